"""What training is given by name or as rows: models with their adapters, trajectories."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from ..data.arguments import (
    check_continues,
    parse_arguments,
    run_arguments,
    shared_arguments,
    with_arguments,
)
from ..data.encoding import encode
from ..data.rows import without_nulls
from ..data.trajectory import Skipped, Trajectory, iterate_trajectories
from ..data.trunk import Trunk
from .precision import loading_dtype, say_precision

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import StepAgentConfig


MOST_STREAMED = 1_000_000  # rows of a dataset without a length; a run holds all of them


def load_policy(
    model: PreTrainedModel | str, peft_config: PeftConfig | None, args: StepAgentConfig
) -> Any:
    """The model to train: loaded where only named, with the adapter where one is asked for."""
    policy: Any = model
    if isinstance(model, str):
        policy = load_named(model, loading_dtype(args, peft_config))
    if peft_config is not None:
        policy = _with_adapter(policy, peft_config, args.seed)
    say_precision(policy, args)
    return policy


def load_reference(
    ref_model: PreTrainedModel | str | None, args: StepAgentConfig
) -> PreTrainedModel | None:
    """The reference: loaded where only named, in the dtype that its frozen weights need."""
    if isinstance(ref_model, str):
        dtype = loading_dtype(args, None, trained=False)
        return cast("PreTrainedModel", load_named(ref_model, dtype))
    return ref_model


def load_named(name: str, dtype: torch.dtype | str) -> Any:
    """A causal language model by its name or folder.

    Raises:
        ValueError: naming it, where there is none.
    """
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} must be a folder with a model or a name on the Hugging Face Hub: {error}"
        ) from error
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype=dtype)


def _with_adapter(model: Any, peft_config: PeftConfig, seed: int) -> Any:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs PEFT: pip install 'stepagent[train]'") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same adapter in every process
        return get_peft_model(model, peft_config)


def encode_run(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: StepAgentConfig,
) -> tuple[list[Trajectory], list[Trunk], PreTrainedTokenizerBase]:
    """The rows, the trunk of each, and the tokenizer with the run's template arguments.

    Those are the arguments of the configuration, and what all rows give alike: the agent learns on
    such states, so it is to be prompted so.

    Raises:
        ValueError: as `encode_all`, and for a run with rollouts for rows whose states are others
            than those of the agent's rollouts.
    """
    tokenizer = with_arguments(tokenizer, parse_arguments(args.chat_template_kwargs))
    read: list[Trajectory] = []
    trunks = encode_all(dataset, tokenizer, progress=not args.disable_tqdm, read=read)
    tokenizer = with_arguments(tokenizer, shared_arguments(read, run_arguments(tokenizer)))
    if args.rolls_out:
        for place, trajectory in enumerate(read):
            try:
                check_continues(trajectory, run_arguments(tokenizer))
            except ValueError as error:
                raise ValueError(
                    f"states={args.states!r} prompts the agent alike everywhere, but "
                    f"train_dataset[{place}] does not: {error}"
                ) from error
    return read, trunks, tokenizer


def encode_all(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool,
    name: str = "train_dataset",
    read: list[Trajectory] | None = None,
) -> list[Trunk]:
    """The trunk of each row.

    Args:
        dataset: a path, a dataset with a length, or rows to be read once: an ``IterableDataset``, a
            generator.
        name: what to call it in errors.
        read: takes up the trajectories.

    Raises:
        TypeError: for what has no rows, or several splits.
        ValueError: naming the row that is no trajectory or cannot be encoded; no rows; rows that do
            not end within ``MOST_STREAMED``.
    """
    rows = _rows_of(dataset, name)
    trunks = []
    found_rows = iterate_trajectories(rows, name=name)
    total = len(rows) if hasattr(rows, "__len__") and not isinstance(rows, str) else None
    for where, found in tqdm(found_rows, desc="encode", disable=not progress, total=total):
        try:
            if isinstance(found, Skipped):
                raise ValueError(found.reason)
            trunks.append(encode(found, tokenizer))
            if read is not None:
                read.append(found)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not trunks:
        raise ValueError(f"{name} must hold at least one trajectory, got none")
    return trunks


def _rows_of(dataset: Any, name: str) -> Any:
    """What rows are read from: the dataset itself, or a list of what can be read only once."""
    if isinstance(dataset, str | os.PathLike):
        return dataset
    if isinstance(dataset, Mapping) and not {"messages", "conversations"} & dataset.keys():
        splits = [str(split) for split in dataset]
        raise TypeError(
            f"{name} must be one dataset, got a {type(dataset).__name__} of {splits}: "
            f"choose one, as {name}=dataset[{splits[0] if splits else 'train'!r}]"
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        # A torch Dataset need not raise IndexError at its end.
        if hasattr(dataset, "__iter__"):
            return dataset
        return [dataset[i] for i in range(len(dataset))]
    if not isinstance(dataset, Iterable):
        raise TypeError(f"{name} must be rows or a path, got {type(dataset).__name__}")
    rows = list(islice(dataset, MOST_STREAMED + 1))
    if len(rows) > MOST_STREAMED:
        raise ValueError(
            f"{name} must end within {MOST_STREAMED} rows, got more of a {type(dataset).__name__}: "
            "all are held in memory and passed over again; give dataset.take(n), or a list"
        )
    # An IterableDataset fills an absent key with None, as Arrow does.
    return [without_nulls(row) for row in rows] if hasattr(dataset, "features") else rows
