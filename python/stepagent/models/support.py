"""Which models a token tree is exact in; the others are refused by name.

That holds only for a model whose tokens interact through attention alone, under a mask of the
caller's. Anything else (recurrent layers, chunked attention, biases by distance, an attention
implementation without custom masks) would be computed wrongly.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.trunk import Trunk
from ..trees.layers import LAYER_TYPES
from ..trees.tree import pack_step_pairs
from .attention import TREE_ATTENTION, UNIFORM_WINDOW_MODELS, dense_attention
from .forward import as_long, evaluation_mode, score
from .head import check_head
from .quantised import prepare_quantised
from .wrappers import text_config, unwrapped

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedModel

# Options of windows that models build inside, by the order of the tokens and not by their depth.
_INNER_WINDOWS = ("window_size", "attention_window_size", "attention_chunk_size", "local_attention")

# Options of models that keep so many keys of a row, by content; the probe's tree has fewer.
_SELECTIONS = ("keep_window_size", "index_topk", "index_topk_blocks")
_ALIBI = {"bloom", "mpt"}
_PADDED_POSITIONS = {
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    *("xlm-roberta-xl", "xmod"),
}
_FLAT_MASKS = {"openai-gpt", "xlm"}
_ENCODERS = {
    *("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert"),
    *("roformer",),
}

# The probe of `check_tree_support`: |tree − separate| in log-prob that rounding alone can explain,
# and the share of what seeing every earlier token of the tree would change.
_PROBE_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
_PROBE_ROUNDING_HALF = 0.25
_PROBE_SHARE = 0.02
_OTHER_MODEL = (
    ". Use a model whose layers are full or sliding-window attention, such as Llama, Qwen3 or "
    "Mistral"
)
_probed: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


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


def check_tree_support(model: nn.Module) -> None:
    """Refuse, by name, a model that would be computed wrongly on a tree.

    Two gates: the configuration, then once for a model and its adapters a probe that compares the
    log-probs of a small tree with those of its sequences run one by one through the model as it is.

    Raises:
        ValueError: naming the model and the reason.
        FloatingPointError: where the model's log-probs are not finite.
    """
    base = unwrapped(model)
    check_head(base)
    _check_config(base)
    peft_config = getattr(model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        raise _refusal(base, f"its {type(peft_config).__name__} puts virtual tokens before it")
    # Adapters and quantisation change the modules of a model that has passed.
    modules = hash(tuple(type(module) for module in base.modules()))
    if _probed.get(base) != modules:
        if (reason := prepare_quantised(model)) is not None:
            raise _refusal(base, reason, "")
        _probe(model)
        _probed[base] = modules


def _refusal(model: nn.Module, reason: str, advice: str = _OTHER_MODEL) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot be computed exactly on a token tree: {reason}{advice}"
    )


def _check_config(model: PreTrainedModel) -> None:
    config = text_config(model)
    layer_types = getattr(config, "layer_types", None)
    if unknown := sorted(set(layer_types or ()) - LAYER_TYPES.keys()):
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
    for name in _SELECTIONS:
        if getattr(config, name, None):
            size = getattr(config, name)
            raise _refusal(
                model, f"it picks the keys that it attends to out of the whole row, {name}={size}"
            )
    window = getattr(config, "sliding_window", None)
    known = layer_types or config.model_type in UNIFORM_WINDOW_MODELS
    if window is not None and getattr(config, "use_sliding_window", True) and not known:
        raise _refusal(model, f"it does not say which layers use sliding_window={window}")
    _check_positions(model, config)


def _check_positions(model: PreTrainedModel, config: Any) -> None:
    """A token's position must be its depth, which the caller gives."""
    if config.model_type in _ALIBI or getattr(config, "alibi", False):
        raise _refusal(
            model, "its attention is biased by distance in the order of the tokens (ALiBi)"
        )
    if config.model_type in _PADDED_POSITIONS:
        raise _refusal(
            model, "its positions begin behind pad_token_id, and not at 0 as those of a tree"
        )
    if getattr(config, "is_decoder", True) is False and config.model_type in _ENCODERS:
        raise _refusal(
            model,
            "it attends to what follows, as an encoder: is_decoder is False in its configuration",
        )
    if config.model_type in _FLAT_MASKS:
        raise _refusal(model, "it takes masks of padding alone, which say nothing of who sees whom")
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise _refusal(
            model, "its forward takes no position_ids: it counts tokens by their order in the row"
        )


@torch.no_grad()
def _probe(model: nn.Module) -> None:
    """Refuse the model where a two-step tree and its separate sequences differ in log-probs."""
    base = unwrapped(model)
    trunk, branches = _probe_actions(text_config(model).vocab_size)
    (tree,) = pack_step_pairs([trunk], [branches])
    # A mask that hides nothing: what a wrong model might compute.
    causal = replace(tree, subtree_end=np.full_like(tree.subtree_end, len(tree.input_ids)))
    with evaluation_mode(model):
        with dense_attention(model), _naming(base, "an ordinary sequence of tokens"):
            separate = _separate_logps(model, trunk, branches)
        if not bool(torch.isfinite(separate).all()):
            raise FloatingPointError(
                f"the log-probs of {type(base).__name__} must be finite, got NaN or infinity; "
                "look for a broken weight"
            )
        with _naming(base, "a tree's mask and positions"):
            error, effect = (
                float((score(model, [each]) - separate).abs().max()) for each in (tree, causal)
            )
    rounding = _PROBE_ROUNDING.get(base.dtype, _PROBE_ROUNDING_HALF)
    if not error <= max(rounding, _PROBE_SHARE * effect):
        raise _refusal(base, f"log-probs on a tree differ by {error:.3g} from separate sequences")


@contextmanager
def _naming(model: nn.Module, what: str) -> Iterator[None]:
    """Models fail in their own ways; what failed, and where, is said with their own words."""
    try:
        yield
    except (FloatingPointError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        raise ValueError(
            f"{type(model).__name__} failed when it was tried on {what}: "
            f"{type(failure).__name__}: {failure}"
        ) from failure


@torch.no_grad()
def probe_logps(model: nn.Module) -> Tensor:
    """Log-probs of the probe's small tree, in the mode that the model is in."""
    trunk, branches = _probe_actions(text_config(model).vocab_size)
    logps: Tensor = score(model, pack_step_pairs([trunk], [branches]))
    return logps


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
            tokens = as_long(model, ids)
            logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[
                0, start - 1 : -1
            ]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logps.append(wide.log_softmax(-1).gather(1, tokens[start:, None]).squeeze(1))
    return torch.cat(logps)
