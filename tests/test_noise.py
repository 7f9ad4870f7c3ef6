"""Noise of training, references that share the policy's layers, experts that are balanced."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from test_ranks import trajectories
from test_trainer import cycles_of, first_batch, grads
from tiny_models import babyai_tokenizer, tiny_agent
from torch import nn
from transformers import AutoModelForCausalLM

from stepagent.learning.config import StepAgentConfig
from stepagent.learning.noise import check_quiet, silence
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.models import recorded_routing, score_trees
from stepagent.trees.tree import pack_step_pairs

# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
COMPARING = ["implicit", "inverse"]


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    def make(model: Any = None, **options: Any) -> StepAgentTrainer:
        names = ("peft_config", "ref_model", "discriminator")
        others = {name: options.pop(name) for name in names if name in options}
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 5,
            "learning_rate": 0.0,
            "cycles": 1,
        }
        if options.get("method") == "inverse":
            defaults["critic_epochs"] = 1
        args = StepAgentConfig(**defaults | options)
        model = tiny_agent() if model is None else model
        return StepAgentTrainer(model, args, trajectories(), babyai_tokenizer(), **others)

    return make


def _layerdrop() -> Any:
    options = {"word_embed_proj_dim": 32, "ffn_dim": 48, "layerdrop": 0.5, "dropout": 0.2}
    return tiny_agent("opt", **options)


def _jitter() -> Any:
    return tiny_agent("mixtral", num_local_experts=2, router_jitter_noise=0.3)


NOISY = {
    "gpt2's default": lambda: tiny_agent("gpt2", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1),
    "functional": lambda: tiny_agent("llama", attention_dropout=0.2),
    "layers and functional": _layerdrop,
    "router": _jitter,
}


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize("method", COMPARING)
@pytest.mark.parametrize("kind", NOISY)
def test_at_learning_rate_0_a_noisy_policy_stays_what_it_was(kind, method, trainer, caplog):
    with caplog.at_level(logging.WARNING):
        made = trainer(NOISY[kind](), method=method, samples=2, max_new_tokens=3)
    assert "compares the policy with itself, so its noise is off" in caplog.text
    made.train()
    (cycle,) = cycles_of(made)
    assert cycle["kl"] == pytest.approx(0, abs=1e-4)
    if method == "implicit":
        assert cycle["mean_loss"] == pytest.approx(math.log(2), abs=1e-5)
    else:
        assert cycle["clip_fraction"] == 0


@pytest.mark.parametrize("method", COMPARING)
def test_dropout_of_an_adapter_is_off_too(method, trainer):
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "lm_head"],
        lora_dropout=0.3,
        init_lora_weights=False,
    )
    made = trainer(peft_config=lora, method=method, samples=2)
    made.train()
    assert cycles_of(made)[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_supervised_training_keeps_its_dropout(trainer):
    made = trainer(NOISY["gpt2's default"](), method="sft", neftune_noise_alpha=5.0)
    rates = [m.p for m in made.model.modules() if isinstance(m, nn.Dropout)]
    assert set(rates) == {0.1}


class Scrambler(nn.Module):
    """Noise in training that no rate tells of."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.1 * torch.randn_like(hidden) if self.training else hidden


@pytest.mark.parametrize("method", COMPARING)
def test_noise_that_cannot_be_turned_off_is_refused(method, trainer):
    model = tiny_agent()
    model.model.norm = nn.Sequential(model.model.norm, Scrambler())
    with pytest.raises(ValueError, match=r"without noise, but the log-probs of LlamaForCausalLM"):
        trainer(model, method=method)
    trainer(model, method="sft")


@pytest.mark.parametrize("method", COMPARING)
def test_noisy_embeddings_are_refused_by_name(method, trainer):
    with pytest.raises(ValueError, match=r"neftune_noise_alpha must be None .*, got 5"):
        trainer(method=method, neftune_noise_alpha=5.0)


def test_the_probe_leaves_random_numbers_and_modes_as_they_were(tmp_path):
    model = tiny_agent("gpt2", attn_pdrop=0.1)
    model.transformer.h[0].train()
    args = StepAgentConfig(output_dir=str(tmp_path), use_cpu=True)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check_quiet(model, args)
    assert torch.equal(torch.rand(3), expected)
    assert silence(model) == {}
    assert model.transformer.h[0].training
    assert not model.transformer.h[1].training


# ------------------------------------------------------------------ references


def test_the_base_of_an_adapter_is_the_policy_without_it(trainer):
    """A true copy of the base gives the same losses, cycle by cycle."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    losses = []
    for shared in (True, False):
        base = tiny_agent()
        reference = base if shared else deepcopy(base)
        torch.manual_seed(0)
        policy = get_peft_model(base, lora)
        made = trainer(policy, ref_model=reference, cycles=3, learning_rate=3e-2)
        made.train()
        losses.append([cycle["mean_loss"] for cycle in cycles_of(made)])
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses[0][2] - math.log(2)) > 0.01


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_reference_that_training_would_change_is_refused_by_its_weights(trainer):
    model = tiny_agent()
    other = tiny_agent(seed=1)
    other.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"layers\.1.*q_proj\.weight is the policy's .*layers\.0"):
        trainer(model, ref_model=other)
    # Another wrapper around the same layers, and another adapter in them.
    model = tiny_agent()
    wrapper = AutoModelForCausalLM.from_config(model.config)
    wrapper.model = model.model
    with pytest.raises(ValueError, match="ref_model must have weights of its own"):
        trainer(model, ref_model=wrapper)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    base = tiny_agent()
    policy = get_peft_model(base, lora)
    with pytest.raises(ValueError, match="ref_model must have weights of its own"):
        trainer(policy, ref_model=PeftModelForCausalLM(base, lora, "other"))


def test_frozen_layers_may_be_shared(trainer):
    model, other = tiny_agent(), tiny_agent(seed=1)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    other.model.layers[0] = model.model.layers[0]
    trainer(model, ref_model=other)


def test_a_reference_of_another_vocabulary_is_refused(trainer):
    other = tiny_agent(vocab_size=len(babyai_tokenizer()) + 8)
    with pytest.raises(ValueError, match=r"must have the policy's vocabulary of \d+ tokens, got"):
        trainer(ref_model=other)


# ------------------------------------------------------------------ mixtures of experts


def _experts(**options: Any) -> Any:
    shape = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1}
    return tiny_agent("mixtral", **shape, **options)


@pytest.mark.parametrize("method", ["sft", "implicit", "inverse"])
def test_the_auxiliary_loss_of_experts_is_added_with_its_weight(method, trainer):
    model = _experts(output_router_logits=True, router_aux_loss_coef=0.5)
    made = trainer(model, method=method, samples=1)
    _, batch = first_batch(made)
    loss = made.compute_loss(model, batch)
    loss.backward()
    learnt = grads(model)
    with recorded_routing(model) as routing:
        score_trees(model, batch["trees"])
    balance = routing.loss(batch["trees"])
    model.config.output_router_logits = False
    without = made.compute_loss(model, batch)
    assert loss.item() == pytest.approx(without.item() + 0.5 * balance.item(), rel=1e-5)
    (without + 0.5 * balance).backward()
    torch.testing.assert_close(grads(model), learnt, rtol=1e-4, atol=1e-5)
    assert made._means.values()["router_loss"] == pytest.approx(balance.item(), rel=1e-5)


def test_on_one_sequence_the_auxiliary_loss_is_the_models_own(trainer):
    model = _experts(output_router_logits=True)
    made = trainer(model, method="sft")
    trunk = made._trunks[0]
    trees = pack_step_pairs([trunk], [[[] for _ in range(trunk.num_steps)]])
    with torch.no_grad(), recorded_routing(model) as routing:
        score_trees(model, trees)
        mine = routing.loss(trees)
    with torch.no_grad():
        own = model(input_ids=torch.tensor(trunk.input_ids.tolist())[None]).aux_loss
    assert mine.item() == pytest.approx(own.item(), rel=1e-5)


def test_a_model_that_asks_for_router_logits_trains(trainer):
    model = _experts(output_router_logits=True)
    made = trainer(model, learning_rate=1e-3, gradient_checkpointing=True)
    made.train()
    assert math.isfinite(cycles_of(made)[0]["router_loss"])


def test_a_model_without_experts_has_no_auxiliary_loss():
    with recorded_routing(tiny_agent()) as routing:
        assert routing is None
