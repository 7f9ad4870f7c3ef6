"""A training run as one self-contained HTML page: results, learning curve, one trajectory.

matplotlib draws the pictures as inline SVG and jinja2 fills ``templates/report.html.jinja``. The
page loads nothing from the network and runs no script.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ExampleStep", "ExampleTrajectory", "closing_table", "write_report"]

_AGENTS = {
    "random": "Random actions",
    "sft": "SFT",
    "sft_continued": "SFT continued",
    "dagger": "DAgger",
    "stepagent_expert_states": "StepAgent,\nexpert’s states",
    "stepagent": "StepAgent",
}
_STATES = {"expert": "the expert’s states", "agent": "the agent’s own states"}

_REQUIRED = (
    *("environment", "seed", "sft", "sft_continued", "stepagent.states", "stepagent.cycles"),
    *("tokens.unique", "tokens.naive", "episodes", "validation_seeds", "evaluation_seeds"),
    "seconds",
)
_REQUIRED_PER_CYCLE = ("cycle", "loss", "agreement", "success_rate")
_OPTIONAL = (*_AGENTS, "differences", "expert_agreement", "hyperparameters")

# matplotlib draws with a placeholder per role; the page's CSS has its colour, light or dark.
_ROLES = ("ink", "muted", "line", "accent", "teal", "plum", "positive", "negative")
_COLOURS = {role: f"#00000{digit:x}" for digit, role in enumerate(_ROLES, start=1)}
_AGENT_COLOURS = {
    "dagger": _COLOURS["teal"],
    "stepagent_expert_states": _COLOURS["plum"],
    "stepagent": _COLOURS["accent"],
}

_WIDTH = 4.8  # inches: at 72 pixels each about a phone's width, where text keeps its size
_STYLE: dict[Any, Any] = {  # matplotlib's keys are one long Literal
    "font.size": 10.5,
    "text.color": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "stepagent",  # the same numbers give the same file
}


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


def write_report(path: Path, metrics: dict[str, Any], example: ExampleTrajectory) -> None:
    """Write the page about a run to ``path``.

    ``metrics`` is the run's metrics.json; a value that is None or NaN is shown as "n/a". Raises
    KeyError for a required key that is missing, and ImportError without matplotlib.
    """
    _require(metrics)
    agents = [agent for agent in _AGENTS if metrics.get(agent)]
    page = _template().render(
        metrics=dict.fromkeys(_OPTIONAL) | metrics,
        agents=agents,
        labels=_AGENTS,
        states=_STATES.get(metrics["stepagent"]["states"], metrics["stepagent"]["states"]),
        hyperparameters=dict(_flatten(metrics.get("hyperparameters") or {})),
        example=example,
        scale=_scale(example),
        pictures=_pictures(metrics, agents, example),
    )
    path.write_text(page, encoding="utf-8")


def _require(metrics: Mapping[str, Any]) -> None:
    for key in (*_REQUIRED, *(f"{a}.success_rate" for a in _AGENTS if metrics.get(a) is not None)):
        values: Any = metrics
        for part in key.split("."):
            if part not in values:
                raise KeyError(f"metrics lack {key!r}")
            values = values[part]
    for index, cycle in enumerate(metrics["stepagent"]["cycles"]):
        for key in _REQUIRED_PER_CYCLE:
            if key not in cycle:
                raise KeyError(f"metrics lack 'stepagent.cycles[{index}].{key}'")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stepagent", "templates"),
        autoescape=True,  # observations and actions are text of the environment and of the model
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, interval, points, signed, count, times, plain, duration, strength)
    environment.filters.update({function.__name__: function for function in filters})
    return environment.get_template("report.html.jinja")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _scale(example: ExampleTrajectory) -> float:
    """The largest step reward in size: the end of the colour scale."""
    rewards = (_number(r) for step in example.steps for r in (step.reward, step.reward_before))
    return max((abs(r) for r in rewards if not math.isnan(r)), default=0.0) or 1.0


# ------------------------------------------------------------------------------------- numbers


def _number(value: float | None) -> float:
    """NaN stands for every value that is not available."""
    return value if value is not None and math.isfinite(value) else math.nan


def _format(value: float | None, spec: str) -> str:
    number = _number(value)
    return "n/a" if math.isnan(number) else format(number, spec).replace("-", "−")


def percent(value: float | None) -> str:
    return _format(value, ".1%")


def interval(bounds: Sequence[float | None] | None) -> str:
    low, high = bounds or (None, None)
    return f"{percent(low).rstrip('%')}–{percent(high)}"


def points(value: float | None) -> str:
    """A difference of two rates in percentage points."""
    return _format(100 * _number(value), "+.1f")


def signed(value: float | None) -> str:
    return _format(value, "+.2f")


def count(value: float | None) -> str:
    return _format(value, ",.0f")


def times(value: float | None, base: float | None) -> str:
    """How many times ``base`` the value is."""
    return _format(_number(value) / (_number(base) or math.nan), ".1f") + "×"


def plain(value: object) -> str:
    """A hyper-parameter or a logged number in its shortest form."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    if math.isnan(number := _number(seconds)):
        return "n/a"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def strength(reward: float | None, scale: float) -> float:
    """How much of its colour a reward gets, in [0, 1]: 0 for none, 1 at the end of the scale."""
    share = abs(_number(reward)) / scale
    return 0.0 if math.isnan(share) else round(share, 3)


# ------------------------------------------------------------------------------------ pictures


def _pictures(
    metrics: Mapping[str, Any], agents: Sequence[str], example: ExampleTrajectory
) -> dict[str, Markup]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the report's pictures need matplotlib ({error}): pip install 'stepagent[demo]'"
        ) from error

    def figure(height: float) -> Figure:
        return Figure(figsize=(_WIDTH, height), layout="constrained")

    with matplotlib.rc_context(_STYLE):
        figures = {
            "results": _draw_results(figure(0.6 + 0.4 * len(agents)), metrics, agents),
            "curve": _draw_curve(figure(3.4), metrics, agents),
            "agreement": _draw_agreement(figure(3.4), metrics["stepagent"]["cycles"]),
            "rewards": _draw_rewards(figure(3.5), example),
        }
        return {name: _svg(drawn, name) for name, drawn in figures.items()}


def _svg(figure: Figure, name: str) -> Markup:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # HTML needs no XML declaration and no doctype
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    # Ids are unique in a page, not only in a picture.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for role, placeholder in _COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{role})")
    return Markup(svg)


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _step_axis(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(label)


def _draw_results(figure: Figure, metrics: Mapping[str, Any], agents: Sequence[str]) -> Figure:
    axes = figure.subplots()
    for row, agent in enumerate(agents):
        rate = _number(metrics[agent]["success_rate"])
        low, high = map(_number, metrics[agent].get("interval") or (None, None))
        axes.barh(row, rate, height=0.62, color=_AGENT_COLOURS.get(agent, _COLOURS["muted"]))
        axes.plot([low, high], [row, row], "|-", color=_COLOURS["ink"], linewidth=1.4)
        end = max((x for x in (rate, high) if not math.isnan(x)), default=0.0)
        axes.text(end + 0.015, row, percent(rate), va="center", fontweight="bold")
    axes.set_yticks(range(len(agents)), [_AGENTS[agent] for agent in agents])
    axes.tick_params(axis="y", length=0, labelcolor=_COLOURS["ink"])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 1.14)  # room for a number behind a full bar
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x")
    _percent_axis(axes.xaxis)
    return figure


def _draw_curve(figure: Figure, metrics: Mapping[str, Any], agents: Sequence[str]) -> Figure:
    axes = figure.subplots()
    last = max((cycle["cycle"] for cycle in metrics["stepagent"]["cycles"]), default=1)
    for agent in agents:
        if agent == "random":  # so far below that it would flatten the others
            continue
        label = _AGENTS[agent].replace("\n", " ")
        colour = _AGENT_COLOURS.get(agent, _COLOURS["muted"])
        if cycles := metrics[agent].get("cycles"):
            x = [0, *(cycle["cycle"] for cycle in cycles)]
            rates = (metrics["sft"]["success_rate"], *(cycle["success_rate"] for cycle in cycles))
            y = [_number(rate) for rate in rates]
            width = 2.4 if agent == "stepagent" else 1.4
            axes.plot(x, y, "o-", markersize=4, color=colour, linewidth=width, label=label)
        else:
            level = _number(metrics[agent]["success_rate"])
            dashes = ":" if agent == "sft" else "--"
            axes.plot([0, last], [level] * 2, dashes, color=colour, linewidth=1.4, label=label)
    axes.set_title("Success rate on held-out episodes")
    axes.grid(axis="y")
    axes.margins(y=0.12)
    _percent_axis(axes.yaxis)
    _step_axis(axes, "cycle (0: SFT)")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _draw_agreement(figure: Figure, cycles: Sequence[Mapping[str, Any]]) -> Figure:
    x = [cycle["cycle"] for cycle in cycles]
    margins = [_number(cycle.get("reward_margin")) for cycle in cycles]
    has_margins = not all(map(math.isnan, margins))
    plots = figure.subplots(1 + has_margins, 1, sharex=True, squeeze=False)[:, 0]
    agreement = [_number(cycle["agreement"]) for cycle in cycles]
    plots[0].plot(x, agreement, "o-", markersize=4, color=_COLOURS["accent"])
    plots[0].set_title("Agreement with the expert")
    _percent_axis(plots[0].yaxis)
    if has_margins:
        plots[1].plot(x, margins, "o-", markersize=4, color=_COLOURS["positive"])
        plots[1].set_title("Step-reward margin, expert − agent (nat)")
    for axes in plots:
        axes.grid(axis="y")
        axes.margins(y=0.15)
    _step_axis(plots[-1], "cycle")
    return figure


def _draw_rewards(figure: Figure, example: ExampleTrajectory) -> Figure:
    bars, strip = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    scale = _scale(example)
    size = min(6.0, 160 / max(len(example.steps), 1))  # neighbours do not touch
    for number, step in enumerate(example.steps, start=1):
        _draw_bar(bars, number, step.reward, scale)
        if step.before != step.expert_action:
            look = _hollow("ink")
            bars.plot(number, _number(step.reward_before), "D", markersize=0.8 * size, **look)
        for row, action in enumerate((step.after, step.before)):
            same = action == step.expert_action
            look = {"color": _COLOURS["accent"]} if same else _hollow("negative")
            strip.plot(number, row, "s", markersize=size, **look)
    bars.axhline(0, color=_COLOURS["muted"], linewidth=0.8)
    bars.set_title("Step reward of the expert’s action (nat)")
    bars.grid(axis="y")
    bars.margins(y=0.12)
    strip.set_title("Same action as the expert: ■ yes, □ no")
    strip.set_yticks([0, 1], ["StepAgent", "SFT"])
    strip.set_ylim(-0.6, 1.6)
    strip.tick_params(axis="y", length=0, labelcolor=_COLOURS["ink"])
    strip.spines["left"].set_visible(False)
    _step_axis(strip, "step")
    return figure


def _draw_bar(axes: Axes, number: int, reward: float, scale: float) -> None:
    height = _number(reward)
    colour = _COLOURS["negative" if height < 0 else "positive"]
    # Never quite transparent: a small reward's bar has to be seen.
    axes.bar(number, height, color=colour, alpha=0.2 + 0.8 * strength(height, scale))


def _hollow(role: str) -> dict[str, Any]:
    return {"markerfacecolor": "none", "markeredgecolor": _COLOURS[role], "markeredgewidth": 1.2}


def closing_table(metrics: dict[str, Any]) -> str:
    """What was reached, for the terminal."""
    rows = [f"{'':28}{'success':>9}   95 % interval   expert's action on held-out states"]
    for name, label in _AGENTS.items():
        result, same = metrics[name], metrics["expert_agreement"].get(name)
        low, high = result["interval"]
        agreement = "" if same is None else f"{same:.1%}"
        rate = f"{result['success_rate']:.1%}"
        rows.append(
            f"{' '.join(label.split()):28}{rate:>9}   {low:.1%} … {high:.1%}   {agreement:>8}"
        )
    for rival in ("sft", "sft_continued", "dagger"):
        gain = {k: 100 * v for k, v in metrics["differences"][rival].items()}
        rows.append(
            f"StepAgent − {_AGENTS[rival]}: {gain['mean']:+.1f} points "
            f"(95 % interval {gain['low']:+.1f} … {gain['high']:+.1f}, paired)"
        )
    tokens = metrics["tokens"]
    rows.append(
        f"tokens encoded in trees: {tokens['unique']:,}; as separate pairs: {tokens['naive']:,} "
        f"({tokens['naive'] / tokens['unique']:.1f}×)"
    )
    return "\n".join(rows)
