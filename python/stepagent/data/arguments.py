"""A run's arguments for the chat template, which its tokenizer carries.

They belong to the template as the template belongs to the tokenizer, and are saved with it, under
``chat_template_kwargs`` in ``tokenizer_config.json``. So all that prompts the agent prompts alike:
training, inspection, rollouts, what a later run loads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .trajectory import Trajectory

NAME = "chat_template_kwargs"
# A template's own name for the clock; as an argument it holds the moment, in ISO format.
CLOCK = "strftime_now"
# Arguments of apply_chat_template that are no template's own.
_RESERVED = frozenset(
    (
        *("add_generation_prompt", "continue_final_message", "conversation"),
        *("chat_template", "max_length", "messages", "padding", "return_assistant_tokens_mask"),
        *("return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)


def check_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments themselves.

    Raises:
        TypeError, ValueError: Where they are no dict, or hold what is none of a template's own.
    """
    if not isinstance(arguments, dict):
        raise TypeError(f"{NAME} must be a dict, got {arguments!r}")
    for name in sorted(_RESERVED & arguments.keys()):
        raise ValueError(f"{NAME} must hold arguments of the template alone, got {name!r}")
    return arguments


def parse_arguments(given: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """Arguments as an option gives them: a dict, or the JSON of one.

    Raises:
        ValueError: For anything else.
    """
    if given is None:
        return None
    try:
        value = json.loads(given) if isinstance(given, str) else dict(given)
        return check_arguments(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{NAME} must be a JSON object of the chat template's arguments, such as "
            f'{{"enable_thinking": false}}, got {given!r}: {error}'
        ) from error


def run_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Those that a tokenizer carries."""
    return check_arguments(getattr(tokenizer, "init_kwargs", {}).get(NAME) or {})


def with_arguments(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None
) -> PreTrainedTokenizerBase:
    """The tokenizer with these arguments beside its own, or in their place; it stays as it is."""
    if not arguments:
        return tokenizer
    other = copy.copy(tokenizer)
    other.init_kwargs = {
        **tokenizer.init_kwargs,
        NAME: {**run_arguments(tokenizer), **arguments},
    }
    return other


def check_agrees(trajectory: Trajectory, run: Mapping[str, Any]) -> None:
    """Require that a trajectory's arguments are the run's wherever both have one.

    The moment of a record's clock is its own.

    Raises:
        ValueError: Naming the first that is another.
    """
    for name, value in trajectory.chat_template_kwargs.items():
        if name != CLOCK and name in run and run[name] != value:
            raise ValueError(
                f"{NAME} has {name}={value!r}, which must be the run's {run[name]!r}: its states "
                "are none that the agent would be given; drop it there, or change the run's"
            )


def check_continues(trajectory: Trajectory, run: Mapping[str, Any]) -> None:
    """Require that a policy with these arguments can go on where a trajectory stands.

    Raises:
        ValueError: Where the states of the trajectory have an argument or tools that those of the
            policy lack.
    """
    name = f"trajectory {trajectory.id!r}"
    if trajectory.tools is not None:
        raise ValueError(f"{name} has tools, of which a policy in an environment is told nothing")
    try:
        check_agrees(trajectory, run)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for argument in trajectory.chat_template_kwargs.keys() - run.keys() - {CLOCK}:
        raise ValueError(
            f"{name} has {NAME} with {argument!r}, which the policy must be given to go on from it"
        )


def shared_arguments(trajectories: Iterable[Trajectory], run: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that all trajectories give alike and the run does not give, clocks apart.

    An agent that learnt on their states is to be prompted so from then on.
    """
    shared: dict[str, Any] | None = None
    for trajectory in trajectories:
        own = trajectory.chat_template_kwargs
        if shared is None:
            shared = {k: v for k, v in own.items() if k != CLOCK and k not in run}
        shared = {k: v for k, v in shared.items() if k in own and own[k] == v}
        if not shared:
            break
    return shared or {}
