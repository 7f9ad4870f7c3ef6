"""A checkpoint in bfloat16, given by name, at a learning rate of 1e-6: how many weights move?

    python benchmarks/weights_moved.py FOLDER_OR_NAME

The model is saved as a bfloat16 checkpoint in a temporary folder and trained from it by its name
with AdamW, once for each of --dtypes: `checkpoint` keeps the weights in bfloat16, `float32` (the
default of StepAgentConfig) updates float32 weights. Data are expert trajectories of BabyAI,
`method="sft"`, constant learning rate, --steps updates of one trajectory each. A weight has moved
where it is another number after training than before; the third column rounds both to bfloat16
first, as one who saves the model in the checkpoint's dtype does. All weights count. The last loss
is of the same trajectory for every dtype, before the last update.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--dtypes", nargs="+", default=["checkpoint", "float32"])
    options = parser.parse_args()
    where = common.environment()
    with tempfile.TemporaryDirectory() as folder:
        name = save_bfloat16(options.model, Path(folder))
        results = {dtype: measure(name, dtype, options, Path(folder)) for dtype in options.dtypes}
    rows = [
        [
            dtype,
            f"{result['moved']:.2%}",
            f"{result['moved_in_bfloat16']:.2%}",
            f"{result['loss'][-1]:.4f}",
        ]
        for dtype, result in results.items()
    ]
    columns = ["model_dtype", "weights that moved", "once rounded to bfloat16", "last loss"]
    text = common.table(columns, rows)
    title = f"Weights that {options.steps} steps at {options.learning_rate:g} move"
    common.report(
        title,
        __doc__ or "",
        text,
        {"benchmark": "weights_moved", "results": results},
        options.json,
        where,
    )


def save_bfloat16(model: str, folder: Path) -> str:
    """The checkpoint in bfloat16, with its tokenizer; its folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def measure(name: str, dtype: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from stepagent import StepAgentConfig, StepAgentTrainer

    args = StepAgentConfig(
        output_dir=str(folder / dtype),
        method="sft",
        model_dtype=dtype,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=options.steps,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    trainer = StepAgentTrainer(name, args, common.expert_trajectories(options.steps), tokenizer)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = [p.detach() for p in trainer.model.parameters()]
    pairs = list(zip(before, after, strict=True))
    total = sum(a.numel() for a in after)
    half = torch.bfloat16
    return {
        "moved": sum(int((a != b).sum()) for a, b in pairs) / total,
        "moved_in_bfloat16": sum(int((a.to(half) != b.to(half)).sum()) for a, b in pairs) / total,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": total,
        "dtype": str(after[0].dtype),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
