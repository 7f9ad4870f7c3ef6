"""Runs of a ragged array by their offsets: run i is [offsets[i], offsets[i + 1]), one program each.

Offsets on a GPU are not checked before the launch, as that would stall the stream. So a kernel
looks at its own: where they break the rule nothing is read, and what the kernel computes is NaN.
"""

import triton
import triton.language as tl


@triton.jit
def segment(offsets_ptr, index, N):
    """start and stop of a run, and whether they break the rule: ascending, all runs from 0 to N."""
    start = tl.load(offsets_ptr + index)
    stop = tl.load(offsets_ptr + index + 1)
    broken = (start < 0) | (stop < start) | (stop > N)
    broken |= (index == 0) & (start != 0)
    broken |= (index == tl.num_programs(0) - 1) & (stop != N)
    return start, tl.where(broken, start, stop), broken
