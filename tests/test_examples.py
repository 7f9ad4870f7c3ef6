"""The examples run, and compute what they say they compute."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,  # to import TRL alone takes ten seconds
    # TRL 1.16 uses what transformers 5.23 warns of.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
]

FOLDER = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "fabric_loop"])
def test_a_loop_of_ones_own_learns_the_experts_actions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "fabric_loop":
        pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed")
    monkeypatch.syspath_prepend(str(FOLDER))
    losses = example(name).train(steps=8)
    assert losses[0] == pytest.approx(0.693147, abs=1e-5), "the policy begins as its reference"
    assert losses[-1] < losses[0] / 2


def test_step_pairs_as_rows_and_as_a_tree_are_one_training_in_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    trl_step_dpo = example("trl_step_dpo")

    def losses(trainer_class: type, **options: Any) -> list[float]:
        trainer = trl_step_dpo.make_trainer(
            trainer_class, str(tmp_path), use_cpu=True, max_steps=4, **options
        )
        trainer.train()
        return [step["loss"] for step in trainer.state.log_history if "loss" in step]

    rows, tree = losses(trl_step_dpo.StepDPOTrainer), losses(trl_step_dpo.TreeDPOTrainer)
    assert rows == pytest.approx(tree, rel=1e-3)
    assert len(rows) == 4
    assert rows[-1] < rows[0]
