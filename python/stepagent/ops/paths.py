"""Which path an operator takes: on the host's terms or a GPU's, and there Triton or torch.

Called through the module, so that tests can send CPU tensors down a GPU's path.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from stepagent.checks import compute_dtype


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def factor_dtype(tensor: Tensor, result: torch.dtype) -> torch.dtype:
    """Of the factors of a product with float32 results: only cuBLAS multiplies halves into them.

    torch has no such product on CPU, nor on ROCm, where it raises.
    """
    return tensor.dtype if on_gpu(tensor) and torch.version.hip is None else result


def runs_triton(first: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels take these floats: they return float32."""
    return on_gpu(first) and compute_dtype(first, *others) == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
