"""Token trees in the formats of other packages, which describe a tree by its segments.

A segment is a run of tokens without a branch inside; it attends to its path, every token from the
root to its own end. Paths are listed whole, so these formats grow with T², where a tree grows
with T: use them to feed the kernels that want them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _core
from .tree import TokenTree, on_host


def tree_kwargs(tree: TokenTree, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A tree as the ``tree_*`` arguments of a model's forward.

    TRL 1.16's tree attention (``tree_fa3``) takes them, and so does tree-recurrence 0.1, which lets
    recurrent layers follow a tree.

    Args:
        tree: the tree, in numpy or torch.
        device: where the tensors go.

    Returns:
        ``tree_cu_seqlens_q`` (S + 1,) int32: segment s is the tokens [s], [s + 1] of the row.
        ``tree_kv_index`` (K,) int64: the tokens of all paths; ``tree_cu_seqlens_k`` (S + 1,) int32:
        where each begins. ``tree_max_seqlen_q``, ``tree_max_seqlen_k``: the longest.
        ``tree_segment_parents`` (S,) int32: the segment it goes on from, -1 for none;
        ``tree_segment_depths`` (S,) int32: how many lie above it.

    Raises:
        ValueError: where the paths hold more than 2³¹ - 1 tokens.
    """
    return _path_kwargs(on_host(tree.subtree_end), device)


def _path_kwargs(
    subtree_end: NDArray[np.int32], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    segments = _core.segments(subtree_end)

    def tensor(name: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.from_numpy(segments[name]).to(device, dtype)

    return {
        "tree_kv_index": tensor("path_rows", torch.int64),
        "tree_cu_seqlens_q": tensor("offsets"),
        "tree_cu_seqlens_k": tensor("path_offsets"),
        "tree_max_seqlen_q": int(np.diff(segments["offsets"]).max()),
        "tree_max_seqlen_k": int(np.diff(segments["path_offsets"]).max()),
        "tree_segment_parents": tensor("parents"),
        "tree_segment_depths": tensor("depths"),
    }


def trl_row(tree: TokenTree) -> dict[str, torch.Tensor]:
    """The tree as one packed row of TRL 1.16's AsyncGRPO, whose collator pads and stacks such rows.

    TRL predicts one label per position, so the row forks one token before the tree does: a token
    with several children is repeated before each.

    Returns:
        For N' tokens and M = N terms of the loss: ``input_ids``, ``position_ids`` (N',);
        ``shift_labels`` (N',), -100 where nothing is scored; ``tree_kv_index``,
        ``tree_cu_seqlens_q``, ``tree_cu_seqlens_k`` as in `tree_kwargs`; ``tree_max_seqlens`` (2,),
        of segments and of paths; ``token_index`` (M,), the position that predicts each scored
        token; ``segment_id`` (M,), which of the row's samples it is from, counted from 0 in the
        order of step_trunk; and the tree's extras (M,) under their own names: TRL needs
        ``old_log_probs`` and ``advantages``.
    """
    arrays = {name: on_host(getattr(tree, name)) for name in _LAYOUT}
    forked = _core.fork_early(**arrays)
    kwargs = _path_kwargs(forked["subtree_end"])
    rows, labels = _long(forked["label_rows"]), _long(arrays["labels"])
    sample_S = np.unique(on_host(tree.step_trunk), return_inverse=True)[1]
    shift_labels = torch.full((len(forked["input_ids"]),), -100)
    shift_labels[rows] = labels
    return {
        "input_ids": _long(forked["input_ids"]),
        "position_ids": _long(forked["position_ids"]),
        "shift_labels": shift_labels,
        "tree_kv_index": kwargs["tree_kv_index"],
        "tree_cu_seqlens_q": kwargs["tree_cu_seqlens_q"],
        "tree_cu_seqlens_k": kwargs["tree_cu_seqlens_k"],
        "tree_max_seqlens": torch.tensor(
            [kwargs["tree_max_seqlen_q"], kwargs["tree_max_seqlen_k"]]
        ),
        "token_index": rows,
        "segment_id": _long(np.repeat(sample_S, np.diff(arrays["step_offsets"]))),
        **{name: torch.as_tensor(values) for name, values in tree.extras.items()},
    }


_LAYOUT = (
    "input_ids",
    "position_ids",
    "subtree_end",
    "labels",
    "label_rows",
    "step_offsets",
)


def _long(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array).long()
