"""Token trees through a model: one forward, and what is computed at its head.

Nothing is checked here: ``scoring.py`` is the door, ``support.py`` its keeper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..trees.tree import TokenTree, on_host
from .attention import TreeRows, lay_out, tree_attention, tree_inputs
from .head import LMHead, ModuleHead, compute_at_head
from .wrappers import unwrapped

if TYPE_CHECKING:
    pass


def score(model: nn.Module, trees: Sequence[TokenTree], return_entropy: bool = False) -> Any:
    batch = lay_out(model, trees)
    labels_N, rows_N = labels_and_rows(model, batch, trees)

    def compute(hidden_BLH: Tensor, head: LMHead | ModuleHead) -> Tensor:
        scored = head.logprobs(hidden_BLH.flatten(0, 1), labels_N, rows_N, return_entropy)
        return torch.stack(scored) if return_entropy else cast("Tensor", scored)

    scored = computed_on_trees(model, batch, compute)
    return scored.unbind() if return_entropy else scored


def computed_on_trees(
    model: nn.Module, batch: TreeRows, compute: Callable[[Tensor, LMHead | ModuleHead], Tensor]
) -> Tensor:
    with tree_attention(model):
        return compute_at_head(model, compute, **tree_inputs(model, batch.rows))


def labels_and_rows(
    model: nn.Module, batch: TreeRows, trees: Sequence[TokenTree]
) -> tuple[Tensor, Tensor]:
    """The labels (N,) of all trees and the hidden rows (N,) that predict them."""
    labels_N = torch.cat([as_long(model, tree.labels) for tree in trees])
    return labels_N, joined_rows(model, batch, [on_host(tree.label_rows) for tree in trees])


def joined_rows(model: nn.Module, batch: TreeRows, rows: Sequence[Any]) -> Tensor:
    """Tokens of each tree as hidden rows of the batch."""
    places = (place[row] for place, row in zip(batch.places, rows, strict=True))
    return as_long(model, np.concatenate([*places]))


def as_long(model: nn.Module, array: Any) -> Tensor:
    return torch.as_tensor(array, dtype=torch.long, device=unwrapped(model).device)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
