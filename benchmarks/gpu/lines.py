"""One JSON line for each thing that is tried: flushed at once, so that a stop keeps what there is.

A line says what was tried, with what errors, what was allowed, whether it is `ok`, and the seconds.
What raises is a line too. A figure is reported only where its check passed.
"""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class Skip(Exception):
    """What is tried does not apply here, for the reason given."""


@dataclass
class Findings:
    """Errors beside what is allowed of each, and figures that mean something if all are within."""

    errors: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, error: float, allowed: float) -> None:
        self.errors[what], self.allowed[what] = error, allowed

    def require(self, what: str, holds: bool) -> None:
        self.add(what, float(not holds), 0.0)

    def join(self, other: Findings, prefix: str) -> None:
        for what, error in other.errors.items():
            self.add(f"{prefix} {what}", error, other.allowed[what])

    @property
    def ok(self) -> bool:
        return all(error <= self.allowed[what] for what, error in self.errors.items())  # no NaN


@dataclass
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: int = 0


def write(line: dict[str, Any]) -> None:
    """A line on stdout; JSON knows neither NaN nor infinity, which are written as strings."""
    print(json.dumps(_plain(line)), flush=True)


def attempt(
    name: str, params: dict[str, Any], work: Callable[[], Findings], counts: Counts
) -> None:
    """Do it, write its line, and count how it went."""
    start = time.perf_counter()
    line: dict[str, Any] = {"case": name, "params": params}
    try:
        line |= _judged(work())
    except Skip as reason:
        line |= {"ok": None, "skipped": str(reason)}
    except Exception as error:  # whatever it is, the rest is tried
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        line |= {"ok": False, "raised": f"{type(error).__name__}: {error}"[:500], "at": where}
    write({**line, "seconds": round(time.perf_counter() - start, 3)})
    outcome = {True: "passed", False: "failed", None: "skipped"}[line["ok"]]
    setattr(counts, outcome, getattr(counts, outcome) + 1)
    if line["ok"] is False:
        gc.collect()  # a frame of the traceback may have held gigabytes
        if torch.cuda.is_available() and device_works():
            torch.cuda.empty_cache()


def device_works() -> bool:
    """False once a kernel has failed: a CUDA context that saw an error answers nothing more."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _judged(findings: Findings) -> dict[str, Any]:
    line: dict[str, Any] = {"errors": findings.errors, "allowed": findings.allowed}
    if findings.figures:
        line["figures"] = findings.figures if findings.ok else "not reported: a check failed"
    return {**line, "ok": findings.ok}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value
