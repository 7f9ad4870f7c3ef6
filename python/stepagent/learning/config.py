"""The options of a training run: transformers' TrainingArguments and what StepAgent adds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from ..data.arguments import parse_arguments
from ..data.draws import check_count
from .arguments import check_accelerator, check_arguments
from .methods import method_class
from .options import OPTIONS_OF_METHODS, StepAgentOptions

_COUNTS = (
    "cycles",
    "epochs_per_cycle",
    "samples",
    "max_tokens",
    "max_new_tokens",
    "inspect_batch_tokens",
    "rollouts",
    "max_steps_per_episode",
    "eval_episodes",
    "ask_budget",
    "discriminators",
    "explorer_reset",
    "critic_epochs",
    "continuations",
    "verify",
    "alternatives",
    "group_size",
)
# Figures of an evaluation that transformers would take the largest of.
_LESS_IS_BETTER = ("nll", "kl", "crashed")
# Of options that are None unless given, for methods that say nothing else.
_DEFAULTS: dict[str, Any] = {
    "states": "expert",
    "samples": 1,
    "temperature": 1.0,
    "baseline": "value",
    "beta": 1.0,
}
_POSITIVE = ("finite and > 0", lambda x: x > 0)
_NOT_NEGATIVE = ("finite and >= 0", lambda x: x >= 0)
_WHOLE = ("a whole number >= 0", lambda x: x >= 0 and x == int(x))
_FRACTION = ("in [0, 1]", lambda x: 0 <= x <= 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": _POSITIVE,
    "sft_weight": _NOT_NEGATIVE,
    "temperature": _NOT_NEGATIVE,
    "critic_learning_rate": _POSITIVE,
    "discriminator_smoothing": ("in [0, 0.5)", lambda x: 0 <= x < 0.5),
    "discriminator_penalty": _NOT_NEGATIVE,
    "discriminator_diversity": _NOT_NEGATIVE,
    "discriminator_replay": _WHOLE,
    "eval_seed_start": _WHOLE,
    "teacher_share": _FRACTION,
    "teacher_decay": _FRACTION,
    "ask_share": ("in (0, 1]", lambda x: 0 < x <= 1),
    "gamma": _FRACTION,
    "gae_lambda": _FRACTION,
    "clip": _POSITIVE,
    "kl_coef": _NOT_NEGATIVE,
    "target_kl": _POSITIVE,
    "entropy_coef": _NOT_NEGATIVE,
    "world_weight": _NOT_NEGATIVE,
    "keep_reward": ("finite", lambda x: True),
    "trajectory_threshold": _NOT_NEGATIVE,
    "step_threshold": _NOT_NEGATIVE,
    "nll_weight": _NOT_NEGATIVE,
    "omega": _NOT_NEGATIVE,
}


@dataclass
class StepAgentConfig(StepAgentOptions, TrainingArguments):
    """Options of `stepagent.StepAgentTrainer`.

    One *cycle* is inspect → reflect: the agent acts at every state, then learns from the comparison
    for ``epochs_per_cycle`` passes. Total passes are ``cycles × epochs_per_cycle``; with cycles,
    ``num_train_epochs`` is set to that product and must not be set by hand. A batch is
    ``per_device_train_batch_size`` trajectories.

    ``method="sft"`` at the expert's states needs no cycles: it runs ``num_train_epochs`` passes.
    ``method="dagger"``, or ``method="sft", states="agent"``, is DAgger (Ross et al. 2011):
    supervised on the expert's answers at the states of all cycles so far, together with the
    expert's own trajectories. An option that belongs to another method is refused.

    Of TrainingArguments, an option that would not be followed is refused by name: docs/training.md
    lists all of them.
    """

    # None tells a number that was asked for from transformers' default; once made it is a number.
    num_train_epochs: float = None  # type: ignore[assignment]
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False  # a batch is a few small arrays

    def __post_init__(self) -> None:
        self.chat_template_kwargs = parse_arguments(self.chat_template_kwargs)
        self.method_options = _parsed(self.method_options)
        self._set_defaults()
        self._check()
        check_arguments(self)
        self._set_epochs()
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(
            _LESS_IS_BETTER  # transformers takes the largest of all but losses
        ):
            self.greater_is_better = False
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_accelerator(self)

    @property
    def has_cycles(self) -> bool:
        """Whether the training data is made anew by the agent every cycle."""
        return method_class(self.method, self.states).acts

    @property
    def inspects(self) -> bool:
        """Whether the agent acts at the states of the demonstrations."""
        explores = method_class(self.method, self.states).explores
        return self.has_cycles and self.states != "agent" and not explores

    @property
    def rolls_out(self) -> bool:
        """Whether the agent acts in the environment, and the expert is asked at its states."""
        return self.states != "expert"

    def changed(self, names: Iterable[str]) -> dict[str, Any]:
        """Of these options, those that are not what they would be if nobody had given them."""
        plain = {field.name: field.default for field in fields(self)}
        by_method = _DEFAULTS | dict(method_class(self.method, self.states).defaults)
        values = {name: getattr(self, name) for name in names}
        return {
            name: value
            for name, value in values.items()
            if value != plain[name] and not (name in by_method and value == by_method[name])
        }

    def _set_epochs(self) -> None:
        if not self.has_cycles:
            if self.num_train_epochs is None:
                self.num_train_epochs = TrainingArguments.num_train_epochs
            return
        epochs = float(self.cycles * self.epochs_per_cycle)
        if self.num_train_epochs not in (None, epochs):
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} cannot be set with cycles: it is "
                f"cycles × epochs_per_cycle = {self.cycles} × {self.epochs_per_cycle}"
            )
        self.num_train_epochs = epochs

    def _set_defaults(self) -> None:
        """Of options that are None unless given, by the method."""
        defaults = _DEFAULTS | dict(method_class(self.method, self.states).defaults)
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check(self) -> None:
        for own in fields(StepAgentOptions):
            choices = own.metadata.get("choices")
            if choices and "open" not in own.metadata and getattr(self, own.name) not in choices:
                raise ValueError(
                    f"{own.name} must be one of {choices}, got {getattr(self, own.name)!r}"
                )
        method = method_class(self.method, self.states)
        self._check_of_method(method.Options)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
        for name, (rule, holds) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name} must be {rule}, got {value}")
        method.options_of(self)
        method.check(self)
        self._check_states()
        if self.scored_part != "all" and self.action_format == "plain":
            raise ValueError(
                f"scored_part={self.scored_part!r} needs an action_format that tells thought from "
                "action, got 'plain', in which there is nothing to leave out: take 'react', 'json' "
                "or 'tool_call'"
            )
        if self.has_cycles and self.max_steps > 0:
            raise ValueError(
                f"max_steps={self.max_steps} cannot be combined with cycles: "
                "set cycles and epochs_per_cycle"
            )

    def _check_states(self) -> None:
        if self.states == "agent" and self.samples != 1:
            raise ValueError(f"states='agent' has one action per state, got samples={self.samples}")
        for name in ("rollouts", "teacher_share"):
            if not self.rolls_out and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} needs states='agent' or 'mixed', got 'expert'"
                )
        self._check_asking()
        if self.verify and not self.rolls_out:
            raise ValueError(f"verify={self.verify} needs states='agent' or 'mixed', got 'expert'")
        if self.verify and self.teacher_share:
            raise ValueError(
                f"verify={self.verify} needs rollouts of the agent alone, got "
                f"teacher_share={self.teacher_share}"
            )
        if self.alternatives and not self.verify:
            raise ValueError(f"alternatives={self.alternatives} needs verify, got None")
        whole_episodes = method_class(self.method, self.states).whole_episodes
        if self.save_rollouts and not (self.rolls_out or whole_episodes):
            raise ValueError(
                f"save_rollouts needs states='agent' or 'mixed', or a method that acts in whole "
                f"episodes, got method={self.method!r} with states={self.states!r}"
            )
        if self.teacher_decay != 1 and not self.teacher_share:
            raise ValueError(
                f"teacher_decay={self.teacher_decay} needs a teacher_share > 0, got "
                f"{self.teacher_share}"
            )

    def _check_asking(self) -> None:
        for name, unset in (("ask", "always"), ("ask_budget", None)):
            if not self.rolls_out and (value := getattr(self, name)) != unset:
                raise ValueError(
                    f"{name}={value!r} needs states='agent' or 'mixed', got {self.states!r}"
                )
        if self.ask_share != 1 and self.ask == "always":
            raise ValueError(
                f"ask_share={self.ask_share} needs ask='unsure', 'worth' or 'random', got 'always'"
            )
        if self.ask_from is not None and self.ask != "worth":
            raise ValueError(f"ask_from={self.ask_from!r} needs ask='worth', got {self.ask!r}")
        if self.ask_budget is None:
            return
        if self.ask_budget < self.cycles:
            raise ValueError(
                f"ask_budget must be at least an answer for each of the {self.cycles} cycles, got "
                f"{self.ask_budget}"
            )
        if self.teacher_share:
            raise ValueError(
                f"teacher_share must be 0 with an ask_budget, got {self.teacher_share}: the expert "
                "that acts is asked before it is known what its answers are worth"
            )

    def _check_of_method(self, own: type) -> None:
        """Refuse what was set of another method: it would change nothing."""
        mine = {field.name for field in fields(own)}
        owners: dict[str, list[str]] = {}
        for method, options in OPTIONS_OF_METHODS.items():
            for field in fields(options):
                unset = (field.default, _DEFAULTS.get(field.name))
                if field.name not in mine and getattr(self, field.name) not in unset:
                    owners.setdefault(field.name, []).append(method)
        for name, methods in owners.items():
            raise ValueError(
                f"{name} is an option of method={' or '.join(map(repr, methods))}, got "
                f"{name}={getattr(self, name)!r} with method={self.method!r}"
            )


def _parsed(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """``method_options`` as they are given, or as the JSON of them."""
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"method_options must be a JSON object, got {given!r}: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"method_options must be a JSON object or a dict, got {given!r}")
    return value
