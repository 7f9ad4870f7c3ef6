"""``stepagent inspect``."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..data.actions import PLAIN, ActionFormat
from ..optional import require
from .base import FILE, FOLDER, NEW_FILE, POSITIVE, Interrupted, make_parent, reports
from .loading import device, load_model, load_tokenizer, parse_format, template_option
from .reading import on_error_option, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.trajectory import OnError
    from ..engines import Engine
    from ..records.branches import Shard


def _check_engine(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value not in ("local", "vllm") and not value.startswith(("http://", "https://")):
        raise click.BadParameter(f"{value!r} is neither 'local' nor 'vllm' nor a server's URL")
    return value


def _check_shard(ctx: click.Context, param: click.Parameter, value: str) -> Shard:
    from ..records.branches import Shard

    try:
        return Shard.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _launched_shard() -> str:
    """As ``accelerate launch`` and ``torchrun`` say; without them a single part."""
    return f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"


@click.command("inspect")
@click.option("--model", type=FOLDER, required=True, help="Folder of a model and its tokenizer.")
@click.option("--data", type=FILE, required=True, help="Expert trajectories.")
@click.option(
    "--output",
    type=NEW_FILE,
    required=True,
    help="JSONL, or .parquet, a record a trajectory. A run that was stopped continues in it.",
)
@click.option("--samples", type=POSITIVE, default=1, show_default=True, help="Actions a state.")
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True)
@click.option("--max-new-tokens", type=POSITIVE, help="[default: the longest expert action]")
@click.option(
    "--max-batch-tokens",
    type=POSITIVE,
    help="Decoded together, with --engine local.  [default: by device and memory]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--engine",
    metavar="local|vllm|URL",
    callback=_check_engine,
    default="local",
    show_default=True,
    help="Who decodes; URL is that of a server such as `vllm serve`, which has the model.",
)
@click.option("--served-model", metavar="NAME", help="Of several on the server.")
@click.option(
    "--action-format",
    metavar="NAME",
    callback=parse_format,
    default="plain",
    show_default=True,
    help="Of both: agreement is that of the actions it reads, with plain that of the tokens.",
)
@click.option(
    "--chunk",
    type=POSITIVE,
    default=32,
    show_default=True,
    help="Trajectories sampled and written together.",
)
@click.option(
    "--shard",
    metavar="I/N",
    callback=_check_shard,
    default=_launched_shard,
    help="Do part I of N, from 0.  [default: as accelerate launch says]",
)
@template_option
@on_error_option
@reports
def inspect_command(
    model: Path,
    data: Path,
    output: Path,
    engine: str,
    served_model: str | None,
    action_format: ActionFormat,
    chunk: int,
    shard: Shard,
    chat_template_kwargs: dict[str, Any] | None,
    on_error: OnError,
    max_new_tokens: int | None,
    max_batch_tokens: int | None,
    **sampling: Any,
) -> tuple[dict[str, Any], str]:
    """Let an agent act at every state of an expert."""
    import numpy as np

    from ..acting.inspection import inspect
    from ..data.arguments import run_arguments
    from ..data.ends import ends_of
    from ..records.branches import BranchWriter, fingerprint

    output = shard.path(output)
    make_parent(output)
    tokenizer = load_tokenizer(model, chat_template_kwargs)
    reading = read(data, tokenizer, on_error)  # first: a bad row need not wait
    agent = _agent(engine, model, served_model)
    trajectories, trunks = reading.trajectories, reading.trunks
    ends = ends_of(trunks)
    longest = max(int(np.diff(trunk.action_spans).max()) for trunk in trunks)
    sampling |= {"max_new_tokens": max_new_tokens or longest, "eos_token_id": ends}
    if max_batch_tokens is not None:
        sampling["max_batch_tokens"] = max_batch_tokens
    where = engine if engine in ("local", "vllm") else "server"
    prompted = run_arguments(tokenizer)
    writer = BranchWriter(
        trajectories,
        trunks,
        lambda part, first: inspect(agent, part, first_trunk=first, **sampling),
        functools.partial(_decoded, tokenizer=tokenizer, ends=ends),
        run={
            "model": model.resolve().name,
            "fingerprint": fingerprint(model),
            "engine": where,
            "chunk": chunk,
            **({} if action_format == PLAIN else {"action_format": action_format.name}),
            **({"chat_template_kwargs": prompted} if prompted else {}),
            **sampling,
        },
    )
    chunks = shard.chunks(len(trunks), chunk)
    try:
        writer.write(output, chunks)
    except KeyboardInterrupt as interrupt:
        raise Interrupted("the same command continues where it stopped") from interrupt
    report = {
        "output": str(output),
        "samples": sampling["samples"],
        **_inspected(output, action_format, tokenizer),
    }
    if on_error == "skip":
        report["skipped"] = reading.records()
    text = f"Wrote {report['trajectories']} trajectories to {output}"
    if report["steps"]:
        actions = report["steps"] * report["samples"]
        agreed = f"agreement with the expert: {report['agreement']:.1%} of {actions} actions"
        text = f"{agreed}\n{text}"
    return report, text


def _agent(engine: str, folder: Path, served_model: str | None) -> PreTrainedModel | Engine:
    if served_model is not None and engine in ("local", "vllm"):
        raise click.UsageError(f"--served-model is of no use with --engine {engine}")
    if engine == "local":
        return load_model(folder, device())[0]
    if engine == "vllm":
        require("--engine vllm", "vllm")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        from vllm import LLM

        from ..engines import VLLMEngine

        return VLLMEngine(LLM(model=str(folder), enable_prefix_caching=True))
    from ..engines import CompletionsEngine

    return CompletionsEngine(engine, model=served_model)


def _inspected(
    output: Path, form: ActionFormat, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What the whole file holds; a part may hold nothing."""
    from ..data.branch import agreement
    from ..records.branches import iterate_branches

    trajectories, steps, agreed = 0, 0, 0.0
    for trunk, branches in iterate_branches(output):
        trajectories += 1
        steps += trunk.num_steps
        same = agreement([trunk], [branches], form=form, tokenizer=tokenizer)
        agreed += same * trunk.num_steps
    return {
        "trajectories": trajectories,
        "steps": steps,
        "agreement": agreed / steps if steps else None,
    }


def _decoded(
    token_ids: list[int], *, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> str:
    ended = token_ids[-1] in ends
    return str(tokenizer.decode(token_ids[:-1] if ended else token_ids)).strip()
