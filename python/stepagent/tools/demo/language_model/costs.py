"""What training costs: tokens, seconds and memory, logged at each update."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class UpdateCosts(TrainerCallback):
    """Logs each update's cost. The log is in the trainer's state, which a checkpoint restores:
    what a run that was interrupted lost is not counted."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entry = {
            "update": state.global_step,
            "tokens": state.num_input_tokens_seen,
            "update_seconds": time.monotonic() - self._start,
            **_peak_memory(),
        }
        state.log_history.append(entry)


def training_cost(log: Path) -> dict[str, float]:
    """Of a stage's ``log.json``: updates, tokens of trees, seconds of updates alone (without acting
    and evaluation), their ratio, and the process's peak memory in bytes."""
    updates = [entry for entry in json.loads(log.read_text()) if "update_seconds" in entry]
    tokens, seconds = updates[-1]["tokens"], sum(entry["update_seconds"] for entry in updates)
    peaks = {
        name: max(entry[name] for entry in updates if name in entry)
        for name in ("peak_memory", "peak_gpu_memory")
        if any(name in entry for entry in updates)
    }
    return {
        "updates": updates[-1]["update"],
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        **peaks,
    }


def _peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most until now."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"peak_memory": largest * (1 if sys.platform == "darwin" else 1024)}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return peaks
