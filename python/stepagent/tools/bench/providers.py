"""Who computes an op: stepagent, torch, and the peers that are installed.

A provider is given a problem and returns how it computes it, as its own project calls it; or raises
`Unsuitable` with the reason why it takes no part. Nothing is imported before it is asked for.

Peers, as of TRL 1.16, Liger 0.8.5 and verl 0.9.1. Left out: Liger's cross entropy on logits, which
overwrites them with their gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor

import stepagent

from .problems import Problem

FromLogits = Callable[[Tensor, Tensor], Tensor]  # logits_NV, labels_N -> logps_N
FromHead = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_RH, weight_VH, labels_N -> logps_N


class Unsuitable(Exception):
    """A provider takes no part in a problem, for the reason given."""


@dataclass(frozen=True)
class Implementation:
    """How a problem is computed: a call that takes its inputs by name.

    Of an op that starts from a head, also what the backward has of the logits: "kept" by the
    forward, computed "again", or nothing, as the forward makes the "gradient" to scale.
    """

    call: Callable[..., Tensor]
    logits: Literal["kept", "again", "gradient"] = "kept"


@dataclass(frozen=True)
class Provider:
    make: Callable[[Problem], Implementation]
    # Whether it is too slow for this problem to be run without being asked for by name.
    on_request: Callable[[Problem], bool] = lambda problem: False


# ------------------------------------------------------------------ stepagent


def _stepagent(problem: Problem) -> Implementation:
    """As it is called without options: on a GPU it keeps the logits where they fit."""
    frozen = "weight_VH" not in problem.op.leaves
    keeps = problem.upstream.is_cuda and not frozen
    function = getattr(stepagent, problem.op.function)
    return Implementation(function, "kept" if keeps else "gradient" if frozen else "again")


def _stepagent_kept(problem: Problem) -> Implementation:
    """The logits of the scored rows are kept in float32, where the head learns."""
    if problem.upstream.is_cuda:
        raise Unsuitable("the same as stepagent")
    return _stepagent_keeping(problem, 4 * problem.shape.n * problem.shape.V)


def _stepagent_again(problem: Problem) -> Implementation:
    """The logits are computed again in the backward, in bounded memory."""
    if not problem.upstream.is_cuda:
        raise Unsuitable("the same as stepagent")
    return _stepagent_keeping(problem, 0)


def _stepagent_keeping(problem: Problem, logits_bytes: int) -> Implementation:
    if "weight_VH" not in problem.op.leaves:
        raise Unsuitable("only a head that learns has logits to keep")
    function = getattr(stepagent, problem.op.function)
    call = functools.partial(function, keep_bytes=logits_bytes)
    return Implementation(call, "kept" if logits_bytes else "again")


def _stepagent_invariant(problem: Problem) -> Implementation:
    """One kernel for the forward, the same bits for a row in any batch."""
    if problem.op.function != "linear_logprobs" or not problem.upstream.is_cuda:
        raise Unsuitable("is linear_logprobs on a GPU")
    function = functools.partial(stepagent.linear_logprobs, batch_invariant=True)
    return Implementation(function, "again")


def _stepagent_graphed(problem: Problem) -> Implementation:
    """Forward and backward captured once and replayed: without the host, which is all else."""
    if problem.op.function != "step_rewards" or not problem.upstream.is_cuda:
        raise Unsuitable("is step_rewards on a GPU, whose launches take longer than its work")
    beta = problem.inputs["beta"]

    def rewards(logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Tensor) -> Tensor:
        return stepagent.step_rewards(logps_N, ref_logps_N, step_offsets, beta=beta)

    tensors = {name: x for name, x in problem.inputs.items() if name != "beta"}
    sample = tuple(x.detach().requires_grad_(name == "logps_N") for name, x in tensors.items())
    graphed: Any = torch.cuda.make_graphed_callables(rewards, sample)

    def call(beta: float, **inputs: Tensor) -> Tensor:
        replayed: Tensor = graphed(*(inputs[name] for name in tensors))
        return replayed

    return Implementation(call)


# ------------------------------------------------------- ops out of one function


def _from_logits(problem: Problem, logps: FromLogits) -> Callable[..., Tensor]:
    """The problem's op, out of a function that starts from logits."""

    def logprob_diff(logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps_N = logps(ref_logits_NV, labels_N)
        return logps(logits_NV, labels_N) - ref_logps_N

    def token_logprobs(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        return logps(logits_NV, labels_N)

    if problem.op.function == "token_logprobs":
        return token_logprobs
    if problem.op.function == "logprob_diff":
        return logprob_diff
    return _from_head(
        problem, lambda hidden_RH, weight_VH, labels_N: logps(hidden_RH @ weight_VH.T, labels_N)
    )


def _from_head(problem: Problem, logps: FromHead) -> Callable[..., Tensor]:
    """The problem's op, out of a function that starts from hidden rows and a head."""

    def linear_logprobs(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        return logps(hidden_RH, weight_VH, labels_N)

    def linear_logprob_diff(
        hidden_RH: Tensor,
        weight_VH: Tensor,
        ref_hidden_RH: Tensor,
        ref_weight_VH: Tensor,
        labels_N: Tensor,
    ) -> Tensor:
        with torch.no_grad():
            ref_logps_N = logps(ref_hidden_RH, ref_weight_VH, labels_N)
        return logps(hidden_RH, weight_VH, labels_N) - ref_logps_N

    if problem.op.function == "linear_logprobs":
        return linear_logprobs
    if problem.op.function == "linear_logprob_diff":
        return linear_logprob_diff
    raise Unsuitable(f"has no {problem.op.function}")


def _scored_rows(logps: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Skip, before the call, the rows whose label is -100; they score 0."""

    def call(rows_N: Tensor, *others: Tensor) -> Tensor:
        *weight, labels_N = others
        scored_N = labels_N != -100
        logps_n = logps(rows_N[scored_N], *weight, labels_N[scored_N])
        return logps_n.new_zeros(labels_N.shape).masked_scatter(scored_N, logps_n)

    return call


# ---------------------------------------------------------------------- torch


def _log_softmax(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    logps_N = logp_NV.gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    return logps_N.masked_fill(labels_N == -100, 0.0)


def _log_softmax_fp32(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """What model code does: logits of the model's dtype, upcast before the softmax."""
    return _log_softmax(logits_NV.float(), labels_N)


def _step_rewards(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Tensor, beta: float
) -> Tensor:
    steps = torch.arange(len(step_offsets) - 1, device=logps_N.device)
    step_N = steps.repeat_interleave(step_offsets.diff())
    zeros_S = logps_N.new_zeros(len(steps))
    return beta * zeros_S.index_add(0, step_N, logps_N - ref_logps_N)


def _torch(problem: Problem) -> Implementation:
    if problem.op.function == "step_rewards":
        return Implementation(_step_rewards)
    return Implementation(_from_logits(problem, _log_softmax))


def _torch_fp32(problem: Problem) -> Implementation:
    if problem.shape.dtype == torch.float32:
        raise Unsuitable("the same as torch: the inputs are float32")
    return Implementation(_from_logits(problem, _log_softmax_fp32))


def _torch_scored(problem: Problem) -> Implementation:
    _require_masked(problem, "torch")
    return Implementation(_of_scored_rows(problem, _log_softmax_fp32))


def _of_scored_rows(problem: Problem, logps: FromLogits) -> Callable[..., Tensor]:
    """Rows are skipped before the head, where there is one."""
    if "hidden_RH" not in problem.inputs:
        return _from_logits(problem, _scored_rows(logps))

    def from_head(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        return logps(hidden_RH @ weight_VH.T, labels_N)

    return _from_head(problem, _scored_rows(from_head))


def _require_masked(problem: Problem, same: str) -> None:
    if problem.shape.scored == 1.0:
        raise Unsuitable(f"the same as {same}: every row is scored")


def _torch_compile(problem: Problem) -> Implementation:
    return Implementation(
        torch.compile(_from_logits(problem, _log_softmax_fp32), fullgraph=True, dynamic=False)
    )


def _slow_to_compile(problem: Problem) -> bool:
    return problem.upstream.device.type == "cpu" or problem.op.unit == "FLOP"


# ------------------------------------------------------------------------ TRL


def _trl(problem: Problem) -> Implementation:
    """As its trainers call it: rows without a label are skipped on a GPU, and only there."""
    if "hidden_RH" not in problem.inputs:
        return Implementation(_from_logits(problem, _trl_selective_log_softmax()))
    chunked = _trl_chunked()
    if problem.upstream.is_cuda:
        return Implementation(_from_head(problem, _scored_rows(chunked)), logits="again")

    def every_row(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        logps_N = chunked(hidden_RH, weight_VH, labels_N.clamp(min=0))
        return logps_N.masked_fill(labels_N == -100, 0.0)

    return Implementation(_from_head(problem, every_row), logits="again")


def _trl_scored(problem: Problem) -> Implementation:
    _require_masked(problem, "trl")
    if problem.upstream.is_cuda or "hidden_RH" not in problem.inputs:
        raise Unsuitable("the same as trl" if problem.upstream.is_cuda else "starts from a head")
    return Implementation(_from_head(problem, _scored_rows(_trl_chunked())), logits="again")


def _trl_chunked() -> FromHead:
    function = _installed("trl.kernels").ChunkedLogProbFunction
    chunk_size = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

    def chunked(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        outputs = function.apply(
            hidden_RH, weight_VH, None, labels_N, 1.0, chunk_size, None, 1.0, ()
        )
        logps_N: Tensor = outputs[0]
        return logps_N

    return chunked


def _trl_selective_log_softmax() -> FromLogits:
    selective_log_softmax = _installed("trl.trainer.utils").selective_log_softmax

    def logps(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        scored_N = labels_N != -100
        logps_N: Tensor = selective_log_softmax(
            logits_NV, labels_N.clamp(min=0), row_mask=scored_N.long()
        )
        return logps_N.masked_fill(~scored_N, 0.0)

    return logps


# ---------------------------------------------------------------------- Liger


def _liger_scaled_ce(problem: Problem) -> Implementation:
    """CuTe on sm_90; elsewhere its fallback, 512 rows of logits at a time in torch."""
    module = _installed("liger_kernel.ops.fused_linear_scaled_cross_entropy")

    def logps(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        nll_N: Tensor = module.LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden_RH, weight_VH, labels_N
        )
        return -nll_N

    return Implementation(_from_head(problem, logps), logits="again")


def _liger_flce(problem: Problem) -> Implementation:
    module = _installed("liger_kernel.ops.fused_linear_cross_entropy", needs_cuda=problem)

    def logps(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        nll_N: Tensor = module.LigerFusedLinearCrossEntropyFunction.apply(
            hidden_RH, weight_VH, labels_N, None, None, -100, 0.0, 0.0, "none"
        )[0]
        return -nll_N

    return Implementation(_from_head(problem, logps), logits="again")


# ----------------------------------------------------------------------- verl


def _verl(problem: Problem) -> Implementation:
    """Its kernel leaves the rows without a label uninitialised, so they are skipped before."""
    module = _installed("verl.utils.kernel.linear_cross_entropy", needs_cuda=problem)

    def logps(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        logps_N, _ = module.linear_cross_entropy(hidden_RH, weight_VH, labels_N, 1.0, "none")
        return cast("Tensor", logps_N)

    masked = problem.shape.scored < 1.0
    return Implementation(_from_head(problem, _scored_rows(logps) if masked else logps), "again")


def _installed(module: str, needs_cuda: Problem | None = None) -> Any:
    """A peer's module, or why it cannot be used here."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise Unsuitable(f"{package} is not installed")
    if needs_cuda is not None and not needs_cuda.upstream.is_cuda:
        raise Unsuitable("its Triton kernels need a GPU; Triton's interpreter is too slow to time")
    try:
        return import_module(module)
    except Exception as error:  # whatever a broken install raises is the reason
        raise Unsuitable(f"not importable: {type(error).__name__}: {error}") from error


OURS = "stepagent"
PROVIDERS = {
    OURS: Provider(_stepagent),
    "stepagent-kept": Provider(_stepagent_kept),
    "stepagent-again": Provider(_stepagent_again),
    "stepagent-invariant": Provider(_stepagent_invariant),
    "stepagent-graphed": Provider(_stepagent_graphed),
    "torch": Provider(_torch),
    "torch-fp32": Provider(_torch_fp32),
    "torch-scored": Provider(_torch_scored),
    "torch-compile": Provider(_torch_compile, on_request=_slow_to_compile),
    "trl": Provider(_trl),
    "trl-scored": Provider(_trl_scored),
    "liger-scaled-ce": Provider(_liger_scaled_ce),
    "liger-flce": Provider(_liger_flce),
    "verl": Provider(_verl),
}
