"""What a Hugging Face decoder must give: log-probs and hidden rows over a token tree.

Key: B rows of a batch, L tokens of a row, H hidden, N scored tokens, K hidden rows that are read.

A tree is exact only in a model whose tokens interact through attention alone, under a mask of the
caller's. Anything else (recurrent layers, chunked attention, an attention implementation without
custom masks) is refused by name in `check_tree_support`, never computed wrongly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..data.encoding import Trunk
from ..trees.tree import TokenTree, on_host, pack_step_pairs
from .attention import (
    TREE_ATTENTION,
    UNIFORM_WINDOW_MODELS,
    TreeRows,
    dense_attention,
    lay_out,
    tree_attention,
    tree_inputs,
)
from .head import LMHead, check_head, compute_at_head
from .wrappers import text_config, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Options of windows that models build inside, by the order of the tokens and not by their depth.
_INNER_WINDOWS = ("window_size", "attention_window_size", "attention_chunk_size", "local_attention")

# The probe of `check_tree_support`: |tree − separate| in log-prob that rounding alone can explain,
# and the share of what seeing every earlier token of the tree would change.
_PROBE_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
_PROBE_ROUNDING_HALF = 0.25
_PROBE_SHARE = 0.02
_probed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def position_limit(model: nn.Module) -> int | None:
    """How many positions the model takes, None where nothing says so.

    A RoPE of type ``longrope`` changes its frequencies for all tokens once one lies past the
    original limit. A tree holds short sequences and long ones, so that limit is its own.
    """
    config = text_config(model)
    limits = [getattr(config, "max_position_embeddings", None)]
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(inner for inner in ropes.values() if isinstance(inner, dict))):
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None), default=None)


def check_fits(model: nn.Module, what: str, ids: ArrayLike, positions: int) -> None:
    """Raise ValueError where ``what`` has a token or a position that the model does not have."""
    limit = position_limit(model)
    if limit is not None and positions > limit:
        raise ValueError(
            f"{what} must fit max_position_embeddings={limit}, got {positions} positions"
        )
    vocabulary, largest = text_config(model).vocab_size, int(np.max(ids))
    if largest >= vocabulary:
        raise ValueError(f"{what} must hold tokens below vocab_size={vocabulary}, got {largest}")


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
    scored: Tensor | tuple[Tensor, Tensor] = _score_trees(model, trees, return_entropy)
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
    rows_K = _joined_rows(model, batch, rows)
    labels_N, rows_N = _labels(model, batch, trees)

    def compute(hidden_BLH: Tensor, head: LMHead) -> Tensor:
        hidden_RH = hidden_BLH.flatten(0, 1)
        logps_N = head.logprobs(hidden_RH, labels_N, rows_N)
        return torch.cat([hidden_RH[rows_K].flatten(), logps_N])

    both = _computed_on_trees(model, batch, compute)
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


def _score_trees(model: nn.Module, trees: Sequence[TokenTree], return_entropy: bool = False) -> Any:
    batch = lay_out(model, trees)
    labels_N, rows_N = _labels(model, batch, trees)

    def compute(hidden_BLH: Tensor, head: LMHead) -> Tensor:
        scored = head.logprobs(hidden_BLH.flatten(0, 1), labels_N, rows_N, return_entropy)
        return torch.stack(scored) if return_entropy else cast("Tensor", scored)

    scored = _computed_on_trees(model, batch, compute)
    return scored.unbind() if return_entropy else scored


def _computed_on_trees(
    model: nn.Module, batch: TreeRows, compute: Callable[[Tensor, LMHead], Tensor]
) -> Tensor:
    with tree_attention(model):
        return compute_at_head(model, compute, **tree_inputs(model, batch.rows))


def _labels(model: nn.Module, batch: TreeRows, trees: Sequence[TokenTree]) -> tuple[Tensor, Tensor]:
    """The labels (N,) of all trees and the hidden rows (N,) that predict them."""
    labels_N = torch.cat([_long(model, tree.labels) for tree in trees])
    return labels_N, _joined_rows(model, batch, [on_host(tree.label_rows) for tree in trees])


def _joined_rows(model: nn.Module, batch: TreeRows, rows: Sequence[Any]) -> Tensor:
    """Tokens of each tree as hidden rows of the batch."""
    places = (place[row] for place, row in zip(batch.places, rows, strict=True))
    return _long(model, np.concatenate([*places]))


def _long(model: nn.Module, array: Any) -> Tensor:
    return torch.as_tensor(array, dtype=torch.long, device=unwrapped(model).device)


def check_tree_support(model: nn.Module) -> None:
    """Refuse, by name, a model that would be computed wrongly on a tree.

    Two gates: the configuration, then once per model a probe that compares the log-probs of a small
    tree with those of its sequences run one by one through the model as it is.

    Raises:
        ValueError: naming the model and the reason.
        FloatingPointError: when the model's log-probs are not finite.
    """
    base = unwrapped(model)
    check_head(base)
    _check_config(base)
    peft_config = getattr(model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        raise _refusal(base, f"its {type(peft_config).__name__} puts virtual tokens before it")
    if base not in _probed:
        _probe(model)
        _probed.add(base)


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot be computed exactly on a token tree: {reason}. Use a model "
        "whose layers are full or sliding-window attention, such as Llama, Qwen3 or Mistral"
    )


def _check_config(model: PreTrainedModel) -> None:
    config = text_config(model)
    layer_types = getattr(config, "layer_types", None)
    if unknown := sorted(set(layer_types or ()) - _LAYER_TYPES):
        raise _refusal(model, f"it has {', '.join(unknown)} layers")
    if getattr(model, "_is_stateful", False):
        raise _refusal(model, "it has recurrent layers")
    if config._attn_implementation not in TREE_ATTENTION:
        raise ValueError(
            f"attn_implementation of {type(model).__name__} must be one of {list(TREE_ATTENTION)}, "
            f"which take a tree mask, got {config._attn_implementation!r}"
        )
    for name in _INNER_WINDOWS:
        if getattr(config, name, None):
            size = getattr(config, name)
            raise _refusal(model, f"it has attention windows of its own, {name}={size}")
    window = getattr(config, "sliding_window", None)
    known = layer_types or config.model_type in UNIFORM_WINDOW_MODELS
    if window is not None and getattr(config, "use_sliding_window", True) and not known:
        raise _refusal(model, f"it does not say which layers use sliding_window={window}")


@torch.no_grad()
def _probe(model: nn.Module) -> None:
    """Refuse the model where a two-step tree and its separate sequences differ in log-probs."""
    base = unwrapped(model)
    trunk, branches = _probe_actions(text_config(model).vocab_size)
    (tree,) = pack_step_pairs([trunk], [branches])
    with evaluation_mode(model):
        try:
            with dense_attention(model):
                separate = _separate_logps(model, trunk, branches)
            if not bool(torch.isfinite(separate).all()):
                raise FloatingPointError(
                    f"the log-probs of {type(base).__name__} must be finite, got NaN or infinity: "
                    "look for a broken weight"
                )
            error = float((_score_trees(model, [tree]) - separate).abs().max())
            # A mask that hides nothing: what a wrong model might compute.
            causal = replace(tree, subtree_end=np.full_like(tree.subtree_end, len(tree.input_ids)))
            effect = float((_score_trees(model, [causal]) - separate).abs().max())
        except (FloatingPointError, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # models fail in their own ways
            raise _refusal(base, f"its forward does not take a tree ({failure})") from failure
    rounding = _PROBE_ROUNDING.get(base.dtype, _PROBE_ROUNDING_HALF)
    if not error <= max(rounding, _PROBE_SHARE * effect):
        raise _refusal(base, f"log-probs on a tree differ by {error:.3g} from separate sequences")


def _probe_actions(vocabulary: int) -> tuple[Trunk, list[list[NDArray[np.int64]]]]:
    ids = (np.arange(2, 14) * 7 + 3) % vocabulary
    trunk = Trunk(input_ids=ids[:9], action_spans=[(3, 5), (7, 9)])
    return trunk, [[ids[9:12]], [ids[10:12], ids[11:]]]


def _separate_logps(
    model: nn.Module, trunk: Trunk, branches: list[list[NDArray[np.int64]]]
) -> Tensor:
    """Log-probs of all actions, each after its own prefix and through the model's own logits."""
    logps = []
    for (start, stop), tried in zip(trunk.action_spans, branches, strict=True):
        for action in (trunk.input_ids[start:stop], *tried):
            ids = np.concatenate([trunk.input_ids[:start], action])
            tokens = _long(model, ids)
            logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[
                0, start - 1 : -1
            ]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logps.append(wide.log_softmax(-1).gather(1, tokens[start:, None]).squeeze(1))
    return torch.cat(logps)


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
