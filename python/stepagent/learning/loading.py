"""What training is given by name or as rows: models with their adapters, trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ..data.trajectory import Skipped, Trajectory, iterate_trajectories
from ..data.trunk import Trunk
from .precision import loading_dtype, say_precision

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import StepAgentConfig


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
    dataset: Sequence[Trajectory | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    args: StepAgentConfig,
) -> tuple[list[Trunk], PreTrainedTokenizerBase]:
    """The trunk of each row, and the tokenizer with the run's template arguments.

    Those are the arguments of the configuration, and what all rows give alike: the agent learns on
    such states, so it is to be prompted so.

    Raises:
        ValueError: as `encode_all`, and with ``states="agent"`` for rows whose states are others
            than those of the agent's rollouts.
    """
    tokenizer = with_arguments(tokenizer, parse_arguments(args.chat_template_kwargs))
    read: list[Trajectory] = []
    trunks = encode_all(dataset, tokenizer, progress=not args.disable_tqdm, read=read)
    tokenizer = with_arguments(tokenizer, shared_arguments(read, run_arguments(tokenizer)))
    if args.states == "agent":
        for place, trajectory in enumerate(read):
            try:
                check_continues(trajectory, run_arguments(tokenizer))
            except ValueError as error:
                raise ValueError(
                    f"states='agent' prompts the agent alike everywhere, but train_dataset[{place}]"
                    f" does not: {error}"
                ) from error
    return trunks, tokenizer


def encode_all(
    dataset: Sequence[Trajectory | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool,
    read: list[Trajectory] | None = None,
) -> list[Trunk]:
    """The trunk of each row.

    Args:
        read: takes up the trajectories.

    Raises:
        ValueError: naming the row that is no trajectory or cannot be encoded.
    """
    if len(dataset) == 0:
        raise ValueError("train_dataset is empty; at least one expert trajectory is needed")
    trunks = []
    rows = iterate_trajectories(dataset, name="train_dataset")
    for where, found in tqdm(rows, desc="encode", disable=not progress, total=len(dataset)):
        try:
            if isinstance(found, Skipped):
                raise ValueError(found.reason)
            trunks.append(encode(found, tokenizer))
            if read is not None:
                read.append(found)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return trunks
