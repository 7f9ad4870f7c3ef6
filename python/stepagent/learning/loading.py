"""What training is given by name or as rows: models with their adapters, trajectories."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
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
from ..models import unwrapped
from .methods import method_class
from .precision import loading_dtype, say_precision
from .reference_policy import change_of_base, has_adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import StepAgentConfig


_logger = logging.getLogger(__name__)

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
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            f"model must have weights to train, but all of this {type(policy).__name__} are "
            "frozen; an adapter is loaded so unless by PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)"
        )
    say_precision(policy, args)
    return policy


def load_reference(
    ref_model: PreTrainedModel | str | None,
    model: PreTrainedModel | str,
    policy: nn.Module,
    args: StepAgentConfig,
) -> PreTrainedModel | None:
    """The reference: loaded where only named, in the dtype that its frozen weights need.

    Not where it is the model by whose name the policy was loaded, below the policy's new adapter:
    it is in memory already.

    Args:
        model: what the policy was made of.
    """
    if not isinstance(ref_model, str):
        return ref_model
    if isinstance(model, str) and same_model(ref_model, model) and has_adapter(policy):
        change = change_of_base(policy)
        if change is None:
            return unwrapped(policy)
        _logger.info("ref_model=%r is loaded beside the policy: %s", ref_model, change)
    dtype = loading_dtype(args, None, trained=False)
    return cast("PreTrainedModel", load_named(ref_model, dtype))


def same_model(name: str, other: str) -> bool:
    """Whether two names are one, or two paths one folder."""
    folders = os.path.isdir(name) and os.path.isdir(other)
    return name == other or (folders and os.path.samefile(name, other))


def load_named(name: str, dtype: torch.dtype | str) -> Any:
    """A causal language model by its name or folder.

    Raises:
        ValueError: naming it, where there is none.
    """
    if Path(name, "adapter_config.json").is_file():
        raise ValueError(
            f"{name!r} must be a folder with a model, got one with an adapter: load it by "
            "PeftModel.from_pretrained(base, folder, is_trainable=True) and give the model"
        )
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
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("peft_config needs PEFT: pip install 'stepagent[train]'") from error
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(  # PEFT would put the new one in its place, and what it learnt were lost
            "model must be without an adapter where peft_config asks for one, got one that has an "
            "adapter: train on without peft_config, as PeftModel.from_pretrained(base, folder, "
            "is_trainable=True), or put it into the weights by merge_and_unload()"
        )
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
    if args.rolls_out or method_class(args.method, args.states).explores:
        for place, trajectory in enumerate(read):
            try:
                check_continues(trajectory, run_arguments(tokenizer))
            except ValueError as error:
                raise ValueError(
                    "rollouts prompt the agent alike everywhere, but "
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
