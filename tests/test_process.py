"""The process of the command line: how fast it answers, its streams, its signals, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from stepagent.cli import choices, main
from stepagent.cli.fields import check_names, given, inherited_names, options, spread

HERE = Path(__file__).parent
HEAVY = ("torch", "numpy", "transformers", "tqdm", "minigrid", "matplotlib", "triton", "jinja2")
EXPERT = ("evaluate", "--env", "babyai:GoToObj", "--policy", "expert", "--episodes", "3")


def start(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """The command in a process that takes Ctrl-C, even where the tests run in the background of a
    shell, which has SIGINT ignored by all that it starts."""
    command = [sys.executable, "-m", "stepagent", *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, text=True, **settings)
    finally:
        signal.signal(signal.SIGINT, before)


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash with ``stepagent`` in it; its status is that of the first of a pipe."""
    line = line.replace("stepagent", f"{sys.executable} -m stepagent", 1)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=folder
    )


# ------------------------------------------------------------------ at once


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("--help", 0, "Commands:"),
        ("--version", 0, "version"),
        ("train --help", 0, "--discriminator_smoothing"),
        ("evaluate --help", 0, "--step-timeout"),
        ("train --model a --data pyproject.toml --method nope", 2, "'sft', 'dagger', 'implicit'"),
        ("train --model a --data pyproject.toml --metod sft", 2, "--method"),
        ("train --model a --data pyproject.toml --learning_rat 1", 2, "--learning_rate"),
        ("train --data pyproject.toml", 2, "Missing option '--model'"),
        ("bench --op nope", 2, "'token_logprobs'"),
        ("bench --suite nope", 2, "'tiny', 'cpu', 'gpu'"),
        ("demo --method nope", 2, "'implicit', 'inverse'"),
        ("evaluate --policy random", 2, "Missing option '--env'"),
        ("collcet", 2, "No such command 'collcet'"),
    ],
)
def test_help_and_refusals_come_without_anything_heavy(line: str, status: int, said: str) -> None:
    program = (
        "import sys\nfrom stepagent.cli import main\n"
        f"try: main({line.split()!r}, prog_name='stepagent')\n"
        "except SystemExit as stop: status = stop.code\n"
        f"print(status, [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.stdout.rstrip().split("\n")[-1] == f"{status} []", done.stderr
    assert said in done.stdout + done.stderr


def test_importing_the_package_loads_nothing_until_a_name_is_used() -> None:
    program = (
        "import sys, stepagent as sa\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert set(sa.__all__) <= set(dir(sa)) and sa.__version__\n"
        "sa.Trajectory; assert 'torch' not in sys.modules\n"
        "for name in sa.__all__:\n"
        "    if 'StepAgent' not in name: getattr(sa, name)\n"
        "from stepagent import *\n"
        "assert not hasattr(sa, 'nothing_of_this_name')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names_that_stand_twice_are_the_same() -> None:
    from stepagent.models.attention import TREE_ATTENTION
    from stepagent.tools.bench.problems import OPS, SUITES
    from stepagent.tools.bench.providers import PROVIDERS

    assert tuple(OPS) == choices.OPS
    assert tuple(SUITES) == choices.SUITES
    assert tuple(PROVIDERS) == choices.PROVIDERS
    assert choices.TREE_ATTENTION == TREE_ATTENTION


# ------------------------------------------------------------------ training options


def test_every_training_argument_is_an_option_as_transformers_parses_it() -> None:
    """click's options and HfArgumentParser's take the same names, in both spellings."""
    from typing import get_type_hints

    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments, add_help=False)
    theirs = {name for action in parser._actions for name in action.option_strings}
    ours = options(
        (f for f in fields(TrainingArguments) if f.init), get_type_hints(TrainingArguments)
    )
    assert {name for option in ours for name in option.opts} >= theirs
    assert inherited_names() == [field.name for field in fields(TrainingArguments)]


def test_values_are_those_that_transformers_parses() -> None:
    from typing import get_type_hints

    import click
    from transformers import HfArgumentParser, TrainingArguments

    line = [
        *("--learning_rate", "1e-3", "--max-steps", "-1", "--use_cpu", "--bf16", "false"),
        *("--tf32", "true", "--seed=7", "--no_dataloader_in_order", "--save_steps", "0.5"),
        *("--lr_scheduler_type", "cosine", "--label_names", "a", "b", "--report_to", "none"),
        *("--log_level", "info", "--optim", "adamw_torch", "--output_dir", "x"),
    ]
    parser = HfArgumentParser(TrainingArguments, add_help=False)
    expected = vars(parser.parse_args(line))
    known = options(
        (f for f in fields(TrainingArguments) if f.init), get_type_hints(TrainingArguments)
    )
    command = click.Command("train", params=list(known))
    found = given(command.make_context("train", spread(line, known)).params)
    assert len(found) == 14
    expected["report_to"] = ["none"]  # it may be several here, as TrainingArguments has it
    assert found == {name: expected[name] for name in found}


def test_an_unknown_name_is_told_with_those_near_it() -> None:
    import click

    with pytest.raises(click.NoSuchOption) as caught:
        check_names(["--warmup_step", "3"], ["warmup_steps", "seed"])
    assert "--warmup_steps" in caught.value.possibilities
    check_names(["--warmup-steps=3", "-1", "--seed"], ["warmup_steps", "seed"])


# ------------------------------------------------------------------ streams


@pytest.mark.slow
@pytest.mark.parametrize("closing", ["2>&-", "2>/dev/full", "2> >(true)", "2>&- <&-"])
def test_progress_carries_no_load(tmp_path: Path, closing: str) -> None:
    """stderr closed, full, or its reader gone: the run is the same."""
    command = f"stepagent {' '.join(EXPERT)} --json --output episodes.jsonl"
    done = shell(f"{command} {closing}", tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["written"] == 3
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["meta"]["seed"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("reader", ["true", "head -c 1"])
def test_a_reader_that_leaves_ends_it_as_it_ends_unix_tools(tmp_path: Path, reader: str) -> None:
    done = shell(f"stepagent train --help | {reader}", tmp_path)
    assert done.stderr == ""
    assert done.returncode in (0, 128 + signal.SIGPIPE)  # 0: a pipe holds all of a short text


def test_a_closed_pipe_is_status_141() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("--help", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path, stdout: str) -> None:
    done = shell(f"stepagent {' '.join(EXPERT)} {stdout}", tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().split("\n")[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_what_an_environment_prints_does_not_touch_the_report(workers: int) -> None:
    """By Python, by a descriptor, and by a program that it starts."""
    program = (
        "from stepagent import envs\n"
        "from stepagent.__main__ import run\n"
        "from hostile_envs import Loud\n"
        "if __name__ == '__main__':\n"
        "    envs.register('loud', Loud)\n"
        "    run()\n"
    )
    line = ("evaluate", "--env", "loud:", "--policy", "expert", "--episodes", "2", "--json")
    done = subprocess.run(
        [sys.executable, "-c", program, *line, "--workers", str(workers)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert json.loads(done.stdout)["episodes"] == 2, done.stderr
    for way in ("print", "descriptor", "program"):
        assert f"loud by {way}" in done.stderr


# ------------------------------------------------------------------ signals

INTERRUPT = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", INTERRUPT)
@pytest.mark.parametrize(
    "after", [0.15, 0.8, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.4, 1.2, 4.0))]
)
def test_a_signal_at_any_time_ends_it_without_a_traceback(
    tmp_path: Path, number: signal.Signals, after: float
) -> None:
    """While modules are imported, and while it runs."""
    line = ("evaluate", "--env", "babyai:GoToLocal", "--policy", "random", "--episodes", 100_000)
    process = start(*line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    time.sleep(after)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPT[number], errors
    assert out == ""
    assert "Traceback" not in errors


@pytest.mark.slow
def test_sigterm_cleans_up_and_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    line = ("evaluate", "--env", "babyai:GoToLocal", "--policy", "random", "--max-steps", 20)
    process = start(
        *(*line, "--episodes", 100_000, "--batch-size", 1, "--workers", 1, "--output", path),
        stderr=subprocess.PIPE,
    )
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "episodes are in" in errors
    assert "the same command continues" in errors


# ------------------------------------------------------------------ environments that hang


def test_an_environment_that_hangs_here_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner
    from hostile_envs import hostile

    from stepagent import envs

    monkeypatch.setattr(envs, "factory", lambda *_: hostile("hangs", 27))
    line = ("evaluate", "--env", "x", "--policy", "expert", "--seeds", "0,27,1", "--json")
    with pytest.warns(RuntimeWarning, match="1 of 3 episodes crashed"):
        result = CliRunner().invoke(main, [*line, "--step-timeout", "1.5"])
    found = json.loads(result.stdout)
    assert (found["episodes"], found["crashed"]) == (2, 1)


def test_a_time_limit_leaves_the_alarm_of_others_as_it_was() -> None:
    from stepagent.envs.pool import _time_limit

    handler = signal.getsignal(signal.SIGALRM)
    before, _ = signal.getitimer(signal.ITIMER_REAL)
    with _time_limit(5.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5.0
    assert signal.getsignal(signal.SIGALRM) is handler
    after, _ = signal.getitimer(signal.ITIMER_REAL)
    assert (after > 0) == (before > 0)
    assert after <= before
