"""Is stepagent right on this GPU? Four minutes at most, with torch and stepagent alone.

    python benchmarks/gpu/smoke.py > smoke.jsonl

One JSON line a case, written as it ends; the last line counts them. Exit code 1 where one failed or
was not reached in time. `--device cpu` is a dry run at tiny sizes: it shows that the script works.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import smoke_device
import smoke_ops
import torch
from lines import Counts, Findings, attempt, device_works, write
from smoke_ops import EVERYTHING, FEATURES, FROZEN, LAYOUTS, TINY, Shape, Sizes


@dataclass(frozen=True)
class Case:
    name: str
    params: dict[str, Any]
    work: Callable[[], Findings]


def cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """What all else rests on first; what may take the device down last."""
    halves = smoke_ops.HALVES
    for dtype in halves:
        work = partial(smoke_device.halves_into_float32, dtype, sizes, device)
        yield Case("out_dtype", {"dtype": str(dtype)[6:]}, work)
    yield from _linear_cases(device, sizes)
    yield Case(
        "mean_bias", sizes.largest().params(), partial(smoke_device.mean_bias, sizes, device)
    )
    yield from _logits_cases(device, sizes)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        yield Case("steps", {"dtype": str(dtype)[6:]}, partial(smoke_ops.steps, device, dtype))
    yield Case("no_host_sync", {}, partial(smoke_device.no_host_sync, sizes, device))
    for features in (frozenset[str](), frozenset({"frozen"}), EVERYTHING):
        work = partial(smoke_device.cuda_graph, features, sizes, device)
        yield Case("cuda_graph", {"features": sorted(features)}, work)
    for way in smoke_device.TF32:
        yield Case("tf32", {"way": way}, partial(smoke_device.tf32, way, sizes, device))
    yield Case("compiled", {}, partial(smoke_device.compiled, sizes, device))
    yield Case("long_logits", {}, partial(smoke_device.long_logits, sizes, device))
    for keep in (False, True):
        work = partial(smoke_device.long_product, keep, sizes, device)
        yield Case("long_product", {"kept": keep}, work)
    yield Case("long_hidden", {}, partial(smoke_device.long_hidden, sizes, device))


def _linear_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    def case(name: str, work: Callable[..., Findings], shape: Shape, features: set[str]) -> Case:
        params = {**shape.params(), "features": sorted(features)}
        return Case(name, params, partial(work, shape, frozenset(features), device))

    plain, everything, frozen = set[str](), set(EVERYTHING), set(FROZEN)
    for feature in FEATURES:
        yield case("linear", smoke_ops.linear, sizes.middle(), {feature})
    for shape in sizes.covering():
        for features in (plain, everything, frozen):
            yield case("linear", smoke_ops.linear, shape, features)
        for features in ({"shared head"}, everything, frozen):
            yield case("linear_diff", smoke_ops.linear_diff, shape, features)
    for dtype in (*smoke_ops.HALVES, torch.float32):
        for features in (plain, everything):
            for shape in (sizes.middle(dtype), sizes.largest(dtype)):
                yield case("batch_invariant", smoke_ops.batch_invariance, shape, features)


def _logits_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    dtypes = (*smoke_ops.HALVES, torch.float32)
    for i, layout in enumerate(LAYOUTS):
        shapes = {sizes.middle(dtypes[i % 3]), Shape(sizes.N[2], sizes.V[i % 3], 0, dtypes[i % 3])}
        for shape in sorted(shapes, key=lambda shape: shape.N):
            params = {**shape.params(), "layout": layout}
            for work in (smoke_ops.token_logprobs, smoke_ops.logprob_diff):
                yield Case(work.__name__, params, partial(work, shape, layout, device))


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    sizes = TINY if device.type == "cpu" else Sizes()
    counts = Counts(options.passed, options.failed, options.skipped)
    write({"environment": _environment(device)})
    late = 0
    for number, case in enumerate(cases(device, sizes)):
        if number < options.start or (options.only and options.only not in case.name):
            continue
        if time.time() > options.deadline:
            late += 1
            continue
        attempt(case.name, case.params, case.work, counts)
        if not device_works():
            _go_on_in_a_new_process(number + 1, counts, options)
    write({**vars(counts), "not_reached": late})
    sys.exit(1 if counts.failed or late else 0)


def _go_on_in_a_new_process(start: int, counts: Counts, options: argparse.Namespace) -> None:
    """With the next case: a failed kernel leaves this process without a device."""
    given = {**vars(options), **vars(counts), "start": start}
    flags = [f"--{name}={value}" for name, value in given.items()]
    os.execv(sys.executable, [sys.executable, *sys.argv[:1], *flags])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=225, help="no case starts after these")
    for name in ("start", "passed", "failed", "skipped"):  # of a process that went on
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.deadline = options.deadline or time.time() + options.seconds
    return options


def _environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "capability": torch.cuda.get_device_capability(device) if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": sys.argv,
    }


if __name__ == "__main__":
    main()
