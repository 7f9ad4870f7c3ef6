"""The benchmark of environments: raw replays agree with our episodes, a quick run is whole."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("minigrid")

SPEED = {
    "steps": 4,
    "ours_ms": 1.0,
    "listing_ms": 10.0,
    "ours_steps_per_second": 1000.0,
    "listing_steps_per_second": 100.0,
    "ratio": 10.0,
    "median_ratio_of_tasks": 10.0,
    "ratio_by_task": {"boil": 10.0},
}
FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    spec = importlib.util.spec_from_file_location("environments", FOLDER / "environments.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("common", None)


def test_a_raw_replay_is_the_episode(benchmark: Any) -> None:
    found = benchmark.expert_part("babyai:GoTo", None, range(2))
    assert (found["successes"], found["misses"]) == (2, [])
    one = benchmark.expert_part("babyai:GoTo", None, range(1, 2))
    steps = round(one["mean_steps"])
    assert benchmark.raw_babyai("GoTo", 1) == f"succeeds after {steps} steps"


def test_a_miss_is_replayed(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "expert", lambda env: "drop")
    found = benchmark.expert_part("babyai:GoToLocalS6N2", None, range(1))
    (miss,) = found["misses"]
    assert (miss["seed"], miss["success"]) == (0, False)
    assert miss["raw"].startswith("succeeds after")
    text = benchmark.text_of(
        {
            "speed scienceworld": SPEED,
            "expert babyai:GoToLocalS6N2": found,
            "random babyai:GoToLocalS6N2": {**found, "step_limit": None},
        }
    )
    assert "seed 0: no success" in text
    assert miss["raw"] in text


@pytest.mark.slow
def test_a_quick_run_is_whole_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("scienceworld")
    pytest.importorskip("textworld")
    path = tmp_path / "result.json"
    kept = {"speed scienceworld": SPEED}  # of a run that was stopped
    path.with_suffix(".partial.json").write_text(json.dumps(kept))
    command = [sys.executable, str(FOLDER / "environments.py"), "--quick", f"--json={path}"]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(path.read_text())
    assert result["speed scienceworld"] == kept["speed scienceworld"]
    experts = {name: part for name, part in result.items() if name.startswith("expert ")}
    assert len(experts) == 10
    assert all(part["success_rate"] == 1 for part in experts.values())
    assert all(result[f"random {name.removeprefix('expert ')}"] for name in experts)
    assert not path.with_suffix(".partial.json").exists()
    assert "No misses." in path.with_suffix(".md").read_text()
