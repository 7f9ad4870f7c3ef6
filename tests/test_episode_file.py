"""Runs that are stopped in any way go on in their file, and end as if they had never been."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_envs
import pytest
from click.testing import CliRunner, Result
from hostile_envs import LEVEL, Mortal
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent import envs, load_trajectories
from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.cli import main
from stepagent.records.episode_file import describe_seeds, open_episodes
from stepagent.records.episodes import Episode

SEEDS = [3, 1, 4, 15, 9, 2, 6]
RUN = {"env": LEVEL, "policy": "random", "max_steps": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that speaks BabyAI's words."""
    path = tmp_path_factory.mktemp("agent") / "model"
    tiny_agent().save_pretrained(path)
    babyai_tokenizer().save_pretrained(path)
    return path


def write(
    path: Path,
    seeds: list[int] = SEEDS,
    run: dict[str, Any] = RUN,
    stop: Callable[[Episode], None] = lambda _: None,
    **options: Any,
) -> list[int]:
    """Roll out what the file lacks; the seeds that were run."""
    with open_episodes(path, run, seeds) as file:
        missing = [seed for seed in seeds if seed not in file.ended]

        def on_end(episode: Episode) -> None:
            file.append(episode)
            stop(episode)

        env = options.pop("env", LEVEL)
        run_episodes(env, RandomPolicy(), missing, max_steps=5, on_end=on_end, **options)
    return missing


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def evaluate(path: Path, *options: object, policy: object = "expert") -> Result:
    common = ("evaluate", "--env", LEVEL, "--policy", policy, "--max-steps", 5, "--episodes", 8)
    return invoke(*common, "--output", path, *options, "--json")


# ------------------------------------------------------------------ what a file holds


def test_a_complete_file_is_in_the_order_of_its_seeds_and_says_its_run(tmp_path):
    path = tmp_path / "episodes.jsonl"
    assert write(path) == SEEDS
    trajectories = load_trajectories(path)
    assert [t.meta["seed"] for t in trajectories] == SEEDS
    assert all(t.meta["run"] == {**RUN, "seeds": "3,1,4,15,9,2,6"} for t in trajectories)
    whole = path.read_bytes()
    assert write(path) == []
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", [b"", b'{"messages": [' + b" " * 100_000])
def test_an_episode_is_on_disk_when_it_has_ended(tmp_path, torn):
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(torn)
    found = []
    write(path, stop=lambda e: found.append(json.loads(path.read_bytes().splitlines()[-1])))
    assert sorted(record["meta"]["seed"] for record in found) == sorted(SEEDS)


def test_seeds_are_written_as_they_are_asked_for():
    assert describe_seeds([0]) == "0"
    assert describe_seeds(range(100)) == "0-99"
    assert describe_seeds([3, 4, 5, 1, 2, 9]) == "3-5,1-2,9"


# ------------------------------------------------------------------ stopped and gone on


@pytest.mark.parametrize("batch_size", [64, 2])
def test_a_file_cut_at_any_byte_goes_on_to_the_same_file(tmp_path, batch_size):
    path = tmp_path / "episodes.jsonl"
    write(path, batch_size=batch_size)
    whole = path.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    cuts = [1, 5, 14, 15, ends[1] - 1, *ends, *random.Random(0).sample(range(len(whole)), 6)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        ended = sum(end <= cut for end in ends) - 1
        assert write(path, batch_size=batch_size) == SEEDS[ended:]
        assert path.read_bytes() == whole


def test_a_run_that_stops_at_any_episode_goes_on_to_the_same_file(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "episodes.jsonl"
    write(whole, batch_size=3)
    order: list[int] = []
    write(tmp_path / "order.jsonl", stop=lambda e: order.append(e.seed), batch_size=3)
    for last in range(1, len(SEEDS)):

        def stop(episode: Episode, last: int = last) -> None:
            if episode.seed == order[last - 1]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(path, stop=stop, batch_size=3)
        assert sorted(write(path, batch_size=3)) == sorted(order[last:])
        assert path.read_bytes() == whole.read_bytes()
        path.unlink()


def test_a_models_resumed_evaluation_is_the_undisturbed_one_to_the_bit(folder, tmp_path):
    """Its log-probs too, which the batch rounds: a batch that lacks one runs as a whole."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "episodes.jsonl"
    options = ("--batch-size", 4, "--max-new-tokens", 3)
    first = evaluate(whole, *options, policy=folder)
    assert first.exit_code == 0, first.stderr
    lines = whole.read_bytes().splitlines(keepends=True)
    records = [json.loads(line)["meta"] for line in lines]
    assert [record["seed"] for record in records] == list(range(8))
    assert {record["policy"] for record in records} == {str(folder)}
    for kept in ([0, 1, 2, 3], [5, 0, 2], [7]):
        path.write_bytes(b"".join(lines[k] for k in kept))
        again = evaluate(path, *options, policy=folder)
        assert path.read_bytes() == whole.read_bytes()
        assert f"{len(kept)} of 8 episodes are in {path}" in again.stderr
        assert json.loads(again.stdout) == json.loads(first.stdout) | {"output": str(path)}


def test_a_complete_file_needs_neither_environment_nor_model(folder, tmp_path, monkeypatch):
    path = tmp_path / "episodes.jsonl"
    first = evaluate(path, policy=folder)
    monkeypatch.setattr("stepagent.cli.rolling.load_model", None)
    monkeypatch.setattr("stepagent.acting.rollout.run_episodes", None)
    assert evaluate(path, policy=folder).stdout == first.stdout


def test_collect_goes_on_too_and_never_writes_what_it_drops(tmp_path):
    path = tmp_path / "expert.jsonl"
    command = ("collect", "--env", LEVEL, "--max-steps", 4, "--episodes", 8, "--output", path)
    report = json.loads(invoke(*command, "--json").stdout)
    whole = path.read_bytes()
    assert 0 < report["kept"] < report["episodes"] == 8
    lines = whole.splitlines(keepends=True)
    assert len(lines) == report["kept"]
    path.write_bytes(lines[2] + lines[0])
    assert json.loads(invoke(*command, "--json").stdout) == report
    assert path.read_bytes() == whole


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    path, whole = tmp_path / "episodes.jsonl", tmp_path / "whole.jsonl"
    evaluate(whole, "--batch-size", 2)
    expert = ExpertPolicy.act

    def interrupted(self: ExpertPolicy, observations: Any, envs: Any) -> Any:
        if path.exists() and path.read_bytes().count(b"\n") >= 4:
            raise KeyboardInterrupt
        return expert(self, observations, envs)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertPolicy, "act", interrupted)
        result = evaluate(path, "--batch-size", 2)
    assert result.exit_code == 130
    assert result.stdout == ""
    note = f"Interrupted: 4 of 8 episodes are in {path}; the same command continues\n"
    assert result.stderr.endswith(note)
    assert evaluate(path, "--batch-size", 2).exit_code == 0
    assert path.read_bytes() == whole.read_bytes()


def test_what_stops_a_run_says_what_there_is(tmp_path, monkeypatch):
    path = tmp_path / "episodes.jsonl"
    broken = hostile_envs.hostile("raises", *range(2, 20), at=0)
    monkeypatch.setattr(envs, "factory", lambda *_: broken)
    command = ("evaluate", "--env", "hostile:", "--policy", "expert", "--episodes", 20)
    result = invoke(*command, "--batch-size", 2, "--output", path)
    assert "10 episodes in a row crashed" in str(result.exception)
    assert result.stderr.endswith(f"2 of 20 episodes are in {path}; the same command continues\n")


SCRIPT = "from stepagent.cli import main; main()"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_file(folder, tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "episodes.jsonl"
    common = ("evaluate", "--env", LEVEL, "--policy", folder, "--max-steps", 8)
    command = [*map(str, common), "--batch-size", "4", "--episodes", "20", "--workers", "2"]
    assert invoke(*command, "--output", whole).exit_code == 0
    for after in (1, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *command, "--output", str(path)],
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") >= after:
                process.kill()
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        assert after <= path.read_bytes().count(b"\n") < 20
    assert invoke(*command, "--output", path).exit_code == 0
    assert path.read_bytes() == whole.read_bytes()


# ------------------------------------------------------------------ crashes


@pytest.mark.filterwarnings("ignore:.*crashed and have no outcome:RuntimeWarning")
def test_killing_workers_at_random_loses_no_finished_episode(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "run.jsonl"
    seeds = list(range(12))
    write(whole, seeds)
    ended: set[int] = set()

    def remember(episode: Episode) -> None:
        if episode.crashed is None:
            ended.add(episode.seed)

    crashes = 0
    while len(ended) < len(seeds):
        before = set(ended)
        with contextlib.suppress(RuntimeError):  # ten crashes in a row
            asked = write(path, seeds, env=Mortal, workers=2, stop=remember)
            assert set(asked) == set(seeds) - before
        there = [Episode.of(trajectory) for trajectory in load_trajectories(path)]
        assert {e.seed for e in there if e.crashed is None} == ended
        crashes += sum(e.crashed is not None for e in there)
    assert crashes
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.filterwarnings("ignore:.*crashed and have no outcome:RuntimeWarning")
def test_an_episode_that_crashed_is_in_the_file_and_is_tried_again(tmp_path):
    path, whole = tmp_path / "episodes.jsonl", tmp_path / "whole.jsonl"
    write(whole)
    write(path, env=hostile_envs.hostile("raises", 4, 9))
    there = {t.meta["seed"]: t for t in load_trajectories(path)}
    assert [seed for seed, t in there.items() if "crashed" in t.meta] == [4, 9]
    assert there[4].reward is None
    assert write(path, env=hostile_envs.hostile("raises", 9)) == [4, 9]
    again = {t.meta["seed"]: t for t in load_trajectories(path)}
    assert list(again) == SEEDS
    assert [seed for seed, t in again.items() if "crashed" in t.meta] == [9]
    assert write(path) == [9]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.filterwarnings("ignore:.*crashed and have no outcome:RuntimeWarning")
def test_a_crash_before_the_first_step_has_no_line(tmp_path):
    path = tmp_path / "episodes.jsonl"
    write(path, env=hostile_envs.hostile("raises", 4, at=0))
    assert [t.meta["seed"] for t in load_trajectories(path)] == [s for s in SEEDS if s != 4]
    other = tmp_path / "none.jsonl"
    write(other, [4], env=hostile_envs.hostile("raises", 4, at=0))
    assert not other.exists()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--max-steps", 6), "max_steps 5, not 6"),
        (("--policy", "random"), "policy 'expert', not 'random'"),
        (("--env", "babyai:GoToObj"), f"env '{LEVEL}', not 'babyai:GoToObj'"),
        (("--query-expert",), "query_expert False, not True"),
    ],
)
def test_the_file_of_another_run_is_refused_by_the_name_of_the_option(tmp_path, options, found):
    path = tmp_path / "episodes.jsonl"
    evaluate(path)
    whole = path.read_bytes()
    result = evaluate(path, *options)
    assert result.exit_code == 1
    assert f"Error: {path}:1 is of another run: it has {found}; write to another" in result.stderr
    assert path.read_bytes() == whole
    assert (
        "command 'evaluate', not 'collect'"
        in invoke(
            *("collect", "--env", LEVEL, "--max-steps", 5, "--episodes", 8, "--output", path)
        ).stderr
    )


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_a_finished_file_goes_on_to_more_episodes(tmp_path, policy):
    """``--episodes 4``, then 8, gives the file of ``--episodes 8``, to the byte."""
    whole, grown = tmp_path / "whole.jsonl", tmp_path / "grown.jsonl"
    evaluate(whole, policy=policy)
    assert evaluate(grown, "--episodes", 4, policy=policy).exit_code == 0
    result = evaluate(grown, policy=policy)
    assert result.exit_code == 0
    assert f"4 of 8 episodes are in {grown}" in result.stderr
    assert grown.read_bytes() == whole.read_bytes()
    # Other seeds before, between and after: the file is in their order.
    common = ("evaluate", "--env", LEVEL, "--policy", policy, "--max-steps", 5)
    assert invoke(*common, "--seeds", "9,0-7", "--output", grown).exit_code == 0
    assert [t.meta["seed"] for t in load_trajectories(grown)] == [9, *range(8)]


def test_a_file_with_episodes_that_are_not_asked_for_is_left_alone(tmp_path):
    path = tmp_path / "episodes.jsonl"
    evaluate(path)
    whole = path.read_bytes()
    result = evaluate(path, "--episodes", 7)
    assert result.exit_code == 1
    assert f"Error: {path}:8 is of another run: it has seed 7, not one of 0-6" in result.stderr
    assert path.read_bytes() == whole


def test_a_model_that_was_trained_further_is_another_run(folder, tmp_path):
    path = tmp_path / "episodes.jsonl"
    assert evaluate(path, policy=folder).exit_code == 0
    tiny_agent(seed=5).save_pretrained(folder)
    assert "it has fingerprint '" in evaluate(path, policy=folder).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": [], "meta": {}}\n', "1 is no record of stepagent evaluate or collect"),
        ("[1, 2]\n", "1 is no record of stepagent evaluate or collect"),
        ("{broken\n", "1: Expecting property name"),
        ("notes of mine", "ends with what stepagent evaluate or collect does not write"),
    ],
)
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, text, message):
    path = tmp_path / "episodes.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}:?{' ' if message[0] == 'e' else ''}{message}"):
        write(path)
    assert path.read_text() == text


def test_a_demonstration_file_is_no_run(tmp_path):
    path = tmp_path / "episodes.jsonl"
    (episode,) = run_episodes(LEVEL, ExpertPolicy(), [3])
    path.write_text(json.dumps(vars(episode.trajectory())) + "\n")
    with pytest.raises(ValueError, match="1 is of another run: it has no word of its run"):
        write(path)


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "episodes.jsonl"
    with open_episodes(path, RUN, SEEDS), pytest.raises(OSError, match="by another process"):
        write(path)
