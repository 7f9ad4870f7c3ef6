"""Time, memory and the machine's own ceilings.

Time, CUDA: events around the forward and the backward of each repetition, the L2 cache overwritten
before it, nothing waited for until the last. CPU: perf_counter, the garbage collector off.
Memory, of a forward and a backward, above what was there before and without the gradients that are
returned. CUDA: the peak of torch's allocator. CPU: that of the allocations in torch's profiler;
what a library allocates by itself is not in it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .checks import fresh_leaves, run
from .problems import Problem

# Read at the first profile. Otherwise Kineto writes two lines into the progress bar at each.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MODES = ("forward", "backward", "full")
FEWEST_REPEATS, MOST_REPEATS = 3, 50
L2_BYTES = 256 * 2**20  # more than any cache holds
Times = dict[str, list[float]]  # ms of each repetition, by mode


def measure(
    problem: Problem, calls: dict[str, Callable[..., Tensor]], budget_s: float, probe: Probe
) -> dict[str, Times | Exception]:
    """Times of each call, or how it failed. The calls take turns, after a run each to warm up.

    Args:
        probe: takes its turns with them, so that it meets the same heat and the same neighbours.
        budget_s: for each call; at least three repetitions are made, and at most 50.
    """
    clock: Any = _CudaClock() if problem.upstream.is_cuda else _CpuClock()
    turns = {name: _Turns(problem, call, clock, budget_s) for name, call in calls.items()}
    with _no_collector():
        for turn in range(MOST_REPEATS):
            if not any(each.takes(turn) for each in turns.values()):
                break
            probe.take(clock)
            for each in turns.values():
                each.take(turn)
        clock.wait()
    return {name: each.result() for name, each in turns.items()}


class _Turns:
    """The repetitions of one call. What it raises ends it, not the others."""

    def __init__(
        self, problem: Problem, call: Callable[..., Tensor], clock: Any, budget_s: float
    ) -> None:
        self.problem, self.call, self.clock = problem, call, clock
        self.marks: list[list[Any]] = []
        self.repeats = 0
        self.failure: Exception | None = None
        self._run()
        if self.failure is None:
            start, _, end = self.marks.pop()
            seconds = clock.between(start, end) / 1e3
            wanted = int(budget_s / max(seconds, 1e-6))
            self.repeats = min(max(wanted, FEWEST_REPEATS), MOST_REPEATS)

    def takes(self, turn: int) -> bool:
        return turn < self.repeats and self.failure is None

    def take(self, turn: int) -> None:
        if self.takes(turn):
            self._run(wait=False)

    def _run(self, wait: bool = True) -> None:
        try:
            self.marks.append(_marked_run(self.problem, self.call, self.clock))
            if wait:
                self.clock.wait()
        except Exception as error:  # a peer's failure is a result
            self.failure = error.with_traceback(None)  # whose frames hold tensors

    def result(self) -> Times | Exception:
        return self.failure or _times(self.clock, self.marks)


def _marked_run(problem: Problem, call: Callable[..., Tensor], clock: Any) -> list[Any]:
    """One forward and backward: the marks before, between and after."""
    leaves = fresh_leaves(problem)
    upstream = problem.upstream
    clock.prepare()
    marks = [clock.mark()]
    values = call(**{**problem.inputs, **leaves})
    marks.append(clock.mark())
    torch.autograd.grad(values, list(leaves.values()), upstream.to(values.dtype))
    marks.append(clock.mark())
    return marks


def _times(clock: Any, marks: list[list[Any]]) -> Times:
    return {
        "forward": [clock.between(start, middle) for start, middle, _ in marks],
        "backward": [clock.between(middle, end) for _, middle, end in marks],
        "full": [clock.between(start, end) for start, _, end in marks],
    }


class _CpuClock:
    def prepare(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def between(self, start: float, end: float) -> float:
        return 1e3 * (end - start)


class _CudaClock:
    def __init__(self) -> None:
        self.l2 = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")

    def prepare(self) -> None:
        self.l2.zero_()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --------------------------------------------------------------------- memory


def peak_bytes(problem: Problem, call: Callable[..., Tensor]) -> int:
    """Of a forward and a backward; a run before has done what is done once."""
    measured = _peak_cuda if problem.upstream.is_cuda else _peak_cpu
    return measured(lambda: run(problem, call, problem.upstream)[1])


def _peak_cuda(compute: Callable[[], dict[str, Tensor]]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = compute()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes(gradients)


def _peak_cpu(compute: Callable[[], dict[str, Tensor]]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients = compute()
    held = peak = 0
    for event in sorted(_trace_events(profiler), key=lambda event: event.get("ts", 0)):
        if event.get("name") == "[memory]":
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak - _bytes(gradients)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def _trace_events(profiler: profile) -> list[dict[str, Any]]:
    """What the profiler saw, which it tells to a file only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        return events


# ------------------------------------------------------------------- ceilings


class Probe:
    """A matrix product (FLOP) or a copy (byte) in a dtype, and the rate that it reaches."""

    def __init__(self, device: torch.device, dtype: torch.dtype, unit: str, small: bool) -> None:
        cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        if unit == "FLOP":
            size = 64 if small else 8192 if cuda else 2048
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            product = torch.empty_like(a)
            self.work: Callable[[], object] = lambda: torch.mm(a, b, out=product)
            self.units = 2 * size**3
        else:
            length = 2**16 if small else 2**31 if cuda else 2**28
            source = torch.zeros(length, dtype=torch.int8, device=device)
            target = torch.empty_like(source)
            self.work = lambda: target.copy_(source)
            self.units = 2 * length
        self.work()

    def take(self, clock: Any) -> None:
        clock.prepare()
        start = clock.mark()
        self.work()
        self.clock = clock
        self.marks.append((start, clock.mark()))

    def rate(self) -> float:
        """Units a second, by the median of its turns."""
        return 1e3 * self.units / statistics.median(self._times())

    def best_rate(self) -> float:
        """Units a second, by the fastest of its turns."""
        return 1e3 * self.units / min(self._times())

    def _times(self) -> list[float]:
        """Milliseconds of each turn."""
        return [float(self.clock.between(*marks)) for marks in self.marks]


def ceilings(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, float]:
    """The machine's best of five: FLOP/s of a matrix product in this dtype, byte/s of a copy."""
    clock: Any = _CudaClock() if device.type == "cuda" else _CpuClock()
    rates = {}
    for unit in ("FLOP", "byte"):
        probe = Probe(device, dtype, unit, small)
        for _ in range(5):
            probe.take(clock)
        clock.wait()
        rates[unit] = probe.best_rate()
    return rates
