"""The C++ core. Its callers in this package convert and check; it trusts what it is given."""

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
