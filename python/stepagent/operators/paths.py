"""Which path an operator takes on a GPU: Triton, or torch."""

import functools
import importlib.util

import torch
from torch import Tensor


def suits_triton(temperature: Tensor) -> bool:
    """The kernels compute in float32; the temperature has the dtype of the computation."""
    return temperature.dtype == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
