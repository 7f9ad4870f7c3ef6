"""What only a GPU can get wrong: precision of products, offsets of 64 bits, graphs, host syncs.

Each of these takes a device and the sizes; on a CPU what does not apply is skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lines import Findings, Skip
from smoke_ops import Draw, Shape, Sizes, Truth, linear_arguments, run
from torch import Tensor

import stepagent
from stepagent import reference

TAIL = 64  # rows at the end of a long tensor


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs CUDA")


# ------------------------------------------------------------------ products


def halves_into_float32(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Findings:
    """`torch.mm` and `torch.addmm` with `out_dtype`, on which every linear op rests."""
    _needs_cuda(device)
    draw, findings = Draw(device), Findings()
    for rows in (1, 127, 1000):
        a, b = (
            draw.normal(rows, sizes.H[2], dtype=dtype),
            draw.normal(5003, sizes.H[2], dtype=dtype),
        )
        sums = draw.normal(rows, 5003)
        truth = a.double() @ b.double().T
        out = torch.empty_like(sums)
        torch.mm(a, b.T, out_dtype=torch.float32, out=out)
        findings.add(f"mm, {rows} rows", _relative(out, truth), 5e-5)
        truth += sums
        torch.addmm(sums, a, b.T, out_dtype=torch.float32, out=sums)
        findings.add(f"addmm, {rows} rows", _relative(sums, truth), 5e-5)
    return findings


def _relative(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


def mean_bias(sizes: Sizes, device: torch.device) -> Findings:
    """Of log-probs from bfloat16: tensor cores that truncate make all a little too large."""
    shape = sizes.largest()
    arguments, _, _ = linear_arguments(shape, frozenset(), Draw(device))
    scored = arguments["labels_N"] != -100
    with torch.device(device):
        truth_N = reference.linear_logprobs(**arguments)
    findings = Findings()
    for name, options in {"hybrid": {}, "batch_invariant": {"batch_invariant": True}}.items():
        if options and device.type == "cpu":
            continue
        error_N = (stepagent.linear_logprobs(**arguments, **options) - truth_N)[scored]
        findings.add(name, float(error_N.mean().abs()), 1e-4)
        findings.figures[f"{name}: mean bias"] = float(error_N.mean())
        findings.figures[f"{name}: deviation"] = float(error_N.std())
        findings.figures[f"{name}: bias of a sum of 64"] = float(64 * error_N.mean())
    return findings


# ------------------------------------------------------------------ TF32


def _use_fp32_precision() -> None:
    torch.backends.fp32_precision = "tf32"


def _use_matmul_precision() -> None:
    torch.set_float32_matmul_precision("high")


def _use_allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


# The three ways to turn it on.
TF32: dict[str, Callable[[], None]] = {
    "backends.fp32_precision": _use_fp32_precision,
    "set_float32_matmul_precision": _use_matmul_precision,
    "cuda.matmul.allow_tf32": _use_allow_tf32,
}


def _precision() -> tuple[str, ...]:
    """By the new names, which torch lets one read whatever was set."""
    parts = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return tuple(part.fp32_precision for part in parts)


def _forget_precision() -> None:
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")  # sets the other two as well, to "ieee"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def tf32(way: str, sizes: Sizes, device: torch.device) -> Findings:
    """The user's TF32 rounds no product of an op, and is as it was after one."""
    draw = Draw(device)
    a = draw.normal(256, 1024)
    exact = a.double() @ a.double().T
    _forget_precision()
    truths = {}
    for dtype in (torch.float32, torch.bfloat16):
        arguments, leaves, _ = linear_arguments(sizes.middle(dtype), frozenset({"rows"}), draw)
        truths[str(dtype)] = Truth("linear_logprobs", arguments, leaves)
    findings = Findings()
    try:
        TF32[way]()
        setting, product = _precision(), a @ a.T
        for name, truth in truths.items():
            findings.join(truth.judge(), name)
        findings.require("the setting stays", _precision() == setting)
        findings.require("torch's own products stay", torch.equal(a @ a.T, product))
    finally:
        _forget_precision()
    findings.figures["error of torch's own products"] = _relative(product, exact)
    return findings


# ------------------------------------------------------------------ offsets of 64 bits


def long_logits(sizes: Sizes, device: torch.device) -> Findings:
    """`token_logprobs` and `logprob_diff` where the last rows lie beyond 2³¹ elements."""
    shape = _beyond(sizes, H=0)
    draw = Draw(device)
    logits_NV = draw.normal(shape.N, shape.V, dtype=shape.dtype)
    labels_N = draw.labels(shape.N, shape.V)
    findings = _tail_of_logits("token_logprobs", {"logits_NV": logits_NV}, labels_N)
    both = {"logits_NV": logits_NV, "ref_logits_NV": logits_NV.flip(0)}
    findings.join(_tail_of_logits("logprob_diff", both, labels_N), "diff:")
    return findings


def _tail_of_logits(function: str, logits: dict[str, Tensor], labels_N: Tensor) -> Findings:
    """Of the last rows alone the truth is known; the op computes all of them."""
    tail = {name: tensor[-TAIL:] for name, tensor in logits.items()}
    truth = Truth(function, {**tail, "labels_N": labels_N[-TAIL:]}, ["logits_NV"])
    leaf_NV = logits["logits_NV"].detach().requires_grad_()
    values_N = getattr(stepagent, function)(
        **{**logits, "logits_NV": leaf_NV, "labels_N": labels_N}
    )
    upstream_N = _upstream_of_tail(truth, values_N)
    (gradient_NV,) = torch.autograd.grad(values_N, leaf_NV, upstream_N)
    findings = truth.findings([values_N.detach()[-TAIL:], gradient_NV[-TAIL:]])
    findings.require("rows before have no gradient", not gradient_NV[:-TAIL].any())
    return findings


def _upstream_of_tail(truth: Truth, values_N: Tensor) -> Tensor:
    upstream_N = torch.zeros_like(values_N)
    upstream_N[-TAIL:] = truth.upstreams[0].to(values_N.dtype)
    return upstream_N


def _beyond(sizes: Sizes, H: int) -> Shape:
    V = sizes.V[2]
    return Shape(sizes.beyond // V + 2 * TAIL, V, H, torch.bfloat16)


def long_product(keep: bool, sizes: Sizes, device: torch.device) -> Findings:
    """`linear_logprobs` of more than 2³¹ logits; with `keep` all of them lie in one tensor."""
    shape = _beyond(sizes, sizes.H[0])
    arguments, leaves, _ = linear_arguments(shape, frozenset(), Draw(device))
    options = {"keep_bytes": 5 * shape.N * shape.V} if keep else {}
    findings = _tail_of_rows(arguments, leaves, options)
    if device.type == "cuda" and not keep:
        invariant = _tail_of_rows(arguments, leaves, {"batch_invariant": True})
        findings.join(invariant, "batch_invariant:")
    return findings


def _tail_of_rows(
    arguments: dict[str, Any], leaves: list[str], options: dict[str, Any]
) -> Findings:
    tail = {k: v[-TAIL:] if k in ("hidden_RH", "labels_N") else v for k, v in arguments.items()}
    truth = Truth("linear_logprobs", tail, leaves)
    fresh = {name: arguments[name].detach().requires_grad_() for name in leaves}
    values_N = stepagent.linear_logprobs(**{**arguments, **fresh, **options})
    upstream_N = _upstream_of_tail(truth, values_N)
    hidden, weight = torch.autograd.grad(values_N, list(fresh.values()), upstream_N)
    return truth.findings([values_N.detach()[-TAIL:], hidden[-TAIL:], weight])


def long_hidden(sizes: Sizes, device: torch.device) -> Findings:
    """`rows_N` names the last of hidden rows that hold more than 2³¹ elements."""
    H, dtype = sizes.H[2], torch.bfloat16
    draw = Draw(device)
    hidden_RH = draw.normal(sizes.beyond // H + TAIL, H, dtype=dtype)
    R = len(hidden_RH)
    last = {
        "weight_VH": draw.weight(Shape(TAIL, sizes.V[0], H, dtype)),
        "labels_N": draw.labels(TAIL, sizes.V[0]),
    }
    truth = Truth("linear_logprobs", {"hidden_RH": hidden_RH[-TAIL:], **last}, ["hidden_RH"])
    given = {**last, "hidden_RH": hidden_RH, "rows_N": torch.arange(R - TAIL, R, device=device)}
    value_N, gradient_RH = run(
        stepagent.linear_logprobs, given, ["hidden_RH"], list(truth.upstreams)
    )
    findings = truth.findings([value_N, gradient_RH[-TAIL:]])
    findings.require("rows before have no gradient", not gradient_RH[:-TAIL].any())
    return findings


# ------------------------------------------------------------------ graphs, compiler, host syncs


def cuda_graph(features: frozenset[str], sizes: Sizes, device: torch.device) -> Findings:
    """Forward and backward of `linear_logprobs` with `rows_N`, captured, replayed on new values."""
    _needs_cuda(device)
    shape = sizes.middle()
    arguments, leaves, options = linear_arguments(shape, features | {"rows"}, Draw(device))
    fresh, _, _ = linear_arguments(shape, features | {"rows"}, Draw(device, seed=1))
    truth = Truth("linear_logprobs", fresh, leaves)

    def step() -> list[Tensor]:
        given = {**arguments, **options}
        return run(stepagent.linear_logprobs, given, leaves, truth.upstreams)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for name, value in fresh.items():
        if isinstance(value, Tensor):
            arguments[name].copy_(value)
    findings = Findings()
    for time in ("replayed", "replayed again"):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        findings.join(truth.findings(results), f"{time}:")
    return findings


def compiled(sizes: Sizes, device: torch.device) -> Findings:
    """Under `torch.compile(fullgraph=True)`; on a CPU without its slow code generation."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    arguments, leaves, _ = linear_arguments(sizes.middle(), frozenset({"rows"}), Draw(device))

    @torch.compile(fullgraph=True, backend=backend)
    def doubled(**given: Any) -> Tensor:
        return 2 * stepagent.linear_logprobs(**given) / 2

    return Truth("linear_logprobs", arguments, leaves).judge(doubled)


def no_host_sync(sizes: Sizes, device: torch.device) -> Findings:
    """What says that it does not stall the stream does not: torch raises where a call would."""
    _needs_cuda(device)
    draw, shape = Draw(device), sizes.middle()
    head, leaves, _ = linear_arguments(shape, frozenset({"rows", "temperature"}), draw)
    logits_NV = draw.normal(shape.N, shape.V, dtype=shape.dtype)
    logps_N, offsets = draw.normal(shape.N), torch.arange(0, shape.N + 1, device=device)
    frozen = {**head, "weight_VH": head["weight_VH"].detach()}
    steps = {"logps_N": logps_N, "ref_logps_N": logps_N.flip(0), "step_offsets": offsets}
    logits = {"logits_NV": logits_NV, "labels_N": head["labels_N"]}
    calls: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "linear_logprobs": ("linear_logprobs", head, leaves),
        "linear_logprobs, frozen": ("linear_logprobs", frozen, ["hidden_RH"]),
        "token_logprobs": ("token_logprobs", logits, ["logits_NV"]),
        "step_rewards": ("step_rewards", {**steps, "beta": 0.1}, ["logps_N"]),
    }
    findings = Findings()
    for name, (function, arguments, wanted) in calls.items():
        upstreams: list[Tensor] = []
        run(getattr(stepagent, function), arguments, wanted, upstreams)  # compiles, draws upstreams
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(getattr(stepagent, function), arguments, wanted, upstreams)
            findings.require(name, True)
        except RuntimeError as error:
            findings.require(f"{name}: {error}"[:200], False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return findings
