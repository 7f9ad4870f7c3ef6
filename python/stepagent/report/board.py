"""What the board shows of its runs, as plain values for the template."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..evaluation import Interval
from ..evaluation.metrics import (
    METRICS,
    compare,
    invalid_actions,
    mean_progress_curve,
    split_by,
    summarize,
)
from ..evaluation.subskills import TASKS, sub_skills, success_by_task
from ..records.episodes import Episode
from .charts import Line, line_chart, ticks
from .numbers import formatted, number, percent, plain, points
from .runs import Run

_STYLES = 8  # colours of runs in the page's CSS; the ninth run is dashed in the first's

# The metrics' titles, what they say, and whether they are shares.
_METRICS = {
    "success": ("Success", "Episodes that reached the goal", True),
    "progress_rate": ("Progress", "How far an episode came", True),
    "grounding_accuracy": ("Grounding", "Actions that were valid", True),
    "reward": ("Reward", "The environment’s, summed over an episode", False),
    "agreement": ("Agreement", "Actions that were the expert’s at the same state", True),
    "step_reward": ("Step reward", "The method’s, mean over an episode’s steps", False),
    "repetition": ("Repetition", "Actions repeated after they had changed nothing", True),
    "steps": ("Steps", "Actions in an episode", False),
}

# Of the numbers that a trainer logs per cycle: their titles, those that are shares, and the order.
_CYCLE_TITLES = {
    "success_rate": "Success rate",
    "agreement": "Agreement with the expert",
    "reward_margin": "Step-reward margin, expert − agent",
    "reward_accuracy": "Expert’s action rewarded more",
    "kl": "KL to the reference",
    "mean_loss": "Loss, mean of the cycle",
    "loss": "Loss",
}
_CYCLE_SHARES = {"success_rate", "agreement", "reward_accuracy"}
_CYCLE_HIDDEN = {"cycle", "epoch", "step"}
_SPLITS = ("environment", "split", "difficulty", "task")


@dataclass(frozen=True)
class Bar:
    """A run's mean; places on the track are percentages of its width.

    Without an interval ``low`` and ``high`` are None and ``bounds`` is empty; without a mean, the
    value is "n/a".
    """

    run: str
    style: str
    value: str
    bounds: str
    start: float
    width: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Picture:
    title: str
    svg: Markup | None
    """None where there is one place on the x axis only, which the table shows better."""
    head: list[str]
    """Of the same numbers as a table: its columns."""
    rows: list[list[str]]


def style(index: int) -> str:
    """The CSS classes of a run: its colour, and dashes once the colours are used up."""
    return f"run-{index % _STYLES}" + (" again" if index >= _STYLES else "")


def board(runs: Sequence[Run], baseline: Run) -> dict[str, Any]:
    """Everything that the template fills in, but the episodes."""
    means = [_means(run.episodes) for run in runs]
    named = [
        {
            "name": run.name,
            "style": style(i),
            "count": len(run.episodes),
            "baseline": run is baseline,
        }
        for i, run in enumerate(runs)
    ]
    return {
        "runs": named,
        "trained": [one for one, run in zip(named, runs, strict=True) if run.cycles],
        "environments": sorted({e.environment for run in runs for e in run.episodes}),
        "crashed": sum(e.crashed is not None for run in runs for e in run.episodes),
        "bars": [
            {
                "title": _described(name)[0],
                "note": _described(name)[1],
                "bars": bars(name, runs, means),
            }
            for name in _told(means)
        ],
        "differences": differences(runs, baseline, _told(means)),
        "progress": progress_picture(runs),
        "splits": [table for key in _SPLITS if (table := split(key, runs)) is not None],
        "skills": skills(runs),
        "invalid": invalid(runs),
        "training": training(runs),
        "updates": updates(runs),
        "settings": settings(runs),
    }


def _means(episodes: Sequence[Episode]) -> dict[str, Interval]:
    """Each metric's mean over the episodes that ended; none where all crashed."""
    if all(episode.crashed is not None for episode in episodes):
        return {}
    return summarize(episodes).metrics


def _told(means: Sequence[dict[str, Interval]]) -> list[str]:
    """The metrics that any run has, in the board's order, then any others."""
    told = {name for metrics in means for name in metrics}
    return [name for name in dict.fromkeys([*_METRICS, *METRICS]) if name in told]


def _described(name: str) -> tuple[str, str, bool]:
    return _METRICS.get(name, (name.replace("_", " ").capitalize(), "", False))


# ------------------------------------------------------------------------------ means, differences


def bars(name: str, runs: Sequence[Run], means: Sequence[dict[str, Interval]]) -> list[Bar]:
    """Each run's mean and interval; shares on a track from 0 to 1, others on one that holds all."""
    share = _described(name)[2]
    found = [metrics.get(name) for metrics in means]
    shown = [i for i in found if i is not None]
    ends = [x for i in shown for x in (i.low, i.high, i.mean) if x is not None]
    marks = [0.0, 1.0] if share else ticks(min(0.0, *ends), max(0.0, *ends))

    def at(x: float) -> float:
        return round(100 * (x - marks[0]) / (marks[-1] - marks[0]), 2)

    return [
        _bar(run.name, style(i), mean, share, at)
        for i, (run, mean) in enumerate(zip(runs, found, strict=True))
    ]


def _bar(
    name: str, style: str, mean: Interval | None, share: bool, at: Callable[[float], float]
) -> Bar:
    if mean is None:
        return Bar(name, style, "n/a", "", 0, 0, None, None)
    ends = at(0.0), at(mean.mean)
    start, width = min(ends), round(abs(ends[1] - ends[0]), 2)
    value = _text(mean.mean, share)
    if mean.low is None or mean.high is None:
        return Bar(name, style, value, "", start, width, None, None)
    bounds = f"{_text(mean.low, share)} to {_text(mean.high, share)}"
    return Bar(name, style, value, bounds, start, width, at(mean.low), at(mean.high))


def _text(value: float, share: bool) -> str:
    if share:
        return percent(value)
    return formatted(value, ",.1f" if abs(value) >= 10 else ".2f")


def differences(runs: Sequence[Run], baseline: Run, names: Sequence[str]) -> dict[str, Any] | None:
    """Each other run minus the baseline, paired by seed; None without a run to compare."""
    rows = [
        {"run": run.name, "style": style(i), **_difference(run, baseline, names)}
        for i, run in enumerate(runs)
        if run is not baseline
    ]
    if not any(row["pairs"] for row in rows):
        return None
    return {
        "baseline": baseline.name,
        "titles": [_described(name)[0] for name in names],
        "rows": rows,
    }


def _difference(run: Run, baseline: Run, names: Sequence[str]) -> dict[str, Any]:
    """A run's cells, and the number of pairs: on the seeds that both have, once each."""
    ours, theirs = run.by_place(), baseline.by_place()
    shared = [
        (ours[place], theirs[place])
        for place in ours
        if place in theirs and ours[place].crashed is None and theirs[place].crashed is None
    ]
    if not shared:
        return {"cells": [_difference_cell(name, None) for name in names], "pairs": 0}
    compared = compare(*zip(*shared, strict=True))
    cells = [_difference_cell(name, compared.differences.get(name)) for name in names]
    return {"cells": cells, "pairs": compared.pairs}


def _difference_cell(name: str, gain: Interval | None) -> dict[str, Any]:
    if gain is None:
        return {"mean": "n/a", "bounds": "", "sure": False}
    write = points if _described(name)[2] else _signed
    if gain.low is None or gain.high is None:
        return {"mean": write(gain.mean), "bounds": "no interval", "sure": False}
    bounds = f"{write(gain.low)} to {write(gain.high)}"
    sure = gain.low > 0 or gain.high < 0  # 0 lies outside the interval
    return {"mean": write(gain.mean), "bounds": bounds, "sure": sure}


def _signed(value: float) -> str:
    return formatted(value, "+,.1f" if abs(value) >= 10 else "+.2f")


# ------------------------------------------------------------------------------------------ curves


def progress_picture(runs: Sequence[Run]) -> Picture | None:
    """Mean progress after each step; None where no run recorded it."""
    steps = max(len(e.actions) for run in runs for e in run.episodes)
    curves = [mean_progress_curve(run.episodes, steps) for run in runs]
    lines = [
        Line(run.name, style(i), range(steps + 1), curve.tolist())
        for i, (run, curve) in enumerate(zip(runs, curves, strict=True))
        if curve.size
    ]
    return _picture("Progress per step", lines, "step", percent=True) if lines else None


def training(runs: Sequence[Run]) -> list[Picture]:
    """A picture of every number that a trainer logged per cycle; cycles are numbered from 1."""
    keys = {key for run in runs for cycle in run.cycles for key in cycle} - _CYCLE_HIDDEN
    order = list(_CYCLE_TITLES)
    pictures = []
    for key in sorted(keys, key=lambda k: (order.index(k) if k in order else len(order), k)):
        lines = []
        for i, run in enumerate(runs):
            ys = [_logged(cycle.get(key)) for cycle in run.cycles]
            if not all(map(math.isnan, ys)):
                xs = [cycle["cycle"] + 1 for cycle in run.cycles]
                lines.append(Line(run.name, style(i), xs, ys))
        if lines:
            title = _CYCLE_TITLES.get(key) or key.replace("_", " ").capitalize()
            pictures.append(_picture(title, lines, "cycle", percent=key in _CYCLE_SHARES))
    return pictures


def updates(runs: Sequence[Run]) -> list[Picture]:
    """A picture of every number that a trainer logged within its cycles, by update."""
    keys = {key for run in runs for entry in run.updates for key in entry} - _CYCLE_HIDDEN
    pictures = []
    for key in sorted(keys, key=lambda key: (key != "loss", key)):
        lines = []
        for i, run in enumerate(runs):
            ys = [_logged(entry.get(key)) for entry in run.updates]
            if not all(map(math.isnan, ys)):
                lines.append(Line(run.name, style(i), [e["step"] for e in run.updates], ys))
        if lines:
            title = key.replace("_", " ").capitalize()
            pictures.append(_picture(title, lines, "update", percent=False))
    return pictures


def settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What each run depended on and how it came about: a name, and each run's value."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [(name, [_setting(run.settings.get(name)) for run in runs]) for name in names]


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    return plain(value) if isinstance(value, str | int | float) else json.dumps(value)


def _logged(value: Any) -> float:
    return (
        number(value)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else math.nan
    )


def _picture(title: str, lines: Sequence[Line], x_label: str, *, percent: bool) -> Picture:
    values = [dict(zip(line.xs, line.ys, strict=True)) for line in lines]
    xs = sorted({x for line in lines for x in line.xs})
    svg = None
    if len(xs) > 1:
        svg = line_chart(lines, title=f"{title}, by {x_label}", x_label=x_label, percent=percent)
    spec = ".1%" if percent else ",.4g"
    rows = [[f"{x:g}", *(formatted(ys.get(x), spec) for ys in values)] for x in xs]
    return Picture(title, svg, [x_label.capitalize(), *(line.label for line in lines)], rows)


# ------------------------------------------------------------------------------------------ tables


def split(key: str, runs: Sequence[Run]) -> dict[str, Any] | None:
    """Success and progress for each value of ``key``; None where there are fewer than two."""
    groups = [split_by(key, run.episodes) for run in runs]
    names = sorted({name for group in groups for name in group})
    if len(names) < 2:
        return None
    rows = [
        {"name": name, "cells": [_split_cell(group.get(name, [])) for group in groups]}
        for name in names
    ]
    return {"key": key, "rows": rows}


def _split_cell(episodes: Sequence[Episode]) -> dict[str, Any]:
    success, progress = (_mean(name, episodes) for name in ("success", "progress_rate"))
    return {
        "count": len(episodes),
        "share": 0.0 if math.isnan(success) else success,
        "success": formatted(success, ".0%"),
        "progress": formatted(progress, ".0%"),
    }


def _mean(name: str, episodes: Sequence[Episode]) -> float:
    """Of those that ended and have one; NaN for none."""
    told = [METRICS[name](episode) for episode in episodes if episode.crashed is None]
    values = [value for value in told if value is not None]
    return sum(values) / len(values) if values else math.nan


def skills(runs: Sequence[Run]) -> dict[str, Any] | None:
    """AgentBoard's sub-skills as bars, and over which of its tasks; None where no run has two of
    them, of which any weights make the same."""
    found = [success_by_task(run.episodes) for run in runs]
    scores = [sub_skills(rates) if len(rates) > 1 else {} for rates in found]
    if not any(scores):
        return None

    def at(share: float) -> float:
        return round(100 * share, 2)

    named = next(score for score in scores if score)
    bars = {
        skill: [
            _bar(run.name, style(i), _exact(score.get(skill)), True, at)
            for i, (run, score) in enumerate(zip(runs, scores, strict=True))
        ]
        for skill in named
    }
    return {
        "bars": [
            {"title": skill.capitalize(), "note": "", "bars": own} for skill, own in bars.items()
        ],
        "over": [
            f"{run.name}: {', '.join(rates)}, {len(rates)} of {len(TASKS)}"
            for run, rates in zip(runs, found, strict=True)
            if len(rates) > 1
        ],
    }


def _exact(value: float | None) -> Interval | None:
    return None if value is None else Interval(value, None, None)


def invalid(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Kinds of invalid actions, the most frequent first: how many, and the share of all actions."""
    counted = [invalid_actions(run.episodes) for run in runs]
    judged = [sum(len(episode.valid) for episode in run.episodes) for run in runs]
    totals = {
        kind: sum(kinds.get(kind, 0) for kinds in counted) for kinds in counted for kind in kinds
    }
    return [
        {
            "kind": kind,
            "cells": [
                {
                    "count": kinds.get(kind, 0) if actions else None,
                    "share": kinds.get(kind, 0) / actions if actions else None,
                }
                for kinds, actions in zip(counted, judged, strict=True)
            ],
        }
        for kind in sorted(totals, key=lambda kind: (-totals[kind], kind))
    ]
