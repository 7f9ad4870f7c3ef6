"""Inspection, in tokens per second, against `generate` on a padded batch of the same states."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from lines import Findings
from numpy.typing import NDArray
from system_model import END, Pairs, timed
from system_trees import System

import stepagent

# Of the states, those where both greedy decoders begin with the same token. Halves round the two
# differently, and random weights have close seconds; another context would leave next to none.
LEAST_AGREEMENT = 0.5


def _trunks(system: System) -> list[stepagent.Trunk]:
    scale = system.scale
    return [Pairs(scale, scale.trunk_steps, seed).trunk for seed in range(scale.trunks)]


def inspected(system: System, budget: int, temperature: float) -> list[NDArray[np.int32]]:
    """The action at each state of each trunk."""
    branches = stepagent.inspect(
        system.model,
        _trunks(system),
        max_new_tokens=system.scale.new_tokens,
        temperature=temperature,
        eos_token_id=END,
        max_batch_tokens=budget,
    )
    return [samples[0].token_ids for steps in branches for samples in steps]


@torch.no_grad()
def generated(system: System, temperature: float) -> list[NDArray[np.int32]]:
    """The same by `generate`: states of about one length together, padded on the left."""
    states = [
        trunk.input_ids[:start]
        for trunk in _trunks(system)
        for start in trunk.action_spans[:, 0].tolist()
    ]
    rows = system.scale.generate_rows
    by_length = sorted(range(len(states)), key=lambda i: -len(states[i]))
    sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
    actions: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(states)
    system.model.eval()
    for first in range(0, len(states), rows):
        batch = by_length[first : first + rows]
        width = len(states[batch[0]])
        ids = np.stack([np.pad(states[i], (width - len(states[i]), 0)) for i in batch])
        ids_BL = torch.from_numpy(ids).long().to(system.device)
        lengths_B1 = torch.tensor([[len(states[i])] for i in batch], device=system.device)
        mask_BL = torch.arange(width, device=system.device) >= width - lengths_B1
        out_BL = system.model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL.long(),
            max_new_tokens=system.scale.new_tokens,
            do_sample=temperature > 0,
            eos_token_id=END,
            pad_token_id=END,
            use_cache=True,
            **sampling,
        )
        for i, new in zip(batch, out_BL[:, width:].cpu().numpy(), strict=True):
            ends = np.flatnonzero(new == END)
            actions[i] = new[: ends[0] + 1 if len(ends) else len(new)].astype(np.int32)
    system.model.train()
    return actions


@cache
def agreement(system: System) -> Findings:
    """Of the greedy actions of both: on it rests what is said of their speeds."""
    ours, theirs = inspected(system, system.scale.budgets[-1], 0.0), generated(system, 0.0)
    first = np.mean([a[0] == b[0] for a, b in zip(ours, theirs, strict=True)])
    whole = np.mean([np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)])
    findings = Findings()
    findings.add("first tokens that differ", 1 - float(first), 1 - LEAST_AGREEMENT)
    findings.figures = {
        "states": len(ours),
        "share of first tokens that agree": float(first),
        "share of whole actions that agree": float(whole),
    }
    return findings


def inspect_speed(system: System, budget: int) -> Findings:
    return _speed(system, lambda: inspected(system, budget, 1.0))


def generate_speed(system: System) -> Findings:
    return _speed(system, lambda: generated(system, 1.0))


def _speed(system: System, sample: Callable[[], list[NDArray[np.int32]]]) -> Findings:
    findings = Findings()
    findings.join(agreement(system), "agreement:")
    tokens: list[int] = []
    time = timed(lambda: tokens.append(sum(map(len, sample()))), 1, system.device)
    # Random weights hardly ever end an action: nearly all have their full length.
    expected = system.scale.trunks * system.scale.trunk_steps * system.scale.new_tokens
    findings.add("tokens missing", 1 - tokens[-1] / expected, 0.25)
    findings.figures = time.figures(tokens[-1])
    return findings
