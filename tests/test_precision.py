"""In which dtype training keeps its weights, and what it says where they cannot move."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_ranks import trajectories
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent.learning.config import StepAgentConfig
from stepagent.learning.precision import share_stuck
from stepagent.learning.trainer import StepAgentTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint in bfloat16."""
    path = tmp_path_factory.mktemp("model")
    tiny_agent(initializer_range=0.02).to(torch.bfloat16).save_pretrained(path)
    return str(path)


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    def make(model: Any, **options: Any) -> StepAgentTrainer:
        others = {
            name: options.pop(name) for name in ("peft_config", "ref_model") if name in options
        }
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 5,
            "learning_rate": 1e-6,
            "cycles": 10,
        }
        args = StepAgentConfig(**defaults | options)
        return StepAgentTrainer(model, args, trajectories(), babyai_tokenizer(), **others)

    return make


def moved(made: StepAgentTrainer) -> float:
    """The share of trained weights that a run moves."""
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    after = list(made.model.parameters())
    changed = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    return changed / sum(p.numel() for p in after)


@pytest.mark.parametrize("halves", [{}, {"bf16": True}], ids=["float32", "bf16"])
@pytest.mark.parametrize("method", ["sft", "implicit"])
def test_a_bf16_checkpoint_by_name_learns_at_a_small_learning_rate(folder, trainer, halves, method):
    """Ten steps at 1e-6; in the checkpoint's dtype fewer than one weight in fifty moved."""
    cycles = {} if method == "implicit" else {"num_train_epochs": 10.0}
    made = trainer(folder, method=method, **halves, **cycles)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert moved(made) > 0.8  # words that nobody says have no gradient
    stuck = trainer(folder, method=method, model_dtype="checkpoint", **halves, **cycles)
    assert {p.dtype for p in stuck.model.parameters()} == {torch.bfloat16}
    assert moved(stuck) < 0.02


def test_what_cannot_move_is_said(folder, trainer, caplog):
    with caplog.at_level(logging.INFO):
        trainer(folder)
    assert "trained weights are float32, products are in the weights' dtype" in caplog.text
    assert "cannot move" not in caplog.text
    trainer(folder, bf16=True)
    with caplog.at_level(logging.WARNING):
        trainer(folder, model_dtype="bfloat16")
        assert r"learning_rate=1e-06 cannot move" in caplog.text
        assert "% of the trained weights: they are bfloat16" in caplog.text
        caplog.clear()
        trainer(folder, model_dtype="bfloat16", learning_rate=1e-3)  # a coarse one can
        trainer(folder, model_dtype="bfloat16", optim="sgd")  # whose steps are not the rate's size
        trainer(folder, model_dtype="bfloat16", learning_rate=0.0)
    assert "cannot move" not in caplog.text


def test_the_share_that_is_stuck_is_that_of_rounding():
    weights = torch.tensor([0.0, 1e-9, 0.001, 1.0, -1.0], dtype=torch.bfloat16)
    assert share_stuck([weights], 1e-6) == pytest.approx(3 / 5)
    assert share_stuck([weights.float()], 1e-6) == 0
    assert share_stuck([weights], 1.0) == 0
    assert share_stuck([], 1.0) == 0


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_what_an_adapter_leaves_frozen_keeps_the_checkpoints_dtype_under_autocast(folder, trainer):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    made = trainer(folder, peft_config=lora, bf16=True, cycles=1)
    dtypes = {p.requires_grad: p.dtype for p in made.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    made.train()
    # Without it, and where a layer is trained whole, all is float32.
    for options in (
        {"peft_config": lora},
        {
            "bf16": True,
            "peft_config": LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
            ),
        },
    ):
        made = trainer(folder, **options)
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}


def test_a_reference_by_name_is_the_model_of_that_name(folder, trainer):
    made = trainer(folder, ref_model=folder, cycles=1)
    reference = made._scorer._ref_model
    assert {p.dtype for p in reference.parameters()} == {torch.float32}
    for mine, its in zip(made.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, its)
    made.train()


def test_a_name_without_a_model_is_an_error(folder, trainer, tmp_path):
    for model, ref_model in ((str(tmp_path / "none"), None), (folder, str(tmp_path / "none"))):
        with pytest.raises(ValueError, match=r"none' must be a folder with a model or a name on"):
            trainer(model, ref_model=ref_model)


def test_an_unknown_dtype_is_named(folder, trainer):
    with pytest.raises(ValueError, match=r"model_dtype must be one of .*'float32'.* got 'int8'"):
        trainer(folder, model_dtype="int8")
