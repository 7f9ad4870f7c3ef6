"""Which path an operator takes: Triton or torch, counted on the host or not."""

import functools
import importlib.util

import torch
from torch import Tensor


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def has_triton(dtype: torch.dtype) -> bool:
    """Whether there are kernels for this dtype of computation: they compute in float32."""
    return dtype == torch.float32 and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
