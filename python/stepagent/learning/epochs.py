"""Counts a run's epochs, and calls the trainer where they begin and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .checkpoint import Place

if TYPE_CHECKING:
    from .trainer import StepAgentTrainer


class EpochCallback(TrainerCallback):
    """Epochs are counted as they begin: ``state.epoch`` stays behind where one was ended early."""

    def __init__(self, trainer: StepAgentTrainer) -> None:
        self._trainer = trainer
        self._place = Place(0, 0)  # where the present epoch was entered
        self._first_step = 0  # all steps of the run before the present epoch
        self._ended = False

    def start(self, place: Place) -> None:
        """Of a run: the epoch that comes first, and how many of its steps are done."""
        self._place, self._ended = place, False
        self._next = place

    def place(self, global_step: int, control: Any) -> Place:
        """Where a run continues that is at this step now."""
        if self._ended or control.should_epoch_stop:
            return Place(self._place.epoch + 1, 0)
        return Place(self._place.epoch, global_step - self._first_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._place, self._ended = self._next, False
        self._first_step = state.global_step - self._place.step
        self._next = Place(self._place.epoch + 1, 0)
        self._trainer.begin_epoch(self._place.epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step - self._first_step
        # Training that stops within an epoch has not ended it.
        self._ended = control.should_epoch_stop or done >= self._trainer.steps_per_epoch
        if self._ended:
            self._trainer.end_epoch(self._place.epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.log_cycle()
        self._trainer.withdraw_policy()
