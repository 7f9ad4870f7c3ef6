"""Shared by all tests: Triton in its interpreter where there is no GPU, and poisoned memory."""

import os
import sys
import types
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be there before the first `import triton`

settings.register_profile("stepagent", deadline=None)  # machines are shared: time says little
settings.load_profile("stepagent")

POISON = -(2**30)  # for integers, which have no NaN
POISONED = (
    "stepagent.operators.blocks",
    "stepagent.operators.head",
    "stepagent.operators.linear",
    "stepagent.operators.shards",
    "stepagent.operators.steps",
    "stepagent.operators.tokens",
    "stepagent.kernels.linear_logprobs",
    "stepagent.kernels.logprob_diff",
    "stepagent.kernels.token_logprobs",
)


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
    for name in POISONED:
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "torch", poisoned)
