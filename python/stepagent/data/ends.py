"""Which token ends an action."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trunk import Trunk


def ends_of(trunks: Iterable[Trunk]) -> list[int]:
    """The ids that end the actions of these trunks, ascending."""
    return sorted({int(t.input_ids[stop - 1]) for t in trunks for _, stop in t.action_spans})


def given_ends(eos_token_id: int | Sequence[int] | None, who: str) -> list[int]:
    """The ids that a caller says end an action.

    Args:
        eos_token_id: One or several.
        who: Asks for them, in errors.

    Raises:
        ValueError: Where there are none.
    """
    ends = [] if eos_token_id is None else [int(token) for token in np.atleast_1d(eos_token_id)]
    if not ends:
        raise ValueError(f"{who} needs eos_token_id: the ids of the tokens that end a turn")
    return ends


def model_ends(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The ids that end an action of a model: those given, else those of its configuration.

    Raises:
        ValueError: Where neither the caller nor the model names one.
    """
    if eos_token_id is None:
        generation_config = getattr(model, "generation_config", None)
        eos_token_id = getattr(generation_config, "eos_token_id", None)
    ends = [] if eos_token_id is None else [int(token) for token in np.atleast_1d(eos_token_id)]
    if not ends:
        raise ValueError(
            "no token ends an action: eos_token_id is not given and model.generation_config has "
            "none; pass the id of the end-of-turn token"
        )
    return ends


def without_end(token_ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    """The tokens of an action less the one that ends it, if it has one."""
    return token_ids[:-1] if len(token_ids) and token_ids[-1] in ends else token_ids
