"""Where the time of an op goes: a trace, and a table with a line for each kernel.

On CUDA a kernel is what ran on the GPU, with the registers, shared memory and warps that limit how
many of it run at once, as CUPTI reports them; on CPU it is a torch operator, without those that it
called. Bytes are those of the tensors that went into the operator: read once, they are the least it
moves. Where Triton's Proton runs, its own profile lies beside the trace.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ...files import destination, write_text
from .checks import run
from .output import table
from .problems import Problem

_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2}
_OCCUPANCY = ("registers per thread", "shared memory", "warps per SM", "est. achieved occupancy %")


@dataclass
class _Kernel:
    calls: int = 0
    us: float = 0.0
    bytes: int = 0
    occupancy: dict[str, Any] = field(default_factory=dict)


def write_profile(
    folder: Path, problem: Problem, provider: str, call: Callable[..., Tensor]
) -> None:
    """The trace (.json, for Perfetto) and the table (.txt) of one forward and backward."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w=.]+", "-", f"{problem.name}-{problem.shape}-{provider}")
    trace, text = folder / f"{stem}.json", folder / f"{stem}.txt"
    cuda = problem.upstream.is_cuda
    run(problem, call, problem.upstream)  # what is done once is not profiled
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        run(problem, call, problem.upstream)
        if cuda:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(destination(trace)))
    kernels = _kernels(json.loads(trace.read_text())["traceEvents"], cuda)
    write_text(text, _described(kernels))
    if cuda:
        _proton(folder / stem, problem, call)


def _kernels(events: list[dict[str, Any]], cuda: bool) -> dict[str, _Kernel]:
    """The kernels of a trace, by name."""
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    kernels: dict[str, _Kernel] = defaultdict(_Kernel)
    if not cuda:
        for event, us in _self_times(operators):
            _add(kernels[event["name"]], us, _input_bytes(event), {})
        return kernels
    launchers = {event["args"].get("External id"): event for event in operators}
    for event in events:
        if event.get("cat") == "kernel":
            launcher = launchers.get(event["args"].get("External id"))
            moved = _input_bytes(launcher) if launcher else 0
            occupancy = {name: event["args"].get(name, "") for name in _OCCUPANCY}
            _add(kernels[event["name"]], event["dur"], moved, occupancy)
    return kernels


def _add(kernel: _Kernel, us: float, moved: int, occupancy: dict[str, Any]) -> None:
    kernel.calls += 1
    kernel.us += us
    kernel.bytes += moved
    kernel.occupancy = occupancy


def _self_times(operators: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], float]]:
    """Each operator with its time less that of the operators it called."""
    own = {id(event): float(event["dur"]) for event in operators}
    open_by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        callers = open_by_thread[event["tid"]]
        while callers and callers[-1]["ts"] + callers[-1]["dur"] <= event["ts"]:
            callers.pop()
        if callers:
            own[id(callers[-1])] -= event["dur"]
        callers.append(event)
    return ((event, own[id(event)]) for event in operators)


def _input_bytes(event: dict[str, Any]) -> int:
    dims, types = (event["args"].get(name, ()) for name in ("Input Dims", "Input type"))
    return sum(
        math.prod(size) * _BYTES[kind]
        for size, kind in zip(dims, types, strict=True)
        if kind in _BYTES and all(isinstance(length, int) for length in size)
    )


def _described(kernels: dict[str, _Kernel]) -> str:
    header = ["kernel", "calls", "ms", "share", "MiB in", "GB/s", *_OCCUPANCY]
    total = sum(kernel.us for kernel in kernels.values())
    rows = [
        [
            name[:80],
            str(kernel.calls),
            f"{kernel.us / 1e3:.4g}",
            f"{kernel.us / total:.1%}",
            f"{kernel.bytes / 2**20:.1f}",
            f"{kernel.bytes / kernel.us / 1e3:.3g}",
            *(str(kernel.occupancy.get(name, "")) for name in _OCCUPANCY),
        ]
        for name, kernel in sorted(kernels.items(), key=lambda item: -item[1].us)
        if kernel.us > total / 1000
    ]
    return "\n".join([*table([header, *rows]), ""])


def _proton(path: Path, problem: Problem, call: Callable[..., Tensor]) -> None:
    try:
        import triton.profiler as proton

        session = proton.start(str(path), hook="triton")
        run(problem, call, problem.upstream)
        torch.cuda.synchronize()
        proton.finalize(session)
    except Exception as error:  # it needs CUPTI, and a Triton that has it
        reason = f"no Proton profile: {type(error).__name__}: {error}\n"
        write_text(path.with_name(f"{path.name}-proton.txt"), reason)
