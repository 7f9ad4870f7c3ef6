"""What the demo does while the trainer trains: it validates, and it scores cycles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback


class StopWhenFlat(TrainerCallback):
    """Validate every few epochs, keep the best weights, stop when they stay the best."""

    def __init__(
        self, validate: Callable[[Any], float], best: Path, *, every: int, patience: int
    ) -> None:
        self._validate, self._best = validate, best
        self._every, self._patience = every, patience

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if round(state.epoch) % self._every:
            return
        # The scores so far are in the trainer's state, which a checkpoint restores.
        scores = [entry["validation"] for entry in state.log_history if "validation" in entry]
        score = self._validate(model)
        state.log_history.append({"epoch": state.epoch, "validation": score})
        if score > max(scores, default=-1.0):
            model.save_pretrained(self._best)
        elif len(scores) - int(np.argmax(scores)) >= self._patience:
            control.should_training_stop = True


class ScoreCycles(TrainerCallback):
    """Adds the success rate on the held-out episodes to each cycle's log entry."""

    def __init__(self, evaluate: Callable[[Any], float]) -> None:
        self._evaluate = evaluate

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        latest = state.log_history[-1] if state.log_history else {}
        if "cycle" in latest and "success_rate" not in latest:
            latest["success_rate"] = self._evaluate(model)
