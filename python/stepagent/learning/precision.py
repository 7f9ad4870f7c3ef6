"""In which dtype weights are kept and updated, and whether an update can move them at all.

Products are in bfloat16 or float16 where ``bf16`` or ``fp16`` ask for it (autocast). The weights
that are updated are float32, in which the small steps of a fine-tuning add up. In bfloat16 a weight
of 0.02 has its neighbours 1.2e-4 away: a step of 1e-6 leaves it where it is.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import text_config

if TYPE_CHECKING:
    from peft import PeftConfig

    from .config import StepAgentConfig

_SAMPLE = 4096  # weights of a parameter that are looked at
_STUCK = 0.5  # the share of weights that may not move before it is said
# Optimisers whose step of a weight is about the learning rate, whatever the gradient.
_STEP_IS_RATE = ("adam", "lion", "ademamix")

_logger = logging.getLogger(__name__)


def loading_dtype(
    args: StepAgentConfig, peft_config: PeftConfig | None, *, trained: bool = True
) -> torch.dtype | str:
    """The dtype in which a model that is given by name is loaded; "auto": the checkpoint's.

    Weights that stay as they are (under an adapter, a reference's) keep the checkpoint's dtype
    where autocast would round them to halves for every product anyhow.
    """
    if args.model_dtype != "float32":
        return "auto" if args.model_dtype == "checkpoint" else getattr(torch, args.model_dtype)
    adapted = peft_config is not None and not getattr(peft_config, "modules_to_save", None)
    frozen = adapted or not trained
    return "auto" if frozen and (args.bf16 or args.fp16) else torch.float32


def say_precision(model: nn.Module, args: StepAgentConfig) -> None:
    """Log the dtypes of a run; warn where the learning rate is below what weights can move by."""
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    halves = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    _logger.info(
        "%s: trained weights are %s, products are %s",
        getattr(text_config(model), "name_or_path", "") or type(model).__name__,
        _names(trained) or "none",
        f"{halves} (autocast)" if halves else "in the weights' dtype",
    )
    if not any(kind in str(args.optim).lower() for kind in _STEP_IS_RATE):
        return
    stuck = share_stuck(trained, args.learning_rate)
    if args.learning_rate > 0 and stuck > _STUCK:
        _logger.warning(
            "learning_rate=%g cannot move %.1f %% of the trained weights: they are %s, whose "
            "values lie further apart than that. Train float32 weights: give the model by name, or "
            "model.float(), and bf16=True for products in bfloat16",
            *(args.learning_rate, 100 * stuck, _names(trained)),
        )


@torch.no_grad()
def share_stuck(parameters: list[Any], step: float) -> float:
    """The share of weights that a step of this size, rounded to their dtype, leaves as they are."""
    stuck = total = 0.0
    for parameter in parameters:
        weights = _some(parameter)
        moved = (weights.double().abs() + step).to(weights.dtype) != weights.abs()
        stuck += parameter.numel() * float((~moved).double().mean()) if len(weights) else 0.0
        total += parameter.numel()
    return stuck / total if total else 0.0


def _some(parameter: Tensor) -> Tensor:
    """A few weights, spread over all of them."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // _SAMPLE)]


def _names(parameters: list[Any]) -> str:
    return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
