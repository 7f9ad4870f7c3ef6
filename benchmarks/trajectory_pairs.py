"""ETO's loss on pairs of whole trajectories: a token tree a pair against padded rows.

Measured: forward, mean over pairs of −log σ(r_chosen − r_rejected) and backward, on one Llama with
the same weights, by the same op for log-probs of the assistant's tokens alone. The two trajectories
of a pair have as many steps and part at a step that its share of the whole names (--shares). The
reference's log-probs are given to both.

* tree: trajectory_pair → pack_comparisons → score_trees → preference_loss, as `method="eto"` does.
* padded: 2P rows, the chosen ones first, padded on the right to the longest, attention_mask; the
  rows of the assistant's tokens → linear_logprobs.

Loss and gradients of both must agree within 1e-4 relative, or nothing is reported. Seconds are CPU
time of one thread, the least of --repeats.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

import stepagent as sa
from stepagent.learning.cycle import Comparison, pack_with_steps
from stepagent.learning.methods.eto import preference_loss
from stepagent.learning.methods.method import Batch
from stepagent.learning.trajectory_pairs import trajectory_pair

BETA = 0.1
TOLERANCE = 1e-4  # relative, of loss and gradients


class Pairs:
    """Model and pairs, and the reference's log-probs of the tree's scored tokens."""

    def __init__(self, options: argparse.Namespace, shares: list[float]) -> None:
        self.model = common.llama(options).train()
        chosen, _ = common.trajectory(options)
        random = np.random.default_rng(2)
        self.sides: list[tuple[sa.Trunk, sa.Trunk]] = []
        for share in shares:
            step = min(int(share * options.steps), options.steps - 1)
            start = int(chosen.action_spans[step, 0])
            ids = chosen.input_ids.copy()
            ids[start:] = random.integers(1, common.VOCABULARY, len(ids) - start)
            self.sides.append((chosen, sa.Trunk(ids, chosen.action_spans)))
        self.comparisons: list[Comparison] = [trajectory_pair(*pair) for pair in self.sides]
        self.trees, self.steps = pack_with_steps(self.comparisons, 2**30)
        with torch.no_grad():
            scored = sa.score_trees(self.model, self.trees)
        noise = random.normal(size=len(scored)) / 10
        self.ref_N = scored + torch.from_numpy(noise).float()

    def tree_loss(self) -> Tensor:
        trees, steps = pack_with_steps(self.comparisons, 2**30)
        logps_N = sa.score_trees(self.model, trees)
        scores = {"ref_logps": self.ref_N}
        batch = Batch.of(logps_N, None, scores, steps, steps.counts())
        return preference_loss(batch, BETA)[0]

    def padded_loss(self) -> Tensor:
        rows = [pair[side] for side in (0, 1) for pair in self.sides]
        ids = [torch.tensor(trunk.input_ids.tolist()) for trunk in rows]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        acted = torch.zeros_like(mask, dtype=torch.bool)
        for row, trunk in zip(acted, rows, strict=True):
            row[: len(trunk.input_ids)] = torch.tensor(trunk.action_mask.tolist())
        hidden = self.model.model(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]
        hidden_NH = hidden[:, :-1][acted[:, 1:]]
        logps_N = sa.linear_logprobs(hidden_NH, self.model.lm_head.weight, input_ids[acted])
        sums_R = torch.stack([part.sum() for part in logps_N.split(acted.sum(1).tolist())])
        rewards = BETA * (sums_R - self.ref_R())
        return sa.implicit_step_loss(*rewards.chunk(2)).mean()

    def ref_R(self) -> Tensor:
        """The reference's log-probs of the padded rows: the same numbers, added up by side."""
        ref_S = sa.step_sums(self.ref_N, self.steps.offsets)
        both = self.steps.side_sums(ref_S, 3)
        return torch.cat([self.steps.side_sums(ref_S, side) + both for side in (1, 2)])

    def tokens(self) -> dict[str, int]:
        """That each side encodes."""
        tree = sum(len(one.input_ids) for one in self.trees)
        return {"tree": tree, "padded": sum(len(t.input_ids) for pair in self.sides for t in pair)}

    def gradients(self, side: str) -> tuple[float, dict[str, Tensor]]:
        """The loss of a side and its gradients."""
        self.model.zero_grad()
        loss = getattr(self, f"{side}_loss")()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in self.model.named_parameters()}


def compared(options: argparse.Namespace, shares: list[float]) -> dict[str, Any]:
    """Errors, tokens and seconds of both sides, for pairs that part at these shares."""
    pairs = Pairs(options, shares)
    (tree, of_tree), (padded, of_padded) = (pairs.gradients(side) for side in ("tree", "padded"))
    loss_error = abs(tree / padded - 1)
    grad_error = max(float((of_tree[n] - g).norm() / g.norm()) for n, g in of_padded.items())
    common.say(f"{shares}: relative error: loss {loss_error:.1e}, gradients {grad_error:.1e}")
    common.check(loss_error <= TOLERANCE, f"the losses are {tree} and {padded}")
    common.check(grad_error <= TOLERANCE, f"gradients differ by {grad_error:.2e} relative")
    seconds = {
        side: common.cpu_seconds(lambda side=side: pairs.gradients(side), options.repeats)
        for side in ("tree", "padded")
    }
    return {
        "shares": shares,
        "loss_relative_error": loss_error,
        "gradient_relative_error": grad_error,
        "tokens": pairs.tokens(),
        "seconds": seconds,
    }


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 0.95])
    parser.set_defaults(threads=1, repeats=3)
    options = parser.parse_args()
    where = common.environment()
    cells = [compared(options, shares) for shares in ([s] for s in options.shares)]
    cells.append(compared(options, options.shares))
    rows = []
    for cell in cells:
        tokens, seconds = cell["tokens"], cell["seconds"]
        rows.append(
            [
                "all in a batch" if len(cell["shares"]) > 1 else f"{cell['shares'][0]:.0%}",
                *tokens.values(),
                f"{tokens['padded'] / tokens['tree']:.2f}×",
                *(f"{value:.2f}" for value in seconds.values()),
                f"{seconds['padded'] / seconds['tree']:.2f}×",
            ]
        )
    header = ["the sides part after", "tokens, tree", "padded", "ratio"]
    text = common.table([*header, "seconds, tree", "padded", "ratio"], rows)
    model = common.llama(options)
    result = {
        "benchmark": "trajectory_pairs",
        "shape": common.shape(options, model),
        "cells": cells,
    }
    title = f"Pairs of trajectories: {common.described(options, model)}"
    common.report(title, __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
