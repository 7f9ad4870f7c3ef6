"""Small runs for the tests of the report: three policies on the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepagent import Trajectory, save_trajectories

STEPS = 4
EXPERT = [f"expert does {t}" for t in range(STEPS)]
HOSTILE = "</script><img src=x onerror=alert(1)>\0<!--\u202e'\"&amp;"


def episode(
    seed: int,
    *,
    policy: str = "agent",
    actions: list[str] | None = None,
    success: bool = True,
    **meta: Any,
) -> Trajectory:
    """Four steps (or as many as actions) with all that a record can tell, unless meta has None."""
    actions = EXPERT if actions is None else actions
    messages = []
    for t, action in enumerate(actions):
        messages.append({"role": "user", "content": f"seed {seed}: you see step {t}"})
        messages.append({"role": "assistant", "content": action})
    T = len(actions)
    told = {
        "environment": "toy",
        "policy": policy,
        "seed": seed,
        "split": "test",
        "task": ("boil", "melt")[seed % 2],
        "difficulty": ("easy", "hard")[seed % 2],
        "success": success,
        "rewards": [0.25 * (t - 1) for t in range(T)],
        "progress": [(t + 1) / T if success else 0.25 for t in range(T)],
        "valid": [t != 1 for t in range(T)],
        "invalid": ["unknown action" if t == 1 else None for t in range(T)],
        "expert_actions": [f"expert does {t}" for t in range(T)],
        "step_rewards": [None if t == 0 else (-1) ** t * 0.5 * t for t in range(T)],
        "last_observation": f"seed {seed}: the end",
    }
    told = {key: value for key, value in (told | meta).items() if value is not None}
    return Trajectory(messages, reward=0.5, id=f"toy/{seed}", meta=told)


def write_run(folder: Path, episodes: list[Trajectory], log: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_trajectories(folder / "episodes.jsonl", episodes)
    if log is not None:
        (folder / "log.json").write_text(json.dumps(log))
    return folder


def write_runs(folder: Path) -> list[Path]:
    """``random`` fails, ``agent`` parts from the expert at step 3 (from 1), ``expert``."""
    other = [*EXPERT[:2], "agent does something", EXPERT[3]]
    log = [
        {"loss": 1.0, "epoch": 0.5},
        {"cycle": 0, "epoch": 1.0, "agreement": 0.5, "success_rate": 0.4, "kl": 0.1},
        {"cycle": 1, "epoch": 2.0, "agreement": 0.75, "success_rate": 0.6, "kl": None},
    ]
    agent = [episode(s, actions=other, success=s != 2) for s in range(6)]
    wild = [episode(s, policy="random", actions=["flail"] * 6, success=False) for s in range(6)]
    wild.append(episode(6, policy="random", actions=["flail"], crashed="the game died"))
    return [
        write_run(folder / "random", wild),
        write_run(folder / "agent", agent, log),
        write_run(folder / "expert", [episode(s, policy="expert") for s in range(6)]),
    ]
