"""docs/environments.md: its programs run, and the environment that it registers keeps the rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stepagent import envs
from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes

pytest.importorskip("minigrid")

PAGE = Path(__file__).parents[1] / "docs" / "environments.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "_factories", dict(envs._factories))


def test_the_first_program_runs() -> None:
    exec(PROGRAMS[0], {})


def test_ones_own_environment_is_made_by_name_and_plays() -> None:
    assert len(PROGRAMS) == 2
    exec(PROGRAMS[1], {})
    env: Any = envs.make("guess")
    assert env.reset(13)[1] == {"valid": True, "success": False, "progress": 0.0}
    assert env.step("x")[4] == {"valid": False, "success": False, "progress": 0.0}
    assert env.step("3")[1:4] == (1.0, True, False)
    (expert,) = run_episodes("guess", ExpertPolicy(), [4])
    assert (expert.actions, expert.success) == (["4"], True)
    guesses = run_episodes("guess", RandomPolicy(), range(40))
    assert {len(episode.actions) for episode in guesses} > {1, 10}
    assert 0 < sum(episode.success for episode in guesses) < 40


def test_every_registered_environment_is_in_the_table() -> None:
    table = "\n".join(line for line in PAGE.read_text().split("\n") if line.startswith("| `"))
    for prefix in envs._factories:
        assert f"`{prefix}" in table
