"""Scoring token trees with Hugging Face decoders.

One forward encodes a trunk and all its branches, and only the rows that predict labels are scored.
What a tree would make wrong is refused first (``support.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..trees.tree import TokenTree
from .attention import lay_out
from .forward import computed_on_trees, joined_rows, labels_and_rows, score
from .head import LMHead, ModuleHead
from .support import check_fits, check_tree_support

if TYPE_CHECKING:
    from numpy.typing import NDArray


@overload
def score_trees(
    model: nn.Module, trees: Sequence[TokenTree], *, return_entropy: Literal[False] = ...
) -> Tensor: ...
@overload
def score_trees(
    model: nn.Module, trees: Sequence[TokenTree], *, return_entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def score_trees(
    model: nn.Module, trees: Sequence[TokenTree], *, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs (N,), fp32, of the labels of all ``trees`` in order, in one forward.

    The trees lie in one row or in a row each (`stepagent.models.attention.lay_out`); padding
    tokens see only themselves. Gradients flow to the model. With ``return_entropy`` also the
    entropies (N,) of what the labels are drawn from.

    Raises:
        ValueError: no trees, a token or a depth that the model does not have, or a model that a
            tree would make wrong (`check_tree_support`).
    """
    _check_trees(model, trees)
    scored: Tensor | tuple[Tensor, Tensor] = score(model, trees, return_entropy)
    return scored


def read_trees(
    model: nn.Module, trees: Sequence[TokenTree], rows: Sequence[NDArray[np.int64]]
) -> tuple[Tensor, Tensor]:
    """Hidden states (K, H) at the tokens ``rows[i]`` of each tree; `score_trees` in one forward.

    Both are fp32, or float64 where the model is.

    Raises:
        ValueError: as `score_trees`.
    """
    _check_trees(model, trees)
    batch = lay_out(model, trees)
    rows_K = joined_rows(model, batch, rows)
    labels_N, rows_N = labels_and_rows(model, batch, trees)

    def compute(hidden_BLH: Tensor, head: LMHead | ModuleHead) -> Tensor:
        hidden_RH = hidden_BLH.flatten(0, 1)
        logps_N = head.logprobs(hidden_RH, labels_N, rows_N)
        return torch.cat([hidden_RH[rows_K].flatten(), logps_N])

    both = computed_on_trees(model, batch, compute)
    states, logps_N = torch.split(both, [len(both) - len(labels_N), len(labels_N)])
    return states.view(len(rows_K), -1), logps_N


def _check_trees(model: nn.Module, trees: Sequence[TokenTree]) -> None:
    if not trees:
        raise ValueError("trees must hold at least one tree, got none")
    check_tree_support(model)
    for i, tree in enumerate(trees):
        check_fits(
            model, f"trees[{i}]", int(tree.input_ids.max()), 1 + int(tree.position_ids.max())
        )
