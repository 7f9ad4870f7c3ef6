"""What the board reads: runs, their episodes, and the training log beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from ..data.trajectory import Trajectory, load_trajectories
from ..evaluation.agentboard import is_agentboard, load_agentboard
from ..records.cycle_file import ROLLOUTS
from ..records.episodes import Episode
from ..records.provenance import sittings
from .kinds import what_is


@dataclass(frozen=True)
class Run:
    """The episodes of one policy, and what its trainer logged, if it was trained.

    cycles: one entry at the end of each. updates: those within cycles, by update. settings: what
    the run depended on and how it came about, for people.
    """

    name: str
    episodes: list[Episode]
    cycles: list[dict[str, Any]] = field(default_factory=list)
    expert: bool = False  # its episodes are the expert's
    updates: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def by_place(self) -> dict[tuple[str, str | None, int], Episode]:
        """Its episodes by environment, split and seed, without those that it has twice."""
        places = [(e.environment, e.split, e.seed) for e in self.episodes]
        times = Counter(places)
        return {p: e for p, e in zip(places, self.episodes, strict=True) if times[p] == 1}


def load_run(path: Path, name: str | None = None, *, expert: bool | None = None) -> Run:
    """Read a JSONL of episodes, or a folder with ``episodes.jsonl`` and perhaps ``log.json``, or
    one of AgentBoard's results.

    Args:
        name: By default the folder's, or the file's without its suffix.
        expert: By default, whether every episode says that its policy is "expert".

    Raises:
        ValueError: For a folder without episodes, for a log that is none, for an episode whose
            record holds a value of another type, naming both, and as `load_episodes` and
            `stepagent.evaluation.agentboard.load_agentboard`.
    """
    if not (path / "episodes.jsonl").exists() and is_agentboard(path):
        return Run(name or _name(path), load_agentboard(path), expert=bool(expert))
    file = path / "episodes.jsonl" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(f"{path} holds no episodes.jsonl; a run is such a folder, or a JSONL file")
    try:
        trajectories = load_trajectories(file)
        episodes = [Episode.of(trajectory) for trajectory in trajectories]
    except ValueError as error:
        if found := what_is(file):
            raise ValueError(f"{file} holds {found}, not episodes: {error}") from error
        raise
    for episode in episodes:
        _check_types(file, episode)
    if expert is None:
        expert = all(episode.policy == "expert" for episode in episodes)
    log = path / "log.json"
    cycles, updates = _logged(log) if path.is_dir() and log.exists() else ([], [])
    settings = _settings(file, trajectories)
    if path.is_dir():
        settings |= _settings_of_training(path)
    return Run(name or _name(path), episodes, cycles, expert, updates, settings)


def _settings(file: Path, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Of the records' ``run``, then of the sittings; what differs between records is "several"."""
    recorded = [trajectory.meta.get("run") for trajectory in trajectories]
    runs = [run for run in recorded if isinstance(run, dict)]
    settings: dict[str, Any] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run.get(name) for run in runs]
        settings[name] = values[0] if all(v == values[0] for v in values) else "several"
    return settings | _of_sittings(sittings(file))


def _settings_of_training(folder: Path) -> dict[str, Any]:
    told = sittings(folder)
    if not told:
        return {}
    found = {"model": told[-1].get("model"), "data": told[-1].get("data")}
    options = told[-1].get("options")
    found |= options if isinstance(options, dict) else {}
    return {f"training: {name}": value for name, value in {**found, **_of_sittings(told)}.items()}


def _of_sittings(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not told:
        return {}
    versions = told[-1].get("versions")
    seconds = [entry.get("seconds") for entry in told]
    found: dict[str, Any] = {"date": told[-1].get("started")}
    found["seconds"] = sum(x for x in seconds if isinstance(x, int | float))
    if isinstance(versions, dict):
        found |= {f"{name} version": number for name, number in versions.items()}
    return found


# What the page can show of a record: the type of a value, and of each step's.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("split", "task", "difficulty", "crashed", "policy"), (str, NoneType)),
    "last_observation": (str, NoneType),
    "environment": (str,),
    "seed": (int,),
    "success": (bool,),
    "measured": (dict,),
}
_STEP_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rewards", "progress"), (float, int)),
    **dict.fromkeys(("invalid", "expert_actions"), (str, NoneType)),
    "step_rewards": (float, int, NoneType),
    "valid": (bool,),
}


def _check_types(file: Path, episode: Episode) -> None:
    """JSON holds anything: what is not of its type would end as nonsense on the page."""
    values = [(name, getattr(episode, name), kinds) for name, kinds in _TYPES.items()]
    for name, kinds in _STEP_TYPES.items():
        values += [(f"{name}[{t}]", v, kinds) for t, v in enumerate(getattr(episode, name))]
    for name, value, kinds in values:
        # True is an int to Python, and no number here.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            allowed = " or ".join("null" if k is NoneType else k.__name__ for k in kinds)
            raise ValueError(f"{file}: {episode.id}: {name} must be {allowed}, got {value!r}")


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Each path's run; where names are equal, the whole paths distinguish them."""
    names = [_name(path) for path in paths]
    taken = Counter(names)
    names = [str(p) if taken[n] > 1 else n for p, n in zip(paths, names, strict=True)]
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{name} is given {times} times; a run is compared with others")
    return [load_run(path, name) for path, name in zip(paths, names, strict=True)]


def _name(path: Path) -> str:
    """The folder's where the file's own says nothing."""
    path = path.resolve()
    return path.parent.name if path.name in ("episodes.jsonl", ROLLOUTS) else path.stem


def _logged(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of a trainer's log of a cycle, in order; and those of updates."""
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError(f"{path} must hold a list of objects, the trainer's log entries")
    cycles = [entry for entry in log if "cycle" in entry]
    for entry in cycles:
        if not isinstance(entry["cycle"], int):
            raise ValueError(f"{path}: a cycle must be a whole number, got {entry['cycle']!r}")
    updates = [
        entry
        for entry in log
        if "cycle" not in entry and "loss" in entry and type(entry.get("step")) is int
    ]
    return sorted(cycles, key=lambda entry: int(entry["cycle"])), updates
