"""``stepagent report``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .base import FILE, FOLDER, NEW_FILE, NEW_FOLDER, make_parent, reports
from .subgoals import load as load_subgoals

if TYPE_CHECKING:
    from ..report import Run

RUN = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("runs", metavar="RUN...", type=RUN, nargs=-1, required=True)
@click.option("--output", type=NEW_FILE, default="report.html", show_default=True)
@click.option(
    "--baseline",
    type=RUN,
    metavar="RUN",
    help="Of the RUNs, the one that the others are compared with.  [default: the first]",
)
@click.option(
    "--agentboard",
    type=NEW_FOLDER,
    help="Also write each RUN as a result folder of AgentBoard's, by its name, in this folder.",
)
@click.option(
    "--subgoals", "phases", type=FOLDER, help="Of stepagent subgoals: shows each step's phase."
)
@click.option(
    "--behaviours", type=FILE, help="Of stepagent behaviours --output: their shares by run."
)
@reports
def report(
    runs: tuple[Path, ...],
    output: Path,
    baseline: Path | None,
    agentboard: Path | None,
    phases: Path | None,
    behaviours: Path | None,
) -> tuple[dict[str, Any], str]:
    """Show runs on one HTML page.

    A RUN is a JSONL of episodes, as evaluate writes it, or a folder with episodes.jsonl and, from
    training, log.json, or a result folder of AgentBoard's.
    """
    from ..report import load_runs, write_report

    if baseline is not None and baseline not in runs:
        raise click.BadParameter(f"{baseline} is none of the RUNs", param_hint="'--baseline'")
    make_parent(output)
    loaded = load_runs(runs)
    compared_with = loaded[0 if baseline is None else runs.index(baseline)].name
    write_report(
        output,
        loaded,
        baseline=compared_with,
        subgoals=None if phases is None else load_subgoals(phases),
        behaviours=None if behaviours is None else json.loads(behaviours.read_text("utf-8")),
    )
    size = output.stat().st_size
    report: dict[str, Any] = {
        "output": str(output),
        "runs": {run.name: len(run.episodes) for run in loaded},
        "baseline": compared_with,
        "bytes": size,
    }
    if agentboard is not None:
        report["agentboard"] = _written(agentboard, loaded)
    episodes = sum(len(run.episodes) for run in loaded)
    counted = f"{len(loaded)} run{'' if len(loaded) == 1 else 's'}"
    text = f"Wrote {episodes} episodes of {counted} to {output} ({size / 1e6:.1f} MB)"
    if agentboard is not None:
        text += f"\nWrote {counted} as AgentBoard's results to {agentboard}"
    return report, text


def _written(folder: Path, runs: Sequence[Run]) -> dict[str, list[str]]:
    """Each run's tasks; the folder is what AgentBoard calls a baseline_dir."""
    from ..evaluation.agentboard import save_agentboard

    names = [run.name.replace("/", "-").strip(".-") for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"the names of runs must differ as folders, got {', '.join(names)}")
    pairs = zip(names, runs, strict=True)
    return {name: save_agentboard(folder / name, run.episodes) for name, run in pairs}
