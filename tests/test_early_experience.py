"""Early Experience: observations are learnt beside actions, as it is worked out by hand."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_envs import LEVEL
from test_alternatives import by_hand, demonstrations, sequence
from test_resume import Seen, weights
from test_rollouts import talker
from tiny_models import babyai_tokenizer, separate_logprobs

import stepagent as sa
from stepagent.envs import make as make_env

SEEDS = [3, 1, 4]


def make(folder: Path, rows: Any = None, callbacks: Any = (), **options: Any) -> Any:
    env = options.pop("env", LEVEL)
    defaults: dict[str, Any] = {
        "method": "early_experience",
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "adam_epsilon": 1e-2,
        "per_device_train_batch_size": 2,
        "cycles": 2,
        "epochs_per_cycle": 2,
        "samples": 3,
        "max_new_tokens": 3,
        "seed": 3,
    }
    rows = demonstrations(seeds=SEEDS) if rows is None else rows
    args = sa.StepAgentConfig(**defaults | options)
    return sa.StepAgentTrainer(
        talker(), args, rows, babyai_tokenizer(), env=env, callbacks=list(callbacks)
    )


@torch.no_grad()
def worked_out(rows: Any, branches: Any, weight: float) -> tuple[float, int]:
    """The loss in float64: one environment, prompts of their own, means over tokens; and how many
    observations there are."""
    model, tokenizer, env = talker().double().eval(), babyai_tokenizer(), make_env(LEVEL)
    actions, observations = [], []
    for trajectory, steps in zip(rows, branches, strict=True):
        trunk = sa.encode(trajectory, tokenizer)
        actions.append(separate_logprobs(model, [trunk], [[[] for _ in steps]]))
        for t, tried in enumerate(steps):
            texts = [tokenizer.decode(ids).replace("<|im_end|>", "").strip() for ids in tried]
            for text in dict.fromkeys(texts):
                one = sequence(tokenizer, trajectory, t, by_hand(env, trajectory, t, text))
                observations.append(separate_logprobs(model, [one], [[[]]]))
    loss = -torch.cat(actions).mean() - weight * torch.cat(observations).mean()
    return float(loss), len(observations)


@pytest.mark.parametrize("batches", [1, 2])
def test_the_loss_is_the_one_worked_out_in_float64(batches, tmp_path):
    rows = demonstrations(seeds=[8, 5])
    trainer = make(
        tmp_path,
        rows,
        cycles=1,
        epochs_per_cycle=1,
        world_weight=0.7,
        per_device_train_batch_size=2 // batches,
        gradient_accumulation_steps=batches,
    )
    trunks = [sa.encode(row, babyai_tokenizer()) for row in rows]
    found = sa.inspect(
        talker(), trunks, samples=3, max_new_tokens=3, seed=3 * 1_000_003, eos_token_id=2
    )
    loss, count = worked_out(rows, [[[b.token_ids for b in s] for s in one] for one in found], 0.7)
    trainer.train()
    (cycle,) = (entry for entry in trainer.state.log_history if "cycle" in entry)
    (step,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert step["loss"] == pytest.approx(loss, abs=2e-5)
    assert cycle["alternatives"] == cycle["observations"] == count > 10
    assert 0 < cycle["alternatives_valid"] <= 1


def test_no_weight_on_the_world_is_supervised_training(tmp_path):
    ours = make(tmp_path / "a", world_weight=0.0)
    ours.train()
    sft = make(
        tmp_path / "b",
        method="sft",
        num_train_epochs=4.0,
        cycles=5,
        epochs_per_cycle=1,
        samples=1,
        max_new_tokens=None,
        env=None,
    )
    sft.train()
    torch.testing.assert_close(weights(ours), weights(sft), atol=2e-6, rtol=0)


@pytest.mark.slow
def test_it_learns_what_the_environment_shows(tmp_path):
    trainer = make(tmp_path, cycles=6, epochs_per_cycle=4)
    trainer.train()
    world = [e["world_nll"] for e in trainer.state.log_history if "cycle" in e]
    assert world[-1] < world[0] - 1


# In a cycle's first epoch, in its second, in the next cycle.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_equals_an_undisturbed_one(stop, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    whole = make(tmp_path / "whole", **saving)
    whole.train()
    make(tmp_path / "cut", callbacks=[Seen(stop_at=stop)], **saving).train()
    resumed = make(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert torch.equal(weights(resumed), weights(whole))
    cycles = [[e for e in t.state.log_history if "cycle" in e] for t in (resumed, whole)]
    assert cycles[0] == cycles[1]


def test_alternatives_for_which_there_is_no_room_are_left_out(tmp_path):
    rows = demonstrations(seeds=[8, 5])
    tokens = []
    for most in (4096, 500):
        trainer = make(tmp_path, rows, cycles=1, epochs_per_cycle=1, max_tokens=most)
        with (
            nullcontext() if most == 4096 else pytest.warns(RuntimeWarning, match="of up to 3 alt")
        ):
            trainer.begin_epoch(0)
        lengths = [len(c.trunk.input_ids) for c in trainer._comparisons]
        assert max(lengths) <= most
        tokens.append(sum(lengths))
        figures = trainer._cycle_log
        assert (figures["observations"] < figures["alternatives"]) == (most == 500)
        assert figures["observations"] > 0
    assert tokens[1] < tokens[0]


def test_what_it_cannot_do_without_is_asked_for_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"must have env, .*got None"):
        make(tmp_path, env=None)
    with pytest.raises(ValueError, match="at the expert's states, got states='agent'"):
        make(tmp_path, states="agent", samples=1)
    with pytest.raises(ValueError, match="world_weight must be finite and >= 0, got -1"):
        make(tmp_path, world_weight=-1.0)
    with pytest.raises(ValueError, match="world_weight is an option of method='early_experience'"):
        make(tmp_path, method="implicit", world_weight=0.5)
    rows = demonstrations(seeds=[8])
    rows[0].meta.pop("seed")
    with pytest.raises(ValueError, match=r"meta\['seed'\], got None"):
        make(tmp_path, rows)


def test_a_record_of_another_environment_ends_the_run(tmp_path):
    rows = demonstrations(seeds=[8, 5])
    rows[1].messages[2]["content"] = "walls"
    trainer = make(tmp_path, rows)
    with pytest.raises(ValueError, match=r"trajectories\[1\] .*/5'\), step 1: replayed"):
        trainer.train()


def test_rows_keep_their_observations_in_a_file(tmp_path):
    from stepagent.learning.cycle import load_comparisons, save_comparisons

    trainer = make(tmp_path)
    trainer.begin_epoch(0)
    save_comparisons(tmp_path / "c.safetensors", trainer._comparisons, {})
    again, _ = load_comparisons(tmp_path / "c.safetensors")
    for one, other in zip(trainer._comparisons, again, strict=True):
        np.testing.assert_array_equal(one.observed, other.observed)
        np.testing.assert_array_equal(one.trunk.rewinds, other.trunk.rewinds)
        assert other.observed.dtype == bool
