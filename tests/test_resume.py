"""Resuming: on another number of processes, after epochs that were ended early, with other data."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_ranks import free_port, trajectories
from tiny_models import babyai_tokenizer, tiny_agent
from transformers import TrainerCallback

from stepagent.data.trajectory import Trajectory
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.trainer import StepAgentTrainer

BATCH = 4


class Seen(TrainerCallback):
    """Notes the trunks of each step, and does something at one of them."""

    def __init__(self, stop_at: int | None = None, end_epochs_at: tuple[int, ...] = ()) -> None:
        self.stop_at, self.end_epochs_at = stop_at, end_epochs_at
        self.epochs: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop_at:
            control.should_training_stop = control.should_save = True
        if state.global_step in self.end_epochs_at:
            control.should_epoch_stop = True


class Watched(StepAgentTrainer):
    """Notes the epochs that were begun and the items of each step of this process."""

    seen: list[list[list[int]]]
    begun: list[int]

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self.begun = [*getattr(self, "begun", []), epoch]

    def get_batch_samples(self, *args: Any) -> Any:
        batches, counts = super().get_batch_samples(*args)
        tokens = sorted(
            tree.input_ids.tolist()
            for batch in batches
            if batch["steps"] is not None
            for tree in batch["trees"]
        )
        self.seen = [*getattr(self, "seen", []), tokens]
        return batches, counts


def make(
    folder: Path, ranks: int = 1, callbacks: Any = (), rows: Any = None, **options: Any
) -> Watched:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_strategy": "no",
        # Large, so that Adam does not make a step of what rounding leaves of a gradient of 0.
        "adam_epsilon": 1e-2,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": BATCH // ranks,
        "cycles": 2,
        "epochs_per_cycle": 2,
        "samples": 2,
        "max_tokens": 400,
        "seed": 3,
    }
    args = StepAgentConfig(**defaults | options)
    others: dict[str, Any] = {}
    if args.method != "sft":
        others["ref_model"] = tiny_agent(seed=1)
    if args.method == "inverse":
        others["discriminator"] = tiny_agent(seed=2)
    rows = trajectories() if rows is None else rows
    model = tiny_agent()
    return Watched(model, args, rows, babyai_tokenizer(), callbacks=list(callbacks), **others)


def weights(trainer: StepAgentTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ------------------------------------------------------------------ 1 → 2 → 4 → 1 processes

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "num_train_epochs": 4.0, "cycles": 5, "samples": 1},
    "implicit": {},
    "inverse": {"method": "inverse", "critic_epochs": 1},
}
# In a run of 8 steps: within a cycle's first epoch, at an epoch's end within it, in the next cycle.
STOPS = ((1, 1), (2, 3), (4, 6), (1, None))


def rank_main(
    rank: int, folder: str, ranks: int, port: int, kind: str, stop: int | None, resume: bool
) -> None:
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
    made = make(Path(folder), ranks, [Seen(stop_at=stop)], **METHODS[kind])
    made.train(resume_from_checkpoint=True if resume else None)
    logged = [entry for entry in made.state.log_history if "cycle" in entry]
    found = {"weights": weights(made), "seen": made.seen, "cycles": logged}
    torch.save(found, Path(folder, f"found-{ranks}-{rank}-{stop}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def seen_by_all(folder: Path, ranks: int, stop: int | None) -> list[list[list[int]]]:
    parts = [
        torch.load(folder / f"found-{ranks}-{rank}-{stop}.pt", weights_only=True)["seen"]
        for rank in range(ranks)
    ]
    return [sorted(chain.from_iterable(step)) for step in zip(*parts, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_a_run_goes_on_over_any_number_of_processes(kind: str, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", save_strategy="no", **METHODS[kind])
    whole.train()
    seen = []
    for place, (ranks, stop) in enumerate(STOPS):
        arguments = (str(tmp_path / "parts"), ranks, free_port(), kind, stop, place > 0)
        mp.spawn(rank_main, args=arguments, nprocs=ranks)
        steps = (stop or 8) - (STOPS[place - 1][1] or 0 if place else 0)
        # Batches are fetched before a callback stops the run, but no step more is made of them.
        seen += seen_by_all(tmp_path / "parts", ranks, stop)[:steps]
    end = torch.load(tmp_path / "parts" / "found-1-0-None.pt", weights_only=True)
    torch.testing.assert_close(end["weights"], weights(whole), rtol=1e-5, atol=1e-5)
    assert len(seen) == 8
    # Trees are cut by batch, so what is compared is their tokens.
    tokens = [sorted(chain.from_iterable(step)) for step in seen]
    assert tokens == [sorted(chain.from_iterable(step)) for step in whole.seen]
    logged = [entry for entry in whole.state.log_history if "cycle" in entry]
    assert len(end["cycles"]) == len(logged) == (0 if kind == "sft" else 2)
    for mine, other in zip(end["cycles"], logged, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


# ------------------------------------------------------------------ epochs that end early


def test_an_epoch_ended_early_is_neither_repeated_nor_is_the_last_one_dropped(tmp_path):
    made = make(tmp_path, callbacks=[Seen(end_epochs_at=(1,))], save_strategy="no")
    made.train()
    assert made.begun == [0, 1, 2, 3]
    assert made.state.global_step == 7
    assert [e["cycle"] for e in made.state.log_history if "cycle" in e] == [0, 1]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_whose_epoch_was_ended_early_resumes_where_it_was(step, tmp_path):
    ended = [Seen(end_epochs_at=(1,))]
    whole = make(tmp_path / "whole", callbacks=ended)
    whole.train()
    resumed = make(tmp_path / "resumed", callbacks=ended)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert resumed.begun == {1: [1, 2, 3], 2: [1, 2, 3], 3: [2, 3]}[step]
    assert torch.equal(weights(resumed), weights(whole))


def test_training_that_stops_within_an_epoch_resumes_within_it(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path / "run", callbacks=[Seen(stop_at=3)], save_strategy="epoch")
    stopped.train()
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.begun == [1, 2, 3]
    assert torch.equal(weights(resumed), weights(whole))
    cycles = [[e for e in run.state.log_history if "cycle" in e] for run in (resumed, whole)]
    assert cycles[0][-1] == cycles[1][-1]


def test_a_cycle_is_begun_whenever_it_is_not_the_present_one(tmp_path):
    made = make(tmp_path)
    made.begin_epoch(3)  # the second epoch of the second cycle
    assert made._cycle == 1


# ------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make(tmp_path_factory.mktemp("run"), callbacks=[Seen(stop_at=1)])
    made.train()
    return f"{made.args.output_dir}/checkpoint-1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 2}, "accumulation_steps × processes must be 4 .*, got 2"),
        ({"epochs_per_cycle": 1}, "epochs_per_cycle must be 2 .*, got 1"),
        ({"rows": trajectories()[:4]}, "train_dataset, must be 5 .*, got 4"),
        ({"rows": [*trajectories()[:4], trajectories()[0]]}, "train_dataset, as the tokenizer enc"),
        ({"method": "inverse"}, "method must be implicit .*, got inverse"),
    ],
    ids=["batch", "epochs", "fewer rows", "other rows", "method"],
)
def test_a_checkpoint_of_a_run_that_counts_otherwise_is_refused(
    options, message, checkpoint, tmp_path
):
    made = make(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        made.train(resume_from_checkpoint=checkpoint)
    assert made.state.global_step == 0


def test_a_supervised_run_is_refused_as_well(tmp_path):
    options = {"method": "sft", "samples": 1, "cycles": 5, "num_train_epochs": 2.0}
    made = make(tmp_path, callbacks=[Seen(stop_at=1)], **options)
    made.train()
    other = make(tmp_path, per_device_train_batch_size=2, **options)
    with pytest.raises(ValueError, match="processes must be 4"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_from_before_the_place_was_written_resumes(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    folder = Path(whole.args.output_dir, "checkpoint-3")
    (folder / "stepagent.json").unlink()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(folder))
    assert torch.equal(weights(resumed), weights(whole))


def test_trajectories_differ_in_length() -> None:
    """Else a tree's tokens would not tell one from another."""
    lengths = [len(t.messages) for t in trajectories()]
    assert len(set(lengths)) == len(lengths) == len(np.unique(lengths))
    assert isinstance(trajectories()[0], Trajectory)
