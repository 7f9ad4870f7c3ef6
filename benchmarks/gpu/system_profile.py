"""Where the time goes: the kernels of an op, or of a decode step, as torch's profiler saw them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from lines import Findings, Skip
from smoke_ops import Draw, Shape, Truth, linear_arguments, run
from system_model import END, Pairs, Scale
from system_trees import System
from torch.profiler import ProfilerActivity, profile

import stepagent

ROWS = 12  # of a table
CHECKED = 128  # tokens of which the truth is computed


def kernel_table(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Of the second call: kernels by time on the GPU; on a CPU operators by their own time."""
    cuda = device.type == "cuda"
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == wanted]
    events.sort(key=lambda event: -getattr(event, key))
    return {
        "us": sum(getattr(event, key) for event in events),
        "launches": sum(event.count for event in events),
        "kernels": [
            {"us": getattr(event, key), "calls": event.count, "name": event.key[:120]}
            for event in events[:ROWS]
        ],
    }


def _shape(scale: Scale) -> Shape:
    N, H, V = scale.profile_shape
    return Shape(N, V, H, scale.dtype)


def linear(
    features: frozenset[str], invariant: bool, scale: Scale, device: torch.device
) -> Findings:
    """`linear_logprobs`, forward and backward: of slices and their fold, or as one kernel."""
    if invariant and device.type == "cpu":
        raise Skip("batch_invariant runs on a GPU only")
    options = {"batch_invariant": True} if invariant else {}
    small = dataclasses.replace(_shape(scale), N=min(CHECKED, scale.profile_shape[0]))
    arguments, leaves, _ = linear_arguments(small, features, Draw(device))
    findings = Truth("linear_logprobs", arguments, leaves).judge(**options)
    arguments, leaves, _ = linear_arguments(_shape(scale), features, Draw(device))
    given, upstreams = {**arguments, **options}, []
    findings.figures = kernel_table(
        lambda: run(stepagent.linear_logprobs, given, leaves, upstreams), device
    )
    return findings


def token_logprobs(scale: Scale, device: torch.device) -> Findings:
    shape, draw = _shape(scale), Draw(device)
    arguments = {
        "logits_NV": draw.normal(shape.N, shape.V, dtype=shape.dtype),
        "labels_N": draw.labels(shape.N, shape.V),
    }
    first = {name: value[:CHECKED] for name, value in arguments.items()}
    findings = Truth("token_logprobs", first, ["logits_NV"]).judge()
    upstreams: list[torch.Tensor] = []
    findings.figures = kernel_table(
        lambda: run(stepagent.token_logprobs, arguments, ["logits_NV"], upstreams), device
    )
    return findings


def inspection(system: System, new_tokens: int) -> Findings:
    """All of `inspect` on one trunk. With a token more it has one decode step more."""
    trunk = Pairs(system.scale, system.scale.trunk_steps).trunk
    tokens: list[int] = []

    def work() -> None:
        (steps,) = stepagent.inspect(
            system.model, [trunk], max_new_tokens=new_tokens, eos_token_id=END
        )
        tokens.append(sum(len(branch.token_ids) for step in steps for branch in step))

    findings = Findings(figures=kernel_table(work, system.device))
    findings.add("tokens missing", 1 - tokens[-1] / (trunk.num_steps * new_tokens), 0.25)
    return findings
