"""One step of the optimiser, however its eight trajectories are cut: is it one gradient?

``python benchmarks/step_gradients.py`` tries the methods of ``METHODS`` × {batch 8×1, 4×2, 1×8} ×
{1, 2, 4 processes} × {float32, bfloat16 autocast} and writes benchmarks/results/step_gradients.md.
Each figure is |g − g₁| / |g₁|, g₁ that of one process with all trajectories in one batch.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"num_train_epochs": 1.0},
    "implicit": {"cycles": 1, "samples": 2, "sft_weight": 0.3},
    # Its critic's batches are not accumulated: it learns nothing here.
    "inverse": {"cycles": 1, "samples": 2, "critic_epochs": 1, "critic_learning_rate": 1e-30},
    "srl": {"cycles": 1, "samples": 3},
    "distillation": {"cycles": 1, "samples": 2},
    "early_experience": {"cycles": 1, "samples": 2},
}
_WITHOUT_REFERENCE = ("sft", "early_experience")
CUTS = {"8×1": 1, "4×2": 2, "1×8": 8}  # batches a step of one process
PROCESSES = (1, 2, 4)
PRECISIONS = ("fp32", "bf16")
_TRAJECTORIES = 8

Case = tuple[str, str, int, str]


def gradient(case: Case, folder: Path) -> torch.Tensor:
    """Of all weights, in the first step of a run; all processes have to call this."""
    from hostile_envs import LEVEL
    from test_alternatives import demonstrations
    from test_ranks import trajectories
    from tiny_models import babyai_tokenizer, tiny_agent
    from transformers import TrainerCallback

    from stepagent import StepAgentConfig, StepAgentTrainer, Trajectory

    class Caught(TrainerCallback):
        found: torch.Tensor

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parameters = kwargs["model"].parameters()
            self.found = torch.cat([p.grad.flatten().clone() for p in parameters])

    method, cut, processes, precision = case
    batches = min(CUTS[cut], _TRAJECTORIES // processes)
    args = StepAgentConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1e-3,
        method=method,
        bf16=precision == "bf16",
        per_device_train_batch_size=_TRAJECTORIES // processes // batches,
        gradient_accumulation_steps=batches,
        seed=3,
        **METHODS[method],
    )
    others: dict[str, Any] = {}
    if method not in _WITHOUT_REFERENCE:
        others["ref_model"] = tiny_agent(seed=1)
    if method == "inverse":
        others["discriminator"] = tiny_agent(seed=2)
    rows = [*trajectories(), *(Trajectory(t.messages * 2) for t in trajectories()[:3])]
    if method == "early_experience":
        others["env"], rows = LEVEL, demonstrations(seeds=range(_TRAJECTORIES))
    caught = Caught()
    made = StepAgentTrainer(
        tiny_agent(), args, rows, babyai_tokenizer(), callbacks=[caught], **others
    )
    made.train()
    assert made.state.global_step == 1
    return caught.found


def _rank_main(rank: int, folder: str, processes: int, port: int, cases: list[Case]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    found = {case: gradient(case, Path(folder)) for case in cases}
    if rank == 0:
        torch.save(found, Path(folder, f"{processes}.pt"))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def errors() -> dict[Case, float]:
    """Of every case, the relative distance from one process and one batch."""
    cases = list(product(METHODS, CUTS, PROCESSES, PRECISIONS))
    found: dict[Case, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in PROCESSES:
            mine = [case for case in cases if case[2] == processes]
            mp.spawn(_rank_main, args=(folder, processes, _free_port(), mine), nprocs=processes)
            found |= torch.load(Path(folder, f"{processes}.pt"), weights_only=True)
    apart = {}
    for case in cases:
        whole = found[case[0], "8×1", 1, case[3]]
        apart[case] = float((found[case] - whole).norm() / whole.norm())
    return apart


def table(apart: dict[Case, float]) -> str:
    columns = list(product(PROCESSES, CUTS))
    rows = [
        "| | " + " | ".join(f"{p} proc., {cut}" for p, cut in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method, precision in product(METHODS, PRECISIONS):
        cells = (f"{apart[method, cut, p, precision]:.1e}" for p, cut in columns)
        rows.append(f"| {method}, {precision} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = table(errors())
    print(text)
    head = (
        "`python benchmarks/step_gradients.py`: |g − g₁| / |g₁| of a step of eight trajectories, "
    )
    head += (
        "g₁ of one process with one batch.\nBatches are of one process; of several processes each "
    )
    head += "has its share of the eight.\n\n"
    (ROOT / "benchmarks" / "results" / "step_gradients.md").write_text(head + text)
