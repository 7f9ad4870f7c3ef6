"""TextWorld through our interface: real games, made here from their seeds."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepagent import envs
from stepagent.envs import ExpertUnavailable

pytest.importorskip("textworld")

from textworld import EnvInfos

from stepagent.envs.textworld import make_game, parse_size, start_game


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    """Its games stay made as long as it is open."""
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
    folder = other._folder
    assert list(folder.iterdir())
    other.close()
    other.close()
    assert not folder.exists()


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
        with pytest.raises(ValueError, match="unknown TextWorld size"):
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
