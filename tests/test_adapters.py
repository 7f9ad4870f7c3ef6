"""Adapters: one base in memory, the frozen head's fast path, saved, loaded and merged."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from test_ranks import trajectories
from test_trainer import cycles_of
from tiny_models import babyai_tokenizer, random_trunks, tiny_agent, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from stepagent.learning import loading
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import Comparison, pack_comparisons
from stepagent.learning.reference_policy import change_of_base
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.models import check_tree_support, score_trees, unwrapped
from stepagent.trees.tree import pack_step_pairs

# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
ONE_COPY = "one copy of the base in memory"


def lora(**options: Any) -> LoraConfig:
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(task_type="CAUSAL_LM", r=4, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_agent().save_pretrained(path)
    return str(path)


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    def make(model: Any, **options: Any) -> StepAgentTrainer:
        others = {name: options.pop(name) for name in ("peft_config", "ref_model") & options.keys()}
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 5,
            "learning_rate": 3e-2,
            "cycles": 2,
        }
        args = StepAgentConfig(**defaults | options)
        return StepAgentTrainer(model, args, trajectories(), babyai_tokenizer(), **others)

    return make


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that were loaded, in order."""
    names: list[str] = []
    load = loading.load_named
    monkeypatch.setattr(loading, "load_named", lambda n, d: names.append(n) or load(n, d))
    return names


# ------------------------------------------------------------------ one copy of the base


def test_a_reference_of_the_models_own_name_is_the_policy_without_its_adapter(
    folder, trainer, loads, caplog
):
    """Its losses are those of a second model, which it does without."""
    losses = []
    for reference in (folder, tiny_agent()):
        with caplog.at_level(logging.INFO):
            made = trainer(folder, ref_model=reference, peft_config=lora(), cycles=3)
        shared = made._scorer._ref_model is unwrapped(made.model)
        assert shared == (reference is folder) == (ONE_COPY in caplog.text)
        caplog.clear()
        made.train()
        losses.append([cycle["mean_loss"] for cycle in cycles_of(made)])
    assert loads == [folder, folder]  # one of each run
    assert losses[0] == losses[1]
    assert abs(losses[0][2] - math.log(2)) > 0.01


def test_a_folder_by_another_path_is_the_same_model(folder, trainer, loads, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    made = trainer(folder, ref_model=str(tmp_path / "link") + "/", peft_config=lora())
    assert made._scorer._ref_model is unwrapped(made.model)
    assert loads == [folder]
    trainer(folder, ref_model=folder)  # all of the policy learns
    assert loads == [folder] * 3


CHANGES = {
    "an initialisation": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the"),
    "biases": ({"bias": "lora_only"}, r"its own .*q_proj\.base_layer\.bias is trained"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_base_that_its_adapter_changes_is_no_reference(kind, trainer, loads, caplog, tmp_path):
    """By name it is loaded once more; as the model itself it is refused."""
    options, reason = CHANGES[kind]
    base = tiny_agent(attention_bias=True)
    name = str(tmp_path / "biased")
    base.save_pretrained(name)
    with caplog.at_level(logging.INFO):
        made = trainer(name, ref_model=name, peft_config=lora(**options))
    assert "is loaded beside the policy: " in caplog.text
    assert loads == [name, name]
    weights = made._scorer._ref_model.state_dict()
    before = tiny_agent(attention_bias=True).state_dict()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    policy = get_peft_model(base, lora(**options))
    with pytest.raises(ValueError, match=f"with its adapter off, or another.*{reason}"):
        trainer(policy, ref_model=base)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 7]},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_what_an_adapter_trains_beside_the_base_leaves_it_as_it_was(options):
    """So the policy with its adapter off gives what the base gave, after any update."""
    trees = pack_step_pairs(*random_trunks(np.random.default_rng(0)))
    names = {"attention_bias": True} if "lora_bias" in options else {}
    with torch.no_grad():
        before = score_trees(tiny_model("llama", **names), trees)
        policy = get_peft_model(tiny_model("llama", **names), lora(**options)).eval()
        assert change_of_base(policy) is None
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        assert not torch.allclose(score_trees(policy, trees), before, atol=0.1)
        with policy.disable_adapter():
            torch.testing.assert_close(score_trees(policy, trees), before, rtol=0, atol=1e-4)


def test_a_layer_that_somebody_unfroze_is_seen(trainer):
    base = tiny_agent()
    policy = get_peft_model(base, lora())
    base.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"its own model\.norm\.weight is trained"):
        trainer(policy, ref_model=base)


# ------------------------------------------------------------------ what a new one would replace


def test_an_adapter_is_not_put_over_another(folder, trainer, tmp_path):
    """PEFT would begin anew in its place, with a warning only."""
    learnt = get_peft_model(tiny_agent(), lora(init_lora_weights=False))
    learnt.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for model in (learnt, loaded, unwrapped(loaded)):
        with pytest.raises(ValueError, match="model must be without an adapter where peft_config"):
            trainer(model, peft_config=lora())
    with pytest.raises(ValueError, match="must have weights to train, but all of this Peft"):
        trainer(loaded)
    with pytest.raises(ValueError, match="a folder with a model, got one with an adapter"):
        trainer(str(tmp_path / "adapter"))
    trainer(loaded.merge_and_unload(), peft_config=lora())
    again = PeftModel.from_pretrained(tiny_agent(), tmp_path / "adapter", is_trainable=True)
    made = trainer(again, ref_model=unwrapped(again))
    made.train()
    assert made.state.global_step > 0


# ------------------------------------------------------------------ the frozen head


class HeadCalls(TorchDispatchMode):
    """What the fused head is asked to keep, and the shapes of the gradients that it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.keeps: list[str] = []
        self.gradients: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.name() == "stepagent::linear_logprobs":
            named = dict(zip([a.name for a in func._schema.arguments], args, strict=False))
            self.keeps.append(named["keep"])
        if func.name() == "stepagent::linear_logprobs_backward":
            self.gradients += [tuple(result.shape) for result in results]
        return results


@pytest.mark.parametrize(
    ("options", "fast"),
    [({}, True), ({"modules_to_save": ["lm_head"]}, False)],
    ids=["frozen head", "trained head"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_frozen_head_takes_its_fast_path_by_itself(options, fast, tied):
    """Its forward keeps ∂log p/∂h, and nothing of the head's size is made for the backward."""
    if tied and not fast:
        options = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    base = tiny_model("llama", tie_word_embeddings=tied)
    model = get_peft_model(base, lora(**options))
    check_tree_support(model)  # which scores the first time
    trees = pack_step_pairs(*random_trunks(np.random.default_rng(0)))
    with HeadCalls() as calls:
        score_trees(model, trees).sum().backward()
    assert calls.keeps == ["gradient" if fast else "nothing"]
    head = (base.config.vocab_size, base.config.hidden_size)
    assert (head in calls.gradients) == (not fast)
    learnt = any(p.grad is not None and p.shape == head for p in model.parameters())
    assert learnt != fast


# ------------------------------------------------------------------ saved, loaded, merged


def test_an_adapter_that_was_saved_is_the_policy_loaded_any_way_and_merged(
    folder, trainer, tmp_path
):
    made = trainer(folder, peft_config=lora(target_modules="all-linear"))
    made.train()
    saved = tmp_path / "adapter"
    made.save_model(str(saved))
    trees = pack_comparisons([Comparison.demonstration(t) for t in made._trunks], 4096)

    def logps(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return score_trees(model.eval(), trees)

    policy = logps(made.model)
    assert float((policy - logps(tiny_agent())).abs().max()) > 0.1
    loaded = PeftModel.from_pretrained(tiny_agent(), saved)
    assert torch.equal(logps(loaded), policy)
    by_its_own_folder = AutoPeftModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logps(by_its_own_folder), policy)
    assert torch.equal(logps(AutoModelForCausalLM.from_pretrained(saved)), policy)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logps(merged), policy, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logps(whole), policy, rtol=0, atol=1e-4)
