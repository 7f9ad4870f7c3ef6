"""Observations as what is learnt: after an answer, what the chat template writes of what came next.

    render(messages[:i] + [answer, observation], add_generation_prompt=True)
        … <eot> <user> the door is closed <eot> <assistant>
    scored             └────────────────────┘

That is the agent's next prompt. Scored is all between the control token before the observation and
the one after it, the latter included: at both, tokenization starts anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .arguments import check_agrees, run_arguments
from .chat import ChatTemplate
from .control import ControlTokens, Tokens
from .encoding import common_prefix, continued_tokens
from .trajectory import Trajectory
from .trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Told: TypeAlias = tuple[str, str]  # an answer, and the observation after it
_PLACES = range(0x10FFFD, 0xFFFFF, -1)  # private characters, of which one stands for an observation


def encode_observations(
    trajectory: Trajectory,
    told: Sequence[Sequence[Told]],
    tokenizer: PreTrainedTokenizerBase,
) -> Trunk | None:
    """One trunk in which the observations after other answers are scored, and nothing else.

    Where an answer goes another way than the line before it, the trunk rewinds: each state and each
    answer is in it once.

    Args:
        trajectory: Whose states the answers were given at.
        told: ``told[t]``: at the state of step t, answers and what followed each. Of those that are
            the same tokens one is scored.

    Returns:
        The trunk, its spans by step; None where nothing is told.

    Raises:
        ValueError: Naming the trajectory, the message and the rule, where the template does not
            write an observation as it is, or not between two control tokens.
    """
    if len(told) != trajectory.num_steps:
        raise ValueError(
            f"told must have {trajectory.num_steps} entries, one a step of trajectory "
            f"{trajectory.id!r}, got {len(told)}"
        )
    try:
        check_agrees(trajectory, run_arguments(tokenizer))
        return _laid_out(_Observations(trajectory, told, tokenizer).lines())
    except ValueError as error:
        raise ValueError(f"trajectory {trajectory.id!r}: {error}") from error


class _Observations:
    """A trajectory's states, each with answers and observations after it."""

    def __init__(
        self,
        trajectory: Trajectory,
        told: Sequence[Sequence[Told]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._trajectory, self._told = trajectory, told
        said = json.dumps([trajectory.messages, trajectory.tools, told], ensure_ascii=False)
        self._place = next(chr(code) for code in _PLACES if chr(code) not in said)
        self._control = ControlTokens(tokenizer).apart_from(said)
        self._template = ChatTemplate(
            tokenizer, self._control.mark(trajectory.tools), trajectory.chat_template_kwargs
        )
        self._messages = self._control.mark_messages(trajectory.messages)

    def lines(self) -> Iterator[tuple[list[int], int]]:
        """The tokens of each up to the observation's last, and where the observation begins."""
        tokens: Tokens | None = None
        for index, told in zip(self._trajectory.step_indices, self._told, strict=True):
            own, seen = self._trajectory.messages[index]["content"], set()
            # The trajectory's own answer last: the next state goes on from it.
            for answer, observation in sorted(told, key=lambda pair: pair[0] == own):
                text, start, stop = self._written(index, answer, observation)
                tokens = continued_tokens(text, tokens, self._control)
                first, last = _between(tokens.anchors, start, stop, index)
                line = tokens.ids[:last]
                if (key := (*line, first)) not in seen:
                    seen.add(key)
                    yield line, first

    def _written(self, index: int, answer: str, observation: str) -> tuple[str, int, int]:
        """The agent's next prompt, and where in it the observation stands."""
        history = [*self._messages[:index], {"role": "assistant", "content": answer}]
        content = self._control.mark(observation)
        text = self._prompt(history, content)
        before, _, after = self._prompt(history, self._place).partition(self._place)
        written = text[len(before) : len(text) - len(after)]
        if text != before + written + after or written.strip() != content.strip():
            raise ValueError(
                f"the chat template must write an observation as it is, or stripped, at one place, "
                f"got {observation!r} after an answer in place of messages[{index}]"
            )
        return text, len(before), len(before) + len(written)

    def _prompt(self, history: list[dict[str, Any]], content: str) -> str:
        newest = {"role": "user", "content": content}
        return self._template.render([*history, newest], generation=True)


def _between(anchors: Any, start: int, stop: int, index: int) -> tuple[int, int]:
    """The tokens after the control token before ``start``, through that at ``stop`` or after."""
    before, after = np.searchsorted(anchors[:, 0], (start, stop))
    if before == 0 or after == len(anchors):
        raise ValueError(
            "the chat template must have a special token before an observation and after it, so "
            f"that it can be told what is the observation's, got none after messages[{index}]"
        )
    return int(anchors[before - 1, 1]) + 1, int(anchors[after, 1]) + 1


def _laid_out(lines: Iterator[tuple[list[int], int]]) -> Trunk | None:
    """The trunk of lines, each of which goes on from what it has in common with the one before."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    rewinds: list[tuple[int, int]] = []
    before: list[int] = []
    for line, start in lines:
        depth = min(common_prefix(before, line), start - 1)
        if depth < len(before):
            rewinds.append((len(ids), depth))
        shift = len(ids) - depth
        ids += line[depth:]
        spans.append((start + shift, len(line) + shift))
        before = line
    return Trunk(ids, spans, rewinds) if spans else None
