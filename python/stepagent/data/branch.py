"""What an agent did at a state of a trunk, and how often that is what the expert did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .encoding import Trunk

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Branch:
    """One action tried at a state.

    Attributes:
        token_ids: (n,) int32, the end token included where it was produced.
        logps: (n,) float32, the policy's log-prob of each, at temperature 1 whatever the sampling
            temperature.
    """

    token_ids: NDArray[np.int32]
    logps: NDArray[np.float32]


def agreement(
    trunks: Sequence[Trunk],
    branches: Sequence[Sequence[Sequence[Branch | NDArray[np.int32]]]],
) -> float:
    """The share of actions tried that equal the trunk's own, token for token; nan if none."""
    same = [
        np.array_equal(_ids(action), trunk.input_ids[start:stop])
        for trunk, steps in zip(trunks, branches, strict=True)
        for (start, stop), tried in zip(trunk.action_spans, steps, strict=True)
        for action in tried
    ]
    return float(np.mean(same)) if same else float("nan")


def _ids(action: Branch | NDArray[np.int32]) -> NDArray[np.int32]:
    return action.token_ids if isinstance(action, Branch) else action
