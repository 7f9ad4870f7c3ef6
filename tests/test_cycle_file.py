"""The episodes of training with their cycles: what is kept, what is dropped, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_online import Letters
from test_ranks import trajectories
from tiny_models import babyai_tokenizer, tiny_agent
from transformers import TrainerCallback

from stepagent.data.trajectory import load_trajectories
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.records.cycle_file import ROLLOUTS, write_cycle
from stepagent.records.episodes import Episode, load_episodes


def episode(seed: int) -> Episode:
    return Episode("room", seed, observations=["cold"], actions=["heat"], rewards=[1.0])


def held(path: Path) -> list[tuple[int, int]]:
    """Cycle and seed of each line."""
    return [(t.meta["cycle"], t.meta["seed"]) for t in load_trajectories(path)]


# ------------------------------------------------------------------ the file


def test_cycles_follow_each_other_and_come_back_as_episodes(tmp_path: Path) -> None:
    path = tmp_path / "new" / ROLLOUTS
    write_cycle(path, 0, [episode(0), episode(1)])
    write_cycle(path, 1, [episode(0)])  # a task of before
    assert held(path) == [(0, 0), (0, 1), (1, 0)]
    assert load_episodes(path)[1].actions == ["heat"]


@pytest.mark.parametrize("cycle", [0, 1, 2])
def test_a_cycle_that_is_made_anew_takes_the_place_of_all_from_it_on(
    cycle: int, tmp_path: Path
) -> None:
    path = tmp_path / ROLLOUTS
    for before in range(3):
        write_cycle(path, before, [episode(before)])
    write_cycle(path, cycle, [episode(9)])
    assert held(path) == [(c, c) for c in range(cycle)] + [(cycle, 9)]


def test_a_line_cut_short_is_dropped_with_its_cycle(tmp_path: Path) -> None:
    path = tmp_path / ROLLOUTS
    write_cycle(path, 0, [episode(0)])
    whole = path.read_bytes()
    write_cycle(path, 1, [episode(1), episode(2)])
    path.write_bytes(path.read_bytes()[:-7])
    write_cycle(path, 1, [episode(1), episode(2)])
    assert held(path) == [(0, 0), (1, 1), (1, 2)]
    assert path.read_bytes().startswith(whole)


def test_episodes_without_a_step_leave_no_file(tmp_path: Path) -> None:
    write_cycle(tmp_path / ROLLOUTS, 0, [Episode("room", 0)])
    assert not (tmp_path / ROLLOUTS).exists()


@pytest.mark.parametrize("text", ['{"messages": []}\n', '{"messages": [], "meta": {}}\n', "[]\n"])
def test_a_file_that_holds_something_else_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / ROLLOUTS
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a line of training with save_rollouts"):
        write_cycle(path, 0, [episode(0)])
    assert path.read_text() == text


# ------------------------------------------------------------------ the trainer


class StopAt(TrainerCallback):
    """Ends a run at a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def trained(folder: Path, stop: int | None = None, resume: bool = False, **options: Any) -> None:
    defaults: dict[str, Any] = {"method": "grpo", "group_size": 2, "rollouts": 4, "cycles": 3}
    args = StepAgentConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=2,
        max_new_tokens=1,
        save_rollouts=True,
        **defaults | options,
    )
    callbacks = [] if stop is None else [StopAt(stop)]
    made = StepAgentTrainer(
        tiny_agent(), args, trajectories(), babyai_tokenizer(), env=Letters, callbacks=callbacks
    )
    made.train(resume_from_checkpoint=resume)


def test_a_run_keeps_each_cycles_episodes(tmp_path: Path) -> None:
    trained(tmp_path)
    assert held(tmp_path / ROLLOUTS) == [(c, 2 * c + g) for c in range(3) for g in (0, 0, 1, 1)]


# Within the second cycle, and at its end.
@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_neither_loses_nor_repeats_a_cycle(stop: int, tmp_path: Path) -> None:
    trained(tmp_path / "whole")
    trained(tmp_path / "resumed", stop=stop)
    trained(tmp_path / "resumed", resume=True)
    whole, resumed = [(tmp_path / name / ROLLOUTS).read_text() for name in ("whole", "resumed")]
    assert resumed == whole


def test_the_experts_answers_are_in_the_rollouts(tmp_path: Path) -> None:
    class Answered(Letters):
        def expert_action(self) -> str:
            return "go"

    args = StepAgentConfig(
        output_dir=str(tmp_path),
        method="dagger",
        cycles=1,
        rollouts=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_new_tokens=1,
        save_rollouts=True,
    )
    StepAgentTrainer(tiny_agent(), args, trajectories(), babyai_tokenizer(), env=Answered).train()
    for one in load_episodes(tmp_path / ROLLOUTS):
        assert set(one.expert_actions) == {"go"}


@pytest.mark.parametrize("method", ["implicit", "sft", "ipr", "early_experience"])
def test_a_method_without_episodes_of_its_own_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_rollouts needs states='agent' or 'mixed'"):
        StepAgentConfig(output_dir=str(tmp_path), method=method, save_rollouts=True)


@pytest.mark.parametrize("method", ["eto", "rft", "dagger"])
def test_a_method_that_rolls_out_takes_it(method: str, tmp_path: Path) -> None:
    assert StepAgentConfig(output_dir=str(tmp_path), method=method, save_rollouts=True)
