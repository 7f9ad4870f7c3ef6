"""Models on trees: as exact as separate sequences, or refused by name."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, WINDOW, random_trunks, separate_logprobs, tiny_model
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedModel,
)

from stepagent.data.encoding import Trunk
from stepagent.models import (
    attention_masks,
    check_tree_support,
    evaluation_mode,
    hidden_states,
    lm_head,
    position_limit,
    score_trees,
    unwrapped,
)
from stepagent.trees.tree import TokenTree, pack_step_pairs

# Full attention with rotary or learned positions; one window in all layers; two kinds of layers.
EXACT = ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gemma3_text"]
TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.float64: (1e-9, 1e-6)}


@pytest.fixture(scope="module")
def data() -> tuple[list[Trunk], list[list[list[np.ndarray]]]]:
    return random_trunks(np.random.default_rng(0))


def gradients(model: torch.nn.Module, logps_N: torch.Tensor) -> torch.Tensor:
    """Of a random linear functional of the log-probs, all parameters in one vector."""
    weights = torch.randn(len(logps_N), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (weights.to(logps_N.dtype) * logps_N).sum().backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in EXACT),
        # Without Gemma2, whose attention takes its softmax in float32 whatever the model's dtype.
        *((name, torch.float64) for name in EXACT if name != "gemma2"),
    ],
)
def test_a_tree_scores_and_learns_as_separate_sequences(name, dtype, data):
    model = tiny_model(name).to(dtype)
    trunks, branches = data
    trees = pack_step_pairs(trunks, branches, max_tokens=70)
    assert len(trees) == 2  # of unequal size: one is padded
    assert max(len(t.input_ids) for t in trunks) > 2 * WINDOW
    logps = score_trees(model, trees)
    separate = separate_logprobs(model, trunks, branches)
    on_tree, alone = gradients(model, logps), gradients(model, separate)

    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(logps, separate, rtol=0, atol=atol)
    assert logps.std() > 1  # the actions are told apart
    assert (on_tree - alone).norm() <= rtol * alone.norm()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_gradient_checkpointing_changes_nothing(name, data):
    trees = pack_step_pairs(*data, max_tokens=70)
    model = tiny_model(name)
    plain = gradients(model, score_trees(model, trees))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    logps = score_trees(model, trees)
    torch.testing.assert_close(gradients(model, logps), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_eager_attention_equals_sdpa(name, data):
    trees = pack_step_pairs(*data, max_tokens=70)
    sdpa, eager = (tiny_model(name, attn_implementation=a) for a in ("sdpa", "eager"))
    with torch.no_grad():
        torch.testing.assert_close(
            score_trees(eager, trees), score_trees(sdpa, trees), rtol=0, atol=1e-4
        )


def test_bfloat16_is_as_exact_as_its_separate_sequences(data):
    exact, model = tiny_model("llama"), tiny_model("llama").bfloat16()
    trunks, branches = data
    with torch.no_grad():
        truth = separate_logprobs(exact.bfloat16().double(), trunks, branches)
        on_tree = (score_trees(model, pack_step_pairs(trunks, branches)) - truth).abs().mean()
        separate = (separate_logprobs(model, trunks, branches) - truth).abs().mean()
    assert on_tree <= 1.5 * separate


def test_logps_are_float32_for_half_precision_models(data):
    model = tiny_model("llama").bfloat16()
    assert score_trees(model, pack_step_pairs(*data)).dtype == torch.float32


def test_trees_on_torch_tensors_score_the_same(data):
    model, trees = tiny_model("llama"), pack_step_pairs(*data)
    with torch.no_grad():
        on_tensors = score_trees(model, [tree.to("cpu") for tree in trees])
        assert torch.equal(on_tensors, score_trees(model, trees))


def test_a_batch_scores_each_tree_as_alone(data):
    model, trees = tiny_model("llama"), pack_step_pairs(*data, max_tokens=70)
    with torch.no_grad():
        together = score_trees(model, trees)
        alone = torch.cat([score_trees(model, [tree]) for tree in trees])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ heads


HEADS = {
    "granite": {"logits_scaling": 3.0},  # divides
    "cohere": {"logit_scale": 0.25},  # multiplies
    "gemma2": {"final_logit_softcapping": 2.0},
    "phi": {},  # has a bias
    "llama": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize(("name", "options"), HEADS.items(), ids=HEADS)
def test_the_head_gives_the_models_own_logits(name, options):
    model = tiny_model(name, **options)
    head = lm_head(model)
    if head.bias_V is not None:
        torch.nn.init.normal_(head.bias_V)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits[0]
        hidden = model.get_decoder()(input_ids=ids)[0][0]
        torch.testing.assert_close(head.logits(hidden), own, rtol=1e-5, atol=1e-5)
        labels = torch.arange(len(own))
        scored = head.logprobs(hidden, labels, labels)
    expected = own.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)
    assert (head.bias_V is not None) == (name == "phi")


@pytest.mark.parametrize("name", ["granite", "cohere", "phi"])
def test_models_with_unusual_heads_are_exact_on_trees(name, data):
    model = tiny_model(name, **HEADS[name])
    with torch.no_grad():
        logps = score_trees(model, pack_step_pairs(*data))
        torch.testing.assert_close(logps, separate_logprobs(model, *data), rtol=0, atol=1e-4)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"LlamaModel .*must have a language-model head"):
        lm_head(tiny_model("llama").model)


# ------------------------------------------------------------------ wrappers

# PEFT calls what transformers has renamed.
peft_warns = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@peft_warns
def test_an_adapter_scores_as_its_base_and_alone_has_gradients(data):
    from peft import LoraConfig, get_peft_model

    base, trees = tiny_model("llama"), pack_step_pairs(*data)
    with torch.no_grad():
        expected = score_trees(base, trees)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert unwrapped(model) is base
    logps = score_trees(model, trees)
    torch.testing.assert_close(logps, expected)
    logps.sum().backward()
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@peft_warns
def test_prompt_tuning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        check_tree_support(get_peft_model(tiny_model("llama"), config))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_reduces_the_gradients(data):
    trees = pack_step_pairs(*data)
    model = tiny_model("llama")
    expected = gradients(model, score_trees(model, trees))
    reduced = []
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, lambda _, bucket: _noted(reduced, bucket))
    torch.testing.assert_close(gradients(wrapped, score_trees(wrapped, trees)), expected)
    assert sum(reduced) == len(expected)


def _noted(sizes, bucket):
    sizes.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


# ------------------------------------------------------------------ refused


def _falcon(**options: object) -> PreTrainedModel:
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
            **options,
        )
    )


def _bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))


_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_QWEN3_NEXT = {
    **_EXPERTS,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 2,
}
_JAMBA = {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
_LLAMA4 = {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48}
_GPT_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "encoder_layers": 1}
_OPENAI = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}

RECURRENT = "(linear_attention|recurrent) layers"  # transformers has named them since 5.0
REFUSED = {
    "mamba": (lambda: tiny_model("mamba"), f"MambaForCausalLM .*{RECURRENT}"),
    "qwen3_next": (lambda: tiny_model("qwen3_next", **_QWEN3_NEXT), "linear_attention layers"),
    "jamba": (lambda: tiny_model("jamba", **_JAMBA), f"JambaForCausalLM .*{RECURRENT}"),
    "llama4": (lambda: tiny_model("llama4_text", **_LLAMA4), "chunked_attention layers"),
    "rwkv": (lambda: tiny_model("rwkv", attention_hidden_size=32), "recurrent layers"),
    # Its window is 256: far longer than the probe's tree, so the probe would not see it.
    "gpt_neo": (lambda: tiny_model("gpt_neo", **_GPT_NEO), "windows of its own, window_size=256"),
    # Biases by distance, computed from the order of the tokens.
    "falcon-alibi": (
        lambda: _falcon(alibi=True),
        "FalconForCausalLM .*order of the tokens .ALiBi.",
    ),
    "bloom": (_bloom, "BloomForCausalLM .*order of the tokens .ALiBi."),
    "mpt": (lambda: tiny_model("mpt", **_MPT), "distance in the order of the tokens .ALiBi."),
    "doge": (lambda: tiny_model("doge"), "picks the keys .* keep_window_size=2048"),
    "bart": (lambda: tiny_model("bart", **_BART), "takes no position_ids"),
    "bert": (lambda: tiny_model("bert"), "attends to what follows, .*is_decoder is False"),
    "roberta": (lambda: tiny_model("roberta"), "positions begin behind pad_token_id"),
    "openai-gpt": (lambda: tiny_model("openai-gpt", **_OPENAI), "masks of padding alone"),
    "window-unknown": (
        lambda: tiny_model("stablelm", sliding_window=4),
        "StableLmForCausalLM .*does not say which layers use sliding_window=4",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of kernels that are not installed
def test_a_model_that_a_tree_would_make_wrong_is_refused_by_name(make, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check_tree_support(make())
    assert "such as Llama" in str(error.value)  # what to do instead


def _counting_by_order(model: PreTrainedModel) -> PreTrainedModel:
    """A model that counts positions by the order of the tokens, whatever it is told."""
    forward = model.model.forward

    def counted(*args: object, position_ids: torch.Tensor, **kwargs: object) -> object:
        order = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return forward(*args, position_ids=order, **kwargs)

    def either(*args: object, **kwargs: object) -> object:
        return (counted if kwargs.get("position_ids") is not None else forward)(*args, **kwargs)

    model.model.forward = either
    return model


def test_an_untrained_model_hides_nothing_from_the_probe():
    """With weights of transformers' default size contexts hardly matter; it is still found."""
    with pytest.raises(ValueError, match="log-probs on a tree differ"):
        check_tree_support(_counting_by_order(tiny_model("llama", initializer_range=0.02)))
    check_tree_support(tiny_model("llama", initializer_range=0.02))


def test_what_fails_in_the_probe_is_said_in_its_own_words():
    """Not that the model cannot be computed on a tree: it can, and something else is wrong."""
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.down_proj = torch.nn.Linear(7, 32)
    with pytest.raises(ValueError, match=r"on an ordinary sequence of tokens: RuntimeError: mat1"):
        check_tree_support(broken)
    with pytest.raises(ValueError, match=r"failed when it was tried .*meta"):
        check_tree_support(tiny_model("llama").to("meta"))


def test_falcon_with_rotary_positions_is_exact(data):
    model = _falcon(alibi=False).eval()
    with torch.no_grad():
        logps = score_trees(model, pack_step_pairs(*data))
        torch.testing.assert_close(logps, separate_logprobs(model, *data), rtol=0, atol=1e-4)


def test_an_attention_implementation_without_masks_is_refused():
    model = tiny_model("llama")
    check_tree_support(model)
    # Also after the model has passed: the setting can change.
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="tree mask, got 'flash_attention_2'"):
        check_tree_support(model)


def test_nan_weights_are_said_to_be_nan(data):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="LlamaForCausalLM must be finite, got NaN"):
        score_trees(model, pack_step_pairs(*data))


def test_a_refused_model_is_left_in_its_mode():
    model = _counting_by_order(tiny_model("llama")).train()
    model.model.layers[0].eval()
    with pytest.raises(ValueError, match="differ"):
        check_tree_support(model)
    assert model.training
    assert not model.model.layers[0].training


# ------------------------------------------------------------------ bad input


def test_positions_and_tokens_beyond_the_model_are_named(data):
    trunks, branches = data
    short = tiny_model("gpt2", n_positions=16)
    with pytest.raises(ValueError, match=r"trees\[0\] must fit .*embeddings=16, got \d+ positions"):
        score_trees(short, pack_step_pairs(trunks, branches))
    narrow = tiny_model("gpt2", vocab_size=50)
    with pytest.raises(
        ValueError, match=r"trees\[0\] must hold tokens below vocab_size=50, got \d\d"
    ):
        score_trees(narrow, pack_step_pairs(trunks, branches))
    with pytest.raises(ValueError, match="trees must hold at least one"):
        score_trees(narrow, [])


def test_positions_where_rope_would_be_rescaled_are_refused():
    """Past the original limit `longrope` changes all frequencies, those of short prefixes too."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
        "factor": 8.0,
    }
    model = tiny_model("llama", rope_parameters=longrope)
    assert position_limit(model) == 16
    ids = np.arange(3, 20)
    (tree,) = pack_step_pairs([Trunk(ids, [(2, 4)])], [[[]]])
    with pytest.raises(ValueError, match="got 17 positions"):
        score_trees(model, [tree])
    (tree,) = pack_step_pairs([Trunk(ids[:16], [(2, 4)])], [[[ids[:3]]]])
    assert bool(torch.isfinite(score_trees(model, [tree])).all())


# ------------------------------------------------------------------ parts


def test_masks_follow_the_layers(data):
    visible = torch.ones(3, 3).tril().bool()[None]
    depths = torch.tensor([[0, 5, 9]])
    near = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]).bool()

    mistral = attention_masks(tiny_model("mistral"), visible, depths, depths)
    assert torch.equal(mistral == 0, near[:, None])
    gemma = attention_masks(tiny_model("gemma3_text"), visible, depths, depths)
    assert torch.equal(gemma["sliding_attention"] == 0, near[:, None])
    assert torch.equal(gemma["full_attention"] == 0, visible[:, None])
    llama = attention_masks(tiny_model("llama"), visible, depths, depths)
    assert torch.equal(llama == 0, visible[:, None])
    assert llama.min() == torch.finfo(torch.float32).min


def test_hidden_states_are_what_the_head_is_given_and_leave_the_model_as_it_was():
    model, ids = tiny_model("llama"), torch.arange(3, 8)[None]
    hidden = hidden_states(model, input_ids=ids, use_cache=False)
    assert torch.equal(hidden, model.model(input_ids=ids)[0])
    with pytest.raises(ValueError, match="exactly one of"):
        hidden_states(model, input_ids=ids, inputs_embeds=7)
    own = model.forward  # accelerate's, for one
    model.forward = lambda **inputs: own(**inputs)
    mine = model.forward
    assert torch.equal(hidden_states(model, input_ids=ids, use_cache=False), hidden)
    assert model.forward is mine
    assert "forward" not in vars(model.lm_head)


def test_a_head_that_is_called_twice_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, _: module.forward(*args))
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM must call .* once in a forward, got 2 calls"
    ):
        hidden_states(model, input_ids=torch.arange(3, 8)[None])


def test_evaluation_mode_restores_every_module():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_a_tree_is_only_arrays():
    assert {field.type for field in fields(TokenTree)} == {"Array", "dict[str, Array]"}
