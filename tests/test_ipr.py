"""IPR: pairs, step rewards and loss as they are worked out one by one; runs that are cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hostile_envs import LEVEL, hostile
from test_alternatives import demonstrations
from test_resume import Seen, weights
from test_rollouts import talker
from tiny_models import END, babyai_tokenizer

import stepagent as sa
from stepagent.acting.policies import ModelPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.preferences import Judged, Thresholds, ipr_preference

SEEDS = [8, 5]
MOST = 12  # steps of an episode


def other(model: Any, seed: int) -> Any:
    """A neighbour of a model."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def make(folder: Path, rows: Any = None, callbacks: Any = (), **options: Any) -> Any:
    env, model = options.pop("env", LEVEL), options.pop("model", None)
    ref_model = options.pop("ref_model", talker())
    defaults: dict[str, Any] = {
        "method": "ipr",
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
        "continuations": 3,
        "max_steps_per_episode": MOST,
        "max_new_tokens": 3,
        "seed": 3,
    }
    rows = demonstrations(seeds=SEEDS) if rows is None else rows
    args = sa.StepAgentConfig(**defaults | options)
    return sa.StepAgentTrainer(
        talker() if model is None else model,
        args,
        rows,
        babyai_tokenizer(),
        ref_model,
        env=env,
        callbacks=list(callbacks),
    )


def policy(model: Any, temperature: float, seed: int = 3) -> ModelPolicy:
    return ModelPolicy(
        model,
        babyai_tokenizer(),
        max_new_tokens=3,
        temperature=temperature,
        eos_token_id=END,
        seed=seed,
    )


def one_by_one(rows: Any, agent: Any, frozen: Any, limits: Thresholds) -> list[Any]:
    """(chosen, rejected, step, trunk) of each pair, every value found by itself."""
    tokenizer, pairs = babyai_tokenizer(), []
    for i, row in enumerate(rows):
        options: dict[str, Any] = {"places": [i], "max_steps": MOST}
        (expert,) = sa.continue_rollouts(policy(frozen, 1.0), LEVEL, [row], samples=3, **options)
        trunk = sa.encode(row, tokenizer)
        for t in range(row.num_steps):
            if t == 0:
                (episode,) = run_episodes(
                    LEVEL, policy(agent, 0.0), [row.meta["seed"]], max_steps=12
                )
            else:
                (after,) = sa.continue_rollouts(
                    policy(agent, 0.0), LEVEL, [row], samples=1, steps=[[t - 1]], max_steps=MOST
                )
                episode = after.episodes[0][0]
            own = episode.trajectory()
            (mine,) = sa.continue_rollouts(policy(frozen, 1.0), LEVEL, [own], samples=3, **options)
            side = ipr_preference(
                t,
                Judged(own.reward, mine.values[t], own.num_steps - t),
                Judged(row.reward, expert.values[t], row.num_steps - t),
                limits,
            )
            if side is not None:
                both = (episode.trunk, trunk) if side == "agent" else (trunk, episode.trunk)
                pairs.append((*both, t))
    return pairs


@torch.no_grad()
def logp(model: Any, trunk: Any, step: int) -> torch.Tensor:
    """log π of all actions from a step on, in float64, of the sequence by itself."""
    ids = torch.from_numpy(trunk.input_ids.astype(np.int64))
    logps = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
    return sum(
        logps[at - 1, ids[at]]
        for start, stop in trunk.action_spans[step:]
        for at in range(start, stop)
    )


def worked_out(pairs: Any, agent: Any, frozen: Any, beta: float, weight: float) -> float:
    agent, frozen = agent.double().eval(), frozen.double().eval()
    losses = []
    for chosen, rejected, t in pairs:
        new = [logp(agent, one, t) for one in (chosen, rejected)]
        old = [logp(frozen, one, t) for one in (chosen, rejected)]
        margin = (new[0] - old[0]) - (new[1] - old[1])
        losses.append(-F.logsigmoid(beta * margin) - weight * new[0])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        (Thresholds(), 1),
        pytest.param(Thresholds(0.05, 0.2), 2, marks=pytest.mark.slow),
        pytest.param(Thresholds(0.99), 1, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_the_one_worked_out_in_float64(limits, batches, tmp_path):
    rows, frozen = demonstrations(seeds=SEEDS), talker()
    agent = other(frozen, 1)
    pairs = one_by_one(rows, agent, frozen, limits)
    trainer = make(
        tmp_path,
        rows,
        model=copy.deepcopy(agent),
        cycles=1,
        epochs_per_cycle=1,
        beta=0.3,
        nll_weight=0.7,
        trajectory_threshold=limits.trajectory,
        step_threshold=limits.step,
        per_device_train_batch_size=2 // batches,
        gradient_accumulation_steps=batches,
    )
    if not pairs:
        with pytest.warns(RuntimeWarning, match="no pair to learn from"):
            trainer.train()
        before = torch.cat([p.detach().flatten() for p in agent.parameters()])
        assert torch.equal(weights(trainer), before)
        return
    loss = worked_out(pairs, agent, frozen, 0.3, 0.7)
    trainer.train()
    (cycle,) = (entry for entry in trainer.state.log_history if "cycle" in entry)
    (step,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert step["loss"] == pytest.approx(loss, rel=2e-6)
    assert cycle["pairs"] == len(pairs)
    assert cycle["pairs_of_steps"] == sum(t > 0 for *_, t in pairs) > 1
    assert cycle["explorations"] == sum(row.num_steps for row in rows)
    assert cycle["tokens_unique"] < cycle["tokens_naive"]


def test_an_action_that_is_the_experts_has_its_step_reward(tmp_path):
    """Else two estimates of one number would differ, and be a pair."""
    rows = demonstrations(seeds=SEEDS)
    trainer = make(tmp_path, rows, cycles=1)
    trainer.begin_epoch(0)
    checked = 0
    for comparison in trainer._comparisons:
        for sides_T in comparison.sides_KT:
            first = int(np.flatnonzero(sides_T)[0])
            if first:  # of a step pair the actions differ at once
                assert sides_T[first] != 3
                checked += 1
    assert checked > 1


def test_the_experts_values_are_found_once(tmp_path, monkeypatch):
    from stepagent.learning.methods.ipr import IPR

    called: list[int] = []
    found = IPR._values_of_expert
    monkeypatch.setattr(IPR, "_values_of_expert", lambda *args: called.append(1) or found(*args))
    make(tmp_path).train()
    assert called == [1]


def test_an_exploration_that_crashes_is_left_out(tmp_path):
    trainer = make(tmp_path, env=hostile("raises", 5, at=7), cycles=1, epochs_per_cycle=1)
    with pytest.warns(RuntimeWarning, match="crashed"):
        trainer.train()
    (cycle,) = (entry for entry in trainer.state.log_history if "cycle" in entry)
    assert cycle["explorations_without_reward"] > 0
    assert cycle["explorations"] > 0


def test_pairs_for_which_a_tree_has_no_room_are_left_out_and_said(tmp_path):
    trainer = make(tmp_path, max_tokens=440)
    with pytest.warns(RuntimeWarning, match="leaves out"):
        trainer.begin_epoch(0)
    assert trainer._cycle_log["pairs_too_long"] > 0
    assert all(c.tokens <= 440 for c in trainer._comparisons)


def test_what_ipr_cannot_do_without_is_named(tmp_path):
    with pytest.raises(ValueError, match="must have ref_model"):
        make(tmp_path, ref_model=None)
    with pytest.raises(ValueError, match="must have env"):
        make(tmp_path, env=None)
    with pytest.raises(ValueError, match="explores once"):
        make(tmp_path, samples=2)
    with pytest.raises(ValueError, match="states='agent'"):
        make(tmp_path, states="agent")
    for name in ("continuations", "trajectory_threshold", "step_threshold", "nll_weight"):
        with pytest.raises(ValueError, match=name):
            make(tmp_path, **{name: -1})
    (row,) = demonstrations(seeds=[8])
    with pytest.raises(ValueError, match=r"meta\['seed'\]"):
        make(tmp_path, [sa.Trajectory(row.messages)])


# In a cycle's first epoch, in its second, in the next cycle.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_equals_an_undisturbed_one(stop, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    whole = make(tmp_path / "whole", **saving)
    whole.train()
    make(tmp_path / "cut", callbacks=[Seen(stop_at=stop)], **saving).train()
    resumed = make(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 4
    assert torch.equal(weights(resumed), weights(whole))
    cycles = [[e for e in t.state.log_history if "cycle" in e] for t in (resumed, whole)]
    assert cycles[0] == cycles[1]
