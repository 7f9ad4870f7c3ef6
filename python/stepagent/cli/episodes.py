"""``stepagent collect`` and ``evaluate``: a policy acts in an environment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import envs
from ..evaluation import bootstrap, success_rate
from ..policies import ExpertPolicy, ModelPolicy, Policy, RandomPolicy
from ..rollout import Episode, action_tokens, run_episodes
from ..trajectory import save_trajectories
from .base import NEW_FILE, POSITIVE, make_parent, reports
from .loading import device, load_model


def _episode_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which episodes to run."""
    for option in reversed(
        (
            click.option("--env", required=True, help="For example babyai:GoToLocalS6N2."),
            click.option("--episodes", type=POSITIVE, default=100, show_default=True),
            click.option(
                "--seed-start",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                help="Environment seed of the first episode; the others follow.",
            ),
            click.option("--max-steps", type=POSITIVE, help="End an episode sooner."),
            click.option(
                "--max-new-tokens",
                type=POSITIVE,
                default=32,
                show_default=True,
                help="Longest action of a model.",
            ),
            click.option("--batch-size", type=POSITIVE, default=64, show_default=True),
        )
    ):
        function = option(function)
    return function


def _check_policy(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value not in ("expert", "random") and not Path(value).is_dir():
        raise click.BadParameter(f"{value!r} is neither 'expert' nor 'random' nor a model's folder")
    return value


_policy = functools.partial(
    click.option, "--policy", metavar="expert|random|PATH", callback=_check_policy
)


@click.command()
@_policy(default="expert", show_default=True, help="Who acts; PATH is a model's folder.")
@_episode_options
@click.option("--output", type=NEW_FILE, required=True, help="JSONL of trajectories.")
@reports
def collect(policy: str, output: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Run episodes and save their trajectories.

    Of the expert's episodes, only those that succeeded are kept.
    """
    make_parent(output)
    episodes = _run("collect", policy, **options)
    ended = _ended(episodes)
    kept = [e for e in ended if e.success] if policy == "expert" else ended
    if not kept:
        raise ValueError(f"none of {len(episodes)} expert episodes in {options['env']} succeeded")
    save_trajectories(output, [episode.trajectory() for episode in kept])
    report = {
        "path": str(output),
        "environment": options["env"],
        "policy": policy,
        "episodes": len(episodes),
        "kept": len(kept),
        "success_rate": success_rate(episodes),
    }
    dropped = len(episodes) - len(kept)
    text = f"{policy} in {options['env']}: success rate {report['success_rate']:.1%}"
    if dropped:
        text += f"; dropped {dropped} of {len(episodes)} episodes, which failed or crashed"
    return report, f"{text}\nWrote {len(kept)} trajectories to {output}"


@click.command()
@_policy(required=True, help="Who acts; PATH is a model's folder.")
@_episode_options
@click.option("--output", type=NEW_FILE, help="JSONL of the episodes as trajectories.")
@reports
def evaluate(policy: str, output: Path | None, **options: Any) -> tuple[dict[str, Any], str]:
    """Measure an agent's success in an environment."""
    if output is not None:
        make_parent(output)
    episodes = _run("evaluate", policy, **options)
    ended = _ended(episodes)
    report = {
        "environment": options["env"],
        "policy": policy,
        "seed_start": options["seed_start"],
        **_summary(ended),
        "crashed": len(episodes) - len(ended),
        "output": None if output is None else str(output),
    }
    if output is not None:
        save_trajectories(output, [episode.trajectory() for episode in ended])
    return report, _evaluation_text(report)


def _ended(episodes: Sequence[Episode]) -> list[Episode]:
    """Without those that crashed, which are neither successes nor failures of the policy."""
    ended = [episode for episode in episodes if episode.crashed is None]
    if not ended:
        raise ValueError(f"all {len(episodes)} episodes crashed, the first: {episodes[0].crashed}")
    return ended


def _summary(episodes: Sequence[Episode]) -> dict[str, Any]:
    interval = bootstrap([episode.success for episode in episodes])
    return {
        "episodes": len(episodes),
        "success_rate": interval.mean,
        "success_rate_interval": [interval.low, interval.high],
        "mean_reward": float(np.mean([sum(episode.rewards) for episode in episodes])),
        "mean_progress": float(np.mean([episode.progress[-1] for episode in episodes])),
        "grounding_accuracy": float(np.mean([v for episode in episodes for v in episode.valid])),
        "mean_steps": float(np.mean([len(episode.actions) for episode in episodes])),
    }


def _evaluation_text(report: dict[str, Any]) -> str:
    low, high = report["success_rate_interval"]
    first, last = report["seed_start"], report["seed_start"] - 1
    last += report["episodes"] + report["crashed"]
    crashed = f"; {report['crashed']} more crashed" if report["crashed"] else ""
    lines = [
        f"{report['policy']} in {report['environment']}, "
        f"{report['episodes']} episodes, seeds {first} to {last}{crashed}",
        f"success rate        {report['success_rate']:.1%}  (95 %: {low:.1%} to {high:.1%})",
        f"mean reward         {report['mean_reward']:.3f}",
        f"mean progress       {report['mean_progress']:.3f}",
        f"grounding accuracy  {report['grounding_accuracy']:.1%}",
        f"mean steps          {report['mean_steps']:.1f}",
    ]
    if report["output"]:
        lines.append(f"Wrote {report['episodes']} trajectories to {report['output']}")
    return "\n".join(lines)


def _run(
    label: str,
    policy: str,
    *,
    env: str,
    episodes: int,
    seed_start: int,
    max_steps: int | None,
    max_new_tokens: int,
    batch_size: int,
) -> list[Episode]:
    actor: Policy
    if policy == "expert":
        actor = ExpertPolicy()
    elif policy == "random":
        actor = RandomPolicy()
    else:
        actor = _model_policy(policy, env, max_new_tokens)
    seeds = range(seed_start, seed_start + episodes)
    return run_episodes(
        env, actor, seeds, max_steps=max_steps, batch_size=batch_size, progress=label
    )


def _model_policy(path: str, env: str, max_new_tokens: int) -> ModelPolicy:
    action = _some_action(env)  # first: a wrong name need not wait for a model
    model, tokenizer = load_model(path, device())
    end_of_turn = int(action_tokens(action, tokenizer)[-1])
    return ModelPolicy(model, tokenizer, max_new_tokens=max_new_tokens, eos_token_id=end_of_turn)


def _some_action(name: str) -> str:
    with closing(envs.make(name)) as env:
        env.reset(seed=0)
        return env.actions[0] if env.actions else env.expert_action()
