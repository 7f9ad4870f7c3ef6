"""Which path an operator takes on a GPU: Triton, or torch."""

import functools
import importlib.util

import torch
from torch import Tensor

from stepagent.checks import compute_dtype


def suits_triton(*floats: Tensor | None) -> bool:
    """The kernels return float32. A temperature has the dtype of its operator's results."""
    return compute_dtype(*floats) == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
