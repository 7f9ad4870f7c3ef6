"""What is benched: ops, shapes, and the inputs of an op at a shape.

Inputs are random: logits of standard deviation 3, labels uniform, a share of them -100 where a
shape says so. Their names end in the letters of their dimensions, as everywhere; a name that ends
in N…, R… or S… has one entry a token, row or step.

Dimensions: N tokens, of which n have a label to score, H hidden size, V vocabulary, S steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Suite: TypeAlias = Literal["tiny", "cpu", "gpu"]
LOGIT_SCALE = 3.0
STEP_TOKENS = 16
BETA = 0.1


@dataclass(frozen=True)
class Shape:
    N: int
    H: int
    V: int
    dtype: torch.dtype
    scored: float = 1.0  # share of the labels that are not -100

    @property
    def n(self) -> int:
        return max(int(self.N * self.scored), 1)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        share = "" if self.scored == 1.0 else f", {self.scored:.0%} scored"
        return f"N={self.N} H={self.H} V={self.V} {dtype}{share}"


# gpu: the heads of Llama 3 8B and of Qwen2.5 7B; and a batch of an agent's, who mostly observes.
SUITES: dict[Suite, list[Shape]] = {
    "tiny": [
        Shape(N=96, H=32, V=500, dtype=torch.float32),
        Shape(N=960, H=32, V=500, dtype=torch.float32, scored=0.1),
    ],
    "cpu": [
        Shape(N=2048, H=1024, V=32768, dtype=torch.float32),
        Shape(N=2048, H=1024, V=32768, dtype=torch.float32, scored=0.1),
    ],
    "gpu": [
        Shape(N=8192, H=4096, V=128256, dtype=torch.bfloat16),
        Shape(N=8192, H=3584, V=152064, dtype=torch.bfloat16),
        Shape(N=32768, H=4096, V=128256, dtype=torch.bfloat16, scored=0.1),
        Shape(N=32768, H=4096, V=128256, dtype=torch.bfloat16),
        Shape(N=32768, H=3584, V=152064, dtype=torch.bfloat16),
    ],
}


@dataclass(frozen=True)
class Op:
    """A function of stepagent and of its reference, what it is given, and what bounds it."""

    function: str
    leaves: tuple[str, ...]  # the inputs that get a gradient
    make: Callable[[Shape, torch.Generator], dict[str, Any]]
    unit: Literal["FLOP", "byte"]  # of what bounds it
    count: Callable[[Shape], tuple[int, int]]  # the least units of a forward and of a backward
    has_labels: bool = True


@dataclass(frozen=True)
class Problem:
    """An op and its inputs at a shape."""

    name: str
    op: Op
    shape: Shape
    inputs: dict[str, Any]
    upstream: Tensor  # gradient of the op's output


def make_problem(name: str, shape: Shape, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    op = OPS[name]
    inputs = op.make(shape, generator)
    outputs = len(inputs["step_offsets"]) - 1 if "step_offsets" in inputs else shape.N
    upstream = torch.randn(outputs, generator=generator, device=device)
    return Problem(name, op, shape, inputs, upstream)


def _randn(*size: int, scale: float = 1.0, shape: Shape, generator: torch.Generator) -> Tensor:
    device = generator.device
    return torch.randn(*size, generator=generator, device=device, dtype=shape.dtype).mul_(scale)


def _labels(shape: Shape, generator: torch.Generator) -> Tensor:
    device = generator.device
    labels_N = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
    masked = torch.randperm(shape.N, generator=generator, device=device)[shape.n :]
    labels_N[masked] = -100
    return labels_N


def _logits(shape: Shape, generator: torch.Generator) -> Tensor:
    return _randn(shape.N, shape.V, scale=LOGIT_SCALE, shape=shape, generator=generator)


def _head(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    scale = LOGIT_SCALE / shape.H**0.5
    return {
        "hidden_RH": _randn(shape.N, shape.H, shape=shape, generator=generator),
        "weight_VH": _randn(shape.V, shape.H, scale=scale, shape=shape, generator=generator),
    }


def _token_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    return {"logits_NV": _logits(shape, generator), "labels_N": _labels(shape, generator)}


def _diff_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    inputs = _token_inputs(shape, generator)
    noise_NV = _randn(shape.N, shape.V, scale=0.1, shape=shape, generator=generator)
    return {**inputs, "ref_logits_NV": noise_NV.add_(inputs["logits_NV"])}


def _linear_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    return {**_head(shape, generator), "labels_N": _labels(shape, generator)}


def _linear_diff_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    reference = {f"ref_{name}": tensor for name, tensor in _head(shape, generator).items()}
    return {**_linear_inputs(shape, generator), **reference}


def _step_inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    logps_N = -torch.rand(shape.N, generator=generator, device=generator.device)
    ends = torch.arange(0, shape.N, STEP_TOKENS, device=generator.device)
    return {
        "logps_N": logps_N,
        "ref_logps_N": logps_N.roll(1),
        "step_offsets": torch.cat([ends, ends.new_tensor([shape.N])]),
        "beta": BETA,
    }


def product(shape: Shape) -> int:
    """FLOP of the scored rows times a head; as many for the gradient of either."""
    return 2 * shape.n * shape.H * shape.V


def _token_bytes(shape: Shape) -> tuple[int, int]:
    """The backward reads the scored rows of logits and writes a gradient of all."""
    row = shape.V * shape.dtype.itemsize
    return shape.n * row, (shape.n + shape.N) * row


def _diff_bytes(shape: Shape) -> tuple[int, int]:
    forward, backward = _token_bytes(shape)
    return 2 * forward, backward


def _step_bytes(shape: Shape) -> tuple[int, int]:
    steps = -(-shape.N // STEP_TOKENS)
    return 4 * (2 * shape.N + steps), 4 * (shape.N + steps)


OPS = {
    "token_logprobs": Op("token_logprobs", ("logits_NV",), _token_inputs, "byte", _token_bytes),
    "logprob_diff": Op("logprob_diff", ("logits_NV",), _diff_inputs, "byte", _diff_bytes),
    "linear_logprobs": Op(
        "linear_logprobs",
        ("hidden_RH", "weight_VH"),
        _linear_inputs,
        "FLOP",
        lambda shape: (product(shape), 2 * product(shape)),
    ),
    "linear_logprobs_frozen": Op(
        "linear_logprobs",
        ("hidden_RH",),
        _linear_inputs,
        "FLOP",
        lambda shape: (product(shape), product(shape)),
    ),
    "step_rewards": Op(
        "step_rewards", ("logps_N",), _step_inputs, "byte", _step_bytes, has_labels=False
    ),
    "linear_logprob_diff": Op(
        "linear_logprob_diff",
        ("hidden_RH", "weight_VH"),
        _linear_diff_inputs,
        "FLOP",
        lambda shape: (2 * product(shape), 2 * product(shape)),
    ),
}
