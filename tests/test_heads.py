"""Language-model heads that are more than one matrix: exact against separate sequences, trained."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import END, random_trunks, separate_logprobs, tiny_model
from torch import Tensor, nn

from stepagent.acting.inspection import inspect
from stepagent.learning.critic import StepCritic
from stepagent.models import (
    LMHead,
    ModuleHead,
    check_tree_support,
    lm_head,
    read_trees,
    score_trees,
    unwrapped,
)
from stepagent.models import head as head_file
from stepagent.trees.tree import pack_step_pairs

# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

DATA = random_trunks(np.random.default_rng(0))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def adapted(name: str = "llama", model_options: Any = None, **options: Any) -> PeftModel:
    """With adapters that are far from the identity."""
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **options}
    model = tiny_model(name, **(model_options or {}))
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return made.eval()


ADAPTED = {
    "on the head": {},
    "on all linear layers": {"target_modules": LINEAR},
    "DoRA": {"use_dora": True},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 20]},
    "tied": {
        "target_modules": ["q_proj", "lm_head"],
        "model_options": {"tie_word_embeddings": True},
    },
    "tied, some tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 7, 20],
        "model_options": {"tie_word_embeddings": True},
    },
    "soft cap": {"name": "gemma2", "model_options": {"final_logit_softcapping": 2.0}},
    "scaled logits": {"name": "granite", "model_options": {"logits_scaling": 3.0}},
    "own bias": {"name": "phi", "target_modules": ["lm_head"], "lora_bias": True},
}


def gradients(model: nn.Module, logps: Tensor) -> Tensor:
    """Of a random functional of the log-probs, by everything that is trained."""
    model.zero_grad()
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
    (weights * logps).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_on_the_head_is_exact_against_separate_sequences(kind, monkeypatch):
    monkeypatch.setattr(head_file, "_LOGITS", 500)  # five rows of logits at a time
    model = adapted(**ADAPTED[kind])
    logps, separate = score_trees(model, pack_step_pairs(*DATA)), separate_logprobs(model, *DATA)
    torch.testing.assert_close(logps, separate, rtol=0, atol=1e-4)
    fast, slow = gradients(model, logps), gradients(model, separate)
    assert slow.norm() > 1
    assert (fast - slow).norm() < 1e-4 * slow.norm()


def test_an_adapter_on_the_head_is_in_its_log_probs():
    """Left out, as it once was, it would be nats away."""
    model = adapted()
    trees = pack_step_pairs(*DATA)
    with torch.no_grad():
        on = score_trees(model, trees)
        with model.disable_adapter():
            off, separate = score_trees(model, trees), separate_logprobs(model, *DATA)
    torch.testing.assert_close(off, separate, rtol=0, atol=1e-4)
    assert float((on - off).abs().max()) > 1


def test_a_head_with_an_adapter_samples_what_it_scores():
    model = adapted()
    trunks = DATA[0]
    branches = inspect(model, trunks, samples=2, max_new_tokens=5, eos_token_id=END, seed=1)
    tried = [[[branch.token_ids for branch in step] for step in steps] for steps in branches]
    with torch.no_grad():
        separate = separate_logprobs(model, trunks, tried)
    scored = iter(separate)
    for trunk, steps in zip(trunks, branches, strict=True):
        for (start, stop), step in zip(trunk.action_spans, steps, strict=True):
            for _ in range(stop - start):
                next(scored)
            for branch in step:
                expected = [float(next(scored)) for _ in branch.token_ids]
                assert branch.logps.tolist() == pytest.approx(expected, abs=1e-4)


def test_entropies_and_rows_of_a_head_with_an_adapter():
    model, trees = adapted(), pack_step_pairs(*DATA)
    _, entropies = score_trees(model, trees, return_entropy=True)
    merged = adapted().merge_and_unload()
    torch.testing.assert_close(
        entropies, score_trees(merged, trees, return_entropy=True)[1], rtol=0, atol=1e-4
    )
    rows = [tree.label_rows for tree in trees]
    for mine, other in zip(
        read_trees(model, trees, rows), read_trees(merged, trees, rows), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_a_critic_reads_with_an_adapter_on_its_head():
    trunks, branches = DATA
    trees = pack_step_pairs(trunks, [[[b for b in step if len(b)] for step in t] for t in branches])
    with torch.no_grad():
        mine, other = (
            StepCritic(body, 1).read(trees).logq_S
            for body in (adapted(), adapted().merge_and_unload())
        )
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)


def test_checkpointed_activations_change_nothing():
    model = adapted()
    trees = pack_step_pairs(*DATA)
    expected = gradients(model, score_trees(model, trees))
    model.gradient_checkpointing_enable()
    model.train()
    torch.testing.assert_close(gradients(model, score_trees(model, trees)), expected)


def test_autocast_rounds_no_logits():
    """In bfloat16 a log-prob of this size is rounded to 1/64; the head's own products are not."""
    model, trees = adapted(), pack_step_pairs(*DATA)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logps = score_trees(model, trees)
    assert logps.dtype == torch.float32
    assert not torch.equal(logps, logps.bfloat16().float())


# ------------------------------------------------------------------ quantised


class Int8Linear(nn.Module):
    """A matrix in eight bits, as libraries keep it: integers, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        weight = (linear.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.to(hidden.dtype) * self.scale.to(hidden.dtype)).T


def torchs_own(linear: nn.Linear) -> nn.Module:
    """torch's, whose ``weight`` is a method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})
    return holder[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("quantise", [Int8Linear, torchs_own], ids=lambda kind: kind.__name__)
def test_a_quantised_head_is_exact_against_separate_sequences(quantise):
    model = tiny_model("llama")
    with torch.no_grad():
        whole = score_trees(model, pack_step_pairs(*DATA))
        model.lm_head = quantise(model.lm_head)
        assert isinstance(lm_head(model), ModuleHead)
        logps, separate = (
            score_trees(model, pack_step_pairs(*DATA)),
            separate_logprobs(model, *DATA),
        )
    # torch quantises the rows of a call by their range, so a row's logits depend on its neighbours.
    exact = 1e-4 if quantise is Int8Linear else 0.2
    torch.testing.assert_close(logps, separate, rtol=0, atol=exact)
    assert float((logps - whole).abs().max()) > 1e-3


def test_an_adapter_beside_a_quantised_head_learns():
    model = tiny_model("llama")
    model.lm_head = Int8Linear(model.lm_head)
    names = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **names))
    fast = gradients(model, score_trees(model, pack_step_pairs(*DATA)))
    slow = gradients(model, separate_logprobs(model, *DATA))
    assert slow.norm() > 1
    assert (fast - slow).norm() < 1e-4 * slow.norm()


# ------------------------------------------------------------------ which way a head goes


def test_one_matrix_goes_through_the_op_and_all_else_through_its_module():
    assert isinstance(lm_head(tiny_model("llama")), LMHead)
    assert isinstance(lm_head(adapted(**ADAPTED["saved whole"])), LMHead)
    assert isinstance(lm_head(adapted()), ModuleHead)
    subclass = tiny_model("llama")

    class Scaled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 0.5

    subclass.lm_head.__class__ = Scaled
    assert isinstance(lm_head(subclass), ModuleHead)
    with torch.no_grad():
        logps = score_trees(subclass, pack_step_pairs(*DATA))
        torch.testing.assert_close(logps, separate_logprobs(subclass, *DATA), rtol=0, atol=1e-4)


def test_a_frozen_matrix_under_an_adapter_gets_no_gradient():
    model = adapted()
    score_trees(model, pack_step_pairs(*DATA)).sum().backward()
    head = unwrapped(model).lm_head
    assert head.base_layer.weight.grad is None
    assert head.lora_A["default"].weight.grad.any()


def test_a_partitioned_model_is_refused_by_name():
    model = tiny_model("llama")
    model.model.norm.weight.ds_id = 0  # DeepSpeed's mark on what ZeRO-3 partitions
    with pytest.raises(ValueError, match=r"ZeRO-3, which stepagent does not support: use FSDP2"):
        check_tree_support(model)


def test_a_model_without_a_head_is_named():
    with pytest.raises(ValueError, match=r"LlamaModel must have a language-model head"):
        check_tree_support(tiny_model("llama").model)
