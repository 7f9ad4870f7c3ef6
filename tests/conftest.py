"""Shared by all tests: Triton in its interpreter where there is no GPU, and poisoned memory."""

import os
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be there before the first `import triton`

INTERPRETED = ("test_kernels", "test_step_kernels", "test_fused_linear")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what Triton's interpreter would run, where it does not work with this numpy."""
    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    old_triton = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    if old_triton and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        reason = f"the interpreter of Triton {version('triton')} needs numpy < 2.4"
        for item in items:
            if item.path.stem in INTERPRETED or "triton" in item.name.lower():
                item.add_marker(pytest.mark.skip(reason=reason))


settings.register_profile("stepagent", deadline=None)  # machines are shared: time says little
settings.load_profile("stepagent")

POISON = -(2**30)  # for integers, which have no NaN
POISONED = ("stepagent.ops.", "stepagent.kernels.")


def _poisoned(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned_empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else POISON)

    return poisoned_empty


@pytest.fixture(autouse=True)
def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the ops, `torch.empty` returns NaN: what is read before it is written shows."""
    poisoned = types.ModuleType("torch")
    poisoned.__dict__.update(torch.__dict__)
    for name in ("empty", "empty_like"):
        setattr(poisoned, name, _poisoned(getattr(torch, name)))
    for name, module in list(sys.modules.items()):
        if name.startswith(POISONED) and hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", poisoned)


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs: on a GPU where there is one, else on CPU tensors in Triton's interpreter."""
    import op_cases

    from stepagent.kernels import online_softmax
    from stepagent.ops import blocks, head, paths

    pytest.importorskip("triton")
    monkeypatch.setattr(online_softmax, "MAX_BLOCK", 4)
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(blocks, "GPU_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(head, "MIN_SLICE", 8)
    monkeypatch.setattr(head, "GPU_MIN_SLICE", 8)  # of 17: two slices, and the rest of one
    monkeypatch.setattr(head, "GPU_CHUNK", 4)  # of 9 tokens: three chunks of a frozen head
    if torch.cuda.is_available():
        monkeypatch.setattr(op_cases, "device", torch.device("cuda"))
    else:
        monkeypatch.setattr(paths, "on_gpu", lambda tensor: True)
