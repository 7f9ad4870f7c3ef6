"""The options of a training run: transformers' TrainingArguments and what StepAgent adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .decoding import check_count

METHODS = ("sft", "implicit")
STATES = ("expert", "agent")
_COUNTS = (
    "cycles",
    "epochs_per_cycle",
    "samples",
    "max_tokens",
    "max_new_tokens",
    "rollouts",
    "max_steps_per_episode",
)


@dataclass
class StepAgentConfig(TrainingArguments):
    """Options of :class:`stepagent.StepAgentTrainer`.

    One *cycle* is inspect → reflect: the agent acts at every state, then learns from the comparison
    for ``epochs_per_cycle`` passes. Total passes are ``cycles × epochs_per_cycle``; with cycles,
    ``num_train_epochs`` is set to that product and must not be set by hand. A batch is
    ``per_device_train_batch_size`` trajectories.

    ``method="sft"`` at the expert's states needs no cycles: it runs ``num_train_epochs`` passes.
    ``method="sft", states="agent"`` is DAgger (Ross et al. 2011): supervised on the expert's
    answers at the states of all cycles so far, together with the expert's own trajectories.
    """

    method: str = field(
        default="implicit",
        metadata={
            "help": "implicit: StepAgent's implicit step rewards; sft: supervised",
            "choices": METHODS,
        },
    )
    states: str = field(
        default="expert",
        metadata={
            "help": "whose states are compared: the expert's (the paper), or the agent's own, "
            "answered by the environment's expert (needs --env)",
            "choices": STATES,
        },
    )
    cycles: int = field(default=5, metadata={"help": "inspect → reflect cycles"})
    epochs_per_cycle: int = field(default=1, metadata={"help": "passes over one cycle's data"})
    beta: float = field(
        default=1.0,
        metadata={
            "help": "step reward = beta · log(policy / reference). Fully optimised cycles converge "
            "to the expert only for beta > 0.5, at once for beta = 1"
        },
    )
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "adds this times the mean NLL of the expert's tokens to the loss"},
    )
    samples: int = field(
        default=1, metadata={"help": "actions sampled at each of the expert's states"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of the agent's sampled actions"})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "cut of a sampled action; default: the longest expert action"},
    )
    max_tokens: int = field(
        default=4096,
        metadata={"help": "token budget of one tree; shorter trajectories share a tree"},
    )
    rollouts: int | None = field(
        default=None,
        metadata={
            "help": "agent rollouts per cycle with states=agent; default: one per trajectory"
        },
    )
    max_steps_per_episode: int | None = field(
        default=None, metadata={"help": "ends a rollout sooner than its environment would"}
    )
    rollout_seed_start: int = field(
        default=0, metadata={"help": "first environment seed of the rollouts with states=agent"}
    )

    def __post_init__(self) -> None:
        self._check()
        if self.has_cycles:
            self._set_epochs(float(self.cycles * self.epochs_per_cycle))
        # The batches are trees, not columns of a dataset.
        self.remove_unused_columns = False
        super().__post_init__()  # type: ignore[no-untyped-call]

    @property
    def has_cycles(self) -> bool:
        """Whether the training data is made anew by the agent every cycle."""
        return self.method != "sft" or self.states == "agent"

    def _set_epochs(self, epochs: float) -> None:
        if self.num_train_epochs not in (epochs, TrainingArguments.num_train_epochs):
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} cannot be set with cycles: it is "
                f"cycles × epochs_per_cycle = {self.cycles} × {self.epochs_per_cycle}"
            )
        self.num_train_epochs = epochs

    def _check(self) -> None:
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("states", self.states, STATES),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta must be finite and > 0, got {self.beta}")
        for name in ("sft_weight", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.states == "agent" and self.samples != 1:
            raise ValueError(f"states='agent' has one action per state, got samples={self.samples}")
        if self.states == "expert" and self.rollouts is not None:
            raise ValueError(f"rollouts={self.rollouts} needs states='agent'")
        if self.has_cycles and self.max_steps > 0:
            raise ValueError(
                f"max_steps={self.max_steps} cannot be combined with cycles: "
                "set cycles and epochs_per_cycle"
            )
        if self.dataloader_num_workers:
            raise ValueError(
                f"dataloader_num_workers must be 0, got {self.dataloader_num_workers}: "
                "batches are packed in C++ from data that changes each cycle"
            )
