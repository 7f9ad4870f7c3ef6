"""How a model attends over token trees: in which rows they lie, under which mask.

Key: B rows of a batch, L tokens of a row, Q new tokens of a row, K keys that they may see.

FlexAttention takes a block mask: no L² memory, and blocks that nobody sees are skipped. Every other
implementation takes one additive mask, which all layers share: a boolean one would be turned into
it, and kept for the backward, in each layer anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..trees.layers import layer_windows
from ..trees.tree import BLOCK_SIZE, TokenTree, additive_mask, on_host, parent_rows
from .wrappers import text_config, unwrapped

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

TreeAttention: TypeAlias = Literal["eager", "flex_attention", "sdpa"]
TREE_ATTENTION: tuple[TreeAttention, ...] = get_args(TreeAttention)
# Without `layer_types`, these apply one `sliding_window` to every layer.
UNIFORM_WINDOW_MODELS = {"mistral", "mixtral", "phi3", "starcoder2"}

# The last dimension that sdpa's memory-efficient kernel reads without a copy of the mask.
_ALIGNMENT = 16
# Two blocks at least: a size of 1 would be compiled apart from all others.
_SHORTEST = 2 * BLOCK_SIZE
# All models of a process share one compiled flex_attention, that of transformers. Each dtype, head
# size, kind of layer, and gradients or none, compiles it anew; past torch's limit of 8 it would go
# on uncompiled, and build all L² scores.
_COMPILATIONS = 64

_logger = logging.getLogger(__name__)
_Mask = TypeVar("_Mask")


class MaskChoice(NamedTuple):
    """Which mask trees get, and why."""

    kind: Literal["block", "additive"]
    why: str


def choose_mask(implementation: TreeAttention, device: torch.device | str) -> MaskChoice:
    """The mask for trees in a model with this ``attn_implementation`` on this device."""
    cuda = torch.device(device).type == "cuda"
    if implementation != "flex_attention":
        advice = "; attn_implementation='flex_attention' needs O(L) and skips what is hidden"
        return MaskChoice(
            "additive",
            f"{implementation} takes dense masks: O(L²) memory, once for all layers"
            + (advice if cuda else ""),
        )
    if cuda:
        return MaskChoice("block", "O(L) memory, and blocks that nobody sees are skipped")
    return MaskChoice(
        "additive", "FlexAttention has no backward outside CUDA: the model runs as sdpa"
    )


def takes_block_mask(model: nn.Module) -> bool:
    """Whether trees in this model, where it now is, get a block mask."""
    implementation = text_config(model)._attn_implementation
    return choose_mask(implementation, unwrapped(model).device).kind == "block"


# ------------------------------------------------------------------ rows


@dataclass(frozen=True)
class TreeRows:
    """Trees laid out as the rows of a batch.

    rows: one tree each, all of the same length; they hold the labels of the trees in order. places:
    for each tree, where its tokens lie in the flattened batch.
    """

    rows: list[TokenTree]
    places: list[NDArray[np.int64]]


def lay_out(model: nn.Module, trees: Sequence[TokenTree]) -> TreeRows:
    """Put trees one after the other into one row, or each into a row of its own: what costs less.

    Subtrees hide trees of one row from each other. A block mask skips what is hidden, so its row is
    always one; under a dense mask all pairs of a row are computed.
    """
    lengths = np.array([len(tree.input_ids) for tree in trees])
    total, longest = int(lengths.sum()), int(lengths.max())
    ends = lengths.cumsum()
    if takes_block_mask(model):
        row, moved = heaviest_first(_row(trees, max(_aligned(total, BLOCK_SIZE), _SHORTEST)))
        return TreeRows([row], np.split(moved[:total], ends[:-1]))
    hidden = text_config(model).hidden_size
    if _dense_cost(1, total, hidden) <= _dense_cost(len(trees), longest, hidden):
        row = _row(trees, _aligned(total, _ALIGNMENT))
        return TreeRows([row], np.split(np.arange(total), ends[:-1]))
    width = _aligned(longest, _ALIGNMENT)
    places = [i * width + np.arange(length) for i, length in enumerate(lengths)]
    return TreeRows([_row([tree], width) for tree in trees], places)


def _dense_cost(rows: int, width: int, hidden: int) -> int:
    """Operations of a layer, up to a factor: products with its 12 H² weights, and attention."""
    return rows * width * (6 * hidden + width)


def _aligned(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _row(trees: Sequence[TokenTree], width: int) -> TokenTree:
    """The trees one after the other, then padding tokens that see themselves only."""
    tokens = np.cumsum([0, *(len(tree.input_ids) for tree in trees)])
    labels = np.cumsum([0, *(len(tree.labels) for tree in trees)])
    padding = np.arange(tokens[-1], width)

    def join(name: str, starts: NDArray[np.int64] | None = None) -> list[NDArray[Any]]:
        arrays = [on_host(getattr(tree, name)) for tree in trees]
        if starts is None:
            return arrays
        return [array + start for array, start in zip(arrays, starts[:-1], strict=True)]

    def whole(*parts: ArrayLike) -> NDArray[np.int32]:
        return np.concatenate(parts).astype(np.int32)

    return TokenTree(
        input_ids=whole(*join("input_ids"), 0 * padding),
        position_ids=whole(*join("position_ids"), 0 * padding),
        subtree_end=whole(*join("subtree_end", tokens), padding + 1),
        labels=whole(*join("labels")),
        label_rows=whole(*join("label_rows", tokens)),
        step_offsets=whole([0], *(part[1:] for part in join("step_offsets", labels))),
        step_trunk=whole(*join("step_trunk")),
        step_index=whole(*join("step_index")),
        step_branch=whole(*join("step_branch")),
    )


def heaviest_first(row: TokenTree) -> tuple[TokenTree, NDArray[np.int64]]:
    """The same tree in another pre-order, and the new place of each token.

    The largest of a token's children follows it, the others come after. A trunk is then one run,
    its branches behind it: blocks of it are seen whole, where a branch at every step would leave
    each block a hole, and the mask's rule to be asked of every pair.
    """
    ends, tokens = row.subtree_end.astype(np.int64), np.arange(len(row.subtree_end))
    sizes = ends - tokens
    # How many subtrees a token lies in: those begun before it, less those that have ended.
    depths = tokens - np.searchsorted(np.sort(ends), tokens, side="right")
    parents = parent_rows(depths)
    order = np.lexsort((-sizes, parents))
    # From a token to its child: over the child's larger siblings.
    larger = np.cumsum(sizes[order]) - sizes[order]
    first = np.diff(parents[order], prepend=-2) != 0
    step = np.empty_like(sizes)
    step[order] = 1 + larger - np.maximum.accumulate(np.where(first, larger, 0))
    # A token's place: the steps of all whose subtree holds it.
    change = np.append(step, 0)
    np.subtract.at(change, ends, step)
    places = np.cumsum(change[:-1]) - 1
    source = np.argsort(places)
    moved = replace(
        row,
        input_ids=row.input_ids[source],
        position_ids=row.position_ids[source],
        subtree_end=(places + sizes)[source].astype(np.int32),
        label_rows=places[row.label_rows].astype(np.int32),
    )
    return moved, places


# ------------------------------------------------------------------ masks


def tree_inputs(model: nn.Module, rows: Sequence[TokenTree]) -> dict[str, Any]:
    """What the model's ``forward`` takes for rows of one length, as `lay_out` makes them."""
    device = unwrapped(model).device

    def batch(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows])).to(
            device, torch.long
        )

    inputs = {
        "input_ids": batch("input_ids"),
        "position_ids": batch("position_ids"),
        "attention_mask": _tree_masks(model, rows, device),
        "use_cache": False,
    }
    # Rows are whole blocks. Of lengths that change torch does not know it, and checks every score:
    # 1.2 times the time of a layer's attention, measured on H200 at 4k and 16k tokens.
    return inputs | ({"kernel_options": {"IS_DIVISIBLE": True}} if takes_block_mask(model) else {})


def _tree_masks(model: nn.Module, rows: Sequence[TokenTree], device: torch.device) -> Any:
    if takes_block_mask(model):
        _allow_compilations()
        (row,) = rows
        return _each_layer_type(model, lambda window: row.block_mask(device, window=window))
    dtype = _score_dtype(model)
    return _each_layer_type(
        model,
        lambda window: torch.cat(
            [row.attention_mask(dtype, device, window=window) for row in rows]
        ),
    )


def attention_masks(
    model: nn.Module, visible_BQK: Tensor, depths_BQ: Tensor, depths_BK: Tensor
) -> Tensor | dict[str, Tensor]:
    """The additive mask(s) that the model's ``forward`` takes inside `dense_attention`.

    Args:
        visible_BQK: bool, what each query may see before any window.
        depths_BQ: depth of each query, its place in its own sequence; depths_BK: of each key.

    Returns:
        (B, 1, Q, K), or one such mask per layer type for models that mix them.
    """
    dtype = _score_dtype(model)

    def mask(window: int | None) -> Tensor:
        seen = visible_BQK
        if window is not None:
            seen = seen & (depths_BQ.unsqueeze(2) - depths_BK.unsqueeze(1) < window)
        return additive_mask(seen, dtype).unsqueeze(1)

    return _each_layer_type(model, mask)


def _each_layer_type(
    model: nn.Module, make: Callable[[int | None], _Mask]
) -> _Mask | dict[str, _Mask]:
    """The mask of the window that all layers have, or a mask for each type of them."""
    config = text_config(model)
    if getattr(config, "layer_types", None):
        return {kind: make(window) for kind, window in layer_windows(config).items()}
    uniform = config.model_type in UNIFORM_WINDOW_MODELS
    return make(getattr(config, "sliding_window", None) if uniform else None)


def _score_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of queries and keys, which sdpa asks of a mask."""
    base = unwrapped(model)
    if torch.is_autocast_enabled(base.device.type):
        return torch.get_autocast_dtype(base.device.type)
    return base.dtype


def _allow_compilations() -> None:
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _COMPILATIONS)


# ------------------------------------------------------------------ FlexAttention, where it runs


@contextmanager
def dense_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model loaded with FlexAttention runs as sdpa; others as they are.

    For prompts and single tokens over a cache: their shapes change all the time, and FlexAttention
    would be compiled for each kind of them.
    """
    config = text_config(model)
    implementation = config._attn_implementation
    if implementation == "flex_attention":
        config._attn_implementation = _dense_implementation(model)
    try:
        yield
    finally:
        config._attn_implementation = implementation


@contextmanager
def tree_attention(model: nn.Module) -> Iterator[None]:
    """Around `tree_inputs` and the forward with them.

    FlexAttention learns on CUDA only. Elsewhere the model runs as sdpa: inside the block, or from
    then on where gradients are recorded, because checkpointed layers run again in the backward.
    """
    config = text_config(model)
    if config._attn_implementation != "flex_attention" or takes_block_mask(model):
        yield
    elif torch.is_grad_enabled():
        dense = _dense_implementation(model)
        _logger.warning(
            "FlexAttention has no backward on %s: %s runs as %s from here on",
            unwrapped(model).device,
            type(unwrapped(model)).__name__,
            dense,
        )
        unwrapped(model).set_attn_implementation(dense)
        yield
    else:
        with dense_attention(model):
            yield


def _dense_implementation(model: nn.Module) -> TreeAttention:
    """sdpa, or eager where sdpa leaves something out: soft caps, attention sinks."""
    capped = getattr(text_config(model), "attn_logit_softcapping", None)
    return "sdpa" if unwrapped(model)._supports_sdpa and not capped else "eager"
