"""Branch files: written by parts, by processes that die, and read back as they were."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from completions_server import CompletionsServer, hang
from tiny_models import babyai_tokenizer, random_trunks, tiny_agent, tiny_model

from stepagent import (
    Trajectory,
    Trunk,
    inspect,
    load_branches,
    pack_step_pairs,
    save_trajectories,
)
from stepagent.cli import main
from stepagent.records.branches import BranchWriter, Shard, fingerprint

TRAJECTORIES = 10
CHUNK = 3
RUN = {"seed": 5, "temperature": 1.0}


class Stop(Exception):
    """What ends a run in its middle."""


class Agent:
    """Draws as `inspect` does with a tiny model, and counts."""

    def __init__(self, last: int = 1000) -> None:
        self.model = tiny_model("llama")
        self.last = last  # the chunk in which the run ends
        self.firsts: list[int] = []

    def __call__(self, trunks: Sequence[Trunk], first: int) -> Any:
        if len(self.firsts) == self.last:
            raise Stop
        self.firsts.append(first)
        options = {"samples": 2, "max_new_tokens": 4, "seed": 5, "first_trunk": first}
        return inspect(self.model, trunks, **options)


@pytest.fixture(scope="module")
def trunks() -> list[Trunk]:
    return random_trunks(np.random.default_rng(0), count=TRAJECTORIES)[0]


def inspection(trunks: Sequence[Trunk], agent: Callable[..., Any], **run: Any) -> BranchWriter:
    message = {"role": "assistant", "content": "go"}
    trajectories = [
        Trajectory([message] * trunk.num_steps, id=None if i % 2 else f"t{i}")
        for i, trunk in enumerate(trunks)
    ]
    return BranchWriter(trajectories, trunks, agent, lambda ids: f"{len(ids)} tokens", RUN | run)


def write(
    path: Path,
    trunks: Sequence[Trunk],
    agent: Agent | None = None,
    shard: Shard | None = None,
    **run: Any,
) -> bytes:
    chunks = (shard or Shard()).chunks(len(trunks), CHUNK)
    inspection(trunks, agent or Agent(), **run).write(path, chunks)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(trunks: list[Trunk], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an undisturbed run."""
    return write(tmp_path_factory.mktemp("whole") / "steps.jsonl", trunks)


def assert_holds(path: Path, trunks: Sequence[Trunk]) -> None:
    """The trunks, and what `inspect` gives chunk by chunk, to the bit."""
    agent = Agent()
    expected = [
        steps
        for start in range(0, len(trunks), CHUNK)
        for steps in agent(trunks[start : start + CHUNK], start)
    ]
    read, branches = load_branches(path)
    for trunk, other, steps, others in zip(read, trunks, branches, expected, strict=True):
        np.testing.assert_array_equal(trunk.input_ids, other.input_ids)
        np.testing.assert_array_equal(trunk.action_spans, other.action_spans)
        for tried, wanted in zip(steps, others, strict=True):
            for branch, want in zip(tried, wanted, strict=True):
                np.testing.assert_array_equal(branch.token_ids, want.token_ids, strict=True)
                np.testing.assert_array_equal(branch.logps, want.logps, strict=True)
    assert len(pack_step_pairs(read, branches)) == 1


# ------------------------------------------------------------------ what a file holds


def test_a_file_holds_what_inspect_gave(trunks, whole, tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(whole)
    assert_holds(path, trunks)
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["index"] for record in records] == list(range(TRAJECTORIES))
    assert [record["id"] for record in records[:3]] == ["t0", None, "t2"]
    for record in records:
        assert record["run"] == RUN
        for step in record["steps"]:
            assert step["expert"] == "go"
            assert [s["text"] for s in step["samples"]] == [
                f"{len(s['token_ids'])} tokens" for s in step["samples"]
            ]


def test_parquet_holds_the_same(trunks, whole, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "steps.parquet"
    write(path, trunks)
    assert_holds(path, trunks)
    rows = pq.read_table(path).to_pylist()
    records = [json.loads(line) for line in whole.splitlines()]
    assert all(row.pop("rewinds") is None for row in rows)  # a column that JSON leaves out
    assert [{**row, "run": json.loads(row["run"])} for row in rows] == records
    assert list(tmp_path.iterdir()) == [path]


def test_shards_one_after_the_other_are_the_whole(trunks, whole, tmp_path):
    for count in 1, 2, 3, 7:
        shards = [Shard(i, count) for i in range(count)]
        paths = [shard.path(tmp_path / f"{count}.jsonl") for shard in shards]
        parts = [write(path, trunks, shard=s) for path, s in zip(paths, shards, strict=True)]
        assert b"".join(parts) == whole
        if count > 1:
            assert paths[1].name == f"{count}-00001-of-{count:05d}.jsonl"
    assert len(load_branches(*paths)[0]) == TRAJECTORIES


def test_parquet_takes_a_shard_that_is_empty(trunks, tmp_path):
    pytest.importorskip("pyarrow")
    paths = [tmp_path / f"{i}.parquet" for i in range(7)]
    for i, path in enumerate(paths):
        write(path, trunks, shard=Shard(i, 7))
    assert len(load_branches(*paths)[0]) == TRAJECTORIES
    assert load_branches(paths[0]) == ([], [])


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_run_goes_on_where_it_stopped(trunks, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    undisturbed = write(tmp_path / f"undisturbed{suffix}", trunks)
    path = tmp_path / f"steps{suffix}"
    with pytest.raises(Stop):
        write(path, trunks, Agent(last=2))
    agent = Agent()
    assert write(path, trunks, agent) == undisturbed
    assert agent.firsts == [6, 9]
    agent = Agent()
    assert write(path, trunks, agent) == undisturbed
    assert agent.firsts == []  # all is there


def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(trunks, whole, tmp_path):
    """Wherever a write was torn; whole lines are never touched again."""
    path = tmp_path / "steps.jsonl"
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    rng = np.random.default_rng(1)
    torn = [end - 1 for end in ends] + rng.integers(len(whole), size=12).tolist()
    for cut in [0, 1, 5, 11, 20, *ends, *torn]:
        path.write_bytes(whole[:cut])
        agent = Agent()
        assert write(path, trunks, agent) == whole
        done = sum(end <= cut for end in ends)
        chunks = Shard().chunks(TRAJECTORIES, CHUNK)
        assert agent.firsts == [chunk.start for chunk in chunks if done < chunk.stop]


def test_a_run_that_could_not_begin_leaves_nothing(trunks, tmp_path):
    with pytest.raises(Stop):
        write(tmp_path / "steps.jsonl", trunks, Agent(last=0))
    assert list(tmp_path.iterdir()) == []


def changed(trunks: Sequence[Trunk], place: int) -> list[Trunk]:
    trunk = trunks[place]
    ids = trunk.input_ids.copy()
    ids[0] += 1
    return [*trunks[:place], Trunk(ids, trunk.action_spans), *trunks[place + 1 :]]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_two_runs_are_never_mixed(trunks, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"steps{suffix}"
    before = write(path, trunks)
    line = "steps.jsonl:1 " if suffix == ".jsonl" else "row 0 "
    with pytest.raises(
        ValueError, match=rf"{line}is of another run: it has seed 5, not 6; write to"
    ):
        write(path, trunks, seed=6)
    with pytest.raises(ValueError, match="is of another run: it has samples None, not 3"):
        write(path, trunks, samples=3)
    with pytest.raises(ValueError, match="it has other data as trajectory 4"):
        write(path, changed(trunks, 4))
    with pytest.raises(ValueError, match="it has trajectory 0"):
        write(path, trunks, shard=Shard(1, 2))
    with pytest.raises(ValueError, match="it has trajectory 6"):
        write(path, trunks[:6])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes of mine", "ends with what stepagent inspect does not write"),
        (b'{"messages": []}\n', r"steps\.jsonl:1 is no record of stepagent inspect"),
        (b"[1]\n", r"steps\.jsonl:1 is no record of stepagent inspect"),
        (b"\n", r"steps\.jsonl:1: Expecting value"),
    ],
)
def test_a_file_of_something_else_is_left_alone(trunks, tmp_path, content, message):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write(path, trunks)
    assert path.read_bytes() == content


def test_two_processes_do_not_write_to_one_file(trunks, whole, tmp_path):
    path = tmp_path / "steps.jsonl"

    class Second(Agent):
        def __call__(self, part: Sequence[Trunk], first: int) -> Any:
            with pytest.raises(OSError, match=r"steps\.jsonl is being written by another process"):
                write(path, trunks)
            return super().__call__(part, first)

    assert write(path, trunks, Second()) == whole


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda line: line[: len(line) // 2], r"steps\.jsonl:3: .*(Expecting|Unterminated)"),
        (lambda line: b"{}\n", r"steps\.jsonl:3 is no record"),
        (lambda line: line.replace(b"logps", b"probs"), r"steps\.jsonl:3: KeyError: 'logps'"),
        (lambda line: line.replace(b'"action_spans": [[', b'"action_spans": [[0, 1], ['), "span"),
        (lambda line: line.replace(b'"token_ids": [', b'"token_ids": ["a", '), r"steps\.jsonl:3: "),
    ],
)
def test_a_broken_record_is_named(whole, tmp_path, edit, message):
    path = tmp_path / "steps.jsonl"
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], edit(lines[2])]))
    with pytest.raises(ValueError, match=message):
        load_branches(path)


@pytest.mark.parametrize("text", ["", "1", "1/1", "3/2", "-1/2", "a/b", "0/0", "1/2/3", "0/2 "])
def test_a_shard_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)


def test_shards_are_whole_chunks_and_leave_nothing_out():
    rng = np.random.default_rng(2)
    for total, size, count in rng.integers(1, 40, size=(200, 3)).tolist():
        parts = [Shard(i, count).chunks(total, size) for i in range(count)]
        chunks = [chunk for part in parts for chunk in part]
        assert chunks == Shard().chunks(total, size)
        assert [place for chunk in chunks for place in chunk] == list(range(total))
        assert {len(chunk) for chunk in chunks[:-1]} <= {size}
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and ``expert.jsonl``: a tiny Llama and 36 little dialogues."""
    pytest.importorskip("minigrid")  # whose words the tokenizer has
    folder = tmp_path_factory.mktemp("inspect")
    tiny_agent().save_pretrained(folder / "model")
    babyai_tokenizer().save_pretrained(folder / "model")
    colors = ["red", "green", "blue", "purple", "yellow", "grey"]
    actions = ["forward", "left", "pickup"]
    trajectories = []
    for i in range(36):
        messages = [{"role": "user", "content": f"{colors[i % 6]} ball {colors[i // 6]} door"}]
        for t in range(i % 3):
            messages.append({"role": "assistant", "content": actions[(i + t) % 3]})
            messages.append({"role": "user", "content": "nothing ahead"})
        messages.append({"role": "assistant", "content": "right"})
        trajectories.append(Trajectory(messages, id=f"e{i}"))
    save_trajectories(folder / "expert.jsonl", trajectories)
    return folder


def command(folder: Path, output: Path, *options: object) -> list[str]:
    files = ("--model", folder / "model", "--data", folder / "expert.jsonl", "--output", output)
    sampling = ("--samples", 2, "--chunk", 2, "--max-new-tokens", 6)
    return [str(option) for option in ("inspect", *files, *sampling, *options)]


def report(arguments: Sequence[str]) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def start(arguments: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "stepagent", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def kill_at(path: Path, size: int, process: subprocess.Popen[bytes]) -> bool:
    """SIGKILL as soon as the file is so large; whether the process was still running."""
    while process.poll() is None and not (path.exists() and path.stat().st_size >= size):
        time.sleep(0.0005)
    process.kill()
    _, stderr = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), stderr
    return process.returncode != 0


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> bytes:
    path = folder / "undisturbed.jsonl"
    torch.set_num_threads(1)
    found = report(command(folder, path))
    assert found["trajectories"] == 36
    assert 0 <= found["agreement"] <= 1
    return path.read_bytes()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_completes_to_the_bytes_of_an_undisturbed_one(
    folder, undisturbed, tmp_path, kills
):
    rng = random.Random(kills)
    path = tmp_path / "steps.jsonl"
    moments = sorted(rng.randrange(1, len(undisturbed) * 7 // 10) for _ in range(kills))
    killed = 0
    for moment in moments:
        before = path.read_bytes() if path.exists() else b""
        killed += kill_at(path, max(moment, len(before) + 1), start(command(folder, path)))
        now = path.read_bytes()
        assert undisturbed.startswith(now)
        assert len(now) >= before.rfind(b"\n") + 1  # no finished trajectory is lost
        if rng.random() < 0.5:  # as a machine that went down leaves it
            path.write_bytes(undisturbed[: len(now) + rng.randrange(200)])
    assert killed > kills // 2  # the others had come to their end
    found = report(command(folder, path))
    assert path.read_bytes() == undisturbed
    assert found["trajectories"] == 36


def test_shards_of_the_command_join_to_the_whole(folder, undisturbed, tmp_path):
    path = tmp_path / "made" / "steps.jsonl"
    found = [report(command(folder, path, "--shard", f"{i}/3")) for i in range(3)]
    parts = [Path(part["output"]) for part in found]
    assert [part.name for part in parts] == [f"steps-0000{i}-of-00003.jsonl" for i in range(3)]
    assert b"".join(part.read_bytes() for part in parts) == undisturbed
    assert sum(part["trajectories"] for part in found) == 36


def test_a_launcher_says_the_shard(folder, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = report(command(folder, tmp_path / "steps.jsonl"))
    assert found["output"] == str(tmp_path / "steps-00001-of-00002.jsonl")
    assert undisturbed.endswith(Path(found["output"]).read_bytes())


@pytest.mark.slow
def test_a_launcher_shares_the_work(folder, undisturbed, tmp_path):
    """torchrun, which is what `accelerate launch` runs where there are several GPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = command(folder, tmp_path / "steps.jsonl")
    subprocess.run([*launch, "-m", "stepagent", *arguments], check=True, capture_output=True)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"steps-0000{i}-of-00002.jsonl" for i in range(2)]
    assert b"".join(part.read_bytes() for part in parts) == undisturbed


@pytest.fixture
def server(folder: Path, undisturbed: bytes) -> Iterator[CompletionsServer]:
    with CompletionsServer(*load_branches(folder / "undisturbed.jsonl")) as server:
        yield server


def test_a_server_gives_the_branches_that_the_local_model_gives(
    folder, undisturbed, server, tmp_path
):
    path = tmp_path / "steps.jsonl"
    found = report(command(folder, path, "--engine", server.url))
    assert found["trajectories"] == 36
    expected = undisturbed.replace(b'"engine": "local"', b'"engine": "server"')
    assert path.read_bytes() == expected


@pytest.mark.slow
def test_ctrl_c_stops_a_run_on_a_server_at_once_and_it_goes_on(folder, server, tmp_path):
    path = tmp_path / "steps.jsonl"
    server.faults = [None] * 10 + [hang] * 100
    arguments = command(folder, path, "--engine", server.url)
    process = start(arguments)
    while len(server.faults) >= 100:
        time.sleep(0.01)
    written = path.read_bytes()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert stderr.endswith(b"Interrupted: the same command continues where it stopped\n")
    assert written
    server.faults = []
    asked = len(server.requests)
    report(arguments)
    assert path.read_bytes().startswith(written)
    states = sum(trunk.num_steps for trunk in load_branches(path)[0])
    assert len(server.requests) < asked + states  # what was written is not asked again


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (("--engine", "ray"), 2, "'ray' is neither 'local' nor 'vllm' nor a server's URL"),
        (("--engine", "vllm", "--served-model", "x"), 2, "--served-model is of no use with"),
        (("--shard", "2/2"), 2, "shard must be 0/2 to 1/2, got 2/2"),
        (("--chunk", "0"), 2, "'--chunk'"),
        (("--seed", "1"), 1, "is of another run: it has seed 0, not 1"),
        (("--chunk", "4"), 1, "is of another run: it has chunk 2, not 4"),
    ],
)
def test_a_wrong_option_is_named(folder, undisturbed, options, exit_code, message):
    path = folder / "undisturbed.jsonl"
    result = CliRunner().invoke(main, command(folder, path, *options))
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr.splitlines()[-1]
    assert path.read_bytes() == undisturbed


def test_a_model_trained_further_is_another_run(folder, undisturbed, tmp_path):
    output = tmp_path / "steps.jsonl"
    output.write_bytes(undisturbed)
    moved = shutil.copytree(folder / "model", tmp_path / "model")
    assert report(command(folder, output, "--model", moved))["trajectories"] == 36
    model = tiny_agent()
    with torch.no_grad():
        model.lm_head.weight += 0.01
    model.save_pretrained(moved)
    result = CliRunner().invoke(main, command(folder, output, "--model", moved))
    assert result.exit_code == 1
    assert "is of another run: it has fingerprint" in result.stderr
    assert output.read_bytes() == undisturbed


def test_a_fingerprint_sees_any_byte_of_a_small_file_and_the_size_of_a_large_one(tmp_path):
    small, large = tmp_path / "config.json", tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    small.write_bytes(b"a" * 200_000)
    large.write_bytes(rng.bytes(3_000_000))
    seen = {fingerprint(tmp_path)}
    for place in rng.integers(200_000, size=20):
        content = bytearray(b"a" * 200_000)
        content[place] = 98
        small.write_bytes(content)
        seen.add(fingerprint(tmp_path))
    large.write_bytes(large.read_bytes()[:-1])
    seen.add(fingerprint(tmp_path))
    large.write_bytes(rng.bytes(2_999_999))
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 23
    (tmp_path / "notes.txt").touch()
    assert fingerprint(tmp_path) in seen


def test_an_engines_failure_is_one_line(folder, server, tmp_path):
    server.models = []
    result = CliRunner().invoke(main, command(folder, tmp_path / "s.jsonl", "--engine", server.url))
    assert result.exit_code == 1
    assert "serves 0 models" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
