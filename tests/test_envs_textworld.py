"""TextWorld through our interface: real games, made here from their seeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepagent import envs
from stepagent.envs import ExpertUnavailable

pytest.importorskip("textworld")

from textworld import EnvInfos

from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.envs.textworld import game_folder, kept_game, make_game, parse_size, start_game


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the games are kept."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPAGENT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def env(cache: Path) -> Iterator[Any]:
    env = envs.make("textworld")
    yield env
    env.close()


def test_the_expert_wins_and_the_game_agrees(env: Any, tmp_path: Path) -> None:
    observation, info = env.reset(0)
    infos = EnvInfos(policy_commands=True, won=True, score=True, max_score=True)
    path = make_game(tmp_path / "again.z8", parse_size(""), 0)
    raw = start_game(path, infos)
    state, paid, progress, over = raw.reset(), 0.0, 0.0, False
    assert observation.startswith(state.objective or "Get ready to pick stuff up")
    assert info == {
        "valid": True,
        "success": False,
        "progress": 0.0,
        "task": "rooms=3,objects=6,quest=4",
        "difficulty": "easy",
    }
    while not over:
        assert env.expert_action() == env.expert_action() == state.policy_commands[0]
        observation, reward, over, truncated, info = env.step(state.policy_commands[0])
        state, _, _ = raw.step(state.policy_commands[0])
        paid += reward
        assert paid == state.score / state.max_score
        assert progress < info["progress"] <= 1.0
        assert (info["progress"] == 1.0) == info["success"] == state.won == over
        assert info["valid"]
        assert not truncated
        progress = info["progress"]
    raw.close()
    assert paid == 1.0
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look")
    with pytest.raises(RuntimeError, match="reset"):
        env.expert_action()


def test_an_observation_is_the_games_text_alone(env: Any) -> None:
    observation, _ = env.reset(0)
    assert observation.count("-= ") == 1
    look, *_ = env.step("look")
    assert look == observation.partition("\n\n")[2]
    inventory, *_ = env.step("inventory")
    assert inventory.startswith("You are carrying")
    assert "\n>" not in look + inventory
    assert "-=" not in inventory  # the status line


@pytest.mark.parametrize("action", ["quit", "restart", "", "Look", "sing", "take everything"])
def test_what_is_not_admissible_does_not_reach_the_game(env: Any, action: str) -> None:
    env.reset(0)
    before, advice = env.admissible_actions(), env.expert_action()
    observation, reward, terminated, truncated, info = env.step(action)
    assert "not an admissible command" in observation
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["valid"], info["invalid"]) == (False, "inadmissible action")
    assert (env.admissible_actions(), env.expert_action()) == (before, advice)


def test_the_expert_wins_from_where_a_random_policy_has_led(env: Any) -> None:
    rng, won = random.Random(0), 0
    for _ in range(5):
        env.reset(0)
        over, progress = False, 0.0
        for step in range(40):
            if over:
                break
            try:
                chosen = rng.choice(env.admissible_actions()) if step < 15 else env.expert_action()
            except ExpertUnavailable:
                break
            _, _, over, _, info = env.step(chosen)
            assert progress <= info["progress"]
            progress = info["progress"]
        won += info["success"]
    assert won >= 4


def test_a_seed_is_a_game(env: Any) -> None:
    first, second = env.reset(0)[0], env.reset(1)[0]
    assert first != second
    other: Any = envs.make("textworld:rooms=3,objects=6,quest=4")
    assert other.name == "textworld:rooms=3,objects=6,quest=4"
    assert other.reset(1)[0] == second
    assert env.reset(0)[0] == first
    other.close()
    other.close()


def test_steps_run_out(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "max_steps", 3)
    env.reset(0)
    ends = [env.step(action)[2:4] for action in ("sing", "look", "sing")]
    assert ends == [(False, False), (False, False), (False, True)]


def test_sizes() -> None:
    assert parse_size("") == parse_size("easy") == {"rooms": 3, "objects": 6, "quest": 4}
    assert parse_size("hard") == {"rooms": 10, "objects": 20, "quest": 10}
    assert parse_size("quest=7,rooms=2") == {"rooms": 2, "objects": 6, "quest": 7}
    for wrong in ("medium", "rooms=0", "rooms", "doors=2", "rooms=2,", "rooms=2 ", "rooms=-1"):
        with pytest.raises(ValueError, match="size of TextWorld must be "):
            envs.make(f"textworld:{wrong}")


def test_a_long_quest_is_hard() -> None:
    env = envs.make("textworld:rooms=2,objects=4,quest=6")
    assert env.reset(0)[1]["difficulty"] == "hard"
    env.close()


def test_without_the_package_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    monkeypatch.delitem(sys.modules, "stepagent.envs.textworld")
    with pytest.raises(ImportError, match=r"pip install 'stepagent\[textworld\]'"):
        envs.make("textworld")


# ------------------------------------------------------------------ games that are kept


def test_a_game_is_made_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: Any
) -> None:
    first = env.reset(3)[0]
    monkeypatch.setenv("STEPAGENT_CACHE", str(tmp_path))
    path = Path(kept_game(game_folder(), parse_size(""), 3))
    assert path.is_relative_to(game_folder())
    made = path.stat().st_mtime_ns
    again: Any = envs.make("textworld")
    assert again.reset(3)[0] == first
    again.close()
    assert path.stat().st_mtime_ns == made
    assert [p.name for p in path.parent.parent.iterdir()] == ["3"]  # nothing half made is left


def test_games_of_a_batch_are_made_side_by_side_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: Any
) -> None:
    one_by_one = [env.reset(seed)[0] for seed in (5, 6, 7)]
    monkeypatch.setenv("STEPAGENT_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    other: Any = envs.make("textworld")
    other.prepare([5, 6, 7])
    kept = sorted(path.name for path in (game_folder() / "rooms3-objects6-quest4").iterdir())
    assert kept == ["5", "6", "7"]
    assert [other.reset(seed)[0] for seed in (5, 6, 7)] == one_by_one
    other.close()


def test_a_run_prepares_its_batch(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[list[int]] = []

    def make() -> Any:
        own: Any = envs.make("textworld")
        own.prepare = lambda seeds: prepared.append(list(seeds))
        return own

    run_episodes(make, ExpertPolicy(), [0, 1, 2], batch_size=2, max_steps=1)
    assert prepared == [[0, 1]]


def test_what_a_killed_process_began_to_make_is_removed(cache: Path) -> None:
    folder = game_folder() / "rooms3-objects6-quest4"
    old, new = folder / ".7-old", folder / ".8-new"
    for making in (old, new):
        making.mkdir(parents=True)
    os.utime(old, (0, 0))
    envs.make("textworld").close()
    assert (old.exists(), new.exists()) == (False, True)
    new.rmdir()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_textworld_does_not_take_is_refused_before_anything_begins(seed: int) -> None:
    with pytest.raises(
        ValueError, match=rf"seed of textworld must lie in \[0, 4294967296\), got {seed}"
    ):
        run_episodes("textworld", ExpertPolicy(), [0, seed])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_leaves_nothing_half_made(workers: int) -> None:
    """A run that is ended while games are made, in its own process or in a worker."""
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's path has 108 bytes
        _end_a_run(workers, Path(folder))


def _end_a_run(workers: int, folder: Path) -> None:
    own = {"STEPAGENT_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "stepagent", "evaluate", "--env", "textworld"]
    options = ["--policy", "expert", "--episodes", "40", "--workers", str(workers)]
    process = subprocess.Popen(
        [*command, *options], env=os.environ | own, stderr=subprocess.PIPE, text=True
    )
    games = folder / "cache" / "textworld"
    deadline = time.monotonic() + 120
    while not list(games.glob("*/*/[0-9]*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert list(games.glob("*/*/.*")) == []
    assert [path.name for path in (folder / "tmp").iterdir()] == []
