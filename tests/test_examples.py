"""The examples run, and compute what they say they compute."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,  # to import TRL alone takes ten seconds
    # TRL 1.16 uses what transformers 5.23 warns of.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
]

FOLDER = Path(__file__).parents[1] / "examples"
# Of TRL's metrics, those that need the logits.
LEFT_OUT = {"logits/chosen", "logits/rejected", "mean_token_accuracy"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("trl_step_dpo", FOLDER / "trl_step_dpo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(example: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A trainer of this class whose policy has left its reference, the same each time."""

    def make(trainer_class: type, **options: Any) -> Any:
        trainer = example.make_trainer(trainer_class, str(tmp_path), use_cpu=True, **options)
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.05)
        return trainer

    return make


def loss_and_gradients(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


def test_step_dpo_has_trls_loss_gradients_and_metrics(
    example: ModuleType, make: Callable[..., Any]
) -> None:
    from trl import DPOTrainer

    ours, theirs = make(example.StepDPOTrainer), make(DPOTrainer)
    loss, gradients = loss_and_gradients(ours)
    expected_loss, expected = loss_and_gradients(theirs)
    assert abs(expected_loss - 0.6931) > 0.01, "the policy has left its reference"
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"{name}: {error}"
    metrics, expected_metrics = ours._metrics["train"], theirs._metrics["train"]
    assert set(metrics) == set(expected_metrics) - LEFT_OUT
    for name, values in metrics.items():
        assert values == pytest.approx(expected_metrics[name], rel=1e-5, abs=1e-5), name


def test_step_dpo_follows_trl_through_training(
    example: ModuleType, make: Callable[..., Any]
) -> None:
    from trl import DPOTrainer

    histories = []
    for trainer_class in (example.StepDPOTrainer, DPOTrainer):
        trainer = make(trainer_class, max_steps=3)
        trainer.train()
        histories.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
    assert len(histories[0]) == 3
    assert histories[0][-1] < histories[0][0]


@pytest.mark.parametrize(
    "options", [{"loss_type": "ipo"}, {"ld_alpha": 0.5}, {"f_divergence_type": "forward_kl"}]
)
def test_step_dpo_refuses_other_losses(
    make: Callable[..., Any], example: ModuleType, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="default loss"):
        make(example.StepDPOTrainer, **options)


def test_step_dpo_scores_no_row_but_those_that_predict_an_action(
    make: Callable[..., Any], example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden rows that the loss does not score get no gradient, those that it scores get one."""
    trainer = make(example.StepDPOTrainer)
    captured: list[torch.Tensor] = []

    def spy(model: Any, **inputs: Any) -> torch.Tensor:
        hidden = real(model, **inputs)
        if hidden.requires_grad:
            hidden.retain_grad()
            captured.append(hidden)
        return hidden

    real = example.hidden_states
    monkeypatch.setattr(example, "hidden_states", spy)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    (hidden,) = captured
    assert hidden.grad is not None
    predicts = torch.nn.functional.pad(batch["completion_mask"][:, 1:], (0, 1)).bool()
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, predicts)
