"""Which of transformers' decoders a token tree is exact in: each family, built small and tried.

``python tests/families.py`` writes the table of docs/models.md.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny_models import random_trunks, separate_logprobs
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stepagent.models import check_tree_support, score_trees
from stepagent.trees.tree import pack_step_pairs

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
VOCAB = 97
EXACT = 1e-4  # in log-probs; what was seen is rounding, of up to 3e-5
_LARGEST = 30_000_000  # parameters of what still is small

# One shape for all; each configuration has some of the names. Selections (of keys, by content) are
# below the tests' lengths, so that they count.
_WIDTHS = dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim_model"), 32)
_INNER = dict.fromkeys(
    (
        *("intermediate_size", "ffn_dim", "n_inner", "dff", "d_inner", "dim_ff", "ffn_hidden_size"),
        *("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "feed_forward_size"),
        *("shared_expert_intermediate_size", "shared_intermediate_size", "dense_intermediate_size"),
    ),
    48,
)
_LAYERS = dict.fromkeys(
    (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
        *("encoder_layers", "num_decoder_layers", "num_encoder_layers"),
    ),
    2,
)
_HEADS = dict.fromkeys(
    (
        *("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_decoder_attention_heads", "attention_heads"),
        *("num_encoder_attention_heads", "num_kv_heads"),
    ),
    4,
)
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    "first_k_dense_replace": 1,
}
_SHAPE: dict[str, Any] = {
    **(_WIDTHS | _INNER | _LAYERS | _HEADS | _EXPERTS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels", "dim_head"), 8),
    **{"num_key_value_heads": 2, "embedding_size": 32, "word_embed_proj_dim": 32},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"qk_head_dim": 16, "rotary_dim": 4, "query_pre_attn_scalar": 8, "keep_window_size": 4},
    **{"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "hidden_size_per_layer_input": 8},
    **{"sliding_window": 7, "is_decoder": True, "initializer_range": 0.3, "init_std": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_buckets": 8},
}
_DROPOUT = ("dropout", "pdrop", "drop_prob", "layerdrop")


def tiny(kind: str) -> Any:
    """A small model of this type, untrained, in float32."""
    default = AutoConfig.for_model(kind).get_text_config().to_dict()
    shape = {name: value for name, value in _SHAPE.items() if default.get(name) is not None}
    if "num_experts_per_tok" in default:  # one that has no default is not left without
        shape["num_experts_per_tok"] = _EXPERTS["num_experts_per_tok"]
    if default.get("kv_lora_rank"):
        shape["num_key_value_heads"] = _HEADS["num_attention_heads"]  # latent attention has as many
    if default.get("layer_types"):  # its own kinds of layers, one of each
        kinds = list(dict.fromkeys(default["layer_types"]))
        shape |= {"layer_types": (kinds * 2)[: max(2, len(kinds))]}
        shape |= {name: len(shape["layer_types"]) for name in _LAYERS if name in shape}
    shape |= {
        name: 0.0
        for name, value in default.items()
        if isinstance(value, float) and any(word in name for word in _DROPOUT)
    }
    config = AutoConfig.for_model(kind, **shape)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def verdict(kind: str) -> str:
    """``exact``, the reason of a refusal, or that no small model could be made."""
    try:
        model = tiny(kind)
    except Exception as error:
        return f"not tried: {_line(error)}"
    try:
        check_tree_support(model)
    except (ValueError, FloatingPointError) as error:
        return f"refused: {_line(error)}"
    trunks, branches = random_trunks(np.random.default_rng(0))
    with torch.no_grad():
        try:
            separate = separate_logprobs(model, trunks, branches)
        except Exception as error:
            return f"not tried: {_line(error)}"
        logps = score_trees(model, pack_step_pairs(trunks, branches))
    apart = float((logps - separate).abs().max())
    return "exact" if apart < EXACT else f"WRONG by {apart:.3g}"


def verdicts() -> Iterator[tuple[str, str]]:
    """Of every family in transformers that has a causal language model."""
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield kind, verdict(kind)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(": ")[2].partition(". Use")[0] or text


def page(found: dict[str, str]) -> str:
    """The generated part of the docs."""
    exact = [kind for kind, said in found.items() if said == "exact"]
    refused = {
        k: said.partition(": ")[2] for k, said in found.items() if said.startswith("refused")
    }
    untried = [kind for kind, said in found.items() if said.startswith("not tried")]
    rows = [f"| {kind} | {why.replace('|', '/')} |" for kind, why in refused.items()]
    return "\n".join(
        [
            f"**Exact** ({len(exact)}): {', '.join(exact)}.",
            "",
            f"**Refused** ({len(refused)}):",
            "",
            *("| | |", "|---|---|", *rows, ""),
            f"**Not tried** ({len(untried)}), because no small model of its family could be made "
            f"without knowing more of it: {', '.join(untried)}.",
            "",
        ]
    )


def quietly(action: Any) -> Any:
    """Without what the models say of themselves."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    found = quietly(lambda: dict(verdicts()))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + page(found) + END + after)
