"""The auxiliary loss of mixtures of experts: how evenly the tokens of trees are routed.

transformers computes it in the model's forward, from an attention mask that says which tokens are
padding. A tree's mask says who sees whom, so it is computed here, by the model's own function.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import lay_out
from .wrappers import text_config, unwrapped

if TYPE_CHECKING:
    from ..trees.tree import TokenTree

_LOSS = "load_balancing_loss_func"


class Routing:
    """What the routers of a model said in one forward."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.logits: list[Tensor] = []

    def loss(self, trees: Sequence[TokenTree]) -> Tensor:
        """The load-balancing loss over the tokens of the trees that were scored, each once."""
        config: Any = text_config(self._model)
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        batch = lay_out(self._model, trees)
        real = torch.zeros(len(batch.rows), len(batch.rows[0].input_ids))
        for places in batch.places:
            real.view(-1)[torch.from_numpy(places)] = 1
        balance = getattr(_module(self._model), _LOSS)
        loss: Tensor = balance(
            tuple(self.logits), experts, config.num_experts_per_tok, real.to(self.logits[0].device)
        )
        return loss


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[Routing | None]:
    """Around one forward: its routing, or None where the model asks for no auxiliary loss.

    Raises:
        ValueError: where ``output_router_logits`` asks for it and the model does not say how.
    """
    if not auxiliary_weight(model):
        yield None
        return
    routing = Routing(model)
    recorder = _recorder(model)

    def record(_: nn.Module, __: Any, output: Any) -> None:
        logits = output[recorder.index] if isinstance(output, tuple) else output
        routing.logits.append(logits.flatten(0, -2))

    routers = [m for m in unwrapped(model).modules() if isinstance(m, recorder.target_class)]
    handles = [router.register_forward_hook(record) for router in routers]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def auxiliary_weight(model: nn.Module) -> float:
    """The weight of the auxiliary loss, 0 where the configuration asks for none."""
    config = text_config(model)
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def _module(model: nn.Module) -> Any:
    return sys.modules[type(unwrapped(model)).__module__]


def _recorder(model: nn.Module) -> Any:
    base = unwrapped(model)
    for part in base.modules():
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if hasattr(recorder, "target_class") and hasattr(_module(model), _LOSS):
            return recorder
    raise ValueError(
        f"output_router_logits is set, but {type(base).__name__} does not say how its experts are "
        "balanced: set model.config.output_router_logits = False to train without that loss"
    )
