"""A step of TRL's DPO on the pairs of one trajectory: its own trainer against stepagent's two.

Measured: `training_step` (policy and reference forward, the loss, backward) on T pairs of an
expert's and an agent's action, on one Llama with the same weights, CPU, float32, one thread.

* dpo: TRL's DPOTrainer, its own loss, 2T padded rows.
* rows: stepagent's StepDPOTrainer on the same rows: TRL's log-probs, the objective of stepagent.
* tree: stepagent's TreeDPOTrainer: the trajectory and the agent's actions as one token tree.

The rows are given as token ids, so TRL's tokenizing is outside. Each side runs in a process of its
own; the losses must agree within 1e-4, or nothing is reported. Seconds are the CPU time of the
process, the median of the runs after the first. Peak memory: the kernel's high-water mark of
resident memory over the first step, less resident memory before it; the gradients, the same on all
sides, are inside.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

TOLERANCE = 1e-4
SIDES = ("dpo", "rows", "tree")


def make_trainer(options: argparse.Namespace, folder: str) -> Any:
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from stepagent.integrations.trl import StepDPOTrainer, TreeDPOTrainer, tree_rows
    from stepagent.tools.small_models import word_tokenizer

    class FromIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class StepsFromIds(StepDPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    trunk, agent = common.trajectory(options)
    if options.side == "tree":
        trainer_class, rows = TreeDPOTrainer, tree_rows([trunk], [[[action] for action in agent]])
    else:
        trainer_class = FromIds if options.side == "dpo" else StepsFromIds
        rows = [
            {
                "prompt_ids": trunk.state_ids(t).tolist(),
                "chosen_ids": trunk.input_ids[start:stop].tolist(),
                "rejected_ids": agent[t].tolist(),
                "chosen_mask": [1] * int(stop - start),
                "rejected_mask": [1] * len(agent[t]),
            }
            for t, (start, stop) in enumerate(trunk.action_spans)
        ]
    reference = common.llama(options)
    policy = copy.deepcopy(reference)
    for parameter in policy.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    args = DPOConfig(
        folder,
        per_device_train_batch_size=len(rows),
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": word_tokenizer([])}
    return trainer_class(policy, reference, args, **data)


def measure_side(options: argparse.Namespace) -> None:
    """In a process of its own: loss, CPU seconds and peak memory, as JSON on stdout."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        if options.side == "tree":
            from stepagent import check_tree_support

            check_tree_support(trainer.model)
        with torch.no_grad():
            trainer.model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
        Path("/proc/self/clear_refs").write_text("5")
        before, peak, times = common.memory("VmRSS"), 0, []
        for run in range(1 + options.repeats):
            trainer.model.zero_grad()
            start = time.process_time()
            loss = float(trainer.training_step(trainer.model, batch))
            times.append(time.process_time() - start)
            if not run:
                peak = common.memory("VmHWM") - before
    print(json.dumps({"loss": loss, "seconds": times[1:], "peak_bytes": peak}))


def in_process(side: str) -> dict[str, Any]:
    common.say(f"{side} …")
    command = [sys.executable, *sys.argv, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    common.check(done.returncode == 0, f"{side} ended with {done.returncode} (-9: out of memory)")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    common.say(f"{side}: {found}")
    return found


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.set_defaults(layers=2, hidden=128, threads=1, repeats=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return measure_side(options)
    where = common.environment("trl")
    found = {side: in_process(side) for side in SIDES}
    losses = {side: found[side]["loss"] for side in SIDES}
    error = max(abs(losses[side] - losses["dpo"]) for side in SIDES)
    common.check(error <= TOLERANCE, f"the losses are {losses}")

    seconds = {side: statistics.median(found[side]["seconds"]) for side in SIDES}
    peak = {side: found[side]["peak_bytes"] for side in SIDES}
    shape = common.shape(options, model := common.llama(options))
    result = {
        "benchmark": "hosts",
        "shape": shape,
        "check": {"loss": losses, "error": error},
        "cpu_seconds": {side: found[side]["seconds"] for side in SIDES},
        "seconds_ratio": {side: seconds["dpo"] / seconds[side] for side in SIDES},
        "peak_bytes": peak,
        "peak_ratio": {side: peak["dpo"] / peak[side] for side in SIDES},
    }
    rows = [
        [
            {"dpo": "TRL's DPOTrainer", "rows": "StepDPOTrainer", "tree": "TreeDPOTrainer"}[side],
            f"{losses[side]:.6f}",
            f"{seconds[side]:.2f}",
            f"{seconds['dpo'] / seconds[side]:.2f}×",
            f"{peak[side] / 2**20:.0f}",
            f"{peak['dpo'] / peak[side]:.2f}×",
        ]
        for side in SIDES
    ]
    header = ["", "loss", "CPU seconds", "faster", "peak memory, MiB", "less"]
    title = f"A step of DPO in TRL: {common.described(options, model)}"
    common.report(title, __doc__ or "", common.table(header, rows), result, options.json, where)


if __name__ == "__main__":
    main()
