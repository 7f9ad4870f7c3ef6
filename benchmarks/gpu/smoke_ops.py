"""Ops of stepagent against the reference in float64 on the same device: values and gradients.

Allowed is twice the error of the reference itself in float32 from the same inputs, and some
rounding: tensor cores add the products of halves in float32 too, but truncate. Gradients are
compared by ‖error‖ / ‖gradient‖; those of halves may be off by what rounding a factor of a product
to bfloat16 costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lines import Findings, Skip
from torch import Tensor

import stepagent
from stepagent import reference

LOGIT_SCALE = 3.0
# Of a value, relative to the largest; of a gradient, relative to its norm.
VALUE_ROUNDING = {torch.float32: 4e-7, torch.float16: 1e-5, torch.bfloat16: 1e-5}
GRADIENT_ROUNDING = {torch.float32: 4e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2}
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    N: int
    V: int
    H: int
    dtype: torch.dtype

    def params(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Sizes:
    """What is tried; `TINY` is for a dry run on a CPU."""

    N: tuple[int, int, int] = (1, 127, 1000)
    V: tuple[int, int, int] = (1000, 50257, 128256)
    H: tuple[int, int, int] = (64, 1000, 4096)
    beyond: int = 2**31 + 2**20  # elements of a tensor whose offsets need 64 bits

    def covering(self) -> list[Shape]:
        """Nine shapes in which every pair of N, V, H and dtype occurs (an orthogonal array)."""
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        return [
            Shape(self.N[b], self.V[(a + b) % 3], self.H[(a + 2 * b) % 3], dtypes[a])
            for a in range(3)
            for b in range(3)
        ]

    def middle(self, dtype: torch.dtype = torch.bfloat16) -> Shape:
        return Shape(self.N[1], self.V[1], self.H[1], dtype)

    def largest(self, dtype: torch.dtype = torch.bfloat16) -> Shape:
        return Shape(self.N[2], self.V[2], self.H[2], dtype)


TINY = Sizes(N=(1, 7, 16), V=(40, 129, 300), H=(8, 33, 64), beyond=2**12)

# ------------------------------------------------------------------ comparing


class Truth:
    """What the reference says, in float64, and how far from it an op may be."""

    def __init__(self, function: str, arguments: dict[str, Any], leaves: list[str]) -> None:
        """`function` is a name of `stepagent` and of `stepagent.reference`; `leaves` get a
        gradient."""
        self.function, self.arguments, self.leaves = function, arguments, leaves
        self.upstreams: list[Tensor] = []
        self.results = self._reference(torch.float64)
        self.allowed = self._allowance()

    def judge(self, call: Callable[..., Any] | None = None, **options: Any) -> Findings:
        """Of the op, or of what computes it in its place; `options` are not the reference's."""
        call = call or getattr(stepagent, self.function)
        results = run(call, {**self.arguments, **options}, self.leaves, self.upstreams)
        return self.findings(results)

    def findings(self, results: list[Tensor]) -> Findings:
        findings = Findings()
        for name, error in self._errors(results).items():
            findings.add(name, error, self.allowed[name])
        return findings

    def _errors(self, results: list[Tensor]) -> dict[str, float]:
        """The largest of a value, ‖error‖ / ‖gradient‖ of a gradient."""
        outputs, errors = len(self.upstreams), {}
        for i, (result, true) in enumerate(zip(results, self.results, strict=True)):
            error = result.double() - true
            if i < outputs:
                errors[f"value{i}" if i else "value"] = largest(error)
            else:
                floor = torch.finfo(torch.float32).tiny
                errors[f"d_{self.leaves[i - outputs]}"] = norm(error) / max(norm(true), floor)
        return errors

    def _allowance(self) -> dict[str, float]:
        dtype = self.arguments[self.leaves[0]].dtype
        errors = self._errors(self._reference(torch.float32))
        rounding = dict.fromkeys(errors, GRADIENT_ROUNDING[dtype])
        for i in range(len(self.upstreams)):
            name = f"value{i}" if i else "value"
            rounding[name] = VALUE_ROUNDING[dtype] * max(largest(self.results[i]), self._terms())
        return {name: 2 * error + rounding[name] for name, error in errors.items()}

    def _terms(self) -> float:
        """So large are the log-probs of which a small difference is made."""
        heads = (self.arguments.get(name) for name in ("weight_VH", "logits_NV"))
        sizes = [head.shape[i] for i, head in enumerate(heads) if head is not None]
        return 2 * math.log(sizes[0]) if "diff" in self.function else 0.0

    def _reference(self, dtype: torch.dtype) -> list[Tensor]:
        cast = {name: self.arguments[name].detach().to(dtype) for name in self.leaves}
        given = {**self.arguments, **cast, "dtype": dtype}
        with torch.device(cast[self.leaves[0]].device):  # where the reference makes its zeros
            return run(getattr(reference, self.function), given, self.leaves, self.upstreams)


def run(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    leaves: list[str],
    upstreams: list[Tensor],
) -> list[Tensor]:
    """Outputs, then gradients of the leaves. `upstreams` of the outputs are drawn where empty."""
    fresh = {name: arguments[name].detach().requires_grad_() for name in leaves}
    outputs = function(**{**arguments, **fresh})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not upstreams:
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        upstreams += [
            torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float64)
            for o in outputs
        ]
    given = [u.to(o.dtype) for u, o in zip(upstreams, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(fresh.values()), given) if leaves else ()
    return [*(o.detach() for o in outputs), *gradients]


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


# ------------------------------------------------------------------ inputs

# What an argument may be besides plain: each is tried alone, then together.
FEATURES = (
    "rows",
    "strided labels",
    "strided bias",
    "expanded bias",
    "strided hidden",
    "strided weight",
    "offset weight",
    "softcap",
    "temperature",
    "entropy",
    "frozen",
    "frozen rows",
    "kept",
)
EVERYTHING = frozenset(
    {"rows", "strided labels", "strided bias", "softcap", "temperature", "entropy", "kept"}
)
FROZEN = frozenset({"rows", "strided labels", "expanded bias", "temperature", "frozen"})


class Draw:
    """Random inputs on a device, the same for the same seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        options = {"generator": self.generator, "device": self.device}
        return torch.randn(*size, dtype=dtype, **options).mul_(scale)

    def integers(self, high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=self.generator, device=self.device)

    def labels(self, N: int, V: int) -> Tensor:
        """One in nine, never the first, is -100."""
        labels_N = self.integers(V, N)
        labels_N[1::9] = -100
        return labels_N

    def temperature(self, N: int) -> Tensor:
        return 0.5 + torch.rand(N, generator=self.generator, device=self.device)

    def weight(self, shape: Shape) -> Tensor:
        """Such that logits of standard normal hidden rows have a deviation of LOGIT_SCALE."""
        scale = LOGIT_SCALE / shape.H**0.5
        return self.normal(shape.V, shape.H, dtype=shape.dtype, scale=scale)


def every_second(tensor: Tensor) -> Tensor:
    """The same values with a stride of 2 in the last dimension; between them others that are valid,
    so that reading them gives a wrong result and not a fault."""
    return torch.stack([tensor, tensor.roll(1, -1)], dim=-1)[..., 0]


def linear_arguments(
    shape: Shape, features: frozenset[str], draw: Draw
) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Arguments of `linear_logprobs`, those that get a gradient, and options of the op alone."""
    N, V, H, dtype = shape.N, shape.V, shape.H, shape.dtype
    rows = bool(features & {"rows", "frozen rows"})
    hidden_RH = draw.normal(N // 2 + 2 if rows else N, H, dtype=dtype)
    weight_VH = draw.weight(shape)
    if "strided hidden" in features:
        hidden_RH = every_second(hidden_RH)
    if "strided weight" in features:
        weight_VH = every_second(weight_VH)
    if "offset weight" in features:
        weight_VH = torch.cat([weight_VH[:1], weight_VH])[1:]
    labels_N = draw.labels(N, V)
    arguments: dict[str, Any] = {
        "hidden_RH": hidden_RH,
        "weight_VH": weight_VH,
        "labels_N": every_second(labels_N) if "strided labels" in features else labels_N,
    }
    leaves = ["hidden_RH"] if features & {"frozen", "frozen rows"} else ["hidden_RH", "weight_VH"]
    if rows:  # they repeat, and the last is named by no label
        arguments["rows_N"] = draw.integers(len(hidden_RH) - 1, N)
    if features & {"strided bias", "expanded bias"}:
        wide = "expanded bias" in features
        bias_V = draw.normal(1 if wide else V, dtype=dtype)
        arguments["bias_V"] = bias_V.expand(V) if wide else every_second(bias_V)
        leaves += [] if "frozen" in features else ["bias_V"]
    if "softcap" in features:
        arguments["softcap"] = 5.0
    if "temperature" in features:
        arguments["temperature"] = draw.temperature(N)
    if "entropy" in features:
        arguments["return_entropy"] = True
    # Room for a third of the logits: some are kept, some are computed again.
    options = {"keep_bytes": 4 * N * V // 3} if "kept" in features else {}
    return arguments, leaves, options


# ------------------------------------------------------------------ cases


def linear(shape: Shape, features: frozenset[str], device: torch.device, **more: Any) -> Findings:
    arguments, leaves, options = linear_arguments(shape, features, Draw(device))
    return Truth("linear_logprobs", arguments, leaves).judge(**options, **more)


def linear_diff(shape: Shape, features: frozenset[str], device: torch.device) -> Findings:
    """With a reference of its own rows, and where `shared head` is asked for of the same head."""
    draw = Draw(device)
    arguments, leaves, options = linear_arguments(shape, features - {"entropy"}, draw)
    shared = "shared head" in features
    hidden_RH = arguments["hidden_RH"]
    noise_RH = draw.normal(*hidden_RH.shape, dtype=shape.dtype, scale=0.3)
    arguments |= {
        "ref_hidden_RH": hidden_RH + noise_RH,
        "ref_weight_VH": arguments["weight_VH"] if shared else draw.weight(shape),
    }
    if "rows_N" in arguments:
        arguments["ref_rows_N"] = arguments["rows_N"].flip(0)
    if "bias_V" in arguments:
        bias_V = arguments["bias_V"]
        arguments["ref_bias_V"] = bias_V if shared else every_second(bias_V.flip(0))
    return Truth("linear_logprob_diff", arguments, leaves).judge(**options)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda logits_NV: logits_NV,
    "strided": every_second,
    "offset": lambda logits_NV: torch.cat([logits_NV[:, :1], logits_NV], dim=1)[:, 1:],
    "transposed": lambda logits_NV: logits_NV.T.contiguous().T,
    "expanded": lambda logits_NV: logits_NV[:1].expand(logits_NV.shape),
}


def token_logprobs(shape: Shape, layout: str, device: torch.device) -> Findings:
    draw = Draw(device)
    logits_NV = draw.normal(shape.N, shape.V, dtype=shape.dtype, scale=LOGIT_SCALE)
    labels_N = every_second(draw.labels(shape.N, shape.V))
    logits_NV[:, 3] = -torch.inf  # a forbidden token
    arguments = {
        "logits_NV": LAYOUTS[layout](logits_NV),
        "labels_N": torch.where(labels_N == 3, 4, labels_N),
        "temperature": every_second(draw.temperature(shape.N)),
    }
    findings = Truth("token_logprobs", arguments, ["logits_NV"]).judge()
    with_entropy = {**arguments, "return_entropy": True}
    findings.join(Truth("token_logprobs", with_entropy, ["logits_NV"]).judge(), "entropy:")
    return findings


def logprob_diff(shape: Shape, layout: str, device: torch.device) -> Findings:
    draw = Draw(device)
    logits_NV, noise_NV = (draw.normal(shape.N, shape.V, dtype=shape.dtype) for _ in range(2))
    logits_NV *= LOGIT_SCALE
    arguments = {
        "logits_NV": LAYOUTS[layout](logits_NV),
        "ref_logits_NV": LAYOUTS[layout](logits_NV + 0.3 * noise_NV),
        "labels_N": draw.labels(shape.N, shape.V),
        "temperature": draw.temperature(shape.N),
    }
    return Truth("logprob_diff", arguments, ["logits_NV"]).judge()


def batch_invariance(shape: Shape, features: frozenset[str], device: torch.device) -> Findings:
    """The one-kernel forward as it is shipped: right, and the same bits in any batch."""
    if device.type == "cpu":
        raise Skip("batch_invariant runs on a GPU only")
    findings = linear(shape, features, device, batch_invariant=True)
    arguments, _, _ = linear_arguments(shape, features, Draw(device))
    whole = _rows_of(arguments, slice(None))
    order = torch.randperm(shape.N, device=device)
    few = order[: max(shape.N // 8, 1)]
    for name, picked in {"permuted": order, "subset": few, "alone": order[:1]}.items():
        same = all(
            torch.equal(a[picked], b)
            for a, b in zip(whole, _rows_of(arguments, picked), strict=True)
        )
        findings.require(f"same bits, {name}", same)
    return findings


def _rows_of(arguments: dict[str, Any], picked: Any) -> tuple[Tensor, ...]:
    per_token = ("labels_N", "rows_N", "temperature")
    given = {k: v[picked] if k in per_token else v for k, v in arguments.items()}
    if "rows_N" not in arguments:
        given["hidden_RH"] = arguments["hidden_RH"][picked]
    results = stepagent.linear_logprobs(**given, batch_invariant=True)
    return results if isinstance(results, tuple) else (results,)


def steps(device: torch.device, dtype: torch.dtype) -> Findings:
    """The four ops on steps, a third of which are empty, against the reference on the CPU."""
    draw, N, S = Draw(device), 10_000, 300
    ends = draw.integers(N + 1, S - 1).sort().values
    step_offsets = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([N])])
    step_offsets[1::3] = step_offsets[:-1:3]
    logps_N, ref_logps_N = (every_second(-draw.temperature(N).to(dtype)) for _ in range(2))
    scored = {"logps_N": logps_N, "ref_logps_N": ref_logps_N, "step_offsets": step_offsets}
    pairs = {f"{who}_steps_P": draw.integers(S, 100) for who in ("expert", "agent")}
    findings = Findings()
    for name, arguments, leaves in (
        ("step_sums", {"values_N": logps_N, "step_offsets": step_offsets}, ["values_N"]),
        ("step_rewards", {**scored, "beta": 0.1}, ["logps_N"]),
        ("step_pair_loss", {**scored, **pairs, "beta": 0.1}, ["logps_N"]),
    ):
        findings.join(_close_on_cpu(name, arguments, leaves), name)
    rewards_S, values_S = (draw.normal(S, dtype=dtype) for _ in range(2))
    trajectories = torch.tensor([0, 0, 1, S // 2, S], device=device)
    gae = {
        "rewards_S": every_second(rewards_S),
        "values_S": every_second(values_S),
        "trajectory_offsets": trajectories,
        "bootstrap_values": draw.normal(len(trajectories) - 1),
        "gamma": 0.95,
        "lam": 0.9,
    }
    findings.join(_close_on_cpu("step_gae", gae, []), "step_gae")
    return findings


def _close_on_cpu(name: str, arguments: dict[str, Any], leaves: list[str]) -> Findings:
    """An op that adds in float64: what is allowed is the rounding of its results."""
    at_home = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    upstreams: list[Tensor] = []
    actual = run(getattr(stepagent, name), arguments, leaves, upstreams)
    truth = run(getattr(reference, name), at_home, leaves, [u.cpu() for u in upstreams])
    findings = Findings()
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        eps = torch.finfo(a.dtype).eps
        findings.add(str(i), largest(a.cpu().double() - t), 4 * eps * largest(t))
    return findings
