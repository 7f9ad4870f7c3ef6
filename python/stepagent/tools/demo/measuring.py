"""What a run's folder says about its agents: success, differences, agreement, cycles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...acting.policies import ExpertPolicy, RandomPolicy
from ...acting.rollout import Episode
from ...data.encoding import encode
from ...data.trajectory import Trajectory, load_trajectories, save_trajectories
from ...data.trunk import Trunk
from ...evaluation import expert_agreement, paired_rate_interval, rate_interval
from ...models import score_trees
from ...ops import step_sums
from ...trees.tree import pack_step_pairs
from .agents import MAX_NEW_TOKENS, Demo
from .stages import MAIN_STAGES, TITLES
from .training import is_trained


def measure(demo: Demo) -> dict[str, Any]:
    """Evaluate every stage that was trained; what ``metrics.json`` holds."""
    with demo.seconds:
        return _metrics(demo)


def successes(demo: Demo, name: str) -> list[int]:
    """Success of each held-out episode, kept as trajectories beside the model."""
    path = demo.folder / name / "episodes.jsonl"
    if not path.exists():
        policy = RandomPolicy() if name == "random" else demo.policy(demo.model(name))
        episodes = demo.episodes(policy, demo.settings.evaluation_seeds, name)
        if name in MAIN_STAGES:
            _add_step_rewards(demo, name, episodes)
        path.parent.mkdir(exist_ok=True)
        save_trajectories(path, [episode.trajectory() for episode in episodes])
    return [int(t.meta["success"]) for t in load_trajectories(path)]


def held_out(demo: Demo) -> list[Trajectory]:
    """The expert on the evaluation episodes."""
    path = demo.folder / "expert_held_out.jsonl"
    if not path.exists():
        policy, seeds = ExpertPolicy(), demo.settings.evaluation_seeds
        episodes = demo.episodes(policy, seeds, "expert, held out")
        save_trajectories(path, [e.trajectory() for e in episodes])
    return load_trajectories(path)


def _metrics(demo: Demo) -> dict[str, Any]:
    s, main = demo.settings, demo.main
    trained = [name for name in TITLES if is_trained(demo.folder / name)]
    names = ["random", *trained]
    found = {name: successes(demo, name) for name in names}
    results: dict[str, Any] = {name: _result(values) for name, values in found.items()}
    for name in trained:
        if name in MAIN_STAGES:
            results[name] |= {"states": "agent", "cycles": _cycles(demo, name)}
    trunks = [encode(trajectory, demo.tokenizer) for trajectory in held_out(demo)]
    cycles = results[main]["cycles"]
    return {
        "environment": s.environment,
        "seed": s.seed,
        "method": demo.method,
        "main": main,
        **results,
        "differences": {
            name: asdict(paired_rate_interval(found[main], found[name]))
            for name in names
            if name != main
        },
        "expert_agreement": {name: _agreement(demo, name, trunks) for name in trained},
        "tokens": {
            "unique": sum(cycle["tokens_unique"] for cycle in cycles),
            "naive": sum(cycle["tokens_naive"] for cycle in cycles),
        },
        "episodes": s.evaluation_episodes,
        "validation_seeds": [s.validation_seeds[0], s.validation_seeds[-1]],
        "evaluation_seeds": [s.evaluation_seeds[0], s.evaluation_seeds[-1]],
        "hyperparameters": asdict(s),
        "seconds": demo.seconds.total(),
    }


def _result(outcomes: Sequence[int]) -> dict[str, Any]:
    interval = rate_interval(outcomes)
    return {"success_rate": interval.mean, "interval": [interval.low, interval.high]}


def _agreement(demo: Demo, name: str, trunks: Sequence[Trunk]) -> float:
    return expert_agreement(
        demo.model(name),
        trunks,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=demo.tokenizer.eos_token_id,
    )


def _cycles(demo: Demo, name: str) -> list[dict[str, Any]]:
    """What each cycle logged; numbered from 1, for the agent before any cycle is SFT's."""
    log = json.loads((demo.folder / name / "log.json").read_text())
    return [
        {**entry, "cycle": entry["cycle"] + 1, "loss": entry["mean_loss"]}
        for entry in log
        if "cycle" in entry
    ]


@torch.no_grad()
def _add_step_rewards(demo: Demo, name: str, episodes: Sequence[Episode]) -> None:
    """β (log π − log π_sft) of each action that the agent took."""
    agent, sft = demo.model(name), demo.model("sft")
    for episode in episodes:
        if episode.trunk is None:  # it crashed
            continue
        (tree,) = pack_step_pairs([episode.trunk], [[[] for _ in episode.actions]])
        difference_N = score_trees(agent, [tree]) - score_trees(sft, [tree])
        rewards_S = demo.settings.beta * step_sums(difference_N, tree.step_offsets)
        episode.step_rewards = rewards_S.tolist()
