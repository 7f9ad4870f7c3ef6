"""What a checkpoint holds beside transformers' files: where a run is, and what it cannot change.

``stepagent.json`` has the place in the run and the sizes by which it is counted, in every
checkpoint; ``cycle.safetensors`` the cycle that it was in (cycle.py). Checkpoints from before
``stepagent.json`` are read as transformers reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.trunk import Trunk

if TYPE_CHECKING:
    from .config import StepAgentConfig
    from .options.choices import States

CYCLE_FILE = "cycle.safetensors"
_RUN_FILE = "stepagent.json"


@dataclass(frozen=True)
class Place:
    """Where a run is: steps of the optimiser that were done in an epoch.

    It is counted here and not taken from the number of all steps: an epoch that a callback ended
    early had fewer.
    """

    epoch: int
    step: int

    def of(self, steps_per_epoch: int) -> Place:
        """The same place, where an epoch's end is the beginning of the next."""
        return Place(self.epoch + 1, 0) if self.step >= steps_per_epoch else self


@dataclass(frozen=True)
class RunSizes:
    """By what a run counts: resumed with another of them, it would continue somewhere else."""

    trajectories_a_step: int
    trajectories_an_epoch: int
    epochs_per_cycle: int
    method: str
    states: States
    dataset_rows: int
    dataset_sum: str

    @classmethod
    def of(cls, args: StepAgentConfig, trunks: Sequence[Trunk], per_epoch: int) -> RunSizes:
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return cls(
            trajectories_a_step=size * args.world_size,
            trajectories_an_epoch=per_epoch,
            epochs_per_cycle=args.epochs_per_cycle if args.has_cycles else 1,
            method=args.method,
            states=args.states,
            dataset_rows=len(trunks),
            dataset_sum=_sum_of(trunks),
        )


_WHAT_TO_DO = {
    "trajectories_a_step": "per_device_train_batch_size × gradient_accumulation_steps × processes",
    "trajectories_an_epoch": "rollouts, or the rows of train_dataset,",
    "dataset_rows": "the number of rows of train_dataset",
    "dataset_sum": "train_dataset, as the tokenizer encodes it,",
}


def save_run(folder: Path, place: Place, sizes: RunSizes) -> None:
    text = json.dumps({"place": asdict(place), "sizes": asdict(sizes)}, indent=2)
    (folder / _RUN_FILE).write_text(text + "\n")


def load_place(folder: Path) -> Place | None:
    """None: of a checkpoint from before the file."""
    path = folder / _RUN_FILE
    return Place(**json.loads(path.read_text())["place"]) if path.exists() else None


def check_same_run(folder: Path, sizes: RunSizes) -> None:
    """Refuse to resume from a checkpoint of a run that counts otherwise.

    Raises:
        ValueError: naming what differs, and what it must be.
    """
    path = folder / _RUN_FILE
    if not path.exists():
        return
    before, now = json.loads(path.read_text())["sizes"], asdict(sizes)
    for name, value in before.items():
        if now.get(name, value) != value:
            raise ValueError(
                f"{_WHAT_TO_DO.get(name, name)} must be {value} as in the run that {folder} is of, "
                f"got {now[name]}"
            )


def check_same_step(folder: Path, before: int, now: int) -> None:
    """As `check_same_run`, of a checkpoint that has only the size of a step."""
    if now != before:
        raise ValueError(
            f"{_WHAT_TO_DO['trajectories_a_step']} must be {before} as in the run that {folder} is "
            f"of, got {now}"
        )


def _sum_of(trunks: Sequence[Trunk]) -> str:
    """A number that other data changes: the first half of a SHA-256 of all tokens and spans."""
    digest = hashlib.sha256()
    for trunk in trunks:
        for array in (trunk.input_ids, trunk.action_spans):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
            digest.update(b"|")
    return digest.hexdigest()[:32]
