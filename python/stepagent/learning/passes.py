"""Passes of an optimiser over what a cycle has, between two updates of the policy."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..ranks import sum_gradients, sum_over_ranks

if TYPE_CHECKING:
    from .config import StepAgentConfig

# Of some items: a mean, None where there is nothing to learn, and over how many.
BatchLoss: TypeAlias = Callable[[list[int]], tuple[Tensor | None, int]]


def minimise(
    optimizer: torch.optim.Optimizer,
    parameters: Collection[Tensor],
    count: int,
    loss: BatchLoss,
    args: StepAgentConfig,
    seed: tuple[int, int],
    label: str,
) -> float:
    """``critic_epochs`` passes over ``count`` items; the mean of the loss over the last one.

    Each process has its share of a batch, and the gradients are added up.
    """
    size = args.per_device_train_batch_size * args.world_size
    losses: list[float] = []
    bar = tqdm(range(args.critic_epochs), desc=label, disable=args.disable_tqdm, leave=False)
    for epoch in bar:
        order = np.random.default_rng((args.seed, *seed, epoch)).permutation(count)
        losses = []
        for first in range(0, count, size):
            share = order[first : first + size][args.process_index :: args.world_size].tolist()
            mean, weight = loss(share) if share else (None, 0)
            total = sum_over_ranks(weight)
            if not total:
                continue
            optimizer.zero_grad(set_to_none=True)
            own = 0.0
            if mean is not None:
                mean = mean * (weight / total)
                mean.backward()  # type: ignore[no-untyped-call]
                own = float(mean.detach())
            sum_gradients(parameters)
            optimizer.step()
            losses.append(sum_over_ranks(own))
    return float(np.mean(losses))
