"""The experiment on the claim: it counts what it says, resumes, repeats, and reports everything."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepagent.envs import ExpertUnavailable
from stepagent.evaluation import bootstrap_runs
from stepagent.report import load_run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/claim"))
import counted
import rivals
import rivals_settings


class Door:
    """Two episodes, 0 and 1; the expert knows the first."""

    name, actions, max_steps = "door", ("open",), 1

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.seed = seed
        return f"door {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "open", 1.0, True, False, {}

    def expert_action(self) -> str:
        if self.seed:
            raise ExpertUnavailable("nobody knows")
        return "open"

    def check_seed(self, seed: int) -> None:
        if seed > 1:
            raise ValueError(f"seed must be 0 or 1, got {seed}")

    def close(self) -> None:
        """Nothing to free."""


def test_steps_and_answers_are_counted_and_seeds_begin_again(monkeypatch):
    monkeypatch.setattr(counted.envs, "make", lambda name, split: Door())
    spent = counted.Spent()
    first, second = (counted.counted("door", None, 2, spent)() for _ in range(2))
    assert (first.max_steps, first.actions) == (1, ("open",))
    assert first.reset(6)[0] == "door 0"
    assert second.reset(7)[0] == "door 1"
    first.check_seed(11)
    assert first.expert_action() == "open"
    with pytest.raises(ExpertUnavailable):
        second.expert_action()
    first.step("open")
    second.step("open")
    assert spent == counted.Spent(env_steps=2, expert_answers=1)
    with pytest.raises(ValueError, match="must be 0 or 1, got 11"):
        counted.counted("door", None, None, spent)().check_seed(11)


def cell(run: int, arm: str, success: list[int]) -> dict[str, Any]:
    values = {"success": success, "reward": [0.5 * s for s in success]}
    costs = dict.fromkeys(rivals.COSTS, 7)
    return {
        "environment": "e",
        "demonstrations": 4,
        "run": run,
        "arm": arm,
        "values": values,
    } | costs


CELLS = [
    *(cell(run, "SFT", [0, 0, run, 1]) for run in range(3)),
    *(cell(run % 2, "RFT", [1, 0, 1, 1]) for run in range(2)),
    *(cell(run, rivals.RIVALS[2], [1, 1, 1, 1]) for run in range(3)),
]


def test_arms_are_compared_within_runs():
    found = rivals.compare(CELLS, "RFT", "SFT", "success")
    assert found is not None
    assert found.per_run == (50.0, 25.0)  # run 2 has no RFT
    by_hand = bootstrap_runs([np.array([100, 0, 100, 0]), np.array([100, 0, 0, 0])])
    assert found == by_hand
    assert rivals.compare(CELLS, "ETO", "SFT", "success") is None


def test_every_comparison_is_reported():
    table = rivals.table(CELLS)
    best = rivals.RIVALS[2]
    assert "**e, 4 demonstrations**" in table
    for first, second in (("RFT", "SFT"), (best, "SFT"), ("RFT", best)):
        assert f"| {first} − {second} |" in table
    assert f"| SFT − {best} |" not in table  # it is there the other way round
    assert "| RFT | 2 | 75.0 | 37.5 | 7 | 7 | 7 | 7 | 7 |" in table


def test_what_is_tuned_is_not_in_the_result(capsys, monkeypatch):
    tuned = next(iter(rivals.TUNED))
    monkeypatch.setattr(sys, "argv", ["rivals.py", "--arms", tuned])
    with pytest.raises(SystemExit):
        rivals.main()
    assert "on dev runs alone: add --dev" in capsys.readouterr().err


def test_what_is_measured_is_reported_without_training(capsys, monkeypatch, tmp_path):
    kept = rivals.Cell("babyai:GoToLocalS6N2", 64, 1, "RFT").file(tmp_path)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(cell(1, "RFT", [1, 0, 1, 1]) | {"options": rivals.ARMS["RFT"]}))
    result = tmp_path / "r.json"
    options = ["--measured", "--output", str(tmp_path), "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["rivals.py", *options])
    rivals.main()
    assert "| RFT | 1 | 75.0 |" in capsys.readouterr().out
    assert [c["arm"] for c in json.loads(result.read_text())["cells"]] == ["RFT"]
    assert result.with_suffix(".md").read_text().startswith("**e, 4 demonstrations**")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["GiGPO", "ETO", rivals.RIVALS[2]])
def test_a_cell_is_measured_once_and_is_the_same_again(arm, monkeypatch, tmp_path):
    pytest.importorskip("minigrid")
    tiny = replace(
        rivals_settings.Setting(),
        sft_epochs=1,
        cycles=1,
        epochs_per_cycle=1,
        measured=(3, 3),
        hidden_size=16,
        layers=1,
        batch_size=4,
    )
    monkeypatch.setattr(rivals, "setting_of", lambda name: tiny)
    one = rivals.Cell("babyai:GoToLocalS6N2", 8, 0, arm)
    first, again = (rivals.run_cell(one, tmp_path / name, None) for name in "ab")
    seconds = {"seconds": None}
    assert first | seconds == again | seconds
    each = rivals.ARMS[arm].get("samples", 1)
    assert first["env_steps"] == 8 * each * tiny.steps[1]  # an untrained agent never arrives
    assert (first["expert_answers"] > 0) == (arm == rivals.RIVALS[2])
    assert str(tmp_path) not in json.dumps(first)
    shown = load_run(one.board(tmp_path / "a"))
    assert [float(e.success) for e in shown.episodes] == first["values"]["success"]
    assert len(shown.cycles) == 1
    monkeypatch.setattr(rivals.Run, "train", None)  # it is read, and not trained again
    assert rivals.run_cell(one, tmp_path / "a", None) == first
    monkeypatch.setitem(rivals.ALL, arm, rivals.ARMS[arm] | {"learning_rate": 1e-5})
    with pytest.raises(TypeError, match="not callable"):  # other options: it would be trained
        rivals.run_cell(one, tmp_path / "a", None)
