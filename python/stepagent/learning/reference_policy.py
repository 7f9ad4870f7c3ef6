"""The fixed reference of a run: a model of its own, or the policy without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from ..models import check_tree_support, text_config, unwrapped

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


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
    return unwrapped(policy) is ref_model and hasattr(policy, "disable_adapter")


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
