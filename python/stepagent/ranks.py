"""Work on many items, shared over the processes of a run; each has all results in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .trees.packing import balance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

T = TypeVar("T")


def over_ranks(
    work: Callable[[list[int]], Sequence[T]], costs: ArrayLike, *, alike: bool = False
) -> list[T]:
    """The results of all items, in order, on every process; each item is done by one of them.

    Every process has to call this, with the same costs.

    Args:
        work: given the places of some items, ascending; one result for each of them, which does not
            depend on the others beyond rounding. It is not called where there are none.
        costs: (n,) of the items; shares are about equal in them.
        alike: every process does all items, and the results are those of the first: for a sharded
            model, whose forward needs all processes at the same time.

    Raises:
        RuntimeError: where another process failed, with its words; where this one did, its error.
    """
    items = range(len(costs))  # type: ignore[arg-type]
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
    if ranks == 1:
        return list(work(list(items))) if items else []
    mine = list(items) if alike else shares(costs, ranks)[rank]
    own, error = _tried(work, mine)
    outcome = (None if alike and rank else own, None if error is None else repr(error))
    everyones: list[Any] = [None] * ranks
    dist.all_gather_object(everyones, outcome)
    if error is not None:
        raise error
    for other, (_, failure) in enumerate(everyones):
        if failure is not None:
            raise RuntimeError(f"process {other} failed: {failure}")
    if alike:
        return list(everyones[0][0])
    results: dict[int, T] = {}
    for share, (done, _) in zip(shares(costs, ranks), everyones, strict=True):
        results |= zip(share, done, strict=True)
    return [results[i] for i in items]


def sum_over_ranks(value: float) -> float:
    """The sum of a number over the processes, each of which has to call this."""
    if not _distributed():
        return value
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    return float(sum(everyones))


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of the processes, each of which has to call this.

    A parameter that has none on any process keeps none, so that optimisers leave it as it is.
    """
    parameters = list(parameters)
    if not _distributed() or not parameters:
        return
    device = parameters[0].device
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    for parameter, learnt in zip(parameters, has.tolist(), strict=True):
        if learnt:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def shares(costs: ArrayLike, ranks: int) -> list[list[int]]:
    """The items of each process, as `stepagent.balance`; some have none of a few."""
    count = len(costs)  # type: ignore[arg-type]
    filled = balance(costs, min(ranks, count)) if count else []
    return filled + [[]] * (ranks - len(filled))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _tried(
    work: Callable[[list[int]], Sequence[T]], items: list[int]
) -> tuple[Sequence[T], Exception | None]:
    """The results, or the error: the other processes wait to hear of it."""
    try:
        return (work(items) if items else []), None
    except Exception as error:
        return [], error
