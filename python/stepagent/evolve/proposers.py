"""Who proposes another guideline: a function, a file of them, or a model behind a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engines import Server
    from ..records.episodes import Episode

_PARTED = re.compile(r"^={5,}[ \t]*$", re.MULTILINE)
_GUIDELINE = re.compile(r"<guideline>(.*?)</guideline>", re.DOTALL)
_SHOWN = 4_000  # characters of an episode; its end tells most

PROMPT = """\
You improve the guideline that an agent reads before it acts. You are shown the guideline and \
episodes in which the agent failed with it, and changes that did not help. Say in a few words what \
the agent does wrong and which rule would prevent it. Then write the whole new guideline between \
<guideline> and </guideline>."""


@dataclass(frozen=True)
class Request:
    """What a proposer is shown.

    Attributes:
        guideline: the present one.
        failed: episodes in which an agent failed with it, without token ids.
        refused: the proposals in its place that were not accepted, each with the mean difference of
            its payoff; those that could not be judged are not among them.
        number: of this proposal in the search, from 1.
    """

    guideline: str
    failed: Sequence[Episode]
    refused: Sequence[tuple[str, float]]
    number: int


Proposer = Callable[[Request], "str | None"]
"""Answers a guideline, or None for none."""


class NoMoreProposals(Exception):
    """A proposer has said all that it has to say: the search ends."""


class Garbage(ValueError):
    """An answer in which there is no guideline."""


class FileProposer:
    """Guidelines from a text file, in their order; a line of ``=====`` parts two of them."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name, path

    def __call__(self, request: Request) -> str:
        """The ``request.number``-th of the file; NoMoreProposals behind the last."""
        found = _PARTED.split(self._path.read_text(encoding="utf-8"))
        if request.number > len(found):
            raise NoMoreProposals(f"{self._path} has {len(found)} proposals")
        return found[request.number - 1].strip()


class ServerProposer:
    """A model behind ``/v1/chat/completions`` that is shown what went wrong.

    Args:
        about: what the agent's task is.
        temperature: above 0, or it may propose the same again.
        seed: of its answers, with the number of the proposal.
    """

    def __init__(
        self,
        server: Server,
        *,
        about: str = "",
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        from ..acting.server_policies import ChatPolicy

        self.name = server.name
        self._about = about
        self._policy = ChatPolicy(
            server,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            system=PROMPT,
        )

    def __call__(self, request: Request) -> str:
        """The guideline between its marks in the model's answer.

        Raises:
            Garbage: for an answer without both marks.
            RuntimeError: where the server refuses the request.
        """
        from ..acting.answers import Answer

        self._policy.begin([request.number])
        (answer,) = self._policy.act([describe(request, self._about)], [])
        if not isinstance(answer, Answer):
            raise RuntimeError(f"the server answered nothing: {getattr(answer, 'reason', '')}")
        if not answer.text:
            return ""
        found = _GUIDELINE.findall(answer.text)
        if not found:
            cut = ", which was cut at the token limit" if answer.truncated else ""
            raise Garbage(f"no <guideline>…</guideline> in {answer.text[:200]!r}{cut}")
        return str(found[-1]).strip()


def describe(request: Request, about: str = "") -> str:
    """A request in words, for a model.

    Args:
        about: what the agent's task is; may be empty.
    """
    parts = [f"The task:\n{about}"] if about else []
    parts.append(f"The guideline:\n<guideline>\n{request.guideline}\n</guideline>")
    for number, episode in enumerate(request.failed, start=1):
        parts.append(f"Failed episode {number}:\n{_story(episode)}")
    for text, difference in request.refused:
        parts.append(f"Did not help (payoff {difference:+.3f}):\n{text}")
    return "\n\n".join(parts)


def _story(episode: Episode) -> str:
    turns = zip(episode.observations, episode.actions, strict=True)
    lines = [line for o, a in turns for line in (f"It saw: {o}", f"It did: {a}")]
    if episode.last_observation is not None:
        lines.append(f"It saw: {episode.last_observation}")
    story = "\n".join([*lines, f"Reward: {sum(episode.rewards):g}"])
    return story if len(story) <= _SHOWN else f"…{story[-_SHOWN:]}"
