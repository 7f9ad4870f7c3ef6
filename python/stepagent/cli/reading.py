"""Trajectories with their tokens, as the commands read them; rows that cannot be used, with why."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.trajectory import OnError, Skipped, Trajectory
    from ..data.trunk import Trunk

on_error_option = click.option(
    "--on-error",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="What becomes of a row that cannot be encoded exactly; skip lists them.",
)


@dataclass
class Reading:
    """What a file holds for a tokenizer: places, trajectories and trunks in step, and the rest."""

    places: list[str] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    trunks: list[Trunk] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many there were, good and bad; of a row with several trajectories, those."""
        return len(self.trunks) + len(self.skipped)

    def records(self) -> list[dict[str, str]]:
        """The rows that were skipped, as reports hold them."""
        return [{"where": row.where, "reason": row.reason} for row in self.skipped]


def read(path: Path, tokenizer: PreTrainedTokenizerBase, on_error: OnError) -> Reading:
    """Load and encode a file.

    Args:
        path: As `stepagent.load_trajectories` takes it.
        tokenizer: Whose chat template writes the conversations.
        on_error: "raise", or "skip" to list bad rows on stderr and continue.

    Raises:
        ValueError: With the place and the reason, for the first bad row, or where none is left.
    """
    reading = read_all(path, tokenizer)
    for row in reading.skipped:
        if on_error == "raise":
            raise ValueError(f"{row.where}: {row.reason}")
        click.echo(f"skipped {row.where}: {row.reason}", err=True)
    if not reading.trunks:
        raise ValueError(f"{path}: none of its {reading.rows} rows can be used")
    if reading.skipped:
        click.echo(f"skipped {len(reading.skipped)} of {reading.rows} rows of {path}", err=True)
    return reading


def read_all(path: Path, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """The same, with all bad rows in ``skipped``."""
    from tqdm.auto import tqdm

    from ..data.encoding import encode
    from ..data.trajectory import Skipped, iterate_trajectories

    reading = Reading()
    for where, found in tqdm(iterate_trajectories(path), desc="encode"):
        if isinstance(found, Skipped):
            reading.skipped.append(found)
            continue
        try:
            trunk = encode(found, tokenizer)
        except (TypeError, ValueError, OverflowError) as error:
            reading.skipped.append(Skipped(where, str(error)))
            continue
        reading.places.append(where)
        reading.trajectories.append(found)
        reading.trunks.append(trunk)
    return reading
