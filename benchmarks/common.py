"""Shared by the benchmarks: the model and trajectory they measure, and how results are written.

A benchmark prints progress on stderr and one table on stdout, writes a result only after its
correctness check has passed, and exits with 1 and the reason where it has not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from stepagent import Trajectory, Trunk

VOCABULARY = 4096

# Read by OpenMP when torch loads it. By default a thread that waits for another spins; on a machine
# whose cores are shared it then spins while that other thread waits for a core (100× slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    result.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    return result


def add_shape_options(options: argparse.ArgumentParser) -> None:
    """The trajectory and the model of the step-pair and the inspection benchmark."""
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--observation-tokens", type=int, default=60)
    options.add_argument("--action-tokens", type=int, default=10)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--threads", type=int, default=os.cpu_count())


def llama(options: argparse.Namespace) -> PreTrainedModel:
    """A Llama with random weights, the same for the same options; 8.5M parameters by default."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        max_position_embeddings=16384,
        attn_implementation="sdpa",
        # No end token: every action has its full length.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def trajectory(options: argparse.Namespace) -> tuple[Trunk, list[NDArray[np.int32]]]:
    """A random expert trajectory, and one agent action per step that differs from the expert's."""
    from stepagent import Trunk

    random = np.random.default_rng(0)
    turn = options.observation_tokens + options.action_tokens
    starts = np.arange(options.steps) * turn + options.observation_tokens
    spans = np.stack([starts, starts + options.action_tokens], axis=1)
    trunk = Trunk(random.integers(1, VOCABULARY, options.steps * turn), spans)
    shifts = random.integers(1, VOCABULARY - 1, (options.steps, options.action_tokens))
    expert = np.stack([trunk.input_ids[start:stop] for start, stop in spans])
    agent = (expert + shifts - 1) % (VOCABULARY - 1) + 1  # never token 0, never the expert's
    return trunk, list(agent.astype(np.int32))


def expert_trajectories(count: int) -> list[Trajectory]:
    """Of BabyAI's expert, the shortest of the first seeds."""
    from stepagent.acting.policies import ExpertPolicy
    from stepagent.acting.rollout import run_episodes

    episodes = run_episodes("babyai:GoToLocalS6N2", ExpertPolicy(), range(3 * count))
    shortest = sorted(episodes, key=lambda episode: len(episode.actions))[:count]
    return [episode.trajectory() for episode in shortest]


def shape(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """What was measured, for the result."""
    return {
        "steps": options.steps,
        "observation_tokens": options.observation_tokens,
        "action_tokens": options.action_tokens,
        "parameters": parameters(model),
        "hidden": options.hidden,
        "layers": options.layers,
        "vocabulary": VOCABULARY,
        "dtype": "float32",
        "threads": options.threads,
        "repeats": options.repeats,
    }


def described(options: argparse.Namespace, model: PreTrainedModel) -> str:
    """The same in a line, for a title."""
    return (
        f"T = {options.steps}, {options.observation_tokens}-token observations, "
        f"{options.action_tokens}-token actions, {parameters(model):,} parameters, float32, "
        f"{options.threads} threads"
    )


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of a call over `repeats` measurements of a millisecond at least.

    For work of one thread: where cores are shared, the wall clock flatters what is short enough to
    end before another process gets the core.
    """
    calls, times = 1, []
    while len(times) < repeats:
        start = time.process_time()
        for _ in range(calls):
            work()
        elapsed = time.process_time() - start
        if elapsed < 1e-3 and not times:
            calls *= 2  # too short to be read from the clock: measured again
            continue
        times.append(elapsed / calls)
    return min(times)


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def check(condition: bool, reason: str) -> None:
    """Where the condition is red, end with 1: no figure is reported."""
    if not condition:
        sys.exit(f"{Path(sys.argv[0]).name}: check failed, nothing reported: {reason}")


def environment(*rivals: str) -> dict[str, Any]:
    """Where and when: what a reader needs to judge or repeat the figures.

    :param rivals: packages that are compared with.
    """
    packages = ("torch", "transformers", "numpy", "stepagent", *rivals)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "device": f"{_cpu_name()}, {os.cpu_count()} cores",
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table whose columns line up."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def report(
    title: str,
    notes: str,
    text: str,
    result: dict[str, Any],
    path: Path | None,
    where: dict[str, Any],
) -> None:
    """Print the table; with a path, write the result as JSON and as a short .md beside it.

    :param where: :func:`environment` as it was before the measurement loaded the machine itself.
    """
    print(f"\n{title}\n\n{text}")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "environment": where}, indent=2) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    path.with_suffix(".md").write_text(
        f"# {title}\n\n{text}\n\n{notes.strip()}\n\n"
        f"* command: `{where['command']}`\n* date: {where['date']}\n* device: {where['device']}, "
        f"load average before the run {where['load_average']}, "
        f"OMP_WAIT_POLICY={where['omp_wait_policy']}\n* versions: {versions}\n"
    )
    say(f"wrote {path} and {path.with_suffix('.md')}")
