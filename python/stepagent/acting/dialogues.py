"""Dialogues of environment and model as token ids, which grow and are never re-tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.draws import check_count, check_temperature
from ..data.encoding import Trunk, encode
from .answers import Answer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..data.trajectory import Trajectory

_SENTINEL = "stepagentsentinelaction"


@dataclass
class Dialogue:
    """One episode as the model sees it: its messages, and the token ids as they were decoded."""

    seed: int
    name: str  # in errors
    messages: list[dict[str, str]] = field(default_factory=list)
    prompt: str = ""  # what stands before its newest action
    token_ids: list[int] = field(default_factory=list)
    action_spans: list[tuple[int, int]] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)  # of the tokens of each action
    encoded: int = 0  # how many of token_ids are in the cache


class Dialogues:
    """One dialogue per running episode, in the chat format of a tokenizer.

    :param ends: the ids of the tokens that end an action, at least one.
    :param system: the first message of each dialogue.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        system: str | None = None,
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        check_temperature(temperature)
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self.system = system
        self._dialogues: list[Dialogue] = []

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
        """The trunks, each encoded once, and which of them each dialogue goes on from."""
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
        trunk = encode(trajectory, self._tokenizer)
        end = int(trunk.input_ids[trunk.action_spans[0, 1] - 1])
        if end not in self._ends:
            raise ValueError(
                f"trajectory {trajectory.id!r}: the chat template ends a turn by token {end}, "
                f"which does not end an action of this policy: eos_token_id is {self._ends}"
            )
        return trunk

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the dialogues that ended."""
        self._dialogues = [self._dialogues[row] for row in rows]

    def record(self, row: int) -> tuple[Trunk, list[NDArray[np.float32]]]:
        """The episode of a running row: its tokens with the spans of the agent's actions, and per
        action the log-probs of its tokens (fp32, at temperature 1; none where it was replayed)."""
        dialogue = self._dialogues[row]
        trunk = Trunk(np.array(dialogue.token_ids), np.array(dialogue.action_spans))
        return trunk, [np.array(logps, dtype=np.float32) for logps in dialogue.logps]

    def _taken(self, seed: int, trajectory: Trajectory, trunk: Trunk, step: int) -> Dialogue:
        """The dialogue after this many actions of a trajectory."""
        first = int(trajectory.messages[0]["role"] == "system")
        messages = trajectory.messages[: first + 2 * step]
        spans = trunk.action_spans[:step].tolist()
        stop = spans[-1][1]
        return Dialogue(
            seed,
            f"a continuation of trajectory {trajectory.id!r} after {step} actions",
            messages=list(messages),
            prompt=self._render(messages[:-1]),
            token_ids=trunk.input_ids[:stop].tolist(),
            action_spans=[(start, stop) for start, stop in spans],
            logps=[[] for _ in spans],
            encoded=stop,
        )

    def _observe(self, dialogue: Dialogue, observation: str) -> None:
        """Append the observation as the chat template writes it, up to the model's next turn."""
        dialogue.messages.append({"role": "user", "content": observation})
        if not dialogue.action_spans:
            dialogue.prompt = self._render(dialogue.messages)
            dialogue.token_ids += self._tokenize(dialogue.prompt)
            return
        *earlier, action, newest = dialogue.messages
        marked = [*earlier, {"role": "assistant", "content": _SENTINEL}, newest]
        before, _, after = self._render(marked).partition(_SENTINEL)
        # Some templates put a space after the prompt for generation, which the model then wrote.
        if before.rstrip() != dialogue.prompt.rstrip():
            raise ValueError(
                "the chat template rewrites earlier turns when a new one comes, so the dialogue "
                "cannot be continued token by token; "
                f"it turned {dialogue.prompt!r} into {before!r}"
            )
        dialogue.prompt = before + action["content"] + after
        dialogue.token_ids += self._glue(after, ended=dialogue.token_ids[-1] in self._ends)

    def _open(self, dialogue: Dialogue) -> None:
        """Begin the next action, whose tokens and log-probs follow."""
        start = len(dialogue.token_ids)
        dialogue.action_spans.append((start, start))
        dialogue.logps.append([])

    def _take_back(self, dialogue: Dialogue) -> None:
        """Take back the observation that came last: the dialogue ends with its newest action."""
        stop = dialogue.action_spans[-1][1] if dialogue.action_spans else 0
        del dialogue.token_ids[stop:]
        dialogue.messages.pop()

    def _answer(self, dialogue: Dialogue) -> Answer:
        """As :meth:`_close`, with whether the token limit cut it."""
        truncated = dialogue.token_ids[-1] not in self._ends
        return Answer(self._close(dialogue), truncated)

    def _glue(self, text: str, ended: bool) -> list[int]:
        """The tokens between an action and the next, less the turn's end if the model wrote it."""
        tokens = self._tokenize(text)
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        if not ended or end is None or self._decode_text(tokens[:end]).strip():
            return tokens
        return tokens[end + 1 :]

    def _render(self, messages: list[dict[str, str]]) -> str:
        rendered: Any = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def _tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _decode_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _close(self, dialogue: Dialogue) -> str:
        """End the action at the newest token, and give its text."""
        start, stop = dialogue.action_spans[-1][0], len(dialogue.token_ids)
        dialogue.action_spans[-1] = (start, stop)
        ids = dialogue.token_ids[start:stop]
        action = self._decode_text(ids[:-1] if ids[-1] in self._ends else ids).strip()
        dialogue.messages.append({"role": "assistant", "content": action})
        return action
