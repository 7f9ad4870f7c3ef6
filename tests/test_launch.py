"""``accelerate launch`` with the repository's FSDP2 configuration, data to weights, on CPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import free_port, trajectories
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent.data.trajectory import save_trajectories

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_agent().save_pretrained(folder / "model")
    babyai_tokenizer().save_pretrained(folder / "model")
    save_trajectories(folder / "data.jsonl", trajectories())
    return ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl")]


def train(ranks: int, inputs: list[str], output: Path, *options: str) -> dict[str, object]:
    """The report of a run with a global batch of four."""
    launcher = [
        *("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/fsdp2.yaml")),
        *("--num_processes", str(ranks), "--main_process_port", str(free_port())),
        *("--mixed_precision", "no", str(ROOT / "tests/launched.py")),
    ]
    command = [
        *(sys.executable, *(launcher if ranks > 1 else ["-m", "stepagent"])),
        *("train", "--json", *inputs, "--output_dir", str(output)),
        *("--use_cpu", "true", "--cycles", "2", "--save_total_limit", "9"),
        *("--per_device_train_batch_size", str(4 // ranks)),
        # Large, so that Adam does not make a step of what rounding leaves of a gradient of 0.
        *("--adam_epsilon", "1e-2", "--learning_rate", "1e-3", *options),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    report: dict[str, object] = json.loads(done.stdout)  # of one process, whatever their number
    return report


def assert_same_weights(a: Path, b: Path, name: str = "model.safetensors") -> None:
    torch.testing.assert_close(load_file(a / name), load_file(b / name), rtol=1e-5, atol=1e-5)


def test_a_sharded_run_equals_one_process_and_resumes_on_another_number(
    inputs: list[str], tmp_path: Path
) -> None:
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    report = train(2, inputs, two)
    assert report["steps"] == 4
    checkpoint = {path.name for path in (two / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "optimizer.bin"} <= checkpoint  # the optimiser's of FSDP
    train(1, inputs, one)
    assert_same_weights(one, two)

    shutil.copytree(two / "checkpoint-2", four / "checkpoint-2")
    assert train(4, inputs, four, "--resume")["steps"] == 4
    assert_same_weights(one, four)


def test_a_sharded_run_evaluates_and_chooses_as_one_process(
    inputs: list[str], tmp_path: Path
) -> None:
    options = (
        *("--eval-data", inputs[3], "--eval-strategy", "epoch", "--save-strategy", "epoch"),
        *("--load-best-model-at-end", "--metric-for-best-model", "nll"),
        *("--env", "babyai:GoToLocalS6N2", "--eval-episodes", "3", "--max-steps-per-episode", "2"),
    )
    evaluations = []
    for ranks, name in ((1, "one"), (2, "two")):
        train(ranks, inputs, tmp_path / name, *options)
        log = json.loads((tmp_path / name / "log.json").read_text())
        kept = [{k: v for k, v in e.items() if "per_sec" not in k} for e in log if "eval_nll" in e]
        evaluations.append([{k: v for k, v in e.items() if k != "eval_runtime"} for e in kept])
    assert len(evaluations[0]) == len(evaluations[1]) == 2
    for one, two in zip(*evaluations, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_a_sharded_adapter_of_the_inverse_form_equals_one_process(
    inputs: list[str], tmp_path: Path
) -> None:
    options = [
        *("--lora-rank", "2", "--method", "inverse", "--discriminator_body", "frozen"),
        *("--critic_epochs", "3", "--samples", "2", "--critic_learning_rate", "1e-2"),
    ]
    one, two = (tmp_path / name for name in ("one", "two"))
    train(2, inputs, two, *options)
    train(1, inputs, one, *options)
    assert_same_weights(one, two, "adapter_model.safetensors")
