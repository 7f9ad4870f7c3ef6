"""What a Hugging Face decoder must give: hidden rows over a token tree, and its head.

Key: B rows of a batch, L tokens of a row, H hidden, V vocabulary, N scored tokens.

A tree is exact only in a model whose tokens interact through attention alone, under a mask of the
caller's. Anything else (recurrent layers, chunked attention, an attention implementation without
custom masks) is refused by name in :func:`check_tree_support`, never computed wrongly.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from .attention import (
    TREE_ATTENTION,
    UNIFORM_WINDOW_MODELS,
    dense_attention,
    lay_out,
    tree_attention,
    tree_inputs,
)
from .attention import attention_masks as attention_masks
from .decoder import text_config as text_config
from .decoder import unwrapped as unwrapped
from .encoding import Trunk
from .operators.head import full_precision
from .ops import linear_logprobs
from .tree import TokenTree, on_host, pack_step_pairs

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


@dataclass(frozen=True)
class LMHead:
    """The map from hidden rows to logits: ``softcap(hidden @ weight.T + bias) / temperature``."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    temperature: float

    def logprobs(
        self, hidden_RH: Tensor, labels_N: Tensor, rows_N: Tensor, return_entropy: bool = False
    ) -> Any:
        """Log-probs (N,) of ``labels_N`` predicted by ``hidden_RH[rows_N]``: fp32, or float64.

        With ``return_entropy`` also the entropies (N,) of what the labels are drawn from.
        """
        return linear_logprobs(
            hidden_RH.to(self.weight_VH.dtype),  # a norm may have left it in another one
            self.weight_VH,
            labels_N,
            rows_N=rows_N,
            bias_V=self.bias_V,
            temperature=self.temperature,
            softcap=self.softcap,
            return_entropy=return_entropy,  # type: ignore[call-overload]
        )

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits (R, V), fp32 or float64, for sampling from a few rows."""
        dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        with full_precision(self.weight_VH.device):
            logits_RV = _product(hidden_RH, self.weight_VH, dtype)
        if self.bias_V is not None:
            logits_RV += self.bias_V
        if self.softcap is not None:
            logits_RV = self.softcap * torch.tanh(logits_RV / self.softcap)
        return logits_RV if self.temperature == 1 else logits_RV / self.temperature


def _product(hidden_RH: Tensor, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """``hidden @ weight.T``, rounded to ``dtype`` only."""
    # CUDA alone multiplies halves into float32; ROCm and the CPU would need a copy of the weight.
    halves = hidden_RH.dtype == weight_VH.dtype != dtype
    if halves and weight_VH.is_cuda and torch.version.hip is None:
        return torch.mm(hidden_RH, weight_VH.T, out_dtype=dtype)
    return hidden_RH.to(dtype) @ weight_VH.to(dtype).T


def lm_head(model: nn.Module) -> LMHead:
    """The model's language-model head. Granite and Cohere scale their logits: a temperature."""
    base = unwrapped(model)
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(head, "weight", None) is None:
        raise ValueError(
            f"{type(base).__name__} has no linear language-model head; "
            "stepagent scores causal language models"
        )
    config = text_config(model)
    return LMHead(
        weight_VH=head.weight,
        bias_V=getattr(head, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        temperature=(getattr(config, "logits_scaling", None) or 1.0)
        / (getattr(config, "logit_scale", None) or 1.0),
    )


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
            f"{what} needs {positions} positions, the model has max_position_embeddings={limit}"
        )
    vocabulary, largest = text_config(model).vocab_size, int(np.max(ids))
    if largest >= vocabulary:
        raise ValueError(f"{what} holds token {largest}, the model has vocab_size={vocabulary}")


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The decoder's last hidden state (B, L, H) of one forward through ``model`` itself.

    The call goes through the outermost module, so that the hooks of DDP and FSDP run; the hidden
    state is taken where the decoder returns it, and the head sees a single row of it.
    """
    captured: list[Tensor] = []
    decoder: nn.Module = unwrapped(model).get_decoder()  # type: ignore[no-untyped-call]
    handle = decoder.register_forward_hook(lambda _m, _i, out: captured.append(out[0]))
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    return captured[0]


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

    The trees lie in one row or in a row each (:func:`stepagent.attention.lay_out`); padding tokens
    see only themselves. Gradients flow to the model. With ``return_entropy`` also the entropies
    (N,) of what the labels are drawn from.

    :raises ValueError: no trees, a token or a depth that the model does not have, or a model that a
        tree would make wrong (:func:`check_tree_support`).
    """
    _check_trees(model, trees)
    scored: Tensor | tuple[Tensor, Tensor] = _score_trees(model, trees, return_entropy)
    return scored


def read_trees(
    model: nn.Module, trees: Sequence[TokenTree], rows: Sequence[NDArray[np.int64]]
) -> tuple[Tensor, Tensor]:
    """Hidden states (K, H) at the tokens ``rows[i]`` of each tree; `score_trees` in one forward.

    :raises ValueError: as :func:`score_trees`.
    """
    _check_trees(model, trees)
    hidden_RH, places = _tree_hidden(model, trees)
    flat = np.concatenate([place[row] for place, row in zip(places, rows, strict=True)])
    states_KH = hidden_RH[torch.from_numpy(flat).to(hidden_RH.device)]
    return states_KH, _head_logprobs(model, trees, hidden_RH, places)


def _check_trees(model: nn.Module, trees: Sequence[TokenTree]) -> None:
    if not trees:
        raise ValueError("trees is empty; at least one is needed")
    check_tree_support(model)
    for i, tree in enumerate(trees):
        check_fits(
            model, f"trees[{i}]", int(tree.input_ids.max()), 1 + int(tree.position_ids.max())
        )


def _score_trees(model: nn.Module, trees: Sequence[TokenTree], return_entropy: bool = False) -> Any:
    return _head_logprobs(model, trees, *_tree_hidden(model, trees), return_entropy)


def _head_logprobs(
    model: nn.Module,
    trees: Sequence[TokenTree],
    hidden_RH: Tensor,
    places: list[NDArray[np.int64]],
    return_entropy: bool = False,
) -> Any:
    head = lm_head(model)
    rows = (place[on_host(tree.label_rows)] for place, tree in zip(places, trees, strict=True))
    rows_N = _long(np.concatenate([*rows]), head)
    labels_N = torch.cat([_long(tree.labels, head) for tree in trees])
    return head.logprobs(hidden_RH, labels_N, rows_N, return_entropy)


def _tree_hidden(
    model: nn.Module, trees: Sequence[TokenTree]
) -> tuple[Tensor, list[NDArray[np.int64]]]:
    """Hidden states (R, H) of the trees and of padding, and the rows of each tree's tokens."""
    batch = lay_out(model, trees)
    with tree_attention(model):
        hidden_BLH = hidden_states(model, **tree_inputs(model, batch.rows))
    return hidden_BLH.flatten(0, 1), batch.places


def _long(array: Any, head: LMHead) -> Tensor:
    return torch.as_tensor(array, dtype=torch.long, device=head.weight_VH.device)


def check_tree_support(model: nn.Module) -> None:
    """Refuse, by name, a model that would be computed wrongly on a tree.

    Two gates: the configuration, then once per model a probe that compares the log-probs of a small
    tree with those of its sequences run one by one through the model as it is.

    :raises ValueError: naming the model and the reason.
    :raises FloatingPointError: when the model's log-probs are not finite.
    """
    base = unwrapped(model)
    _check_config(base)
    peft_config = getattr(model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        raise _refusal(base, f"its {type(peft_config).__name__} puts virtual tokens before it")
    if base not in _probed:
        _probe(base)
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
            f"attn_implementation={config._attn_implementation!r} takes no tree mask; "
            f"load {type(model).__name__} with one of {list(TREE_ATTENTION)}"
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
def _probe(model: PreTrainedModel) -> None:
    """Refuse the model where a two-step tree and its separate sequences differ in log-probs."""
    trunk, branches = _probe_actions(text_config(model).vocab_size)
    (tree,) = pack_step_pairs([trunk], [branches])
    with evaluation_mode(model):
        try:
            with dense_attention(model):
                separate = _separate_logps(model, trunk, branches)
            if not bool(torch.isfinite(separate).all()):
                raise FloatingPointError(
                    f"the log-probs of {type(model).__name__} hold NaN or infinity; "
                    "look for a broken weight"
                )
            error = float((_score_trees(model, [tree]) - separate).abs().max())
            # A mask that hides nothing: what a wrong model might compute.
            causal = replace(tree, subtree_end=np.full_like(tree.subtree_end, len(tree.input_ids)))
            effect = float((_score_trees(model, [causal]) - separate).abs().max())
        except (FloatingPointError, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # models fail in their own ways
            raise _refusal(model, f"its forward does not take a tree ({failure})") from failure
    rounding = _PROBE_ROUNDING.get(model.dtype, _PROBE_ROUNDING_HALF)
    if not error <= max(rounding, _PROBE_SHARE * effect):
        raise _refusal(model, f"log-probs on a tree differ by {error:.3g} from separate sequences")


def _probe_actions(vocabulary: int) -> tuple[Trunk, list[list[NDArray[np.int64]]]]:
    ids = (np.arange(2, 14) * 7 + 3) % vocabulary
    trunk = Trunk(input_ids=ids[:9], action_spans=[(3, 5), (7, 9)])
    return trunk, [[ids[9:12]], [ids[10:12], ids[11:]]]


def _separate_logps(
    model: PreTrainedModel, trunk: Trunk, branches: list[list[NDArray[np.int64]]]
) -> Tensor:
    """Log-probs of all actions, each after its own prefix and through the model's own logits."""
    logps = []
    for (start, stop), tried in zip(trunk.action_spans, branches, strict=True):
        for action in (trunk.input_ids[start:stop], *tried):
            ids = np.concatenate([trunk.input_ids[:start], action]).astype(np.int64)
            tokens = torch.from_numpy(ids).to(model.device)
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
