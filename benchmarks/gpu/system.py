"""stepagent in a whole model on this GPU: 8B parameters, LoRA, gradient checkpointing. 8 minutes.

    python benchmarks/gpu/system.py > system.jsonl

One JSON line a result, written as it ends. Four parts, each with its own time, so that a slow one
takes nothing from the others: trees under each kind of mask, trees against the same pairs padded,
inspection against `generate`, and tables of kernels. What a check has not passed reports no figure.
Needs transformers and peft, 80 GB of GPU memory, and no weights: they are random. `--device cpu` is
a dry run at tiny sizes: it shows that the script works.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import system_inspection
import system_profile
import torch
import transformers
from lines import Counts, Findings, attempt, device_works, write
from system_model import FULL, TINY, Scale, build
from system_trees import MASKS, System, masked, tree_against_padded

Case = tuple[str, dict[str, Any], Callable[[], Findings]]


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float  # no case of it starts after these
    cases: Callable[[System], Iterator[Case]]


def mask_cases(system: System) -> Iterator[Case]:
    for steps in system.scale.mask_steps:
        for name in MASKS:
            yield "masks", {"steps": steps, "mask": name}, partial(masked, system, steps, name)


def padded_cases(system: System) -> Iterator[Case]:
    for steps in system.scale.padded_steps:
        yield "padded", {"steps": steps}, partial(tree_against_padded, system, steps)


def inspection_cases(system: System) -> Iterator[Case]:
    yield "agreement", {}, partial(system_inspection.agreement, system)
    for budget in system.scale.budgets:
        work = partial(system_inspection.inspect_speed, system, budget)
        yield "inspect", {"max_batch_tokens": budget}, work
    yield "generate", {}, partial(system_inspection.generate_speed, system)


def profile_cases(system: System) -> Iterator[Case]:
    for new_tokens in (2, 3):
        work = partial(system_profile.inspection, system, new_tokens)
        yield "profile inspect", {"max_new_tokens": new_tokens}, work
    scale, device = system.scale, system.device
    for name, features, invariant in (
        ("slices", frozenset[str](), False),
        ("slices, frozen head", frozenset({"frozen"}), False),
        ("one kernel", frozenset[str](), True),
    ):
        work = partial(system_profile.linear, features, invariant, scale, device)
        yield "profile linear_logprobs", {"as": name}, work
    yield "profile token_logprobs", {}, partial(system_profile.token_logprobs, scale, device)


PARTS = (
    Part("masks", 150, mask_cases),
    Part("padded", 100, padded_cases),
    Part("inspection", 120, inspection_cases),
    Part("profile", 60, profile_cases),
)


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    scale = TINY if device.type == "cpu" else FULL
    write({"environment": _environment(device, scale)})
    system, counts = System(build(scale, device), scale, device), Counts()
    for part in PARTS:
        if options.part in ("", part.name):
            _attempt_all(part, system, counts)
    write(vars(counts))
    sys.exit(1 if counts.failed else 0)


def _attempt_all(part: Part, system: System, counts: Counts) -> None:
    start = time.monotonic()
    for name, params, work in part.cases(system):
        if time.monotonic() - start > part.seconds:
            write({"case": name, "params": params, "ok": None, "skipped": "no time left"})
            counts.skipped += 1
            continue
        attempt(name, params, work, counts)
        if not device_works():
            write({**vars(counts), "stopped": "a kernel failed: the device answers no more"})
            sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", default="", choices=["", *(part.name for part in PARTS)])
    return parser.parse_args()


def _environment(device: torch.device, scale: Scale) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft)},
        },
        "command": sys.argv,
        "model": scale.model,
    }


if __name__ == "__main__":
    main()
