"""``stepagent behaviours``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .base import NEW_FILE, POSITIVE, make_parent, reports

if TYPE_CHECKING:
    from ..analysis import Behaviours
    from ..records.episodes import Episode

_RUN = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("runs", metavar="RUN...", type=_RUN, nargs=-1, required=True)
@click.option("--count", type=click.IntRange(min=2), default=5, show_default=True)
@click.option(
    "--parts",
    type=POSITIVE,
    default=2,
    show_default=True,
    help="Of an episode, each with a local latent.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--output", type=NEW_FILE, help="JSON of them, as report takes it.")
@reports
def behaviours(
    runs: tuple[Path, ...], count: int, parts: int, seed: int, output: Path | None
) -> tuple[dict[str, Any], str]:
    """Find kinds of behaviour in episodes, and when their shares changed.

    A RUN is a JSONL of episodes, or a folder with the rollouts.jsonl of training (--save_rollouts)
    or else with episodes.jsonl. Changes are looked for along a run's cycles, where its records have
    a "cycle" in their meta, or else along the RUNs in the order they are given. Episodes that
    crashed are left out.
    """
    from ..analysis import Behaviours
    from ..optional import require

    require("stepagent behaviours", "analysis")
    points = _points(runs)
    episodes = [episode for _, _, own in points for episode in own]
    found = Behaviours.fit(episodes, count=count, parts=parts, seed=seed)
    report = summary(found, points)
    if output is not None:
        from ..files import write_text

        make_parent(output)
        write_text(output, json.dumps(report, indent=1) + "\n")
    report["output"] = None if output is None else str(output)
    return report, _text(report)


Point = tuple[str, int | None, "list[Episode]"]
"""A run's name, the cycle, and its episodes."""


def _points(runs: tuple[Path, ...]) -> list[Point]:
    """Of each run its cycles in order, or the run as a whole.

    Raises:
        ValueError: for a run of which no episode ended.
    """
    from ..data.trajectory import load_trajectories
    from ..report import load_runs

    points: list[Point] = []
    files = [_file(path) for path in runs]
    for file, run in zip(files, load_runs(files), strict=True):
        by_cycle: dict[int | None, list[Episode]] = {}
        for trajectory, episode in zip(load_trajectories(file), run.episodes, strict=True):
            if episode.crashed is None:
                cycle = trajectory.meta.get("cycle")
                by_cycle.setdefault(cycle if type(cycle) is int else None, []).append(episode)
        if not by_cycle:
            raise ValueError(f"{file} must hold an episode that ended, got none")
        ordered = sorted(by_cycle.items(), key=lambda item: (item[0] is not None, item[0] or 0))
        points += [(run.name, cycle, episodes) for cycle, episodes in ordered]
    return points


def _file(run: Path) -> Path:
    """A folder's rollouts of training, which have cycles; or else its episodes."""
    from ..records.cycle_file import ROLLOUTS

    if not run.is_dir():
        return run
    for name in (ROLLOUTS, "episodes.jsonl"):
        if (run / name).is_file():
            return run / name
    raise ValueError(
        f"{run} must hold {ROLLOUTS}, which training with --save_rollouts writes, or "
        "episodes.jsonl, got neither"
    )


def summary(found: Behaviours, points: list[Point]) -> dict[str, Any]:
    """Behaviours, their shares at each point, and the changes, as JSON can hold them."""
    import numpy as np

    from ..analysis import change_points
    from ..evaluation.statistics import rate_interval

    episodes = [episode for _, _, own in points for episode in own]
    labels = found.assign(episodes)
    ends = np.cumsum([len(own) for _, _, own in points])
    at_points = np.split(labels, ends[:-1])
    kinds = []
    for k, (name, places) in enumerate(zip(found.names, found.exemplars(episodes), strict=True)):
        own = [float(e.success) for e, label in zip(episodes, labels, strict=True) if label == k]
        success = rate_interval(own) if own else None
        kinds.append(
            {
                "name": name,
                "episodes": len(own),
                "success": None if success is None else [success.mean, success.low, success.high],
                "exemplars": [_place(points, ends, place) for place in places],
            }
        )
    return {
        "behaviours": kinds,
        "gain": found.gain,
        "points": [
            {
                "run": run,
                "cycle": cycle,
                "episodes": len(own),
                "shares": (np.bincount(here, minlength=len(kinds)) / len(here)).tolist(),
            }
            for (run, cycle, own), here in zip(points, at_points, strict=True)
        ],
        "changes": [
            {"point": offset + change.at, "p": change.p}
            for offset, own in _sequences(points, at_points)
            for change in change_points(own)
        ],
    }


def _place(points: list[Point], ends: Any, place: int) -> dict[str, Any]:
    point = int((ends <= place).sum())
    run, _, own = points[point]
    episode = own[place - (int(ends[point - 1]) if point else 0)]
    return {"run": run, "environment": episode.environment, "seed": episode.seed}


def _sequences(points: list[Point], labels: list[Any]) -> list[tuple[int, list[Any]]]:
    """Along what changes are looked for: each run's cycles, or all runs; with the first point."""
    if all(cycle is None for _, cycle, _ in points):
        return [(0, labels)]
    names = [run for run, _, _ in points]
    return [
        (names.index(run), [own for name, own in zip(names, labels, strict=True) if name == run])
        for run in dict.fromkeys(names)
    ]


def _text(report: dict[str, Any]) -> str:
    lines = [f"behaviours tell {report['gain']:.2f} nats an action beyond the observation"]
    lines.append("   episodes   success (95 %)  actions")
    for k, kind in enumerate(report["behaviours"], start=1):
        lines.append(f"{k}  {kind['episodes']:>8}  {_rate(kind['success']):>15}  {kind['name']}")
        shown = ", ".join(f"{e['run']} seed {e['seed']}" for e in kind["exemplars"])
        lines.append(f"     such as {shown}" if shown else "     no episodes")
    for point in report["points"]:
        shares = "  ".join(f"{k}: {x:.0%}" for k, x in enumerate(point["shares"], start=1) if x)
        lines.append(f"{_point_name(point)}, {point['episodes']} episodes: {shares}")
    for change in report["changes"]:
        point = report["points"][change["point"]]
        lines.append(f"behaviour changed at {_point_name(point)} (p = {change['p']:.3f})")
    if not report["changes"]:
        lines.append("no change of behaviour that chance would not make")
    if report["output"]:
        lines.append(f"Wrote them to {report['output']}")
    return "\n".join(lines)


def _rate(success: list[float | None] | None) -> str:
    if success is None:
        return "n/a"
    mean, low, high = success
    return f"{mean:.0%}" if low is None else f"{mean:.0%} ({low:.0%}–{high:.0%})"


def _point_name(point: dict[str, Any]) -> str:
    cycle = "" if point["cycle"] is None else f", cycle {point['cycle']}"
    return f"{point['run']}{cycle}"
