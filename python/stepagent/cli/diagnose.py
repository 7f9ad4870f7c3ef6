"""``stepagent diagnose``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..address import Address, is_url, scheme_hint, without_secrets
from ..data.actions import ActionFormat
from .base import FILE, FOLDER, POSITIVE, reports
from .loading import (
    device,
    import_from_here,
    is_hub_name,
    load_model,
    load_tokenizer,
    model_folder,
    parse_format,
    template_option,
)
from .reading import on_error_option, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.trajectory import OnError
    from ..engines import Engine

_EPISODES = 100
_TIMEOUT = 60.0  # seconds


def _check_model(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if is_url(value):
        try:
            Address.parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    elif not Path(value).is_dir() and not is_hub_name(value):
        raise click.BadParameter(
            f"{without_secrets(value)!r} is neither a model's folder nor its name on the Hub "
            f"(owner/name) nor a server's URL{scheme_hint(value)}"
        )
    return value


# Of the episodes; without --env they are of no use.
_IN_ENVIRONMENT = (
    click.option("--split", metavar="NAME", help="Of the environment, where it has some."),
    click.option("--episodes", type=POSITIVE, help=f"How many.  [default: {_EPISODES}]"),
    click.option(
        "--seed-start",
        type=click.IntRange(min=0),
        help="Environment seed of the first episode; the others follow.  [default: 0]",
    ),
    click.option("--max-steps", type=POSITIVE, help="End an episode sooner."),
    click.option("--batch-size", type=POSITIVE, help="Episodes side by side.  [default: 64]"),
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        help="Processes that run the environments.  [default: 0, this one does]",
    ),
    click.option(
        "--step-timeout",
        "timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help=f"An environment that takes longer for a step has crashed.  [default: {_TIMEOUT:g}]",
    ),
    click.option("--system", metavar="TEXT", help="First message to the agent."),
)


def _episode_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_IN_ENVIRONMENT):
        function = option(function)
    return function


@click.command()
@click.option(
    "--model",
    metavar="PATH|NAME|URL",
    callback=_check_model,
    required=True,
    help="The agent: a model's folder, its name on the Hub, or the server that has it.",
)
@click.option("--data", type=FILE, required=True, help="Held-out expert trajectories.")
@click.option("--env", help="Has an expert, and can be run, as babyai:GoToLocalS6N2.")
@_episode_options
@click.option(
    "--samples",
    type=POSITIVE,
    default=4,
    show_default=True,
    help="Answers a state at temperature 1.",
)
@click.option("--max-new-tokens", type=POSITIVE, help="[default: the longest expert action]")
@click.option(
    "--action-format",
    metavar="NAME",
    callback=parse_format,
    default="plain",
    show_default=True,
    help="How actions are written: plain, react, json, tool_call, or your own module:function.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the answers at temperature 1.",
)
@click.option("--served-model", metavar="NAME", help="Of several on the server.")
@click.option("--tokenizer", type=FOLDER, help="Of the server's model; a server needs it.")
@template_option
@on_error_option
@reports
def diagnose(
    model: str,
    data: Path,
    env: str | None,
    served_model: str | None,
    tokenizer: Path | None,
    action_format: ActionFormat,
    chat_template_kwargs: dict[str, Any] | None,
    on_error: OnError,
    max_new_tokens: int | None,
    samples: int,
    seed: int,
    **episodes: Any,
) -> tuple[dict[str, Any], str]:
    """Tell before any training what it can gain.

    How often an agent acts as the expert at the expert's held-out states; with --env also what
    becomes of its episodes after it first does otherwise.
    """
    _check_server(model, served_model, tokenizer)
    place = _place(env, **episodes)
    folder = tokenizer or model_folder(model)
    reading = read(data, load_tokenizer(folder, chat_template_kwargs), on_error)
    agent, spoken = _agent(model, folder, served_model, chat_template_kwargs)
    from ..evaluation import diagnose as find

    found = find(
        agent,
        reading.trunks,
        tokenizer=spoken,
        samples=samples,
        max_new_tokens=max_new_tokens,
        action_format=action_format,
        seed=seed,
        progress=True,
        **place,
    )
    shown = without_secrets(model) if is_url(model) else model
    report = {"model": shown, "data": str(data), **found.as_dict()}
    if on_error == "skip":
        report["skipped"] = reading.records()
    return report, f"{shown} beside the expert of {data}\n{found.as_text()}"


def _check_server(model: str, served_model: str | None, tokenizer: Path | None) -> None:
    if is_url(model) and tokenizer is None:
        raise click.UsageError("--model URL needs --tokenizer, the folder of that model's")
    for name, value in (("served-model", served_model), ("tokenizer", tokenizer)):
        if value is not None and not is_url(model):
            raise click.UsageError(f"--{name} is of no use with --model {model}")


def _place(
    env: str | None,
    split: str | None,
    episodes: int | None,
    seed_start: int | None,
    **options: Any,
) -> dict[str, Any]:
    """The environment and its episodes, as `stepagent.evaluation.diagnose` takes them."""
    own = {"split": split, "episodes": episodes, "seed_start": seed_start, **options}
    given = {name: value for name, value in options.items() if value is not None}
    if env is None:
        for name, value in own.items():
            if value is not None:
                option = {"timeout": "step-timeout"}.get(name, name.replace("_", "-"))
                raise click.UsageError(f"--{option} is of no use without --env")
        return {}
    from .. import envs

    import_from_here()
    make, start = envs.factory(env, split), seed_start or 0
    make().close()  # first: a wrong name need not wait for a model
    seeds = range(start, start + (episodes or _EPISODES))
    return {"env": make, "seeds": seeds, "timeout": _TIMEOUT, **given}


def _agent(
    model: str, folder: Path, served_model: str | None, arguments: dict[str, Any] | None
) -> tuple[PreTrainedModel | Engine, PreTrainedTokenizerBase]:
    if not is_url(model):
        return load_model(folder, device(), chat_template_kwargs=arguments)
    from ..engines import CompletionsEngine

    return CompletionsEngine(model, model=served_model), load_tokenizer(folder, arguments)
