"""Every Triton kernel compiled ahead of time, on a machine without a GPU, into Triton's cache.

The kernels are launched as always, on tensors without memory, for a GPU that is not there: what
would launch only compiles. So the cache keys are those of a real launch, and a process on such a
GPU, with the same Triton and the same kernels, finds its kernels compiled.

Covered are the shapes of a language model: a vocabulary of at least a tile (4,096) and divisible by
16, as are the strides of the logits, and one temperature for all tokens. Anything else compiles at
its first use, as without this.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from tqdm.auto import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stepagent.kernels.logprob_diff import logprob_diff
from stepagent.kernels.token_logprobs import token_logprobs, token_logprobs_backward

TARGETS = {
    **{f"sm_{sm}": GPUTarget("cuda", sm, 32) for sm in (80, 86, 89, 90, 100, 120)},
    **{gfx: GPUTarget("hip", gfx, 64) for gfx in ("gfx942", "gfx950")},
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class CompiledKernel:
    kernel: str
    arch: str
    dtype: str  # of the logits
    registers: int  # a thread
    spills: int  # NVIDIA: bytes of stack a thread, where ptxas spills to; AMD: spilled registers


def compile_all(archs: Sequence[str], *, progress: bool = False) -> list[CompiledKernel]:
    """Compile every kernel for these GPUs, into the cache that Triton uses (TRITON_CACHE_DIR).

    Args:
        archs: of `TARGETS`, for example "sm_90" or "gfx942".
        progress: show a bar on stderr.

    Raises:
        ValueError: another arch, or a Triton that interprets instead of compiling.
    """
    for arch in archs:
        if arch not in TARGETS:
            raise ValueError(f"arch must be one of {', '.join(TARGETS)}, got {arch!r}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so that nothing compiles; unset it")
    cases = list(product(archs, DTYPES, _launches(torch.float32)))
    return [_compile(*case) for case in tqdm(cases, "compile", disable=not progress)]


def _compile(arch: str, dtype: str, kernel: str) -> CompiledKernel:
    with _compiling_for(TARGETS[arch]) as compiled:
        _launches(DTYPES[dtype])[kernel]()
    (binary,) = compiled
    resources = _amd_resources if TARGETS[arch].backend == "hip" else _nvidia_resources
    return CompiledKernel(kernel, arch, dtype, *resources(binary))


def _launches(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A call for each kernel, on tensors without memory."""
    logits_NV = torch.empty(16, 2**17, dtype=dtype, device="meta")
    labels_N = torch.empty(16, dtype=torch.int64, device="meta")
    temperature = torch.empty((), device="meta")
    g_N = torch.empty(16, device="meta")
    inputs, results = (logits_NV, labels_N, temperature), [g_N] * 4
    return {
        "token_logprobs": lambda: token_logprobs(*inputs, with_entropy=False),
        "token_logprobs, entropy": lambda: token_logprobs(*inputs, with_entropy=True),
        "token_logprobs backward": lambda: token_logprobs_backward(g_N, None, results, *inputs),
        "token_logprobs backward, entropy": lambda: token_logprobs_backward(
            g_N, g_N, results, *inputs
        ),
        "logprob_diff": lambda: logprob_diff(logits_NV, *inputs),
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


def _nvidia_resources(binary: Any) -> tuple[int, int]:
    """Registers, and bytes of stack, as the cuobjdump in Triton's wheel reads them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _amd_resources(binary: Any) -> tuple[int, int]:
    """Vector registers, and how many registers spilled, which the assembly says of itself."""
    assembly = binary.asm["amdgcn"]
    spills = (_number(rf"\.{kind}_spill_count:\s+(\d+)", assembly) for kind in ("vgpr", "sgpr"))
    return _number(r"\.vgpr_count:\s+(\d+)", assembly), sum(spills)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"expected {pattern} in what Triton {triton.__version__} compiled")
    return int(found[1])
