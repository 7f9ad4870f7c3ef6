"""The language-model head, and what is computed with it inside the model's own forward.

Under FSDP2 the head's weight is whole only while the module that owns it runs, and its gradient is
reduced by hooks on what that module returns. So log-probs are computed in the head's place: its
``forward`` is replaced for one call of the outermost module, and what was computed is what the head
and the model return, so that every wrapper's hooks see it.

Key: B rows of a batch, L tokens of a row, R = B·L hidden rows, H hidden, V vocabulary, N scored
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import linear_logprobs
from ..ops.head import full_precision
from .wrappers import text_config, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class LMHead:
    """The map from hidden rows to logits: ``softcap(hidden @ weight.T + bias) / logit_divisor``."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_divisor: float

    def logprobs(
        self, hidden_RH: Tensor, labels_N: Tensor, rows_N: Tensor, return_entropy: bool = False
    ) -> Any:
        """Log-probs (N,) of ``labels_N`` predicted by ``hidden_RH[rows_N]``: fp32, or float64.

        With ``return_entropy`` also the entropies (N,) of what the labels are drawn from.
        """
        return linear_logprobs(
            hidden_RH.to(self.weight_VH.dtype),  # a norm may have left it in another one
            self.weight_VH,
            labels_N,
            rows_N=rows_N,
            bias_V=self.bias_V,
            temperature=self.logit_divisor,
            softcap=self.softcap,
            return_entropy=return_entropy,  # type: ignore[call-overload]
        )

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits (R, V), fp32 or float64, for sampling from a few rows."""
        dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        with full_precision(self.weight_VH.device):
            logits_RV = _product(hidden_RH, self.weight_VH, dtype)
        if self.bias_V is not None:
            logits_RV += self.bias_V
        if self.softcap is not None:
            logits_RV = self.softcap * torch.tanh(logits_RV / self.softcap)
        return logits_RV if self.logit_divisor == 1 else logits_RV / self.logit_divisor


def _product(hidden_RH: Tensor, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """``hidden @ weight.T``, rounded to ``dtype`` only."""
    # CUDA alone multiplies halves into float32; ROCm and the CPU would need a copy of the weight.
    halves = hidden_RH.dtype == weight_VH.dtype != dtype
    if halves and weight_VH.is_cuda and torch.version.hip is None:
        return torch.mm(hidden_RH, weight_VH.T, out_dtype=dtype)
    return hidden_RH.to(dtype) @ weight_VH.to(dtype).T


def lm_head(model: nn.Module) -> LMHead:
    """The model's language-model head. Granite and Cohere scale their logits.

    Where the weight is sharded now (FSDP2, outside a forward), it is a whole copy, gathered from
    all processes, each of which has to call this.

    Raises:
        ValueError: where the model has no head, or one whose weight is not all there is to it: with
            an adapter on it, quantised, or partitioned by DeepSpeed ZeRO-3.
    """
    config, module = text_config(model), check_head(model)
    return LMHead(
        weight_VH=_whole(module.weight),
        bias_V=_whole(getattr(module, "bias", None)),
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_divisor=(getattr(config, "logits_scaling", None) or 1.0)
        / (getattr(config, "logit_scale", None) or 1.0),
    )


def compute_at_head(
    model: nn.Module, compute: Callable[[Tensor, LMHead], Tensor], **inputs: Any
) -> Tensor:
    """``compute(hidden_BLH, head)`` in the place of the head, in one forward through ``model``.

    The call goes through the outermost module, so that the hooks of DDP and FSDP run; gradients to
    the head's weight and to the hidden states go their way.

    Args:
        compute: its one tensor is the result. Where there are several, they have to be joined: a
            hook of FSDP2's that waits for one of them would not run for the others.
        inputs: of the model's forward.

    Raises:
        ValueError: as :func:`lm_head`; where the forward does not call the head once.
    """
    base, module = unwrapped(model), check_head(model)
    own_forward = base.forward
    results: list[Tensor] = []

    def head_forward(hidden_BLH: Tensor) -> Tensor:
        results.append(compute(hidden_BLH, lm_head(base)))
        return results[-1]

    def base_forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        own_forward(*args, **kwargs)  # what it makes of the result, as of logits, is nothing
        return results

    with _forward(module, head_forward), _forward(base, base_forward):
        model(**inputs)
    if len(results) != 1:
        raise ValueError(
            f"{type(base).__name__} calls its language-model head {len(results)} times in a "
            "forward; it must be once"
        )
    # Not what the call returned: FSDP2 rounds that to the dtype of its mixed precision.
    return results[0]


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The hidden states (B, L, H) that the head is given in one forward through ``model``."""
    return compute_at_head(model, lambda hidden_BLH, _: hidden_BLH, **inputs)


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module's ``forward`` replaced inside the block; its hooks run all the same."""
    own = vars(module).get("forward")  # accelerate puts one there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def check_head(model: nn.Module) -> Any:
    """The head's module; errors are those of :func:`lm_head`."""
    base = unwrapped(model)
    name = type(base).__name__
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    if weight is None:
        raise ValueError(
            f"{name} has no linear language-model head; stepagent scores causal language models"
        )
    kind = type(head)
    if kind.__module__.startswith("peft.") and kind.__name__ != "ModulesToSaveWrapper":
        raise ValueError(
            f"the language-model head of {name} has an adapter on it ({kind.__name__}), which "
            "scoring would leave out: take it from the adapter's target_modules, and where it "
            'shall be trained, name it in modules_to_save=["lm_head"]'
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"the language-model head of {name} is quantised ({kind.__name__}, {weight.dtype}): "
            "load the model with its head in floating point"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3, which stepagent does not support: "
            "use FSDP2, or ZeRO-2"
        )
    return head


def _whole(weight: Any) -> Any:
    """A weight that is still a DTensor, in one piece.

    Each process has its own data, so the gradient is the mean of theirs; ``full_tensor()`` alone
    takes their gradients for equal ones, and lets each keep a part of its own.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
