"""What training refuses before any work is done: models, and data that would not fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data.trunk import Trunk
from ..models import check_fits, check_tree_support

if TYPE_CHECKING:
    from .config import StepAgentConfig


def check_discriminator(discriminator: torch.nn.Module | None, model: torch.nn.Module) -> None:
    if discriminator is None:
        return
    if discriminator is model:
        raise ValueError("discriminator must be another object than model, which PPO changes")
    check_tree_support(discriminator)


def check_engine(args: StepAgentConfig) -> None:
    """Refuse a run in which an engine would not act, or not as the policy that has to."""
    if not args.has_cycles:
        raise ValueError(
            f"engine is given, but method={args.method!r} at the expert's states never acts"
        )
    if args.explorer != "none":
        raise ValueError(
            f"engine must be None with explorer={args.explorer!r}, whose two adapters act in the "
            "model here: an engine is given one"
        )


def check_optimizer(optimizer: Any, policy: torch.nn.Module) -> None:
    """Refuse an optimiser of other parameters: it would change nothing that is trained."""
    if optimizer is None:
        return
    own = {id(parameter): parameter.requires_grad for parameter in policy.parameters()}
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = sum(own.get(key, False) for key in given)
    if not trained or any(key not in own for key in given):
        strange = sum(key not in own for key in given)
        raise ValueError(
            f"optimizers[0] must be of parameters that are trained, got {trained} of "
            f"{len(given)}, and {strange} that are not the policy's: make it of "
            "model.parameters(), of a model that is given as an object, with its adapter already"
        )


def check_one_gpu(count: int) -> None:
    if count > 1:
        raise ValueError(
            f"one process cannot train on {count} GPUs: start one per GPU with "
            "`accelerate launch` or `torchrun`, or show it one by CUDA_VISIBLE_DEVICES"
        )


def check_sharding(fsdp_plugin: Any, deepspeed_plugin: Any) -> None:
    """Refuse the kinds of sharding in which weights cannot be read as the methods need them."""
    if fsdp_plugin is not None and fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version is {fsdp_plugin.fsdp_version}, but stepagent shards with FSDP2: set "
            "fsdp_version: 2, as examples/fsdp2.yaml does"
        )
    if deepspeed_plugin is not None and deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 is not supported: it takes the head's weight away between forward "
            "and backward, where the fused log-probs need it. Shard with FSDP2, as "
            "examples/fsdp2.yaml does, or take ZeRO-2"
        )


def check_parallelism(config: Any) -> None:
    """Refuse what ``accelerate launch`` can ask for where the arguments do not."""
    if config is not None:
        raise ValueError(
            f"parallelism_config must be None, got {config}: processes share trajectories, by DDP, "
            "FSDP2 or ZeRO-2, and a tree is in one of them"
        )


def check_loaded_everywhere() -> None:
    """Before anything is computed: accelerate can leave all but one process without weights."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(name, "").lower() == "true" for name in names):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false: stepagent tries the model on a small "
            "tree in every process, and with it one process alone has the weights"
        )


def check_budget(
    model: torch.nn.Module,
    trunks: Sequence[Trunk],
    args: StepAgentConfig,
    new_tokens: int,
    *,
    inspects: bool,
    name: str = "train_dataset",
) -> None:
    """Refuse what would not fit into a tree or the model, before any work is done.

    Args:
        inspects: actions are sampled at the states of these trunks, and put into their trees.
    """
    for i, trunk in enumerate(trunks):
        length, what = len(trunk.input_ids), f"{name}[{i}]"
        tried = trunk.num_steps * args.samples * new_tokens if inspects else 0
        if length + tried > args.max_tokens:
            actions = f" and up to {tried} of sampled actions" if tried else ""
            raise ValueError(
                f"max_tokens must be at least {length + tried}, as {what} has {length} "
                f"tokens{actions}, got {args.max_tokens}"
            )
        starts = trunk.position_ids[trunk.action_spans[:, 0]]
        deepest = int(starts.max()) + new_tokens if inspects else 0
        line = int(trunk.position_ids.max()) + 1
        check_fits(model, what, trunk.input_ids, max(line, deepest))
