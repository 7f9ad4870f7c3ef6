"""Every Triton kernel compiled ahead of time, on a machine without a GPU, into Triton's cache.

The kernels are launched as always, on tensors without memory, for a GPU that is not there: what
would launch only compiles. So the cache keys are those of a real launch, and a process on such a
GPU, with the same Triton and the same kernels, finds its kernels compiled.

Covered are the shapes of a language model: a vocabulary of at least a tile (4,096) and divisible by
16, as are the hidden size and the strides of the logits, one temperature for all tokens, no bias
and no softcap. Anything else compiles at its first use, as without this.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from tqdm.auto import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stepagent.kernels.fused_linear import fused_linear_logprobs
from stepagent.kernels.labels import all_known
from stepagent.kernels.linear_logprobs import finish, fold_slice, grad_slice, weigh_slice
from stepagent.kernels.logprob_diff import logprob_diff
from stepagent.kernels.step_gae import step_gae
from stepagent.kernels.step_rewards import (
    step_pair_loss,
    step_pair_loss_backward,
    step_rewards,
    step_rewards_backward,
)
from stepagent.kernels.token_logprobs import token_logprobs, token_logprobs_backward

TARGETS = {
    **{f"sm_{sm}": GPUTarget("cuda", sm, 32) for sm in (80, 86, 89, 90, 100, 120)},
    **{gfx: GPUTarget("hip", gfx, 64) for gfx in ("gfx942", "gfx950")},
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Matrix units (mma.sync, wgmma, tcgen05, MFMA) and what copies past the registers (TMA, cp.async).
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma", "UTMALDG", "LDGSTS")


@dataclass(frozen=True)
class CompiledKernel:
    kernel: str
    arch: str
    dtype: str  # of the logits, or of hidden and weight
    registers: int  # a thread
    spills: int  # NVIDIA: bytes of stack a thread, where ptxas spills to; AMD: spilled registers
    shared: int  # bytes of shared memory a program
    instructions: list[str]  # those of `INSTRUCTIONS` that it has


def compile_all(
    archs: Sequence[str],
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    *,
    progress: bool = False,
) -> list[CompiledKernel]:
    """Compile every kernel for these GPUs, into the cache that Triton uses (TRITON_CACHE_DIR).

    Args:
        archs: of `TARGETS`, for example "sm_90" or "gfx942".
        dtypes: of `DTYPES`.
        progress: show a bar on stderr.

    Raises:
        ValueError: another arch or dtype, or a Triton that interprets instead of compiling.
    """
    for name, values, known in (("arch", archs, TARGETS), ("dtype", dtypes, DTYPES)):
        for value in values:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so that nothing compiles; unset it")
    cases = list(product(archs, dtypes, _launches(torch.float32)))
    compiled = (_compile(*case) for case in tqdm(cases, "compile", disable=not progress))
    return list(chain.from_iterable(compiled))


def _compile(arch: str, dtype: str, kernels: tuple[str, ...]) -> list[CompiledKernel]:
    with _compiling_for(TARGETS[arch]) as compiled:
        _launches(DTYPES[dtype])[kernels]()
    resources = _amd_resources if TARGETS[arch].backend == "hip" else _nvidia_resources
    return [
        CompiledKernel(kernel, arch, dtype, *resources(binary))
        for kernel, binary in zip(kernels, compiled, strict=True)
    ]


def _launches(dtype: torch.dtype) -> dict[tuple[str, ...], Callable[[], object]]:
    """Calls, on tensors without memory, by the kernels that each launches."""
    V, H = 2**17, 2**12
    logits_NV = torch.empty(16, V, dtype=dtype, device="meta")
    hidden_NH = torch.empty(16, H, dtype=dtype, device="meta")
    weight_VH = torch.empty(V, H, dtype=dtype, device="meta")
    labels_N = torch.empty(16, dtype=torch.int64, device="meta")
    temperature = torch.empty((), device="meta")
    g_N = torch.empty(16, device="meta")
    inputs, results = (logits_NV, labels_N, temperature), [g_N] * 4
    head = (hidden_NH, weight_VH, labels_N, None, temperature, None)
    return {
        ("labels",): lambda: all_known(labels_N, V),
        ("token_logprobs",): lambda: token_logprobs(*inputs, with_entropy=False),
        ("token_logprobs, entropy",): lambda: token_logprobs(*inputs, with_entropy=True),
        ("token_logprobs backward",): lambda: token_logprobs_backward(g_N, None, results, *inputs),
        ("token_logprobs backward, entropy",): lambda: token_logprobs_backward(
            g_N, g_N, results, *inputs
        ),
        ("logprob_diff",): lambda: logprob_diff(logits_NV, *inputs),
        ("fused_linear fold", "fused_linear join"): lambda: fused_linear_logprobs(
            *head, with_entropy=False
        ),
        ("fused_linear fold, entropy", "fused_linear join, entropy"): lambda: fused_linear_logprobs(
            *head, with_entropy=True
        ),
        **_slice_launches(dtype, labels_N, g_N),
        **_step_launches(dtype, g_N),
    }


def _slice_launches(
    dtype: torch.dtype, labels_N: Tensor, g_N: Tensor
) -> dict[tuple[str, ...], Callable[[], object]]:
    """Of `linear_logprobs`: products are float32 whatever the head is, what goes back is not."""
    products_Nw = torch.empty(16, 2**14, device="meta")
    state, head = (g_N,) * 4, (products_Nw, None, torch.empty((), device="meta"), None, 2**14)

    def grad(grad_entropy_N: Tensor | None) -> object:
        return grad_slice(labels_N, state, g_N, grad_entropy_N, *head, dtype=dtype)

    return {
        ("linear slice",): lambda: fold_slice(labels_N, state, *head, with_entropy=False),
        ("linear slice, entropy",): lambda: fold_slice(labels_N, state, *head, with_entropy=True),
        ("linear slice, frozen head",): lambda: weigh_slice(labels_N, state, *head, dtype=dtype),
        ("linear results",): lambda: finish(labels_N, state, with_entropy=False),
        ("linear results, entropy",): lambda: finish(labels_N, state, with_entropy=True),
        ("linear slice backward",): lambda: grad(None),
        ("linear slice backward, entropy",): lambda: grad(g_N),
    }


def _step_launches(dtype: torch.dtype, g_S: Tensor) -> dict[tuple[str, ...], Callable[[], object]]:
    x_N = torch.empty(64, dtype=dtype, device="meta")
    offsets = torch.empty(17, dtype=torch.int64, device="meta")
    steps_P = torch.empty(16, dtype=torch.int64, device="meta")
    rewards_S = torch.empty(16, dtype=torch.float64, device="meta")
    pairs = (offsets, steps_P, steps_P)
    return {
        ("step_sums",): lambda: step_rewards(x_N, None, offsets, 1.0),
        ("step_rewards",): lambda: step_rewards(x_N, x_N, offsets, 0.1),
        ("step_rewards backward",): lambda: step_rewards_backward(g_S, offsets, 0.1, 64, dtype),
        ("step_pair_loss rewards",): lambda: step_rewards(x_N, x_N, offsets, 0.1, torch.float64),
        ("step_pair_loss",): lambda: step_pair_loss(rewards_S, steps_P, steps_P),
        ("step_pair_loss backward",): lambda: step_pair_loss_backward(
            g_S, g_S, *pairs, 0.1, 64, dtype
        ),
        ("step_gae",): lambda: step_gae(x_N, x_N, offsets, None, 0.9, 0.5),
        ("step_gae, bootstrap",): lambda: step_gae(x_N, x_N, offsets, g_S, 0.9, 0.5),
    }


class _AbsentGpu:
    """What Triton asks its driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"  # Triton keeps its kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside, what launches a kernel compiles it for the target instead, into this list."""
    compiled = []
    run = JITFunction.run

    def compile_only(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    absent = patch.object(triton.runtime.driver, "_active", _AbsentGpu(target))
    with absent, patch.object(JITFunction, "run", compile_only):
        yield compiled


def _nvidia_resources(binary: Any) -> tuple[int, int, int, list[str]]:
    """Registers, bytes of stack, and instructions as the cuobjdump in Triton's wheel reads them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary.asm["cubin"])
        options = ["--dump-resource-usage", "--dump-sass"]
        command = [triton.knobs.nvidia.cuobjdump.path, *options, str(file)]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = _number(r"STACK:(\d+)", dump)
    return _number(r"REG:(\d+)", dump), stack, binary.metadata.shared, _instructions(dump)


def _amd_resources(binary: Any) -> tuple[int, int, int, list[str]]:
    """Vector registers, and how many registers spilled, which the assembly says of itself."""
    assembly = binary.asm["amdgcn"]
    spills = (_number(rf"\.{kind}_spill_count:\s+(\d+)", assembly) for kind in ("vgpr", "sgpr"))
    registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
    return registers, sum(spills), binary.metadata.shared, _instructions(assembly)


def _instructions(code: str) -> list[str]:
    return [name for name in INSTRUCTIONS if re.search(rf"\s{name}\b|\s{name}_", code)]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"expected {pattern} in what Triton {triton.__version__} compiled")
    return int(found[1])
