"""Training under DeepSpeed in two processes (gloo): ZeRO-1 and ZeRO-2 learn what DDP does.

DeepSpeed is no dependency of the package; where it is not installed these tests are skipped.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig
from test_ranks import free_port, trajectories
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent.learning.config import StepAgentConfig

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RANKS = 2
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "num_train_epochs": 2.0},
    "implicit": {"samples": 2, "cycles": 2},
    "inverse": {"method": "inverse", "cycles": 2, "samples": 2, "critic_epochs": 1},
    "head adapter": {"samples": 2, "cycles": 2, "lora": ["q_proj", "lm_head"]},
    "tied": {"samples": 2, "cycles": 2, "tied": True},
}


def trained(method: str, stage: int, folder: Path) -> dict[str, Any]:
    from stepagent.learning.trainer import StepAgentTrainer

    options = dict(METHODS[method])
    tied, lora = options.pop("tied", False), options.pop("lora", None)
    model = tiny_agent(tie_word_embeddings=tied)
    args = StepAgentConfig(
        output_dir=str(folder / f"{method}{stage}"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        optim="sgd",
        learning_rate=2e-3,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        seed=3,
        deepspeed={
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",  # without it DeepSpeed clips to 1
            "zero_allow_untested_optimizer": True,
        }
        if stage
        else None,
        **options,
    )
    others: dict[str, Any] = {}
    if args.method != "sft":
        others["ref_model"] = tiny_agent(seed=1, tie_word_embeddings=tied)
    if args.method == "inverse":
        others["discriminator"] = tiny_agent(seed=2)
    if lora:
        others["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=lora)
    made = StepAgentTrainer(model, args, trajectories(), babyai_tokenizer(), **others)
    made.train()
    logs = made.state.log_history
    return {
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "weights": [p.detach().clone() for p in made.model.parameters()],
        "agreement": [entry["agreement"] for entry in logs if "cycle" in entry],
    }


def refusal(folder: Path) -> str:
    """Of ZeRO-3, with the model there before: made later, DeepSpeed partitions it at once."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    with pytest.raises(ValueError, match="ZeRO-3") as raised:
        trained("sft", 3, folder)
    return str(raised.value)


def rank_main(rank: int, folder: str, stage: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    found: dict[str, Any] = {method: trained(method, stage, Path(folder)) for method in METHODS}
    if stage:
        found["refusal"] = refusal(Path(folder))
    torch.save(found, Path(folder, f"stage{stage}-rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("stages")
    load = partial(torch.load, weights_only=True)
    found = {}
    for stage in (0, 1, 2):
        mp.spawn(rank_main, args=(str(folder), stage, free_port()), nprocs=RANKS)
        found[stage] = [load(folder / f"stage{stage}-rank{rank}.pt") for rank in range(RANKS)]
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_zero_learns_what_ddp_does(
    method: str, stage: int, stages: dict[int, list[dict[str, Any]]]
) -> None:
    expected = stages[0][0][method]
    for rank in stages[stage]:
        found = rank[method]
        assert found["agreement"] == expected["agreement"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-5)
        for mine, other in zip(found["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_zero_3_is_refused_by_name(stages: dict[int, list[dict[str, Any]]]) -> None:
    for rank in stages[2]:
        assert "DeepSpeed ZeRO-3 is not supported: it takes the head's weight" in rank["refusal"]
