"""Values and gradients of a provider against the reference in float64.

The provider computes the whole problem. What is compared is a sample of 128 scored tokens, spread
from the first to the last: only they are given an upstream gradient, so that the gradient of a
weight is theirs alone and that of every other token must be 0, as must be the value of a token
whose label is -100. An op without labels is compared as a whole.

Allowed is twice the error of the reference itself in float32, its gradients rounded to the dtype of
the inputs, and some rounding. Of 16-bit inputs a GPU's tensor cores add the products in float32
too, but truncate: every logit errs to the same side, so that of a sum grows with its length and not
with its root. Rounding the logits to 16 bits is beyond it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepagent import reference

from .problems import Problem

SAMPLE = 128
SUM = 64  # tokens of a sum: a long action
# Relative to the largest value. float32: a few units in the last place.
ROUNDING = {torch.float32: 4e-7, torch.float16: 1e-5, torch.bfloat16: 1e-5}


@dataclass(frozen=True)
class Errors:
    value: float  # largest absolute error, nats
    sum64: float  # of a sum of 64 sampled tokens (or as many as there are), nats
    gradient: float  # ‖error‖ / ‖gradient‖, the largest of any input

    def within(self, allowed: "Errors") -> bool:
        pairs = zip(vars(self).values(), vars(allowed).values(), strict=True)
        return all(error <= limit for error, limit in pairs)  # NaN is not


@dataclass(frozen=True)
class _Answer:
    """Of the sample: values, and gradients of the problem's leaves."""

    values: Tensor
    gradients: dict[str, Tensor]


def truncates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are added by units that truncate."""
    return device.type == "cuda" and dtype != torch.float32


class Check:
    """The reference's answer to a problem, and how far others are from it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rows, self.masked = _sample(problem)
        kept = torch.zeros_like(problem.upstream).index_fill_(0, self.rows, 1.0)
        self.upstream = problem.upstream * kept
        self.truth = self._reference(torch.float64)
        self.allowed = self._allowance()

    def errors(self, call: Callable[..., Tensor]) -> Errors:
        """Of a provider's call.

        Raises:
            Exception: what the call raises.
        """
        values, gradients = run(self.problem, call, self.upstream)
        sampled = {name: self._sampled(name, gradient) for name, gradient in gradients.items()}
        errors = self._distance(_Answer(values[self.rows], sampled))
        stray_value = values[self.masked].abs().max().item() if len(self.masked) else 0.0
        stray_gradients = [self._elsewhere(name, g) for name, g in gradients.items()]
        return Errors(
            _worst(errors.value, stray_value),
            errors.sum64,
            _worst(errors.gradient, *stray_gradients),
        )

    def _distance(self, answer: _Answer) -> Errors:
        """From the truth."""
        error = answer.values.double() - self.truth.values
        sums = [chunk.sum().abs().item() for chunk in torch.split(error, SUM)]
        gradients = [
            _norm(answer.gradients[name].double() - true) / _norm(true)
            for name, true in self.truth.gradients.items()
        ]
        return Errors(error.abs().max().item(), _worst(*sums), _worst(*gradients))

    def _elsewhere(self, name: str, gradient: Tensor) -> float:
        """The gradient of tokens outside the sample, relative to that of the sample; overwrites."""
        if not self._by_token(name):
            return 0.0
        gradient[self.rows] = 0
        return _norm(gradient) / _norm(self.truth.gradients[name])

    def _reference(self, dtype: torch.dtype) -> _Answer:
        inputs = {name: self._sampled(name, x) for name, x in self.problem.inputs.items()}
        names = self.problem.op.leaves
        leaves = [inputs[name].to(dtype).detach().requires_grad_() for name in names]
        function = getattr(reference, self.problem.op.function)
        with torch.device(self.upstream.device):  # where the reference makes its zeros
            values = function(**{**inputs, **dict(zip(names, leaves, strict=True))}, dtype=dtype)
        gradients = torch.autograd.grad(values, leaves, self.upstream[self.rows].to(dtype))
        return _Answer(values.detach(), dict(zip(names, gradients, strict=True)))

    def _allowance(self) -> Errors:
        single = self._reference(torch.float32)
        rounded = {
            name: gradient.to(self.problem.inputs[name].dtype)
            for name, gradient in single.gradients.items()
        }
        baseline = self._distance(_Answer(single.values, rounded))
        rounding = ROUNDING[self.problem.shape.dtype]
        of_value = rounding * self.truth.values.abs().max().item()
        grows = SUM if truncates(self.upstream.device, self.problem.shape.dtype) else math.sqrt(SUM)
        return Errors(
            2 * baseline.value + of_value,
            2 * baseline.sum64 + grows * of_value,
            2 * baseline.gradient + 10 * rounding,
        )

    def _sampled(self, name: str, value: Any) -> Any:
        return value[self.rows] if self._by_token(name) else value

    def _by_token(self, name: str) -> bool:
        """Whether the sample picks entries of it: N… and R… have one a token, where labels say."""
        return "labels_N" in self.problem.inputs and name.rpartition("_")[2][0] in "NR"


def _sample(problem: Problem) -> tuple[Tensor, Tensor]:
    """Positions of the tokens that are compared, and of those whose label is -100."""
    labels_N = problem.inputs.get("labels_N")
    if labels_N is None:
        everything = torch.arange(len(problem.upstream), device=problem.upstream.device)
        return everything, everything[:0]
    scored_n = (labels_N != -100).nonzero().squeeze(1)
    spread = torch.linspace(0, len(scored_n) - 1, min(SAMPLE, len(scored_n)))
    rows = scored_n[spread.round().long().to(scored_n.device)]
    return rows, (labels_N == -100).nonzero().squeeze(1)


def _norm(tensor: Tensor) -> float:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=dtype))


def _worst(*errors: float) -> float:
    """The largest; NaN where there is one, which `max` may pass over."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def run(
    problem: Problem, call: Callable[..., Tensor], upstream: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward: the values, and the gradients of the problem's leaves."""
    leaves = fresh_leaves(problem)
    values = call(**{**problem.inputs, **leaves})
    gradients = torch.autograd.grad(values, list(leaves.values()), upstream.to(values.dtype))
    return values.detach(), dict(zip(leaves, gradients, strict=True))


def fresh_leaves(problem: Problem) -> dict[str, Tensor]:
    """The inputs that get a gradient, on the same memory, without a history."""
    return {name: problem.inputs[name].detach().requires_grad_() for name in problem.op.leaves}
