"""Observations as what is learnt: after an answer, what the chat template writes of what came next.

    render(messages[:i] + [answer, observation], add_generation_prompt=True)
        … <eot> <user> the door is closed <eot> <assistant>
    scored             └────────────────────┘

That is the agent's next prompt. Scored is all between the control token before the observation and
the one after it, the latter included: at both, tokenization starts anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .arguments import check_agrees, run_arguments
from .chat import ChatTemplate
from .control import ControlTokens, Tokens
from .encoding import common_prefix, continued_tokens
from .trajectory import Trajectory
from .trunk import Trunk

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

Told: TypeAlias = tuple[str, str]  # an answer, and the observation after it
_PLACES = range(0x10FFFD, 0xFFFFF, -1)  # private characters, of which one stands for an observation


def encode_observations(
    trajectory: Trajectory,
    trunk: Trunk,
    told: Sequence[Sequence[Told]],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Trunk, NDArray[np.bool_]]:
    """A trajectory's trunk in which what followed other answers is scored beside its own actions.

    Where an answer goes another way, the trunk rewinds: each state and each answer is in it once,
    and a state's last token twice.

    Args:
        trajectory: Whose states the answers were given at.
        trunk: Its tokens, as `stepagent.encode` gives them.
        told: ``told[t]``: at the state of step t, answers and what followed each. Of those that are
            the same tokens one is scored.

    Returns:
        The trunk of S spans, by step, and (S,) which of them are observations; the others are the
        actions of ``trunk``, each after the tokens that it has there.

    Raises:
        ValueError: Naming the trajectory, the message and the rule, where the template does not
            write an observation as it is, or not between two control tokens.
    """
    name, T = f"trajectory {trajectory.id!r}", trajectory.num_steps
    if (len(told), trunk.num_steps) != (T, T):
        raise ValueError(
            f"{name} has {T} steps, of which told must have one entry each and trunk one action, "
            f"got {len(told)} and {trunk.num_steps}"
        )
    try:
        check_agrees(trajectory, run_arguments(tokenizer))
        observations = _Observations(trajectory, told, tokenizer)
        lines = [line for t in range(T) for line in observations.lines(t, trunk)]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return _laid_out(lines), np.array([line.observed for line in lines])


@dataclass(frozen=True)
class _Line:
    """The tokens of a state and what is scored after it: those from ``start`` on."""

    ids: list[int]
    start: int
    observed: bool


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
        self._newest: Tokens | None = None  # what has its beginning is not tokenized again

    def lines(self, t: int, trunk: Trunk) -> list[_Line]:
        """Those of one state; the trajectory's own action and what followed it are the last, as
        the next state goes on from there."""
        index = self._trajectory.step_indices[t]
        own = self._trajectory.messages[index]["content"]
        state, (start, stop) = trunk.state_ids(t).tolist(), trunk.action_spans[t]
        action = _Line([*state, *trunk.input_ids[start:stop].tolist()], len(state), observed=False)
        lines = [self._line(index, *pair) for pair in self._told[t] if pair[0] != own]
        after = [self._line(index, *pair) for pair in self._told[t] if pair[0] == own]
        distinct = {tuple(line.ids): line for line in (*lines, action, *after)}
        return list(distinct.values())

    def _line(self, index: int, answer: str, observation: str) -> _Line:
        text, start, stop = self._written(index, answer, observation)
        self._newest = tokens = continued_tokens(text, self._newest, self._control)
        first, last = _between(tokens.anchors, start, stop, index)
        return _Line(tokens.ids[:last], first, observed=True)

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


def _laid_out(lines: Sequence[_Line]) -> Trunk:
    """The trunk of lines, each of which goes on from what it has in common with the one before."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    rewinds: list[tuple[int, int]] = []
    before: list[int] = []
    for line in lines:
        depth = min(common_prefix(before, line.ids), line.start - 1)
        if depth < len(before):
            rewinds.append((len(ids), depth))
        shift = len(ids) - depth
        ids += line.ids[depth:]
        spans.append((line.start + shift, len(line.ids) + shift))
        before = line.ids
    return Trunk(ids, spans, rewinds)
