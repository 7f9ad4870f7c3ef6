"""``stepagent bench``, ``warmup`` and ``doctor``: the kernels and the machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..optional import require
from .base import NEW_FILE, NEW_FOLDER, reports
from .choices import OPS, PROVIDERS, SUITES

if TYPE_CHECKING:
    from ..tools.bench.problems import Suite


@click.command()
@click.option(
    "--suite", type=click.Choice(SUITES), help="Shapes.  [default: gpu, or cpu without one]"
)
@click.option("--op", "ops", type=click.Choice(OPS), multiple=True, help="Repeatable.")
@click.option(
    "--provider",
    "providers",
    type=click.Choice(PROVIDERS),
    multiple=True,
    help="Repeatable; ours always takes part.",
)
@click.option("--csv", type=NEW_FILE, help="Write figures in Liger's CSV schema.")
@click.option("--plots", type=NEW_FOLDER, help="Write a PNG for each op.")
@click.option("--profile", type=NEW_FOLDER, help="Write a trace and a table of kernels of each.")
@reports
def bench(suite: Suite | None, plots: Path | None, **options: Any) -> tuple[dict[str, Any], str]:
    """Check every op against the reference, then time it against its rivals.

    Speed, memory, and the fraction of what this machine reaches. Where a check of ours fails,
    nothing of that problem is reported, and the command fails.
    """
    if plots is not None:
        require("--plots", "plots")
    import torch

    from ..tools.bench.output import describe as describe_bench
    from ..tools.bench.runner import run_bench

    report = run_bench(
        suite or ("gpu" if torch.cuda.is_available() else "cpu"), plots=plots, **options
    )
    return report, describe_bench(report)


@click.command()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    required=True,
    help="GPU to compile for, such as sm_90 or gfx942; may be repeated.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("bfloat16", "float32"),
    show_default=True,
    help="Of the logits or the head: bfloat16, float16 or float32; may be repeated.",
)
@reports
def warmup(archs: tuple[str, ...], dtypes: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Compile every Triton kernel ahead of time; needs no GPU.

    Fills Triton's cache (TRITON_CACHE_DIR), for example of a container image. Only the same version
    of Triton finds the kernels there.
    """
    import triton

    from ..tools.warmup import compile_all

    kernels = [asdict(kernel) for kernel in compile_all(archs, dtypes, progress=True)]
    report = {"triton": triton.__version__, "cache": triton.knobs.cache.dir, "kernels": kernels}
    return report, _warmup_text(report)


def _warmup_text(report: dict[str, Any]) -> str:
    kernels = [{**k, "instructions": " ".join(k["instructions"])} for k in report["kernels"]]
    rows = [list(kernels[0]), *([*kernel.values()] for kernel in kernels)]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell!s:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append("spills: bytes of stack a thread on NVIDIA, registers on AMD; shared: bytes")
    found = f"{len(kernels)} kernels of Triton {report['triton']}"
    return "\n".join([*lines, f"Wrote {found} to {report['cache']}"])


@click.command()
@reports
def doctor() -> tuple[dict[str, Any], str]:
    """Say what works on this machine, and why."""
    from ..tools.doctor import describe, diagnose

    report = diagnose()
    return report, describe(report)
