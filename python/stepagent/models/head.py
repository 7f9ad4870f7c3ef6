"""The language-model head, and what is computed with it inside the model's own forward.

Under FSDP2 the head's weights are whole only while the module that owns them runs, and
their gradients are reduced by hooks on what that module returns. So log-probs are computed in the
head's place: its ``forward`` is replaced for one call of the outermost module, and what was
computed is what the head and the model return, so that every wrapper's hooks see it.

A head that is one matrix goes through the fused op. Any other (with an adapter on it, quantised) is
run as the module that it is, on the scored rows alone and in slices.

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
from torch.utils.checkpoint import checkpoint

from ..ops import linear_logprobs, token_logprobs
from ..ops.head import full_precision
from .wrappers import text_config, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

# Logits of a head that is run as a module exist for this many at once: 64 MiB in float32.
_LOGITS = 2**24

# These divide the hidden rows by logits_scaling: what reaches the head is scaled already.
_SCALED_ROWS = frozenset({"minicpm3"})


@dataclass(frozen=True)
class LMHead:
    """The map from hidden rows to logits: ``softcap(hidden @ weight.T + bias) / logit_divisor``."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_divisor: float

    @property
    def device(self) -> torch.device:
        return self.weight_VH.device

    @property
    def vocab_size(self) -> int:
        return self.weight_VH.shape[0]

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
        return _scaled(logits_RV, self.softcap, self.logit_divisor)


@dataclass(frozen=True)
class ModuleHead:
    """A head that is more than one matrix: its module is run, and its gradients are its own.

    An adapter's is exact where its layers are float32. Others round their logits to their own
    dtype, as the model does itself.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    softcap: float | None
    logit_divisor: float
    device: torch.device
    vocab_size: int

    def logprobs(
        self, hidden_RH: Tensor, labels_N: Tensor, rows_N: Tensor, return_entropy: bool = False
    ) -> Any:
        """As `LMHead.logprobs`; a slice of logits exists at a time, in the backward too."""

        def score(hidden_nH: Tensor, labels_n: Tensor) -> Any:
            logits_nV = self.logits(hidden_nH)
            return token_logprobs(
                logits_nV,
                labels_n,
                return_entropy=return_entropy,  # type: ignore[call-overload]
            )

        rows = max(1, _LOGITS // self.vocab_size)
        hidden_NH = hidden_RH[rows_N]
        if not len(labels_N):  # a slice of nothing keeps the result connected
            return score(hidden_NH, labels_N)
        slices = zip(torch.split(hidden_NH, rows), torch.split(labels_N, rows), strict=True)
        if torch.is_grad_enabled():
            scored = [checkpoint(score, *each, use_reentrant=False) for each in slices]
        else:
            scored = [score(*each) for each in slices]
        if return_entropy:
            return tuple(torch.cat(parts) for parts in zip(*scored, strict=True))
        return torch.cat(scored)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """As `LMHead.logits`, and with gradients."""
        with full_precision(self.device):
            logits_RV = self.forward(hidden_RH.to(self._dtype(hidden_RH)))
        dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        return _scaled(logits_RV.to(dtype), self.softcap, self.logit_divisor)

    def _dtype(self, hidden_RH: Tensor) -> torch.dtype:
        """The head's own, which a norm or autocast may have left; integers stand for weights."""
        floating = [p.dtype for p in self.module.parameters() if p.is_floating_point()]
        return floating[0] if floating else hidden_RH.dtype


def _scaled(logits_RV: Tensor, softcap: float | None, divisor: float) -> Tensor:
    if softcap is not None:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    return logits_RV if divisor == 1 else logits_RV / divisor


def _product(hidden_RH: Tensor, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """``hidden @ weight.T``, rounded to ``dtype`` only."""
    # CUDA alone multiplies halves into float32; ROCm and the CPU would need a copy of the weight.
    halves = hidden_RH.dtype == weight_VH.dtype != dtype
    if halves and weight_VH.is_cuda and torch.version.hip is None:
        return torch.mm(hidden_RH, weight_VH.T, out_dtype=dtype)
    return hidden_RH.to(dtype) @ weight_VH.to(dtype).T


def lm_head(model: nn.Module) -> LMHead | ModuleHead:
    """The model's language-model head. Granite and Cohere scale their logits.

    Where its weights are sharded now (FSDP2, outside a forward), it has whole copies,
    gathered from all processes, each of which has to call this.

    Raises:
        ValueError: where the model has no language-model head.
    """
    module = check_head(model)
    return _head(model, module, module.forward)


def _head(
    model: nn.Module, module: Any, forward: Callable[[Tensor], Tensor]
) -> LMHead | ModuleHead:
    config = text_config(model)
    divisor = (getattr(config, "logits_scaling", None) or 1.0) / (
        getattr(config, "logit_scale", None) or 1.0
    )
    if config.model_type in _SCALED_ROWS:
        divisor = 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    if _is_one_matrix(module):
        bias_V = _whole(getattr(module, "bias", None))
        return LMHead(_whole(module.weight), bias_V, softcap, divisor)
    return ModuleHead(
        module=module,
        forward=_on_whole_weights(module, forward),
        softcap=softcap,
        logit_divisor=divisor,
        device=unwrapped(model).device,
        vocab_size=config.vocab_size,
    )


def _is_one_matrix(module: Any) -> bool:
    """Whether the weight, a plain tensor, is all there is to the head; else its module is run."""
    if type(module).__name__ == "ModulesToSaveWrapper":  # PEFT's; its weight is the active copy's
        if module.disable_adapters or not module.active_adapters:
            module = module.original_module
        else:
            module = module.modules_to_save[module.active_adapters[0]]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    # A subclass of Linear (GPT-Q's, bitsandbytes') or of Tensor (torchao's) does more.
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and (type(weight.data) is Tensor or hasattr(weight, "full_tensor"))


def _on_whole_weights(
    module: nn.Module, forward: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The module's forward, without its hooks; with gathered weights where they are sharded now."""
    named = dict(module.named_parameters())
    if not any(hasattr(parameter, "full_tensor") for parameter in named.values()):
        return forward
    whole = {f"module.{name}": _whole(parameter) for name, parameter in named.items()}
    called = _Called(module, forward)
    return lambda hidden_RH: torch.func.functional_call(called, whole, (hidden_RH,))


class _Called(nn.Module):
    """A module's forward as that of another, so that the module's own hooks do not run."""

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    def forward(self, hidden_RH: Tensor) -> Tensor:
        return self._forward(hidden_RH)


def compute_at_head(
    model: nn.Module, compute: Callable[[Tensor, LMHead | ModuleHead], Tensor], **inputs: Any
) -> Tensor:
    """``compute(hidden_BLH, head)`` in the place of the head, in one forward through ``model``.

    The call goes through the outermost module, so that the hooks of DDP and FSDP run; gradients to
    the head's weights and to the hidden states go their way.

    Args:
        compute: its one tensor is the result. Where there are several, they have to be joined: a
            hook of FSDP2's that waits for one of them would not run for the others.
        inputs: of the model's forward.

    Raises:
        ValueError: as `lm_head`; where the forward does not call the head once.
    """
    base, module = unwrapped(model), check_head(model)
    own_forward, head_own = base.forward, module.forward
    results: list[Tensor] = []

    def head_forward(hidden_BLH: Tensor) -> Tensor:
        # The head's own forward: it may call modules in itself, but not the replaced one.
        results.append(compute(hidden_BLH, _head(base, module, head_own)))
        return results[-1]

    def base_forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        own_forward(*args, **kwargs)  # what it makes of the result, as of logits, is nothing
        return results

    if getattr(text_config(model), "output_router_logits", False):
        # The model would balance its experts over what it takes for sequences: see routing.py.
        inputs["output_router_logits"] = False
    with _forward(module, head_forward), _forward(base, base_forward):
        model(**inputs)
    if len(results) != 1:
        raise ValueError(
            f"{type(base).__name__} must call its language-model head once in a forward, got "
            f"{len(results)} calls"
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
    """The head's module; errors are those of `lm_head`."""
    base = unwrapped(model)
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        raise ValueError(
            f"{type(base).__name__} is partitioned by DeepSpeed ZeRO-3, which stepagent does not "
            "support: use FSDP2, or ZeRO-2"
        )
    if head is None:
        raise ValueError(
            f"{type(base).__name__} must have a language-model head, as causal language models do"
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
