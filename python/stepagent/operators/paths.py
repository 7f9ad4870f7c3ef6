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


def runs_triton(first: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels take these floats: they return float32."""
    return on_gpu(first) and compute_dtype(first, *others) == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
