"""Whether all labels are in the vocabulary: one program, so that a check costs one launch.

Dimensions: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepagent.kernels.online_softmax import IGNORE

BLOCK = 8192  # labels that are looked at together


@triton.jit(do_not_specialize=["N"])
def _all_known_kernel(
    # data
    labels_ptr,
    known_ptr,
    # shapes
    N,
    V,
    # strides
    labels_stride_n,
    # constants
    BLOCK: tl.constexpr,
):
    unknown = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        offset = token.to(tl.int64) * labels_stride_n
        label = tl.load(labels_ptr + offset, mask=token < N, other=IGNORE)
        outside = (label < 0) | (label >= V)
        unknown += tl.where(outside & (label != IGNORE), 1, 0)
    tl.store(known_ptr, tl.sum(unknown, 0) == 0)


def all_known(labels_N: Tensor, V: int) -> Tensor:
    """Bool (): every label is -100 or in [0, V).

    Args:
        labels_N: (N,) int64, any stride.
    """
    known = torch.empty((), dtype=torch.bool, device=labels_N.device)
    with torch.cuda.device_of(labels_N):  # Triton launches on the current device
        _all_known_kernel[(1,)](
            labels_N,
            known,
            labels_N.shape[0],
            V,
            labels_N.stride(0),
            BLOCK=BLOCK,
            num_warps=8,
        )
    return known
