"""Failed rollouts, with the answers at their steps that may turn them into successes (CSO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..acting.alternatives import texts_of
from .cycle import Comparison

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..data.actions import ActionFormat
    from ..data.branch import Branch
    from ..data.trunk import Trunk
    from ..records.episodes import Episode


@dataclass(frozen=True, eq=False)
class Failure:
    """An episode of the agent's, its tokens, and by step the answers to be verified there.

    Attributes:
        tokens, texts: ``[t][k]``, of the same answers; none does what the agent did.
    """

    episode: Episode
    trunk: Trunk
    tokens: list[list[NDArray[np.int32]]]
    texts: list[list[str]]

    @classmethod
    def of(
        cls,
        episode: Episode,
        trunk: Trunk,
        answers: Sequence[list[NDArray[np.int32]]],
        form: ActionFormat,
    ) -> Failure:
        """With the expert's answers, where they are other actions than the agent's."""
        done = episode.done
        other = [a is not None and a != done[t] for t, a in enumerate(episode.expert_actions)]
        return cls(
            episode,
            trunk,
            [list(step) if is_other else [] for step, is_other in zip(answers, other, strict=True)],
            [
                [form.written(action)] if is_other and action is not None else []
                for action, is_other in zip(episode.expert_actions, other, strict=True)
            ],
        )

    @property
    def tried(self) -> int:
        """How many answers there are."""
        return sum(map(len, self.texts))

    def kept(self, turned: Sequence[Sequence[bool]]) -> Comparison:
        """The agent's rollout with the answers that turn it."""
        branches = [
            [ids for ids, turns in zip(step, own, strict=True) if turns]
            for step, own in zip(self.tokens, turned, strict=True)
        ]
        return Comparison(self.trunk, branches, expert_trunk=False)


def with_alternatives(
    failures: Sequence[Failure],
    branches: Sequence[Sequence[Sequence[Branch]]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
) -> list[Failure]:
    """With what the agent itself would also do at its states, each text once."""
    read = texts_of([one.trunk for one in failures], branches, tokenizer, ends=ends)
    made = []
    for failure, steps, texts in zip(failures, branches, read, strict=True):
        tokens_T = [list(step) for step in failure.tokens]
        texts_T = [list(step) for step in failure.texts]
        for t, (tried, told) in enumerate(zip(steps, texts, strict=True)):
            known = {failure.episode.actions[t], *texts_T[t]}
            for branch, text in zip(tried, told, strict=True):
                if text not in known:
                    known.add(text)
                    tokens_T[t].append(branch.token_ids)
                    texts_T[t].append(text)
        made.append(replace(failure, tokens=tokens_T, texts=texts_T))
    return made
