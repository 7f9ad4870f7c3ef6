"""``stepagent demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..optional import require
from .base import NEW_FOLDER, Interrupted, reports

if TYPE_CHECKING:
    from ..tools.demo import Method


@click.command()
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--method",
    type=click.Choice(["implicit", "inverse"]),
    default="implicit",
    show_default=True,
    help="How StepAgent reflects. Run with both in one folder, they share a report.",
)
@click.option("--output", type=NEW_FOLDER, default="runs/demo", show_default=True)
@reports
def demo(seed: int, method: Method, output: Path) -> tuple[dict[str, Any], str]:
    """Train an agent on a real environment, in minutes."""
    require("stepagent demo", "demo")
    from transformers.utils.logging import disable_progress_bar

    from ..report.demo import closing_table
    from ..tools.demo import Settings, run_demo

    # Of reading and writing weights; ours and the trainer's stay.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        metrics = run_demo(output, Settings(seed=seed), method)
    except KeyboardInterrupt as interrupt:
        raise Interrupted("the same command continues where it stopped") from interrupt
    files = "metrics.json, report.html, the trajectories and the models"
    return metrics, f"{closing_table(metrics)}\nWrote {files} to {output}"
