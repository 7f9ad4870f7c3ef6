"""The dataset card of an episode file: what is in it, how it was made, how it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..files import write_text
from ..records.cards import MARKER, is_a_persons, table
from ..records.episodes import Episode
from ..records.provenance import versions
from .metrics import summarize
from .statistics import Interval

_SHOWN = 8  # of a list's values; the rest are counted


def dataset_card(episodes: Sequence[Episode], file: str) -> str:
    """The card of a file of episodes, the README.md beside it on the Hub, made offline.

    Its metadata let ``datasets.load_dataset`` find the file. It names no license, as no episode
    does.

    Args:
        file: the name of the JSONL file, without its folder.

    Raises:
        ValueError: where no episode ended.
    """
    summary = summarize(episodes)
    name = Path(file).stem
    data = DatasetCardData(
        pretty_name=name,
        tags=["stepagent", "agent", "trajectories"],
        configs=[{"config_name": "default", "data_files": file}],
    )
    origin = {
        "environment": _values(episodes, lambda e: e.environment),
        "split": _values(episodes, lambda e: e.split),
        "policy": _values(episodes, lambda e: e.policy),
        "action format": _values(episodes, lambda e: e.action_format),
        "seeds": len({episode.seed for episode in episodes}),
        "steps": sum(len(episode.actions) for episode in episodes),
        "expert's answers": sum(a is not None for e in episodes for a in e.expert_actions),
        "episodes that crashed": summary.crashed,
    }
    parts = (
        MARKER,
        f"# {name}",
        f"{len(episodes)} episodes of an agent in a text environment, one a line of `{file}`: what "
        "was said as chat `messages`, what happened at each step in `meta`. "
        "`stepagent.load_trajectories` reads them for training, "
        "`stepagent.episodes.load_episodes` with all of `meta`.",
        "## How they came about\n\n" + table({k: v for k, v in origin.items() if v is not None}),
        "## What happened\n\nMeans over the episodes that ended, with intervals of 95 %.\n\n"
        + table({name: _interval(found) for name, found in summary.metrics.items()}),
        "## Versions\n\n" + table(versions()),
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def write_dataset_card(path: Path, episodes: Sequence[Episode], file: str) -> bool:
    """Write `dataset_card` to ``path`` and return True; a card that a person wrote stays."""
    if is_a_persons(path):
        return False
    write_text(path, dataset_card(episodes, file))
    return True


def _values(episodes: Sequence[Episode], of: Callable[[Episode], Any]) -> str | None:
    """What differs between the episodes, and how often; None where none has it."""
    counts = Counter(value for value in map(of, episodes) if value is not None)
    if len(counts) == 1:
        return str(next(iter(counts)))
    shown = [f"{value} ({count})" for value, count in counts.most_common(_SHOWN)]
    more = [f"{len(counts) - _SHOWN} more"] if len(counts) > _SHOWN else []
    return ", ".join([*shown, *more]) or None


def _interval(found: Interval) -> str:
    mean = f"{found.mean:.3f}"
    return mean if found.low is None else f"{mean} ({found.low:.3f} to {found.high:.3f})"
