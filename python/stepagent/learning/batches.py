"""From a cycle's comparisons to the batches of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .averages import Counts
from .cycle import SCORES, Comparison, pack_comparisons, pack_with_steps

if TYPE_CHECKING:
    from .config import StepAgentConfig
    from .cycle import StepTable


class CycleData(Dataset["Comparison | None"]):
    """A dataset of fixed length whose items are chosen anew each epoch."""

    def __init__(self, count: int, args: StepAgentConfig) -> None:
        """An epoch of ``count`` items at most, and of as many batches on all processes.

        accelerate would take the first items a second time, and they would count twice; so what is
        missing is None.

        Args:
            count: Items of an epoch.
            args: The batch size, the number of processes, the seed.
        """
        size = args.per_device_train_batch_size
        whole = args.world_size * size if args.world_size > 1 else 1
        self.count = count
        self._length = -(-count // whole) * whole
        self._seed = args.seed if args.data_seed is None else args.data_seed
        self._shuffled = args.train_sampling_strategy == "random"
        self.items: list[Comparison | None] = []

    def choose(self, comparisons: Sequence[Comparison], epoch: int) -> None:
        """The items of an epoch, in an order that depends on the seed and the epoch alone."""
        order = np.arange(len(comparisons))
        if self._shuffled:
            order = np.random.default_rng((self._seed, epoch)).permutation(order)
        items = [comparisons[i] for i in order[: self.count].tolist()]
        # Fewer than there could be, as where rollouts crashed: none is learnt twice.
        self.items = [*items, *[None] * (self._length - len(items))]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Comparison | None:
        return self.items[index]


def collate(
    items: Sequence[Comparison | None], max_tokens: int, stand_in: Comparison
) -> dict[str, Any]:
    """A batch of trees; of nothing but padding, a tree to go through the model all the same."""
    comparisons = [item for item in items if item is not None]
    if not comparisons:
        return {"trees": pack_comparisons([stand_in], max_tokens), "steps": None}
    trees, steps = pack_with_steps(comparisons, max_tokens)
    scores = {
        name: torch.from_numpy(np.concatenate([getattr(c, name) for c in comparisons]))
        for name in SCORES
    }
    return {"trees": trees, "steps": steps, **scores}


def counts_of(steps: StepTable | None) -> Counts:
    return Counts() if steps is None else steps.counts()
