"""One step-pair update: a token tree against the padded batch, on the CPU in float32.

Measured: zero_grad, forward, the implicit step loss over T pairs (state, expert action, agent
action), backward and an AdamW step, on one Llama with the same weights. The reference's log-probs
are given to both.

* tree: pack_step_pairs → score_trees → step_rewards → implicit_step_loss.
* padded: what TRL's DPO trainer does: 2T rows of prefix and action, the experts' first, padded on
  the right to the longest, attention_mask, logits of every position, log-prob = logit − logsumexp
  row by row, the action's tokens summed.

Order: each side runs once in a process of its own, which gives peak memory and the gradients; they
must agree within 1e-4 relative, or nothing is reported. Then both are timed in this process.

Peak memory: the kernel's high-water mark of resident memory (VmHWM, reset through
/proc/self/clear_refs) over the update, minus resident memory before it, after the model and a
forward of two tokens. Gradients and optimizer state, the same on both sides, are inside. The padded
side needs 15 GiB at the default shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

import stepagent as sa

BETA = 0.1
TOLERANCE = 1e-4  # relative, of loss and gradients
SIDES = ("tree", "padded")


class Update:
    """Model, optimizer and data of one side."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = common.llama(options).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.trunk, self.agent = common.trajectory(options)
        # The reference's log-prob of each action, expert's and agent's in turn, as a tree orders
        # its steps: near those of random weights, different for every action.
        random = np.random.default_rng(1).normal(size=2 * options.steps)
        scores_S = options.action_tokens * (random / 10 - np.log(common.VOCABULARY))
        self.ref_S = torch.from_numpy(scores_S).float()

    def run(self, loss: Callable[[Update], Tensor]) -> float:
        """One whole update; its loss."""
        self.optimizer.zero_grad()
        value = loss(self)
        value.backward()
        self.optimizer.step()
        return value.item()


def tree_loss(update: Update) -> Tensor:
    trees = sa.pack_step_pairs([update.trunk], [[[action] for action in update.agent]])
    offsets = torch.as_tensor(trees[0].step_offsets)
    lengths = offsets.diff()
    ref_logps_N = (update.ref_S / lengths).repeat_interleave(lengths)
    logps_N = sa.score_trees(update.model, trees)
    rewards_S = sa.step_rewards(logps_N, ref_logps_N, offsets, beta=BETA)
    return sa.implicit_step_loss(rewards_S[0::2], rewards_S[1::2]).mean()


def padded_loss(update: Update) -> Tensor:
    spans, ids = update.trunk.action_spans, update.trunk.input_ids
    expert = [ids[:stop] for _, stop in spans]
    agent = [np.append(ids[:start], a) for (start, _), a in zip(spans, update.agent, strict=True)]
    prompts = torch.tensor(spans[:, 0].tolist()).repeat(2)
    rows = [torch.tensor(row.tolist()) for row in (*expert, *agent)]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    depth = torch.arange(input_ids.shape[1])
    mask = (depth < lengths[:, None]).long()
    logits = update.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    labels = input_ids[:, 1:]
    normalizers = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    logps = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - normalizers
    acted = (depth[1:] >= prompts[:, None]) & (depth[1:] < lengths[:, None])
    scores = logps.masked_fill(~acted, 0.0).sum(dim=1)
    ref = torch.cat([update.ref_S[0::2], update.ref_S[1::2]])
    expert_rewards, agent_rewards = (BETA * (scores - ref)).chunk(2)
    return sa.implicit_step_loss(expert_rewards, agent_rewards).mean()


LOSSES: dict[str, Callable[[Update], Tensor]] = {"tree": tree_loss, "padded": padded_loss}


def warm_up(update: Update) -> None:
    """A forward of two tokens, and the tree's one-time check of the model."""
    with torch.no_grad():
        update.model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
    sa.check_tree_support(update.model)


def measure_side(options: argparse.Namespace) -> None:
    """In a process of its own: peak memory, loss and gradients of one update, into --out."""
    update = Update(options)
    warm_up(update)
    Path("/proc/self/clear_refs").write_text("5")
    before = common.memory("VmRSS")
    loss = update.run(LOSSES[options.side])
    peak = common.memory("VmHWM") - before
    gradients = {name: p.grad for name, p in update.model.named_parameters()}
    torch.save(gradients, options.out)
    print(json.dumps({"loss": loss, "peak_bytes": peak}))


def in_process(side: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    common.say(f"{side}: peak memory and gradients, in a process of its own …")
    out = folder / f"{side}.pt"
    command = [sys.executable, *sys.argv, "--side", side, "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    common.check(done.returncode == 0, f"{side} ended with {done.returncode} (-9: out of memory)")
    return json.loads(done.stdout), torch.load(out)


def gradient_error(tree: dict[str, Tensor], padded: dict[str, Tensor]) -> float:
    """The largest ‖difference‖ / ‖gradient‖ of any parameter."""
    return max(float((tree[name] - padded[name]).norm() / padded[name].norm()) for name in padded)


def seconds(update: Update, side: str) -> float:
    start = time.perf_counter()
    update.run(LOSSES[side])
    elapsed = time.perf_counter() - start
    common.say(f"{side}: {elapsed:.2f} s")
    return elapsed


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.add_argument("--padded-repeats", type=int, default=1, help="the padded batch is slow")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return measure_side(options)
    where = common.environment()
    with tempfile.TemporaryDirectory() as folder:
        alone = {side: in_process(side, Path(folder)) for side in SIDES}
    losses = {side: alone[side][0]["loss"] for side in SIDES}
    loss_error = abs(losses["tree"] / losses["padded"] - 1)
    grad_error = gradient_error(alone["tree"][1], alone["padded"][1])
    common.say(f"relative error: loss {loss_error:.1e}, gradients {grad_error:.1e}")
    common.check(loss_error <= TOLERANCE, f"the losses are {losses}")
    common.check(grad_error <= TOLERANCE, f"gradients differ by {grad_error:.2e} relative")

    update = Update(options)
    warm_up(update)
    update.run(tree_loss)
    # The tree is timed before and after the padded batch, so that a change of load shows in it.
    before = [seconds(update, "tree") for _ in range(options.repeats)]
    times = {"padded": [seconds(update, "padded") for _ in range(options.padded_repeats)]}
    times["tree"] = before + [seconds(update, "tree") for _ in range(options.repeats)]

    width = options.steps * (options.observation_tokens + options.action_tokens)
    branches = options.steps * options.action_tokens
    tokens = {"tree": width + branches, "padded": 2 * options.steps * width}
    median = {side: statistics.median(times[side]) for side in SIDES}
    peak = {side: alone[side][0]["peak_bytes"] for side in SIDES}
    result = {
        "benchmark": "step_pair_update",
        "shape": common.shape(options, update.model),
        "check": {"loss_relative_error": loss_error, "gradient_relative_error": grad_error},
        "seconds": {**median, "all": times, "ratio": median["padded"] / median["tree"]},
        "peak_bytes": {**peak, "ratio": peak["padded"] / peak["tree"]},
        "tokens": {**tokens, "ratio": tokens["padded"] / tokens["tree"]},
    }
    rows = [
        ["seconds", f"{median['tree']:.2f}", f"{median['padded']:.1f}"],
        ["peak memory, MiB", f"{peak['tree'] / 2**20:.0f}", f"{peak['padded'] / 2**20:.0f}"],
        ["tokens encoded", tokens["tree"], tokens["padded"]],
    ]
    ratios = [result[key]["ratio"] for key in ("seconds", "peak_bytes", "tokens")]
    targets = ["≥ 10", "≥ 5", ""]
    text = common.table(
        ["", "tree", "padded batch", "ratio", "target"],
        [[*row, f"{r:.1f}×", t] for row, r, t in zip(rows, ratios, targets, strict=True)],
    )
    title = f"One step-pair update: {common.described(options, update.model)}"
    common.report(title, __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
