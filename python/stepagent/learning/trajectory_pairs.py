"""Pairs of trajectories of one task, as trees: what both begin with is encoded once.

::

    u o₁ a₁ o₂ a₂ o₃ a₃          chosen          u task, o observation, a action
         └──── o₂ â₂ ô₃ â₃       rejected

A pair is a `Trunk` that goes back to where the sides part, and `Comparison.sides`, which say whose
each step is. One trajectory and many others, each with its own place to part at, are one tree too:
the trunk comes first, then the others, the one that parts last before the one that parts first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.trunk import Trunk
from .cycle import CHOSEN, REJECTED, Comparison


@dataclass(frozen=True, eq=False)
class Rival:
    """What a trajectory is compared with.

    Args:
        trunk: Another trajectory of the task.
        preferred: It is the chosen one.
        first: The pair is of the suffixes from this step on, before which both must be the same.
    """

    trunk: Trunk
    preferred: bool = False
    first: int = 0


def trajectory_pair(chosen: Trunk, rejected: Trunk, first: int = 0) -> Comparison:
    """One pair, or that of the suffixes from step ``first`` on.

    Raises:
        ValueError: where the two differ before ``first``, or have no step from there on.
    """
    return compared_with(chosen, [Rival(rejected, first=first)])


def compared_with(trunk: Trunk, rivals: Sequence[Rival]) -> Comparison:
    """A trajectory compared with each of its rivals: K pairs, in their order.

    Raises:
        ValueError: where a rival differs from it before the rival's ``first``, or either has no
            step from there on; naming the rival.
    """
    shared_K = [trunk.shared_steps(rival.trunk) for rival in rivals]
    for k, (rival, shared) in enumerate(zip(rivals, shared_K, strict=True)):
        _check(k, rival, shared, min(trunk.num_steps, rival.trunk.num_steps))
    tree, places = trunk, {}
    for k in sorted(range(len(rivals)), key=lambda k: -shared_K[k]):
        first, other = tree.num_steps, rivals[k].trunk
        if shared_K[k] < other.num_steps:
            tree = tree.and_then(other, shared_K[k])
        places[k] = slice(first, tree.num_steps)
    sides_KT = np.zeros((len(rivals), tree.num_steps), np.int8)
    for k, rival in enumerate(rivals):
        own, others = (REJECTED, CHOSEN) if rival.preferred else (CHOSEN, REJECTED)
        sides_KT[k, rival.first : trunk.num_steps] = own
        sides_KT[k, rival.first : shared_K[k]] = CHOSEN | REJECTED
        sides_KT[k, places[k]] = others
    branches: list[list[np.ndarray]] = [[] for _ in range(tree.num_steps)]
    return Comparison(tree, branches, expert_trunk=True, sides=sides_KT.ravel())


def _check(k: int, rival: Rival, shared: int, both: int) -> None:
    if not 0 <= rival.first < both:
        raise ValueError(
            f"rivals[{k}].first must lie in [0, {both}), the steps that both have, got "
            f"{rival.first}"
        )
    if shared < rival.first:
        raise ValueError(
            f"rivals[{k}].trunk must be the same as the trunk before step {rival.first}, got "
            f"another step {shared}"
        )
