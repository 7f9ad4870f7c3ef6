"""``stepagent collect`` and ``evaluate``: a policy acts in an environment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..address import Address, TokenLimit, is_url, scheme_hint, without_secrets
from .base import FILE, FOLDER, NEW_FILE, POSITIVE, make_parent, reports
from .loading import import_from_here, is_hub_name, parse_format, template_option
from .rolling import Rollout

if TYPE_CHECKING:
    from ..records.episodes import Episode

_PERCENT = ("success", "progress_rate", "grounding_accuracy", "repetition", "agreement")


def _parse_seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """``0-99,200`` as a list of whole numbers, each once."""
    if value is None:
        return None
    seeds: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or not (last if dash else first).isdecimal():
            raise click.BadParameter(f"{value!r} is no list such as 0-99,200")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise click.BadParameter(f"{value!r} must name at least one seed, and each once")
    return seeds


def _check_policy(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if is_url(value):
        try:
            Address.parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    elif value not in ("expert", "random") and not Path(value).is_dir() and not is_hub_name(value):
        raise click.BadParameter(
            f"{without_secrets(value)!r} is neither 'expert' nor 'random' nor a model's folder nor "
            f"its name on the Hub (owner/name) nor a server's URL{scheme_hint(value)}"
        )
    return value


_policy = functools.partial(
    click.option, "--policy", metavar="expert|random|PATH|NAME|URL", callback=_check_policy
)
_POLICY_HELP = (
    "Who acts; PATH is a model's folder, NAME its name on the Hub, URL an OpenAI-compatible "
    "server's."
)


_OPTIONS = (
    click.option(
        "--env",
        required=True,
        help="For example babyai:GoToLocalS6N2, or your own module:Class.",
    ),
    click.option("--split", metavar="NAME", help="Where it has some, for example test."),
    click.option("--episodes", type=POSITIVE, help="How many.  [default: 100]"),
    click.option(
        "--seed-start",
        type=click.IntRange(min=0),
        help="Environment seed of the first episode; the others follow.  [default: 0]",
    ),
    click.option(
        "--seeds",
        metavar="A-B,…",
        callback=_parse_seeds,
        help="These instead, for example 0-99,200.",
    ),
    click.option("--max-steps", type=POSITIVE, help="End an episode sooner."),
    click.option("--query-expert", is_flag=True, help="Record the expert's action at every state."),
    click.option(
        "--max-new-tokens",
        type=POSITIVE,
        default=32,
        show_default=True,
        help="Longest action of a model.",
    ),
    click.option(
        "--batch-size",
        type=POSITIVE,
        default=64,
        show_default=True,
        help="Episodes side by side.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Processes that run the environments; 0: this one does.",
    ),
    click.option(
        "--step-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="An environment that takes longer for a step has crashed. With --workers 0 "
        "one that hangs in C code cannot be stopped.",
    ),
    click.option("--served-model", metavar="NAME", help="Of several on the server."),
    click.option(
        "--tokenizer",
        type=FOLDER,
        help="Of the server's model: token ids both ways in place of text.",
    ),
    click.option("--system", metavar="TEXT", help="First message to a model."),
    template_option,
    click.option(
        "--instructions/--no-instructions",
        default=None,
        help="Tell a model the task and its actions in the first message.  [default: by "
        "name, where it is one of the Hub or a server's that is asked in text]",
    ),
    click.option(
        "--action-format",
        metavar="NAME",
        callback=parse_format,
        default="plain",
        show_default=True,
        help="How a model writes an action: plain, react, json, tool_call, or your own "
        "module:function.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        help="Of a model's answers.  [default: 0, the likeliest]",
    ),
    click.option(
        "--server-timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="To wait for a server's answer before another try.  [default: 600]",
    ),
    click.option(
        "--token-limit",
        type=click.Choice(get_args(TokenLimit)),
        help="Field of a server's requests that limits the answer.  [default: max_tokens]",
    ),
)


def _rollout_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which episodes to run, gathered in a `Rollout`."""

    @functools.wraps(function)
    def command(
        policy: str,
        output: Path | None,
        seeds: list[int] | None,
        episodes: int | None,
        seed_start: int | None,
        **options: Any,
    ) -> Any:
        import_from_here()
        if seeds is not None and (episodes is not None or seed_start is not None):
            raise click.UsageError("--seeds says which episodes; --episodes and --seed-start too")
        if seeds is None:
            start = seed_start or 0
            seeds = list(range(start, start + (100 if episodes is None else episodes)))
        own = {name: options.pop(name) for name in ("against", "card") if name in options}
        if output is not None:
            make_parent(output)
        rollout = Rollout(function.__name__, policy=policy, seeds=seeds, output=output, **options)
        return function(rollout, **own)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_policy(default="expert", show_default=True, help=_POLICY_HELP)
@click.option("--output", type=NEW_FILE, required=True, help="JSONL of trajectories.")
@click.option("--card", is_flag=True, help="Describe them in a README.md beside, for the Hub.")
@reports
@_rollout_options
def collect(rollout: Rollout, card: bool) -> tuple[dict[str, Any], str]:
    """Run episodes and save their trajectories.

    Of the expert's episodes, only those that succeeded are kept. Each is written as it ends, and
    the same command continues where it was stopped.
    """

    from ..evaluation import success_rate

    def keep(episode: Episode) -> bool:
        wanted = episode.success or rollout.policy != "expert"
        return wanted and episode.crashed is None

    episodes = rollout.run(keep)
    rate = success_rate(episodes)
    kept = [episode for episode in episodes if keep(episode)]
    if not kept:
        raise ValueError(
            f"none of {len(episodes)} expert episodes in {rollout.shown_env} succeeded"
        )
    report = {
        "path": str(rollout.output),
        "environment": rollout.shown_env,
        "policy": rollout.shown_policy,
        "episodes": len(episodes),
        "kept": len(kept),
        "success_rate": rate,
    }
    text = f"{rollout.shown_policy} in {rollout.shown_env}: success rate {rate:.1%}"
    if dropped := len(episodes) - len(kept):
        text += f"; dropped {dropped} of {len(episodes)} episodes, which failed or crashed"
    text += f"\nWrote {len(kept)} trajectories to {rollout.output}"
    if card:
        text += f"\n{_write_card(rollout, kept)}"
    return report, text


def _write_card(rollout: Rollout, kept: Sequence[Episode]) -> str:
    from ..evaluation.card import write_dataset_card

    assert rollout.output is not None
    path = rollout.output.with_name("README.md")
    if write_dataset_card(path, kept, rollout.output.name):
        return f"Wrote their card to {path}"
    return f"Left {path} as it is: a person wrote it"


@click.command()
@_policy(required=True, help=_POLICY_HELP)
@click.option("--output", type=NEW_FILE, help="JSONL of the episodes as trajectories.")
@click.option("--against", type=FILE, help="Compare with these episodes, pair by pair.")
@reports
@_rollout_options
def evaluate(rollout: Rollout, against: Path | None) -> tuple[dict[str, Any], str]:
    """Measure an agent's success, progress and grounding in an environment.

    With --output each episode is written as it ends, and the same command continues where it was
    stopped.
    """
    from ..evaluation.metrics import compare, summarize
    from ..records.episode_file import describe_seeds
    from ..records.episodes import load_episodes

    others = [] if against is None else load_episodes(against)
    episodes = rollout.run()
    summary = summarize(episodes)
    report = {
        "environment": rollout.shown_env,
        "policy": rollout.shown_policy,
        "seeds": describe_seeds(rollout.seeds),
        "success_rate": summary.metrics["success"].mean,
        **asdict(summary),
        "by_task": _groups("task", episodes),
        "by_difficulty": _groups("difficulty", episodes),
        "against": None,
        "output": None if rollout.output is None else str(rollout.output),
        "written": sum(bool(e.actions) for e in episodes) if rollout.output is not None else 0,
    }
    if against is not None:
        report["against"] = {"path": str(against), **asdict(compare(episodes, others))}
    return report, _text(report)


def _groups(label: str, episodes: Sequence[Episode]) -> dict[str, Any]:
    from ..evaluation.metrics import split_by, summarize

    ended = [episode for episode in episodes if episode.crashed is None]
    groups = {name: asdict(summarize(own)) for name, own in split_by(label, ended).items()}
    return {
        name: {key: group[key] for key in ("episodes", "metrics")} for name, group in groups.items()
    }


# ------------------------------------------------------------------ for a person


def _text(report: dict[str, Any]) -> str:
    crashed = f"; {report['crashed']} more crashed" if report["crashed"] else ""
    lines = [
        f"{report['policy']} in {report['environment']}, "
        f"{report['episodes']} episodes, seeds {report['seeds']}{crashed}",
        *_table(report["metrics"]),
    ]
    if report["invalid_actions"]:
        kinds = (f"{kind} {count}" for kind, count in report["invalid_actions"].items())
        lines.append(f"invalid actions     {', '.join(kinds)}")
    if limited := report["terminate_reasons"].get("context_limit"):
        lines.append(f"context limit       {limited} episodes ended there")
    for label in ("task", "difficulty"):
        for name, group in report[f"by_{label}"].items():
            means = [
                f"{key.replace('_', ' ')} {_figure(key, group['metrics'][key]['mean'])}"
                for key in ("success", "progress_rate")
                if key in group["metrics"]
            ]
            lines.append(f"{label} {name}: {', '.join(means)} over {group['episodes']} episodes")
    if report["against"]:
        other = report["against"]
        lines.append(f"less {other['path']}, {other['pairs']} pairs of episodes")
        lines += _table(other["differences"], sign="+")
    if report["output"]:
        lines.append(f"Wrote {report['written']} episodes to {report['output']}")
    return "\n".join(lines)


def _table(metrics: dict[str, dict[str, float | None]], sign: str = "") -> list[str]:
    rows = []
    for name, found in metrics.items():
        ends = [
            _figure(name, end, sign) for end in (found["low"], found["high"]) if end is not None
        ]
        interval = f"95 %: {' to '.join(ends)}" if ends else "no interval"
        mean = _figure(name, found["mean"] or 0.0, sign)
        rows.append(f"{name.replace('_', ' '):<20}{mean}  ({interval})")
    return rows


def _figure(name: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if name in _PERCENT else f"{value:{sign}.3f}"
