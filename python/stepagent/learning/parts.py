"""Thought and action apart: which action each step is, and which of its tokens losses cover.

A step's text is thought and action, as the action format of the run reads it (data/actions.py).
Two steps with one action are the same, whatever they think; a discriminator reads actions alone;
and losses may leave the thought out, which stays the context that its action is taken in.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..data.actions import FORMATS, PLAIN, ActionFormat
from ..data.branch import action_of, written_text
from ..data.encoding import common_prefix
from ..data.trunk import Trunk
from .cycle import Comparison
from .options.choices import ScoredPart

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from .config import StepAgentConfig


@dataclass(frozen=True)
class StepParts:
    """Reads the steps of a run.

    Attributes:
        form: how they are written; in the plain one a text is its action.
        ends: the tokens that end a step; the last of each belongs to the action.
        scored_part: what losses cover.
    """

    form: ActionFormat
    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    scored_part: ScoredPart = "all"

    @classmethod
    def of_run(
        cls, args: StepAgentConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
    ) -> StepParts:
        """As the options of a run say."""
        return cls(FORMATS[args.action_format], tokenizer, ends, args.scored_part)

    @property
    def plain(self) -> bool:
        """Whether there is nothing to take apart."""
        return self.form == PLAIN

    def check(self, trunks: Sequence[Trunk], name: str) -> None:
        """Refuse an expert's step without an action in the format of the run.

        Args:
            name: of the data, in the error.

        Raises:
            ValueError: naming the step, and what is missing.
        """
        for i, trunk in enumerate(trunks if not self.plain else ()):
            for t, (start, stop) in enumerate(trunk.action_spans):
                text = written_text(trunk.input_ids[start:stop], self.tokenizer, self.ends).strip()
                problem = self.form.parse(text).problem
                if problem is not None:
                    raise ValueError(
                        f"{name}[{i}], step {t}, must hold an action in "
                        f"action_format={self.form.name!r}, got {text!r} ({problem}): leave the "
                        "row out, or take the format that the expert writes in"
                    )

    def told(self, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """The comparisons with their `action_ids`, and `counted` unless all counts."""
        return [c if self.plain else self._told(c) for c in comparisons]

    def _told(self, comparison: Comparison) -> Comparison:
        steps = comparison.step_tokens()
        actions = [action_of(ids, self.form, self.tokenizer, self.ends) for ids in steps]
        numbers = {action: n for n, action in enumerate(dict.fromkeys(actions))}
        ids = [-1 if action is None else numbers[action] for action in actions]
        told = replace(comparison, action_ids=np.array(ids, np.int32))
        if self.scored_part == "all":
            return told
        return replace(told, counted=np.concatenate([self.counted(ids) for ids in steps]))

    def counted(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) which tokens of a step losses cover.

        A step without an action is an act all the same, which the environment refuses: all of it
        counts as the action, and nothing as the thought.
        """
        if self.scored_part == "all":
            return np.ones(len(ids), dtype=bool)
        action = self._of_action(ids)
        return action if self.scored_part == "action" else ~action

    def _of_action(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) the tokens with a character of the action, and the one that ends the step."""
        text = written_text(ids, self.tokenizer, self.ends)
        place = self.form.located(text.strip())
        if place is None:
            return np.ones(len(ids), dtype=bool)
        blank = len(text) - len(text.lstrip())
        start, stop = blank + place[0], blank + place[1]
        written = len(ids) - (len(ids) > 0 and int(ids[-1]) in self.ends)

        def reached(count: int) -> tuple[int, int]:
            """The characters that so many tokens complete; and those that they begin, as several
            tokens may share one of several bytes."""
            part = written_text(ids[:count], self.tokenizer, ())
            whole = common_prefix(text, part)
            return whole, whole + (len(part) > whole)

        mask = np.zeros(len(ids), dtype=bool)
        first = bisect_right(range(written), start, key=lambda k: reached(k + 1)[1])
        last = bisect_left(range(written), stop, key=lambda k: reached(k)[0])
        mask[first:last] = True
        mask[written:] = True
        return mask

    def alone(self, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """The same states, and as branches the actions alone: the trunk's own first at each step.

        Each action is written as the format writes it, in tokens of its own, so that the same
        action is the same tokens whoever took it. A step without an action stays as it is.
        """
        return [replace(c, branches=self._alone(c)) for c in comparisons]

    def _alone(self, comparison: Comparison) -> list[list[NDArray[np.int32]]]:
        steps = iter([self._action_alone(ids) for ids in comparison.step_tokens()])
        return [[next(steps) for _ in range(1 + len(tried))] for tried in comparison.branches]

    def _action_alone(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        action = action_of(ids, self.form, self.tokenizer, self.ends)
        if action is None:
            return ids
        tokens = self.tokenizer.encode(self.form.write(action), add_special_tokens=False)
        return np.array([*tokens, self.ends[0]], np.int32)
