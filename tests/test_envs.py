"""Text environments: BabyAI against the raw minigrid environment it is rendered from."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepagent import envs
from stepagent.envs import ExpertUnavailable, TextEnv

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("minigrid")

from minigrid.core.actions import Actions  # noqa: E402

from stepagent.envs.babyai import ACTIONS, VOCABULARY  # noqa: E402

# One room and mazes, objects and doors (locked ones too), single missions and sequences.
LEVELS = (
    "GoToLocalS6N2",
    "GoToLocal",
    "PickupLoc",
    "Open",
    "GoToSeqS5R2",
    "SynthS5R2",
    "BossLevel",
)


def raw_env(level: str, seed: int) -> tuple[Any, dict[str, Any]]:
    env = gymnasium.make(f"BabyAI-{level}-v0")
    obs, _ = env.reset(seed=seed)
    return env.unwrapped, obs


def random_walk(level: str, seed: int, steps: int) -> Iterator[tuple[str, Any]]:
    """Observations, and the raw environment in the same state (to be read before the next one)."""
    env, rng = envs.make(f"babyai:{level}"), random.Random(seed)
    raw, _ = raw_env(level, seed)
    observation, _ = env.reset(seed)
    yield observation.partition(" . ")[2], raw
    for _ in range(min(steps, env.max_steps)):
        # Mostly forward: a uniform walk does not leave its corner.
        action = rng.choice([*ACTIONS, "forward", "forward", "forward"])
        observation, _, terminated, truncated, _ = env.step(action)
        raw.step(Actions[action])
        yield observation, raw
        if terminated or truncated:
            return


def kind_of(mission: str) -> str:
    """Told from its words: how many verbs it has, and which."""
    verbs = re.findall("go to|pick up|open|put", mission)
    return "sequence" if len(verbs) > 1 else {"put": "put next to"}.get(verbs[0], verbs[0])


def follow_expert(env: TextEnv) -> tuple[bool, int]:
    """Whether the expert succeeds from where the environment is, and in how many steps."""
    steps, over = 0, False
    while not over:
        _, _, terminated, truncated, info = env.step(env.expert_action())
        steps, over = steps + 1, terminated or truncated
    return bool(info["success"]), steps


@pytest.mark.parametrize("level", LEVELS)
def test_text_actions_are_the_raw_environments_actions(level: str) -> None:
    env, rng = envs.make(f"babyai:{level}"), random.Random(0)
    for seed in range(3):
        raw, obs = raw_env(level, seed)
        observation, info = env.reset(seed)
        assert observation.startswith(f"mission : {obs['mission'].replace(',', ' ,')} . ")
        assert info.items() >= {"valid": True, "success": False, "progress": 0.0}.items()
        assert info["task"] == kind_of(obs["mission"])
        assert env.max_steps == raw.max_steps
        over, progress = False, 0.0
        while not over:
            expert = rng.random() < 0.9
            action = env.expert_action() if expert else rng.choice(ACTIONS)
            _, reward, terminated, truncated, info = env.step(action)
            _, *expected, _ = raw.step(Actions[action])
            assert [reward, terminated, truncated] == expected
            assert info["valid"]
            assert info["success"] == (terminated and expected[0] > 0)
            assert progress <= info["progress"] <= 1.0
            assert (info["progress"] == 1.0) == info["success"]
            over, progress = terminated or truncated, info["progress"]


def objects_in_view(raw: Any) -> Iterator[tuple[str, int, int, bool]]:
    """Each object's text, steps ahead and to the right, and whether it is seen, from the map."""
    _, visible = raw.gen_obs_grid()
    for x in range(raw.grid.width):
        for y in range(raw.grid.height):
            cell, view = raw.grid.get(x, y), raw.relative_coords(x, y)
            offset = (x - raw.agent_pos[0], y - raw.agent_pos[1])
            if cell is None or cell.type == "wall" or view is None or offset == (0, 0):
                continue
            state = ""
            if cell.type == "door":
                state = "locked " if cell.is_locked else "open " if cell.is_open else "closed "
            ahead, right = int(offset @ raw.dir_vec), int(offset @ raw.right_vec)
            place = [("ahead", ahead), ("left", -right), ("right", right)]
            words = " ".join(f"{direction} {steps}" for direction, steps in place if steps > 0)
            yield f"{state}{cell.color} {cell.type} {words}", ahead, right, bool(visible[view])


def walls_in_sight(raw: Any) -> str:
    """Walk in each direction until a wall; a closed door or the view's edge ends the sight."""
    rays = {"ahead": raw.dir_vec, "left": -raw.right_vec, "right": raw.right_vec}
    words = []
    for direction, vector in rays.items():
        for steps in range(1, 7 if direction == "ahead" else 4):
            cell = raw.grid.get(*(raw.agent_pos + steps * vector))
            if cell is not None and not cell.see_behind():
                words += [f"{direction} {steps}"] if cell.type == "wall" else []
                break
    return " ".join(words)


@pytest.mark.parametrize("level", LEVELS)
def test_a_view_lists_what_is_in_sight_once_nearest_first_and_nothing_hidden(level: str) -> None:
    for seed in range(6):
        for observation, raw in random_walk(level, seed, steps=40):
            seen = [(a + abs(r), a, r, text) for text, a, r, seen in objects_in_view(raw) if seen]
            expected = [text for *_, text in sorted(seen)]
            if raw.carrying is not None:
                expected.append(f"carrying {raw.carrying.color} {raw.carrying.type}")
            if walls := walls_in_sight(raw):
                expected.append(f"walls {walls}")
            assert observation.split(" , ") == (expected or ["nothing"])


def test_some_objects_in_view_are_hidden() -> None:
    """Otherwise the test above says nothing about sight."""
    walk = random_walk("BossLevel", 0, steps=60)
    assert any(not seen for _, raw in walk for *_, seen in objects_in_view(raw))


def test_vocabulary_is_closed_and_all_words_of_its_own_are_single() -> None:
    assert set(ACTIONS) <= set(VOCABULARY)
    assert all(word == word.lower() and len(word.split()) == 1 for word in VOCABULARY)
    for level in (*LEVELS, "PutNextLocal", "UnlockPickup", "OpenDoorLoc", "MiniBossLevel"):
        env = envs.make(f"babyai:{level}")
        for seed in range(30):
            observation, _ = env.reset(seed)
            assert set(observation.split()) <= set(VOCABULARY)
        observation, *_ = env.step("invalid")
        assert set(observation.split()) <= set(VOCABULARY)
        for observation, _ in random_walk(level, 0, steps=50):
            assert set(observation.split()) <= set(VOCABULARY)


@pytest.mark.parametrize("level", ["GoToLocalS6N2", "GoToLocal", "PickupLoc", "GoTo", "Open"])
def test_the_expert_solves_every_episode_from_reset(level: str) -> None:
    env = envs.make(f"babyai:{level}")
    for seed in range(10):
        env.reset(seed)
        success, steps = follow_expert(env)
        assert success
        assert steps < env.max_steps


@pytest.mark.parametrize("level", ["GoToLocalS6N2", "GoToLocal", "GoTo", "Open", "BossLevel"])
def test_the_expert_solves_the_task_from_where_a_random_policy_has_led(level: str) -> None:
    env, rng = envs.make(f"babyai:{level}"), random.Random(0)
    for seed in range(10):
        env.reset(seed)
        over = False
        for _ in range(15):
            if not over:
                _, _, terminated, truncated, _ = env.step(rng.choice(ACTIONS))
                over = terminated or truncated
        assert over or follow_expert(env)[0]


def test_asking_the_expert_changes_nothing() -> None:
    """Asked twice at every state or never: the same answers in the same episode."""
    asked, unasked = envs.make("babyai:PickupLoc"), envs.make("babyai:PickupLoc")
    rng = random.Random(0)
    assert asked.reset(3) == unasked.reset(3)
    for _ in range(20):
        assert asked.expert_action() == asked.expert_action()
        action = rng.choice(("left", "right", "forward", "drop"))
        assert asked.step(action) == unasked.step(action)
    assert asked.expert_action() == unasked.expert_action()


def test_the_expert_goes_on_after_the_agent_has_destroyed_a_box() -> None:
    """Opening a box destroys it, and minigrid's bot gives up."""
    env, destroyed = envs.make("babyai:GoToLocal"), 0
    for seed in range(30):
        observation, _ = env.reset(seed)
        over = " box" in observation.partition(" . ")[0]  # the target, perhaps
        while not over:  # walk straight on until there is a box
            action = "toggle" if re.search(r"box ahead 1( ,|$)", observation) else "forward"
            before = observation
            observation, _, terminated, truncated, _ = env.step(action)
            over = terminated or truncated or observation == before
            if action == "toggle":
                assert follow_expert(env)[0]
                destroyed, over = destroyed + 1, True
    assert destroyed > 0


def test_the_expert_says_so_where_the_target_is_destroyed() -> None:
    env = envs.make("babyai:PickupLoc")
    observation, _ = env.reset(2)
    assert "pick up the yellow box" in observation
    while (action := env.expert_action()) != "pickup":
        env.step(action)
    env.step("toggle")
    with pytest.raises(ExpertUnavailable, match="pick up the yellow box"):
        env.expert_action()


@pytest.mark.parametrize("action", ["", "jump", "Left", "turn left", "left right", "done"])
def test_an_invalid_action_is_a_step_that_changes_nothing(action: str) -> None:
    env, twin = envs.make("babyai:GoToLocal"), envs.make("babyai:GoToLocal")
    first, _ = env.reset(7)
    twin.reset(7)
    advice = env.expert_action()
    view = first.partition(" . ")[2]
    observation, reward, terminated, truncated, info = env.step(action)
    assert observation == f"invalid action . {view}"
    assert (reward, terminated, truncated) == (0.0, False, False)
    expected = {"valid": False, "success": False, "progress": 0.0, "task": "go to"}
    assert info == {**expected, "difficulty": "easy", "invalid": "unknown action"}
    assert env.expert_action() == advice
    assert env.step("left") == twin.step("left")


def things(mission: str) -> int:
    """Told from its words: each verb is a thing to be done, and what is put is picked up before."""
    return len(re.findall("go to|pick up|open|put", mission)) + mission.count("put")


@pytest.mark.parametrize("level", ["PutNextLocal", "GoToSeqS5R2", "SynthS5R2", "BossLevel"])
def test_progress_is_the_share_of_the_things_that_are_done(level: str) -> None:
    env = envs.make(f"babyai:{level}")
    for seed in range(6):
        observation, info = env.reset(seed)
        count = things(observation.partition(" . ")[0])
        assert info["difficulty"] == ("hard" if count > 1 else "easy")
        seen, over = {0.0}, False
        while not over:
            _, _, terminated, truncated, info = env.step(env.expert_action())
            seen.add(info["progress"])
            over = terminated or truncated
        steps = {number / count for number in range(count + 1)}
        assert seen <= steps
        if level == "PutNextLocal" and info["success"]:
            assert seen == {0.0, 0.5, 1.0}, "half of it once it is carried, though it is put down"


def test_invalid_actions_use_up_the_steps() -> None:
    env = envs.make("babyai:GoToLocalS6N2")
    env.reset(0)
    truncations = [env.step("jump")[3] for _ in range(env.max_steps)]
    assert truncations == [False] * (env.max_steps - 1) + [True]
    with pytest.raises(RuntimeError, match="reset"):
        env.step("left")


def test_the_same_seed_is_the_same_episode_whatever_came_before() -> None:
    def episode(env: TextEnv, seed: int) -> list[Any]:
        record: list[Any] = [env.reset(seed)]
        over = False
        while not over:
            record.append(env.step(env.expert_action()))
            over = record[-1][2] or record[-1][3]
        return record

    env, other = envs.make("babyai:GoToLocal"), envs.make("babyai:GoToLocal")
    first = episode(env, 5)
    assert episode(env, 6) != first
    env.reset(8)
    env.step("forward")
    assert episode(other, 5) == episode(env, 5) == first


@pytest.mark.parametrize("call", [lambda env: env.step("left"), lambda env: env.expert_action()])
def test_an_episode_has_to_run(call: Callable[[TextEnv], object]) -> None:
    env = envs.make("babyai:GoToLocalS6N2")
    with pytest.raises(RuntimeError, match="reset"):
        call(env)
    env.reset(0)
    follow_expert(env)
    with pytest.raises(RuntimeError, match="reset"):
        call(env)


def test_levels_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    env = envs.make("babyai:GoTo")  # rejects some of the layouts it draws, with a print
    for seed in range(10):
        env.reset(seed)
    assert capfd.readouterr() == ("", "")


def test_every_level_of_minigrid_is_there() -> None:
    levels = [id.split("-")[1] for id in gymnasium.registry if id.startswith("BabyAI-")]
    assert len(levels) == len(set(levels)) > 90
    for level in levels:
        env = envs.make(f"babyai:{level}")
        observation, info = env.reset(0)
        mission = observation.partition(" . ")[0].removeprefix("mission : ").replace(" ,", ",")
        assert info["task"] == kind_of(mission)
        assert env.expert_action() in ACTIONS
        assert env.step("left")[4]["valid"]
        env.close()


def test_names() -> None:
    env = envs.make("babyai:GoToObjS6")  # BabyAI-GoToObjS6-v1
    assert env.name == "babyai:GoToObjS6"
    assert env.actions == ACTIONS
    env.close()
    with pytest.raises(ValueError, match=r"one of .*babyai.*'chess:e4'"):
        envs.make("chess:e4")
    with pytest.raises(ValueError, match=r"GoToLocalS6N2.*got 'GoToLocalS6'"):
        envs.make("babyai:GoToLocalS6")


def test_a_registered_environment_is_made_by_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "_factories", dict(envs._factories))
    envs.register("again", lambda task: envs.make(f"babyai:{task}"))
    assert envs.make("again:GoToObj").name == "babyai:GoToObj"
    with pytest.raises(ValueError, match="'again'"):
        envs.register("again", envs.make)
    with pytest.raises(ValueError, match="'a:b'"):
        envs.register("a:b", envs.make)


def test_a_split_reaches_the_factories_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "_factories", dict(envs._factories))
    monkeypatch.setattr(envs, "_splits", dict(envs._splits))
    made = []

    def factory(*arguments: str) -> TextEnv:
        made.append(arguments)
        return envs.make("babyai:GoToObj")

    envs.register("parts", factory, splits=("train", "test"))
    envs.make("parts:one")
    envs.make("parts:one", "test")
    envs.factory("parts", split="train")()
    assert made == [("one", "train"), ("one", "test"), ("", "train")]
    with pytest.raises(ValueError, match="'parts' must be one of train, test, got 'dev'"):
        envs.make("parts", "dev")
    with pytest.raises(ValueError, match="'babyai' must be None, got 'test'"):
        envs.factory("babyai:GoToObj", "test")


def test_importing_envs_needs_no_minigrid_and_making_one_names_the_extra() -> None:
    code = """
import sys
sys.modules["minigrid"] = None
import stepagent.envs
assert "gymnasium" not in sys.modules
try:
    stepagent.envs.make("babyai:GoToLocal")
except ImportError as error:
    assert "pip install 'stepagent[demo]'" in str(error), error
else:
    raise AssertionError("made without minigrid")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
