"""Noise of training: what makes a model say something else in training mode than in evaluation.

A step's reward is a difference of two scores of the same tokens: now, and where the cycle began.
Dropped units, noisy embeddings, skipped layers or jittered routers would look like a change of the
policy. Rates that modules keep are set to 0; what still differs is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models import evaluation_mode, unwrapped
from ..models.support import probe_logps
from .methods import method_class

if TYPE_CHECKING:
    from .config import StepAgentConfig

_NAMES = ("drop", "jitter")  # in the names of rates: attention_dropout, layerdrop, jitter_noise
_TRIES = 4  # forwards in training mode: noise may spare one of them
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_HALF = 0.05

_logger = logging.getLogger(__name__)


def check_quiet(policy: nn.Module, args: StepAgentConfig) -> None:
    """Turn off the noise of a policy that is compared with itself, and say so.

    Supervised training (``method="sft"``, "dagger") compares nothing; its dropout stays.

    Raises:
        ValueError: where noise is left that cannot be turned off.
    """
    if not method_class(args.method, args.states).scores:
        return
    if off := silence(policy):
        _logger.warning(
            "method=%r compares the policy with itself, so its noise is off: %s",
            *(args.method, ", ".join(f"{name}={rate:g}" for name, rate in off.items())),
        )
    apart = _difference(policy)
    if not apart <= _TOLERANCE.get(unwrapped(policy).dtype, _TOLERANCE_HALF):
        raise ValueError(
            f"method={args.method!r} needs a policy without noise, but the log-probs of "
            f"{type(unwrapped(policy)).__name__} in training mode differ by {apart:.3g} from those "
            "in evaluation mode: turn off in its configuration what it does in training only "
            "(dropout, layer dropping, noise of routers or embeddings)"
        )


def silence(model: nn.Module) -> dict[str, float]:
    """Set every rate of dropout, layer dropping or jitter to 0; those that were not, by name."""
    off = {}
    for name, module in model.named_modules():
        for attribute, rate in _rates(module):
            off[f"{name}.{attribute}".removeprefix(".")] = rate
            setattr(module, attribute, type(rate)(0))
    return off


def _rates(module: nn.Module) -> Iterator[tuple[str, float]]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if module.p > 0:
            yield "p", module.p
        return
    for name, value in list(vars(module).items()):
        if isinstance(value, float) and value > 0 and any(word in name for word in _NAMES):
            yield name, value


@torch.no_grad()
def _difference(model: Any) -> float:
    """The largest change of a log-prob of a small tree from evaluation to training mode."""
    with evaluation_mode(model):
        quiet = probe_logps(model)
        model.train()  # evaluation_mode gives each module its mode back
        with torch.random.fork_rng():
            noisy = [probe_logps(model) for _ in range(_TRIES)]
    return max(float((logps - quiet).abs().max()) for logps in noisy)
