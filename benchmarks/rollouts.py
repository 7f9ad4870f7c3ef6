"""Environments side by side against one at a time: rollouts of a small model, CPU, greedy.

Measured: the same episodes of a BabyAI level by ``run_episodes`` in three ways, steps per second:

* one: one environment, in this process, one episode after the other.
* batch: ``--environments`` of them in this process, one batch of model forwards per step.
* workers: the same in ``--workers`` processes, which step and plan at the same time.

The model has random weights and hardly ever solves the level, so an episode has ``--steps`` steps,
of ``--action-tokens`` tokens at most. All ways must give the same episodes, token for token, or
nothing is reported; that first run is also the warm-up. Then they are timed in turn; the medians
count. Every timed run starts its workers; only what the first start costs, once a process, when
multiprocessing's server imports the package, is reported apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch

from stepagent.acting.policies import ExpertPolicy, ModelPolicy
from stepagent.acting.rollout import Episode, run_episodes

Roll = Callable[[], list[Episode]]


def ways(policy: ModelPolicy, options: argparse.Namespace) -> dict[str, Roll]:
    """The ways to roll out; each returns the episodes of the same seeds."""

    def roll(batch_size: int, workers: int) -> list[Episode]:
        return run_episodes(
            options.env,
            policy,
            range(options.episodes),
            max_steps=options.steps,
            batch_size=batch_size,
            workers=workers,
        )

    return {
        "one": lambda: roll(1, 0),
        "batch": lambda: roll(options.environments, 0),
        "workers": lambda: roll(options.environments, options.workers),
    }


def model_policy(options: argparse.Namespace) -> ModelPolicy:
    """An untrained Llama with the words of the level, learnt from the expert's episodes."""
    # Not above: every worker imports this script, as multiprocessing does, but needs no model.
    from stepagent.tools.small_models import small_llama, word_tokenizer

    torch.set_num_threads(options.threads)
    expert = run_episodes(options.env, ExpertPolicy(), range(options.episodes))
    tokenizer = word_tokenizer([episode.trajectory() for episode in expert])
    torch.manual_seed(0)
    model = small_llama(tokenizer, options.hidden, options.layers).eval()
    return ModelPolicy(model, tokenizer, max_new_tokens=options.action_tokens)


def same(found: list[Episode], expected: list[Episode]) -> bool:
    """Whether all tokens and all that was seen and paid are the same."""
    return all(
        a.trunk is not None
        and b.trunk is not None
        and a.trunk.input_ids.tolist() == b.trunk.input_ids.tolist()
        and (a.observations, a.rewards) == (b.observations, b.rewards)
        for a, b in zip(found, expected, strict=True)
    )


def seconds(name: str, roll: Roll) -> float:
    """Of one run, on the wall."""
    start = time.perf_counter()
    roll()
    elapsed = time.perf_counter() - start
    common.say(f"{name}: {elapsed:.2f} s")
    return elapsed


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Check that all ways give the same episodes, then time them."""
    rolls = ways(model_policy(options), options)
    common.say("checking that the episodes are the same …")
    first = {name: roll() for name, roll in rolls.items() if name != "workers"}
    start = time.perf_counter()
    first["workers"] = rolls["workers"]()
    cold = time.perf_counter() - start
    for name, episodes in first.items():
        common.check(same(episodes, first["one"]), f"{name}: other episodes than one at a time")
    steps = sum(len(episode.actions) for episode in first["one"])
    times: dict[str, list[float]] = {name: [] for name in rolls}
    for _ in range(options.repeats):
        for name, roll in rolls.items():
            times[name].append(seconds(name, roll))
    rates = {name: steps / statistics.median(runs) for name, runs in times.items()}
    return {
        "check": {"episodes_identical": True},
        "steps": steps,
        "seconds": times,
        "steps_per_second": rates,
        "ratio": {name: rates[name] / rates["one"] for name in rates},
        "first_start_of_workers_seconds": max(0.0, cold - statistics.median(times["workers"])),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--env", default="babyai:GoToLocalS6N2")
    parser.add_argument("--environments", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--action-tokens", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of torch, beside the workers")
    options = parser.parse_args()
    where = common.environment("minigrid", "gymnasium")
    found = compare(options)
    rows = [
        [name, f"{found['steps_per_second'][name]:.1f}", f"{found['ratio'][name]:.2f}×"]
        for name in found["ratio"]
    ]
    text = common.table(["way", "steps/s", "on one (target ≥ 3×)"], rows)
    title = (
        f"Rollouts: {options.environments} environments of {options.env}, "
        f"{options.workers} workers, {options.layers} layers of {options.hidden}, "
        f"{options.threads} torch threads"
    )
    shape = {k: v for k, v in vars(options).items() if k != "json"}
    result = {"benchmark": "rollouts", "shape": shape, **found}
    common.report(title, __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
