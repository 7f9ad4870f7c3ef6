"""The C++ core. Its callers in this package convert and check; it trusts what it is given."""

from enum import Enum

import numpy as np
from numpy.typing import NDArray

def pack_step_pairs(
    trunk_ids: NDArray[np.int32],
    trunk_offsets: NDArray[np.int64],
    trunk_steps: NDArray[np.int64],
    action_spans: NDArray[np.int32],
    branch_ids: NDArray[np.int32],
    branch_offsets: NDArray[np.int64],
    step_branches: NDArray[np.int64],
    max_tokens: int,
) -> list[dict[str, NDArray[np.int32]]]: ...

class StepMethod(Enum):
    nw = 0
    lcs = 1
    dtw = 2

def edit_distance(a: NDArray[np.int32], b: NDArray[np.int32], cutoff: int) -> int: ...
def align_tokens(
    recorded_offsets: NDArray[np.int64],
    retokenized_offsets: NDArray[np.int64],
    recorded_ids: NDArray[np.int32],
    retokenized_ids: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
def token_spans(char_spans: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int32]: ...
def char_spans(token_spans: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]: ...
def step_costs(
    expert_ids: NDArray[np.int32],
    expert_offsets: NDArray[np.int64],
    agent_ids: NDArray[np.int32],
    agent_offsets: NDArray[np.int64],
    band: int,
) -> NDArray[np.float64]: ...
def align_steps(
    costs: NDArray[np.float64], method: StepMethod, band: int, cutoff: float
) -> tuple[NDArray[np.int32], float]: ...
