"""Means over what is divided: a step's items over batches and processes, a cycle's over batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Counts:
    """How many items of each kind a loss is a mean over.

    A mean over an optimiser's step is that of all its batches, on all processes: each batch divides
    its sums by the step's counts, and not by its own.
    """

    pairs: float = 0
    expert_tokens: float = 0
    agent_steps: float = 0
    agent_tokens: float = 0
    batches: float = 1

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to average over."""
        return not (self.pairs or self.expert_tokens or self.agent_steps)

    @classmethod
    def of_step(cls, own: Sequence[Counts], accelerator: Accelerator) -> Counts:
        """Of a step whose batches on this process are ``own``; all processes have to call this.

        Gradients are averaged over the processes, so these are the items of all of them divided by
        their number: a batch's sum / count is then its share of the step's mean.
        """
        sums = [float(sum(column)) for column in zip(*map(astuple, own), strict=True)]
        mean = accelerator.reduce(torch.tensor(sums, device=accelerator.device), "mean")
        return cls(*mean.tolist())


class RunningMeans:
    """Sums and counts by name, of this process; kept through a checkpoint."""

    def __init__(self, state: dict[str, tuple[float, float]] | None = None) -> None:
        self._sums = dict(state or {})
        self._recent: dict[str, tuple[float, float]] = {}

    def add(self, name: str, values: Tensor, weight: float = 1.0) -> None:
        """Values that each count ``weight`` times."""
        added = weight * float(values.sum()), weight * values.numel()
        for sums in (self._sums, self._recent):
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (total + added[0], count + added[1])

    def take_recent(self) -> RunningMeans:
        """Of what was added since this was called last."""
        recent, self._recent = self._recent, {}
        return RunningMeans(recent)

    def of_all_ranks(self) -> RunningMeans:
        """Of all processes, each of which has to call this."""
        from accelerate.utils import gather_object

        both: dict[str, tuple[float, float]] = {}
        for state in gather_object([self._sums]):
            for name, (total, count) in state.items():
                before = both.get(name, (0.0, 0.0))
                both[name] = before[0] + total, before[1] + count
        return RunningMeans(both)

    def values(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items() if count}

    def state(self) -> dict[str, tuple[float, float]]:
        return self._sums
