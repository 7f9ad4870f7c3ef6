"""Trees through the model: under each kind of mask, and against the same pairs padded.

A time counts only where the log-probs are right: within rounding of the truth, which is measured
against what a wrong mask would change. Random weights make rounding of halves large and the same
bound would be none for float32, so it is a share of that effect and not a number of nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from lines import Findings, Skip
from peft import PeftModel
from system_model import (
    Pairs,
    Scale,
    Timed,
    decode,
    head_logprobs,
    learn,
    taken_gradient,
    timed,
)
from torch import Tensor

import stepagent
from stepagent import TokenTree

SHARE = 1 / 4  # of the effect of a wrong mask, that rounding may have


@dataclass(frozen=True)
class Truth:
    """Under the tree's mask, dense and boolean, and how a wrong one changes it: one that is causal
    over the whole tree, so that siblings are seen."""

    logps_N: Tensor
    gradient: Tensor  # of their mean
    effect: float
    gradient_effect: float

    def findings(self, logps_N: Tensor, gradient: Tensor) -> Findings:
        findings = Findings()
        findings.add("log-probs", _mean_error(logps_N, self.logps_N), SHARE * self.effect)
        error = _relative_error(gradient, self.gradient)
        findings.add("gradient", error, SHARE * self.gradient_effect)
        return findings


def _mean_error(logps_N: Tensor, truth_N: Tensor) -> float:
    return float((logps_N - truth_N).abs().mean())


def _relative_error(gradient: Tensor, truth: Tensor) -> float:
    return float((gradient - truth).norm() / truth.norm())


@dataclass(eq=False)  # one, and the key of what is computed once of it
class System:
    model: PeftModel
    scale: Scale
    device: torch.device


@cache
def truth(system: System, steps: int) -> Truth:
    """Computed under sdpa."""
    tree = Pairs(system.scale, steps).tree()
    right = tree.attention_mask(torch.bool, system.device)
    wrong = torch.ones_like(right).tril()
    logps_N, gradient = learn(system.model, lambda: score_by_hand(system, tree, right))
    wrong_N, other = learn(system.model, lambda: score_by_hand(system, tree, wrong))
    effects = _mean_error(wrong_N, logps_N), _relative_error(other, gradient)
    return Truth(logps_N, gradient, *effects)


def score_by_hand(system: System, tree: TokenTree, mask: Tensor) -> Tensor:
    ids, positions = (
        torch.as_tensor(array, device=system.device).long()[None]
        for array in (tree.input_ids, tree.position_ids)
    )
    hidden_BLH = decode(system.model, ids, position_ids=positions, attention_mask=mask)
    return head_logprobs(system.model, hidden_BLH[0], tree.labels, tree.label_rows)


# ------------------------------------------------------------------ masks


def _shipped(system: System, tree: TokenTree) -> Callable[[], Tensor]:
    return lambda: stepagent.score_trees(system.model, [tree])


def _dense(system: System, tree: TokenTree, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The mask is made once, outside of what is timed."""
    mask = tree.attention_mask(dtype, system.device)
    return lambda: score_by_hand(system, tree, mask)


MASKS: dict[str, tuple[str, Callable[[System, TokenTree], Callable[[], Tensor]]]] = {
    "boolean": ("sdpa", lambda system, tree: _dense(system, tree, torch.bool)),
    "additive": ("sdpa", lambda system, tree: _dense(system, tree, system.scale.dtype)),
    "score_trees": ("sdpa", _shipped),
    "score_trees, flex": ("flex_attention", _shipped),
}


def masked(system: System, steps: int, name: str) -> Findings:
    implementation, prepare = MASKS[name]
    if implementation == "flex_attention" and system.device.type == "cpu":
        raise Skip("FlexAttention has no backward on a CPU")
    tree, right = Pairs(system.scale, steps).tree(), truth(system, steps)
    base: Any = system.model.get_base_model()
    base.set_attn_implementation(implementation)
    try:
        score = prepare(system, tree)
        findings = right.findings(*learn(system.model, score))
        time = _timed_learning(system, score)
    finally:
        base.set_attn_implementation("sdpa")
    findings.figures = time.figures(len(tree.input_ids))
    return findings


# ------------------------------------------------------------------ padded pairs


class Padded:
    """The pairs of a tree as sequences of their own, padded on the right, in batches that fit.

    Neighbours in length share a batch. Causal attention hides the padding from all before it, so
    no mask is given and the fastest attention runs.
    """

    def __init__(self, system: System, pairs: Pairs) -> None:
        self.system, self.pairs = system, pairs
        self.sequences = pairs.sequences()
        self.batches: list[list[int]] = []
        longest_first = sorted(range(len(self.sequences)), key=lambda i: -len(self.sequences[i]))
        for i in longest_first:
            batch = self.batches[-1] if self.batches else []
            width = len(self.sequences[batch[0]]) if batch else 0
            if batch and (len(batch) + 1) * width <= system.scale.padded_tokens:
                batch.append(i)
            else:
                self.batches.append([i])

    @property
    def tokens(self) -> int:
        return sum(len(batch) * len(self.sequences[batch[0]]) for batch in self.batches)

    def score(self, batch: list[int]) -> Tensor:
        """Log-probs of the actions, sequence by sequence."""
        ids = [torch.from_numpy(self.sequences[i]).long() for i in batch]
        ids_BL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.system.device)
        hidden_BLH = decode(self.system.model, ids_BL)
        action, width = self.system.scale.action, ids_BL.shape[1]
        ends = np.array([len(self.sequences[i]) for i in batch])
        rows = ends[:, None] - action - 1 + np.arange(action)
        labels = np.stack([self.sequences[i][-action:] for i in batch])
        flat_rows = rows + width * np.arange(len(batch))[:, None]
        return head_logprobs(
            self.system.model, hidden_BLH.flatten(0, 1), labels.ravel(), flat_rows.ravel()
        )

    def learn(self) -> tuple[Tensor, Tensor]:
        """As `learn`, all batches together; log-probs in the order of the tree."""
        action = self.system.scale.action
        logps = torch.empty(len(self.sequences), action, device=self.system.device)
        for batch in self.batches:
            scored = self.score(batch)
            (scored.sum() / logps.numel()).backward()
            logps[batch] = scored.detach().view(-1, action)
        return logps.flatten(), taken_gradient(self.system.model)


def tree_against_padded(system: System, steps: int) -> Findings:
    pairs, right = Pairs(system.scale, steps), truth(system, steps)
    padded, tree = Padded(system, pairs), pairs.tree()
    score = _shipped(system, tree)
    findings = right.findings(*padded.learn())
    findings.join(right.findings(*learn(system.model, score)), "tree:")
    ours = _timed_learning(system, score)
    theirs = timed(padded.learn, 1, system.device, warm=True)
    findings.figures = {
        "tree": ours.figures(len(tree.input_ids)),
        "padded": theirs.figures(padded.tokens),
        "padded batches": len(padded.batches),
        "padded / tree, seconds": theirs.median / ours.median,
        "padded / tree, peak": theirs.peak_bytes / max(ours.peak_bytes, 1),
    }
    return findings


def _timed_learning(system: System, score: Callable[[], Tensor]) -> Timed:
    """Of a forward and a backward that ran before."""
    repeats = system.scale.repeats
    return timed(lambda: learn(system.model, score), repeats, system.device, warm=True)
