"""The fixed reference of a run: a model of its own, or the policy without its adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from ..engines.adapters import INITS_BESIDE_BASE
from ..models import check_tree_support, text_config, unwrapped

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)


def check_reference(ref_model: nn.Module | None, policy: nn.Module) -> None:
    """Refuse a reference of other words, or one that training would change.

    Raises:
        ValueError: naming what is wrong with it.
    """
    if ref_model is None:
        return
    if ref_model is policy:
        raise ValueError("ref_model must be another object than model, which training changes")
    mine, its = (text_config(model).vocab_size for model in (policy, ref_model))
    if mine != its:
        raise ValueError(f"ref_model must have the policy's vocabulary of {mine} tokens, got {its}")
    if not _is_base_of(ref_model, policy):
        _check_apart(ref_model, policy)
        check_tree_support(ref_model)
        return
    change = change_of_base(policy)
    if change is not None:
        raise ValueError(
            "ref_model must be what the policy is with its adapter off, or another model, got the "
            f"adapter's base: {change}. Give a copy from before, or its name"
        )
    _logger.info("the reference is the policy with its adapter off: one copy of the base in memory")


def _check_apart(ref_model: nn.Module, policy: nn.Module) -> None:
    """By the parameters themselves: a wrapper around the same layers is another object."""
    trained = {id(p): name for name, p in policy.named_parameters() if p.requires_grad}
    for name, parameter in ref_model.named_parameters():
        if id(parameter) in trained:
            raise ValueError(
                f"ref_model must have weights of its own, but its {name} is the policy's "
                f"{trained[id(parameter)]}, which training changes: give a copy, or None"
            )


def _is_base_of(ref_model: nn.Module, policy: nn.Module) -> bool:
    """Whether the policy is an adapter that was put into the layers of this reference.

    PEFT replaces layers in place, so the reference would run with the adapter too.
    """
    return has_adapter(policy) and unwrapped(policy) is ref_model


def has_adapter(policy: nn.Module) -> bool:
    """Whether it is a model of PEFT's, whose adapter can be turned off."""
    return hasattr(policy, "disable_adapter")


def change_of_base(policy: nn.Module) -> str | None:
    """Why a policy with its adapter off is not the model that the adapter was put into, if so."""
    base: Any = unwrapped(policy)
    if getattr(base, "_hf_peft_config_loaded", False):
        return "it had an adapter already, which is off with the new one"
    for config in cast("Any", policy).peft_config.values():
        init = getattr(config, "init_lora_weights", True)
        if init not in INITS_BESIDE_BASE:
            return f"init_lora_weights={init!r} changes the base weights"
    prefix = getattr(cast("Any", policy).base_model, "prefix", None)
    beside = (*(() if prefix is None else (prefix,)), "modules_to_save.", "trainable_tokens_")
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and not any(part in name for part in beside):
            return f"its own {name} is trained, adapter or not"
    return None


@contextmanager
def reference_of(ref_model: PreTrainedModel, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model that the reference's log-probs come from, inside the block.

    Where the policy's adapter lies in the reference's own layers: the policy, its adapter off.
    """
    if _is_base_of(ref_model, policy):
        with cast("Any", policy).disable_adapter():
            yield policy
    else:
        yield ref_model
