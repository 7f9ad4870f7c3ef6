"""``stepagent subgoals``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .base import FILE, NEW_FOLDER, reports
from .loading import device, load_model, model_folder

if TYPE_CHECKING:
    from ..analysis import Describe, Subgoals


@click.command()
@click.argument("file", metavar="FILE", type=FILE)
@click.option(
    "--model",
    metavar="PATH|NAME",
    help="Reads the observations, each alone.  [default: their words, hashed]",
)
@click.option("--phases", type=click.IntRange(min=2), default=8, show_default=True)
@click.option(
    "--others",
    type=click.IntRange(min=0),
    help="Negatives of other episodes; 0 where each episode has its own layout.  [default: 4]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--output", type=NEW_FOLDER, help="Folder to keep them in, as report takes it.")
@reports
def subgoals(
    file: Path, model: str | None, phases: int, others: int | None, seed: int, output: Path | None
) -> tuple[dict[str, Any], str]:
    """Find the phases of a task in demonstrations of it.

    FILE holds episodes, as collect and evaluate write them; those that did not reach the goal are
    left out.
    """
    from ..analysis import ContrastOptions, Subgoals
    from ..optional import require
    from ..records.episodes import load_episodes

    require("stepagent subgoals", "analysis")
    episodes = load_episodes(file)
    reached = [e for e in episodes if e.success and e.crashed is None]
    if not reached:
        raise ValueError(f"{file} must hold an episode that reached the goal, got none")
    options = ContrastOptions() if others is None else ContrastOptions(others=others)
    found = Subgoals.fit(
        reached, phases=phases, describe=describe(model), options=options, seed=seed
    )
    if output is not None:
        found.save(output)
    report = {
        "file": str(file),
        "demonstrations": len(reached),
        "left_out": len(episodes) - len(reached),
        **found.as_dict(),
        "path": found.path(reached[0]),
        "output": None if output is None else str(output),
    }
    return report, _text(report)


def describe(model: str | None) -> Describe | None:
    """What reads observations: a model, or None for their words."""
    if model is None:
        return None
    from ..analysis import ModelRows

    return ModelRows(*load_model(model_folder(model), device()))


def load(folder: Path) -> Subgoals:
    """What ``--output`` wrote, with the model that reads its observations, where there is one."""
    from ..analysis import Subgoals
    from ..analysis.subgoals import read_told

    kind = read_told(folder)["describe"]
    return Subgoals.load(folder, describe=describe(kind.get("name")))


def _text(report: dict[str, Any]) -> str:
    dropped = f", {report['left_out']} more left out" if report["left_out"] else ""
    lines = [f"{report['demonstrations']} demonstrations of {report['file']}{dropped}"]
    lines += ["phase  potential  share  nearest observation"]
    lines += [
        f"{k:>5}  {phase['potential']:>9.2f}  {phase['share']:>5.0%}  {phase['name']}"
        for k, phase in enumerate(report["phases"], start=1)
    ]
    lines.append("first demonstration: " + " → ".join(str(k + 1) for k in report["path"]))
    if report["output"]:
        lines.append(f"Wrote them to {report['output']}")
    return "\n".join(lines)
