"""What is measured of each stage: in held-out games, and at the expert's states of these games."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ....acting.inspection import inspect
from ....data.actions import PLAIN
from ....data.branch import action_agreement
from ....data.encoding import encode
from ....data.trajectory import Trajectory
from ....evaluation import mean_interval, paired_rate_interval
from ....evaluation.metrics import grounding_accuracy, progress_rate
from ....files import write_text
from ....records.episodes import Episode
from ..training import is_trained
from .agents import LanguageModelDemo
from .costs import training_cost
from .stages import AT_AGENT_STATES, TITLES, UNTRAINED

HELD_OUT = "expert_held_out.jsonl"
MEASURES = ("valid_actions", "success", "progress", "agreement")


def measure_stage(demo: LanguageModelDemo, stage: str) -> dict[str, list[float]]:
    """A value of each held-out game for each of `MEASURES`; what was measured before is read.

    Valid actions and agreement are shares of a game's steps: of those that the agent took, and of
    the expert's, at whose states the greedy action is compared as text.
    """
    path = demo.folder / stage / "measures.json"
    if path.exists():
        found: dict[str, list[float]] = json.loads(path.read_text())
        return found
    episodes = demo.episodes(stage)
    _refuse_crashes(stage, episodes)
    found = {
        "valid_actions": [float(grounding_accuracy(e) or 0.0) for e in episodes],
        "success": [float(e.success) for e in episodes],
        "progress": [float(progress_rate(e) or 0.0) for e in episodes],
        "agreement": _agreement(demo, stage),
    }
    write_text(path, json.dumps(found))
    means = (f"{name.replace('_', ' ')} {np.mean(values):.1%}" for name, values in found.items())
    tqdm.write(f"{stage}: {', '.join(means)}", file=sys.stderr)
    return found


def held_out(demo: LanguageModelDemo) -> list[Trajectory]:
    """The expert in the held-out games."""
    return demo.expert(HELD_OUT, demo.settings.evaluation_seeds)


def measure(demo: LanguageModelDemo) -> dict[str, Any]:
    """What ``metrics.json`` holds, of every stage that was trained."""
    s = demo.settings
    trained = [stage for stage in TITLES if is_trained(demo.folder / stage)]
    per_game = {stage: measure_stage(demo, stage) for stage in (UNTRAINED, *trained)}
    main = "stepagent" if "stepagent" in trained else trained[-1]
    results = {stage: _result(values) for stage, values in per_game.items()}
    for stage in trained:
        results[stage] |= {
            "states": "agent" if stage in AT_AGENT_STATES else "expert",
            "cost": training_cost(demo.folder / stage / "log.json"),
        }
    return {
        "environment": s.environment,
        "model": s.model,
        "seed": s.seed,
        "main": main,
        **results,
        "differences": {
            stage: asdict(paired_rate_interval(per_game[main]["success"], values["success"]))
            for stage, values in per_game.items()
            if stage != main
        },
        "expert_agreement": {
            stage: result["measures"]["agreement"]["mean"] for stage, result in results.items()
        },
        "episodes": s.evaluation_episodes,
        "demonstrations": len(demo.trajectories),
        "evaluation_seeds": [s.evaluation_seeds[0], s.evaluation_seeds[-1]],
        "hyperparameters": asdict(s),
        "seconds": demo.seconds.total(),
        "peak_memory": max(results[stage]["cost"]["peak_memory"] for stage in trained),
    }


def _result(per_game: dict[str, list[float]]) -> dict[str, Any]:
    intervals = {
        name: asdict(mean_interval(per_game[name], bounds=(0.0, 1.0))) for name in MEASURES
    }
    success = intervals["success"]
    return {
        "success_rate": success["mean"],
        "interval": [success["low"], success["high"]],
        "measures": intervals,
        "per_game": per_game,
    }


def _refuse_crashes(stage: str, episodes: Sequence[Episode]) -> None:
    if crashed := [e for e in episodes if e.crashed is not None or not e.actions]:
        why = crashed[0].crashed or f"it took no step ({crashed[0].terminate_reason})"
        raise RuntimeError(
            f"{len(crashed)} of {len(episodes)} games of {stage} did not end; {crashed[0].id}: "
            f"{why}. The same command tries them again"
        )


def _agreement(demo: LanguageModelDemo, stage: str) -> list[float]:
    system = demo.system(stage)
    told = [] if system is None else [{"role": "system", "content": system}]
    trunks = [
        encode(replace(trajectory, messages=[*told, *trajectory.messages]), demo.tokenizer)
        for trajectory in held_out(demo)
    ]
    branches = inspect(
        demo.model(stage),
        trunks,
        max_new_tokens=demo.settings.max_new_tokens,
        temperature=0.0,
        eos_token_id=demo.ends,
        progress=True,
    )
    shares = [
        action_agreement([trunk], [steps], form=PLAIN, tokenizer=demo.tokenizer)
        for trunk, steps in zip(trunks, branches, strict=True)
    ]
    return shares
