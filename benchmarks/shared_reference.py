"""LoRA against a fixed reference: one copy of the base in memory, or two.

    python benchmarks/shared_reference.py --model FOLDER

Both sides train the same adapter in the same way on --trajectories short ones of BabyAI:
`method="implicit"`, rank 8 on all linear layers, float32, a trajectory a batch, checkpointed
layers, an update of the adapter in each of --cycles cycles. `shared` gives the model's own name as
`ref_model`, so the reference is the policy with its adapter off. `two models` gives a model that
was loaded on its own. Each side runs in a fresh process. Its peak is the largest resident set of
that process (VmHWM); the last column is the peak less the resident set when all packages were
imported and no model was loaded. The check: losses, rewards and log-probs of both sides are equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

import common

SIDES = ("shared", "two models")
FIGURES = ("mean_loss", "reward_margin", "kl", "expert_logp", "agent_logp")
MIB = 2**20


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--trajectories", type=int, default=2)
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(train(options)))
        return
    where = common.environment("peft")
    sides = {side: in_fresh_process(side) for side in SIDES}
    shared, two = (sides[side] for side in SIDES)
    common.check(shared["copies"] == 1 and two["copies"] == 2, f"copies in memory: {sides}")
    common.check(shared["figures"] == two["figures"], f"the sides learn differently: {sides}")
    common.check(
        abs(shared["figures"][-1]["reward_margin"]) > 1e-3, "the adapter has learnt nothing"
    )
    ratios = {
        "of_the_models": (shared["peak"] - shared["base"]) / (two["peak"] - two["base"]),
        "of_the_process": shared["peak"] / two["peak"],
    }
    rows = [
        [side, f"{found['peak'] / MIB:.0f} MiB", f"{(found['peak'] - found['base']) / MIB:.0f} MiB"]
        for side, found in sides.items()
    ]
    rows.append(["ratio", *(f"{ratios[name]:.0%}" for name in ("of_the_process", "of_the_models"))])
    losses = ", ".join(f"{cycle['mean_loss']:.4f}" for cycle in shared["figures"])
    common.report(
        "Peak memory of LoRA against a fixed reference",
        (__doc__ or "") + f"\nLosses of the cycles, on both sides: {losses}.",
        common.table(["reference", "peak", "above the imported packages"], rows),
        {"benchmark": "shared_reference", "sides": sides, "ratios": ratios},
        options.json,
        where,
    )


def in_fresh_process(side: str) -> dict[str, Any]:
    common.say(side)
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    common.check(done.returncode == 0, f"{side} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process: its memory, and what each cycle logged."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stepagent import StepAgentConfig, StepAgentTrainer
    from stepagent.models import unwrapped

    torch.set_num_threads(options.threads)
    trajectories = common.expert_trajectories(options.trajectories)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    reference = options.model
    base = common.memory("VmRSS")
    if options.side == "two models":
        reference = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = StepAgentTrainer(
            options.model,
            StepAgentConfig(
                output_dir=folder,
                cycles=options.cycles,
                max_new_tokens=8,
                learning_rate=1e-3,
                per_device_train_batch_size=1,
                per_device_eval_batch_size=1,
                gradient_accumulation_steps=options.trajectories,
                activation_checkpointing=True,
                inspect_batch_tokens=1024,
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
            ),
            trajectories,
            tokenizer,
            ref_model=reference,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "cycle" in entry]
    same = trainer._scorer._ref_model is unwrapped(trainer.model)
    return {
        "base": base,
        "peak": common.memory("VmHWM"),
        "copies": 1 if same else 2,
        "figures": [{name: entry[name] for name in FIGURES} for entry in log],
    }


if __name__ == "__main__":
    main()
