"""The C++ core. Its callers convert arrays to the types below; it checks their values."""

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

def pack_step_pairs(
    trunks: list[NDArray[Any]],
    action_spans: list[NDArray[np.int32]],
    rewinds: list[NDArray[np.int32]],
    branches: list[NDArray[Any]],
    branch_counts: NDArray[np.int64],
    max_tokens: int | None,
    threads: int,
) -> list[dict[str, Any]]: ...
def pack_sequences(
    sequences: list[NDArray[Any]],
    action_masks: list[NDArray[np.uint8]],
    max_tokens: int | None,
    threads: int,
) -> list[dict[str, Any]]: ...
def fill_mask(
    subtree_end: NDArray[np.int32],
    window: int | None,
    visible: int,
    hidden: int,
    mask: NDArray[Any],
    threads: int,
) -> None: ...
def block_lists(
    subtree_end: NDArray[np.int32], window: int | None, block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]: ...
def segments(subtree_end: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]: ...
def fork_early(
    input_ids: NDArray[np.int32],
    position_ids: NDArray[np.int32],
    subtree_end: NDArray[np.int32],
    labels: NDArray[np.int32],
    label_rows: NDArray[np.int32],
    step_offsets: NDArray[np.int32],
) -> dict[str, NDArray[np.int32]]: ...
def pack_bins(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def balance(
    costs: NDArray[np.float64], parts: int, equal_size: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

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
