"""What an agent did at a state of a trunk, and how often that is what the expert did."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .actions import PLAIN, ActionFormat
from .encoding import Trunk

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Branch:
    """One action tried at a state.

    Attributes:
        token_ids: (n,) int32, the end token included where it was produced.
        logps: (n,) float32, the policy's log-prob of each, at temperature 1 for any sampling
            temperature.
    """

    token_ids: NDArray[np.int32]
    logps: NDArray[np.float32]


def agreement(
    trunks: Sequence[Trunk],
    branches: Sequence[Sequence[Sequence[Branch | NDArray[np.int32]]]],
    *,
    form: ActionFormat = PLAIN,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """The share of actions tried that equal the trunk's own; nan if none.

    Of trunks and branches: the ``agreement`` that training logs, and what `expert_agreement` of
    `stepagent.evaluation` gives for greedy actions. `stepagent.metrics.agreement` is of an episode.

    Args:
        trunks: of which each step has an action of its own.
        branches: ``[i][t]``: the actions tried at step t of ``trunks[i]``.
        form: plain compares token for token; in another format the actions that it reads in the
            texts are compared, without the thoughts. A text without an action equals none.
        tokenizer: which made the tokens; needed by a format that is not plain.

    Raises:
        ValueError: a format that is not plain, and no tokenizer.
    """
    if form == PLAIN:
        return _share(np.array_equal, trunks, branches)
    if tokenizer is None:
        raise ValueError(f"action format {form.name!r} must have a tokenizer, to read the texts")
    return action_agreement(trunks, branches, form=form, tokenizer=tokenizer)


def action_agreement(
    trunks: Sequence[Trunk],
    branches: Sequence[Sequence[Sequence[Branch | NDArray[np.int32]]]],
    *,
    form: ActionFormat,
    tokenizer: PreTrainedTokenizerBase,
) -> float:
    """As `agreement`, of the actions that a format reads in the texts, plain too: what differs in
    the thought alone is the same."""
    ends = {int(trunk.input_ids[stop - 1]) for trunk in trunks for _, stop in trunk.action_spans}
    return _share(_same_action(form, tokenizer, ends), trunks, branches)


def _share(
    equal: Callable[[NDArray[np.int32], NDArray[np.int32]], bool],
    trunks: Sequence[Trunk],
    branches: Sequence[Sequence[Sequence[Branch | NDArray[np.int32]]]],
) -> float:
    same = [
        equal(_ids(action), trunk.input_ids[start:stop])
        for trunk, steps in zip(trunks, branches, strict=True)
        for (start, stop), tried in zip(trunk.action_spans, steps, strict=True)
        for action in tried
    ]
    return float(np.mean(same)) if same else float("nan")


def _same_action(
    form: ActionFormat, tokenizer: PreTrainedTokenizerBase, ends: Container[int]
) -> Callable[[NDArray[np.int32], NDArray[np.int32]], bool]:
    def equal(tried: NDArray[np.int32], own: NDArray[np.int32]) -> bool:
        action = action_of(tried, form, tokenizer, ends)
        return action is not None and action == action_of(own, form, tokenizer, ends)

    return equal


def action_of(
    ids: NDArray[np.int32],
    form: ActionFormat,
    tokenizer: PreTrainedTokenizerBase,
    ends: Container[int],
) -> str | None:
    """The action that a format reads in what was written; None where there is none."""
    return form.parse(written_text(ids, tokenizer, ends).strip()).action


def written_text(
    ids: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase, ends: Container[int]
) -> str:
    """The text of what was written in one turn, less the token that ends it."""
    kept = ids[:-1] if len(ids) and int(ids[-1]) in ends else ids
    return str(tokenizer.decode(kept.tolist(), clean_up_tokenization_spaces=False))


def _ids(action: Branch | NDArray[np.int32]) -> NDArray[np.int32]:
    return action.token_ids if isinstance(action, Branch) else action
