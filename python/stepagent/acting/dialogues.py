"""Dialogues of environment and model as token ids: what was sampled is never tokenized again.

A dialogue grows by what the chat template writes between an action and the next one. Where the
template rewrites what came before, as one that leaves out earlier thoughts, the next state is
tokenized from its own text and the dialogue rewinds to what both have in common: the agent sees the
prompt that a server would show it, and its actions stay as they were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.arguments import check_continues, with_arguments
from ..data.chat import ChatTemplate
from ..data.control import ControlTokens
from ..data.draws import check_count, check_temperature
from ..data.encoding import encode
from ..data.ends import without_end
from ..data.recorded import made_with
from ..data.trunk import Trunk
from .answers import Answer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..data.trajectory import Trajectory


@dataclass
class Dialogue:
    """One episode as the model sees it: its messages, and the token ids as they were decoded."""

    seed: int
    name: str  # in errors
    messages: list[dict[str, Any]] = field(default_factory=list)
    state: str = ""  # the text that its newest action answers
    token_ids: list[int] = field(default_factory=list)
    action_spans: list[tuple[int, int]] = field(default_factory=list)
    rewinds: list[tuple[int, int]] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)  # of the tokens of each action
    line: list[int] = field(default_factory=list)  # the places of the tokens that the next one sees
    slots: list[int] = field(default_factory=list)  # where the first of these are in a cache

    def append(self, ids: Sequence[int]) -> None:
        """Go on with these tokens."""
        self.line += range(len(self.token_ids), len(self.token_ids) + len(ids))
        self.token_ids += ids

    def go_on_from(self, ids: Sequence[int]) -> None:
        """Make ``ids`` all that the next token sees; at least the last of them is new."""
        depth = 0
        while depth < min(len(ids) - 1, len(self.line)):
            if self.token_ids[self.line[depth]] != ids[depth]:
                break
            depth += 1
        if depth < len(self.line):
            self.rewinds.append((len(self.token_ids), depth))
            del self.line[depth:], self.slots[depth:]
        self.append(ids[depth:])

    @property
    def visible_ids(self) -> list[int]:
        """All that the next token sees."""
        return [self.token_ids[place] for place in self.line] if self.rewinds else self.token_ids


class Dialogues:
    """One dialogue per running episode, in the chat format of a tokenizer.

    Args:
        ends: the ids of the tokens that end an action, at least one.
        system: the first message of each dialogue.
        chat_template_kwargs: for the chat template, as ``{"enable_thinking": False}``, beside
            those that the tokenizer carries or in their place. Today's date, where a template
            writes it, is that of the run's start.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        chat_template_kwargs: dict[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        check_temperature(temperature)
        self._tokenizer, self._ends = with_arguments(tokenizer, chat_template_kwargs), list(ends)
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._template = ChatTemplate(self._tokenizer)
        self._control = ControlTokens(tokenizer)
        self.system = system
        self._dialogues: list[Dialogue] = []

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given, with the moment that it takes for now."""
        return self._template.fixed_arguments

    @property
    def made_with(self) -> dict[str, str]:
        """Hashes of the tokenizer and of its chat template, for the records of its ids."""
        return made_with(self._tokenizer)

    def begin(self, seeds: Sequence[int]) -> None:
        """Start one dialogue per seed."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._dialogues = [
            Dialogue(seed, f"the episode of seed {seed}", messages=list(first)) for seed in seeds
        ]

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """The same, after the first ``steps[k]`` actions of ``trajectories[k]``."""
        self._resume(seeds, trajectories, steps)

    def _resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> tuple[list[Trunk], NDArray[np.int64]]:
        """The trunks, each encoded once, and which of them each dialogue continues."""
        distinct = list({id(trajectory): trajectory for trajectory in trajectories}.values())
        trunks = [self._encode(trajectory) for trajectory in distinct]
        place = {id(trajectory): i for i, trajectory in enumerate(distinct)}
        origin = [place[id(trajectory)] for trajectory in trajectories]
        self._dialogues = [
            self._taken(seed, trajectory, trunks[i], step)
            for seed, trajectory, i, step in zip(seeds, trajectories, origin, steps, strict=True)
        ]
        return trunks, np.array(origin)

    def _encode(self, trajectory: Trajectory) -> Trunk:
        check_continues(trajectory, self._template.arguments)
        trunk = encode(trajectory, self._tokenizer)
        # Of a record: not of actions that were cut short by a limit of tokens.
        cut = trajectory.meta.get("truncated") or [False] * trunk.num_steps
        whole = trunk.action_spans[~np.array(cut[: trunk.num_steps])]
        ends = sorted({int(trunk.input_ids[stop - 1]) for _, stop in whole})
        if others := [end for end in ends if end not in self._ends]:
            raise ValueError(
                f"trajectory {trajectory.id!r}: the chat template ends a turn by token "
                f"{others[0]}, which does not end an action of this policy: eos_token_id is "
                f"{self._ends}"
            )
        return trunk

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the dialogues that ended."""
        self._dialogues = [self._dialogues[row] for row in rows]

    def record(self, row: int) -> tuple[Trunk, list[NDArray[np.float32]]]:
        """The episode of a running row: its tokens with the spans of the agent's actions, and per
        action the log-probs of its tokens (fp32, at temperature 1; none where it was replayed or
        overruled)."""
        dialogue = self._dialogues[row]
        trunk = Trunk(dialogue.token_ids, dialogue.action_spans, dialogue.rewinds)
        return trunk, [np.array(logps, dtype=np.float32) for logps in dialogue.logps]

    def overrule(self, row: int, text: str, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Have a running row go on as if its newest action were this one, of somebody else, which
        then has no log-probs; the token ids of its own."""
        dialogue = self._dialogues[row]
        start, stop = dialogue.action_spans[-1]
        own = np.array(dialogue.token_ids[start:stop], dtype=np.int32)
        seen = len(dialogue.line) - len(own)
        del dialogue.token_ids[start:], dialogue.line[seen:], dialogue.slots[seen:]
        dialogue.append(ids.tolist())
        dialogue.action_spans[-1] = (start, len(dialogue.token_ids))
        dialogue.logps[-1] = []
        dialogue.messages[-1] = {"role": "assistant", "content": text}
        return own

    def _taken(self, seed: int, trajectory: Trajectory, trunk: Trunk, step: int) -> Dialogue:
        """The dialogue after this many actions of a trajectory."""
        first = int(trajectory.messages[0]["role"] == "system")
        messages = trajectory.messages[: first + 2 * step]
        spans = trunk.action_spans[:step].tolist()
        stop = spans[-1][1]
        line = [*trunk.rows_before(stop - 1).tolist(), stop - 1]
        return Dialogue(
            seed,
            f"a continuation of trajectory {trajectory.id!r} after {step} actions",
            messages=list(messages),
            state=self._render(messages[:-1]),
            token_ids=trunk.input_ids[:stop].tolist(),
            action_spans=[(start, stop) for start, stop in spans],
            rewinds=[(at, depth) for at, depth in trunk.rewinds.tolist() if at < stop],
            logps=[[] for _ in spans],
            line=line,
            slots=list(line),
        )

    def _observe(self, dialogue: Dialogue, observation: str) -> None:
        """Append the observation as the chat template writes it, up to the model's next turn."""
        dialogue.messages.append({"role": "user", "content": observation})
        self._control_apart_from(observation)
        before, action, dialogue.state = dialogue.state, None, self._render(dialogue.messages)
        if dialogue.action_spans:
            *earlier, action, _ = dialogue.messages
            before = self._render(earlier)
        after = None if action is None else self._after(before, action["content"], dialogue.state)
        if after is None:
            dialogue.go_on_from(self._control.tokenize(dialogue.state).ids)
        else:
            ended = dialogue.token_ids[-1] in self._ends
            dialogue.append(self._glue(after, ended))

    def _control_apart_from(self, observation: str) -> None:
        """Marks are of a dialogue's texts only while they are compared, so they may change."""
        self._control = self._control.apart_from(observation)

    def _after(self, before: str, action: str, state: str) -> str | None:
        """What a state has after an action, where it goes on from the state before and that; else
        None."""
        # Some templates put a space after the prompt for generation, which the model then wrote.
        start = len(before.rstrip())
        if state[:start] != before[:start]:
            return None
        rest = state[start:].lstrip()
        return rest[len(action) :] if rest.startswith(action) else None

    def _open(self, dialogue: Dialogue) -> None:
        """Begin the next action, whose tokens and log-probs follow."""
        start = len(dialogue.token_ids)
        dialogue.action_spans.append((start, start))
        dialogue.logps.append([])

    def _take_back(self, dialogue: Dialogue) -> None:
        """Take back the observation that came last: the dialogue ends with its newest action."""
        stop = dialogue.action_spans[-1][1] if dialogue.action_spans else 0
        del dialogue.token_ids[stop:]
        dialogue.rewinds = [(at, depth) for at, depth in dialogue.rewinds if at < stop]
        dialogue.messages.pop()

    def _answer(self, dialogue: Dialogue) -> Answer:
        """As `_close`, with whether the token limit cut it."""
        truncated = dialogue.token_ids[-1] not in self._ends
        return Answer(self._close(dialogue), truncated)

    def _glue(self, text: str, ended: bool) -> list[int]:
        """The tokens between an action and the next, less the turn's end if the model wrote it."""
        tokens = self._control.tokenize(text).ids
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        if not ended or end is None or self._decode_text(tokens[:end]).strip():
            return tokens
        return tokens[end + 1 :]

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        return self._template.render(self._control.mark_messages(messages), generation=True)

    def _decode_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _close(self, dialogue: Dialogue) -> str:
        """End the action at the newest token, and give its text."""
        start, stop = dialogue.action_spans[-1][0], len(dialogue.token_ids)
        dialogue.action_spans[-1] = (start, stop)
        ids = dialogue.token_ids[start:stop]
        action = self._decode_text(without_end(ids, self._ends)).strip()
        dialogue.messages.append({"role": "assistant", "content": action})
        return action
