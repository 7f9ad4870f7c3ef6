"""Training in 1, 2 and 4 processes (gloo): the same data, losses, gradients and weights.

The global batch is the same for all, four trajectories of five: of the last batch of an epoch one
process has a trajectory, and the others have nothing.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent.data.trajectory import Trajectory
from stepagent.envs.babyai import VOCABULARY
from stepagent.learning.config import StepAgentConfig
from stepagent.ranks import over_ranks, shares

# PEFT's, of names of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

BATCH = 4
RUNS: dict[str, dict[str, Any]] = {
    "implicit": {"samples": 2, "sft_weight": 0.3, "cycles": 2},
    "sft": {"method": "sft", "num_train_epochs": 2.0},
    "inverse": {
        "method": "inverse",
        "cycles": 2,
        "samples": 2,
        "critic_epochs": 1,
        "entropy_coef": 0.1,
        "target_kl": 1.0,
    },
    "agent": {
        "states": "agent",
        "env": "babyai:GoToLocalS6N2",
        "rollouts": 3,
        "max_steps_per_episode": 3,
        "cycles": 2,
    },
    "explorer": {
        "method": "inverse",
        "states": "agent",
        "env": "babyai:GoToLocalS6N2",
        "rollouts": 5,
        "max_steps_per_episode": 3,
        "cycles": 2,
        "critic_epochs": 1,
        "explorer": "optimistic",
        "discriminators": 2,
        "discriminator_diversity": 1.0,
        "adam_epsilon": 1e-2,  # the explorer's, with which it is nearly linear
    },
}


def trajectories() -> list[Trajectory]:
    """Five, of one to five steps and as many words to each action."""
    rng = np.random.default_rng(0)

    def said(count: int) -> str:
        return " ".join(rng.choice(VOCABULARY, count))

    return [
        Trajectory(
            [
                {"role": role, "content": said(5 if role == "user" else steps)}
                for _ in range(steps)
                for role in ("user", "assistant")
            ]
        )
        for steps in (3, 1, 5, 2, 4)
    ]


def trained(kind: str, folder: Path, ranks: int) -> dict[str, Any]:
    """What a short run made, and how it ended."""
    from stepagent.learning.trainer import StepAgentTrainer

    options = dict(RUNS[kind])
    env = options.pop("env", None)
    args = StepAgentConfig(
        output_dir=str(folder / kind),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        optim="sgd",  # linear in the gradients, as Adam is not
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH // ranks,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_episodes=3 if env else None,
        eval_seed_start=100,
        seed=3,
        **options,
    )
    # In float64; and where the reference and the discriminator are not the policy itself: there
    # margins and gradients are 0, and their signs rounding, of which Adam makes much.
    others: dict[str, Any] = {"env": env, "eval_dataset": trajectories()[:3]}
    if args.method != "sft":
        others["ref_model"] = tiny_agent(seed=1).double()
    if args.method == "inverse":
        others["discriminator"] = tiny_agent(seed=2).double()
    if kind == "explorer":
        others["peft_config"] = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model, tokenizer = tiny_agent().double(), babyai_tokenizer()
    made = StepAgentTrainer(model, args, trajectories(), tokenizer, **others)
    made.train()
    logs = made.state.log_history
    return {
        "tokens": [
            [c.trunk.input_ids.tolist(), [[b.tolist() for b in step] for step in c.branches]]
            for c in made._comparisons
        ],
        "scores": [
            torch.from_numpy(np.concatenate([getattr(c, name) for c in made._comparisons]))
            for name in ("ref_logps", "old_logps", "advantages")
        ],
        "evaluations": [
            {name: value for name, value in entry.items() if "_per_second" not in name}
            for entry in logs
            if entry.pop("eval_runtime", None)
        ],
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in logs if "grad_norm" in entry],
        "cycles": [entry for entry in logs if "cycle" in entry],
        "weights": [p.detach().clone() for p in made.model.parameters()],
        "explorer": made._method.reflection.explorer.state() if kind == "explorer" else {},
    }


def refusals(rank: int, ranks: int) -> list[str]:
    def work(items: list[int]) -> list[int]:
        if rank == 1:
            raise ValueError("broken")
        return items

    try:
        over_ranks(work, np.ones(ranks))
    except (RuntimeError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return []


def rank_main(rank: int, folder: str, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    found: dict[str, Any] = {kind: trained(kind, Path(folder), ranks) for kind in RUNS}
    found["shared"] = over_ranks(lambda items: [(i, rank) for i in items], [3, 1, 2])
    found["alike"] = over_ranks(lambda items: [(i, rank) for i in items], [3, 1, 2], alike=True)
    found["refused"] = refusals(rank, ranks)
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    mp.spawn(rank_main, args=(str(folder), ranks, free_port()), nprocs=ranks)
    load = partial(torch.load, weights_only=True)
    return [load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {kind: trained(kind, tmp_path_factory.mktemp("one"), 1) for kind in RUNS}


@pytest.mark.parametrize("kind", RUNS)
def test_any_number_of_processes_trains_as_one(
    kind: str, several: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    expected = one[kind]
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    for found in (ranks[kind] for ranks in several):
        assert found["tokens"] == expected["tokens"]
        close(found["scores"], expected["scores"])
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert len(found["cycles"]) == len(expected["cycles"])
        for cycle, other in zip(found["cycles"], expected["cycles"], strict=True):
            assert cycle == pytest.approx(other, rel=1e-4, abs=1e-5)
        # A figure is a mean over all that was held out, whoever scored it.
        assert len(found["evaluations"]) == len(expected["evaluations"]) == len(found["losses"])
        for figures, other in zip(found["evaluations"], expected["evaluations"], strict=True):
            assert figures == pytest.approx(other, rel=1e-4, abs=1e-5)
        close(found["weights"], expected["weights"])
        close(found["explorer"], expected["explorer"])
    assert len(expected["losses"]) == (2 if kind == "agent" else 4)


def test_each_item_is_done_by_one_process_and_all_have_all(several: list[dict[str, Any]]) -> None:
    ranks = len(several)
    owners = {i: rank for rank, share in enumerate(shares([3, 1, 2], ranks)) for i in share}
    for found in several:
        assert found["shared"] == [(i, owners[i]) for i in range(3)]
        assert found["alike"] == [(i, 0) for i in range(3)]


def test_an_error_of_one_process_is_raised_by_all(several: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(several):
        name, words = found["refused"]
        assert name == ("ValueError" if rank == 1 else "RuntimeError")
        assert words == ("broken" if rank == 1 else "process 1 failed: ValueError('broken')")


def test_shares_are_balanced_and_some_empty_where_items_are_few() -> None:
    assert shares([3, 1, 3], 2) == [[0, 1], [2]]
    assert shares([5, 1], 4) == [[0], [1], [], []]
    assert shares([], 2) == [[], []]
    assert over_ranks(lambda items: items, np.ones(3)) == [0, 1, 2]
    assert over_ranks(lambda items: 1 / 0, []) == []
