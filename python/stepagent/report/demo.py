"""The demo's page: the board over its stages, with a headline and one trajectory in front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .board import style
from .numbers import number, points
from .page import write_page
from .runs import Run, load_run

__all__ = ["ExampleStep", "ExampleTrajectory", "closing_table", "write_demo_report"]

_LABELS = {
    "random": "Random actions",
    "zero_shot": "Untrained",
    "sft": "SFT",
    "sft_long": "SFT, for longer",
    "sft_continued": "SFT continued",
    "dagger": "DAgger",
    "stepagent_expert_states": "StepAgent, expert’s states",
    "stepagent": "StepAgent",
    "rft": "RFT",
    "eto": "ETO",
    "inverse_expert_states": "Inverse RL, expert’s states",
    "inverse": "StepAgent, inverse RL",
}
_STATES = {"expert": "the expert’s states", "agent": "the agent’s own states"}

_REQUIRED = (
    *("environment", "seed", "method", "main", "sft", "sft_continued"),
    *("tokens.unique", "tokens.naive", "episodes", "validation_seeds", "evaluation_seeds"),
    "seconds",
)
_OPTIONAL = ("differences", "expert_agreement", "hyperparameters", "dagger")


@dataclass(frozen=True)
class ExampleStep:
    """One step of an expert's trajectory, with what the agent would have done there."""

    observation: str
    expert_action: str
    before: str
    """The SFT agent's action."""
    after: str
    """The StepAgent agent's action."""
    reward: float
    """Step reward of the expert's action: β (log π − log π_sft)."""
    reward_before: float
    """Step reward of the SFT agent's own action."""


@dataclass(frozen=True)
class ExampleTrajectory:
    title: str
    steps: tuple[ExampleStep, ...]


def write_demo_report(folder: Path, metrics: dict[str, Any], example: ExampleTrajectory) -> None:
    """Write ``report.html`` about the run in ``folder``, whose stages hold their episodes.

    ``metrics`` is the run's metrics.json; a value that is None or NaN is shown as "n/a". Raises
    KeyError for a required key that is missing.
    """
    _require(metrics)
    write_stages_page(folder, metrics, example, "demo.html.jinja", {"spread": spread(metrics)})


def write_stages_page(
    folder: Path,
    metrics: dict[str, Any],
    example: ExampleTrajectory,
    template: str,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Fill ``template`` about the stages in ``folder`` that ``metrics`` has a success rate of.

    Args:
        more: what the template needs beside the values of the demo's page.
    """
    agents = stages_of(metrics)
    runs = _runs(folder, agents)
    names, states = [run.name for run in runs], metrics[metrics["main"]]["states"]
    values = {
        "metrics": dict.fromkeys(_OPTIONAL) | metrics,
        "agents": agents,
        "label": label,
        "styles": {a: style(names.index(label(a))) for a in agents if label(a) in names},
        "states": _STATES.get(states, states),
        "hyperparameters": dict(_flatten(metrics.get("hyperparameters") or {})),
        "example": example,
        "strength": lambda reward: _strength(reward, _scale(example)),
        "spread": None,
        **(more or {}),
    }
    write_page(folder / "report.html", template, runs, baseline=label("sft"), values=values)


def label(agent: str) -> str:
    """What the page calls a stage's agent."""
    return _LABELS.get(agent, agent.replace("_", " "))


def stages_of(metrics: Mapping[str, Any]) -> list[str]:
    """The stages that were evaluated: those with a label in its order, then the others."""
    found = [name for name, v in metrics.items() if isinstance(v, Mapping) and "success_rate" in v]
    order = list(_LABELS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _runs(folder: Path, agents: list[str]) -> list[Run]:
    runs = [
        load_run(folder / agent, label(agent))
        for agent in agents
        if (folder / agent / "episodes.jsonl").exists()
    ]
    held_out = folder / "expert_held_out.jsonl"
    return [*runs, load_run(held_out, "Expert", expert=True)] if held_out.exists() else runs


def _require(metrics: Mapping[str, Any]) -> None:
    for key in (*_REQUIRED, f"{metrics.get('main')}.states"):
        values: Any = metrics
        for part in key.split("."):
            if part not in values:
                raise KeyError(f"metrics lack {key!r}")
            values = values[part]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _scale(example: ExampleTrajectory) -> float:
    """The largest step reward in size: the end of the colour scale."""
    rewards = (number(r) for step in example.steps for r in (step.reward, step.reward_before))
    return max((abs(r) for r in rewards if not math.isnan(r)), default=0.0) or 1.0


def _strength(reward: float | None, scale: float) -> float:
    """How much of its colour a reward gets, in [0, 1]: 0 for none, 1 at the end of the scale."""
    share = abs(number(reward)) / scale
    return 0.0 if math.isnan(share) else round(share, 3)


def closing_table(metrics: dict[str, Any]) -> str:
    """What was reached, for the terminal."""
    rows = [f"{'':28}{'success':>9}   95 % interval   expert's action on held-out states"]
    for name in stages_of(metrics):
        result, same = metrics[name], metrics["expert_agreement"].get(name)
        low, high = result["interval"]
        agreement = "" if same is None else f"{same:.1%}"
        rate = f"{result['success_rate']:.1%}"
        rows.append(f"{label(name):28}{rate:>9}   {low:.1%} … {high:.1%}   {agreement:>8}")
    rows += [*gains(metrics), spread(metrics)]
    tokens = metrics["tokens"]
    rows.append(
        f"tokens encoded in trees: {tokens['unique']:,}; as separate pairs: {tokens['naive']:,} "
        f"({tokens['naive'] / tokens['unique']:.1f}×)"
    )
    return "\n".join(rows)


def spread(metrics: Mapping[str, Any]) -> str:
    """What one run leaves open, by ten runs that were measured once (docs/convergence.md)."""
    said = "This is one training run; its intervals are of the held-out episodes alone."
    if metrics["main"] != "stepagent":
        return said
    return (
        f"{said} Over ten runs {label('stepagent')} was 18.7 points above SFT continued, from +8.5 "
        "to +31.0, and 3.0 below DAgger, from −9.0 to +3.0."
    )


def gains(metrics: Mapping[str, Any]) -> list[str]:
    """The main stage's success less that of each other, a line each."""
    rows = []
    for rival, difference in metrics["differences"].items():
        mean, low, high = (points(difference[key]) for key in ("mean", "low", "high"))
        rows.append(
            f"{label(metrics['main'])} − {label(rival)}: {mean} points "
            f"(95 % interval {low} … {high}, paired)"
        )
    return rows
