"""iStar: a reward model learns from outcomes, by the equations in float64, and rewards steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_online import Letters, cycles_of
from test_ranks import free_port, trajectories
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent import reference
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import Comparison
from stepagent.learning.process_reward import ProcessReward
from stepagent.learning.trainer import StepAgentTrainer

# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def config(tmp_path: Path, **options: Any) -> StepAgentConfig:
    defaults = {
        "method": "istar",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "critic_epochs": 2,
        "max_new_tokens": 1,
        "cycles": 2,
        "rollouts": 16,
        "group_size": 4,
    }
    return StepAgentConfig(str(tmp_path / "run"), **defaults | options)


def trainer(args: StepAgentConfig, **others: Any) -> StepAgentTrainer:
    given = {"env": Letters} | others
    return StepAgentTrainer(tiny_agent(), args, trajectories(), babyai_tokenizer(), **given)


def collected(made: StepAgentTrainer) -> tuple[list[Comparison], torch.Tensor, torch.Tensor]:
    """A cycle's episodes, scored, with what they earned and their tasks."""
    kept: dict[str, Any] = {}
    own = made._method.reflect

    def recorded(fresh: Any, earlier: Any, cycle: int) -> Any:
        kept["fresh"], kept["outcomes"] = fresh, made._method._outcomes
        return own(fresh, earlier, cycle)

    made._method.reflect = recorded
    made._begin_cycle(0)
    return kept["fresh"], *kept["outcomes"]


def logps_of(model: Any, comparison: Comparison) -> list[torch.Tensor]:
    """Of each step's tokens, by a plain forward of the whole episode in float64."""
    trunk = comparison.trunk
    ids = torch.tensor(trunk.input_ids, dtype=torch.long)[None]
    rows = model(ids).logits[0].log_softmax(-1)
    return [
        torch.stack([rows[n - 1, ids[0, n]] for n in range(start, stop)])
        for start, stop in trunk.action_spans
    ]


def step_rewards(model: Any, comparison: Comparison, beta: float) -> torch.Tensor:
    old = np.split(comparison.old_logps.astype(np.float64), np.cumsum(lengths(comparison))[:-1])
    pairs = zip(logps_of(model, comparison), old, strict=True)
    return torch.stack([beta * (new - torch.from_numpy(was)).sum() for new, was in pairs])


def lengths(comparison: Comparison) -> list[int]:
    return [stop - start for start, stop in comparison.trunk.action_spans]


def test_the_reward_model_learns_from_all_pairs_of_a_task(tmp_path):
    """One pass, one batch, against −log σ of every pair in float64 and Adam's first step."""
    beta = 0.7
    made = trainer(config(tmp_path, per_device_train_batch_size=64, critic_epochs=1))
    fresh, returns_B, groups_B = collected(made)
    judge = ProcessReward(tiny_agent(), made.args, beta)
    twin = tiny_agent().double().eval()
    q_B = torch.stack([step_rewards(twin, c, beta).sum() for c in fresh])
    margins = [
        q_B[i] - q_B[j]
        for i in range(len(fresh))
        for j in range(len(fresh))
        if groups_B[i] == groups_B[j] and returns_B[i] > returns_B[j]
    ]
    assert len(margins) > 4
    loss = -F.logsigmoid(torch.stack(margins)).mean()
    loss.backward()
    figures = judge.fit(fresh, returns_B, groups_B, 0)
    assert figures["process_reward_loss"] == pytest.approx(loss.item(), abs=1e-6)
    for (name, mine), other in zip(judge._trained().items(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad.double(), other.grad, rtol=1e-3, atol=1e-6, msg=f"gradient of {name}"
        )


def test_steps_are_rewarded_by_what_it_has_learnt(tmp_path):
    """Advantages of a cycle, from the reward model's own weights, by the reference in float64."""
    made = trainer(config(tmp_path, omega=2.0, beta=0.3))
    fresh, returns_B, groups_B = collected(made)
    twin = tiny_agent().double().eval()
    learnt = {name: p.detach().double() for name, p in made._method._judge._trained().items()}
    twin.load_state_dict(learnt, strict=False)
    rewards = [step_rewards(twin, c, 0.3) for c in fresh]
    assert max(r.abs().max().item() for r in rewards) > 1e-3
    expected_S = reference.istar(
        returns_B,
        torch.cat(rewards).detach(),
        torch.tensor([0, *map(len, rewards)]).cumsum(0),
        groups_B,
        omega=2.0,
    )
    groups = groups_B.tolist()
    dead = [g for g in set(groups) if len(set(returns_B[groups_B == g].tolist())) == 1]
    alive_S = np.repeat([g not in dead for g in groups], [len(r) for r in rewards])
    found_S = np.concatenate([c.advantages for c in made._comparisons])
    np.testing.assert_allclose(found_S, expected_S.numpy() * alive_S, atol=2e-3)


def test_a_task_whose_episodes_earn_the_same_has_no_advantage(tmp_path):
    """Beside one that has: its step rewards are not 0, and would be scaled up to deviation 1."""

    class HalfFree(Letters):
        def reset(self, seed: int) -> Any:
            self._free = seed % 2 == 0
            return super().reset(seed)

        def step(self, action: str) -> Any:
            found = super().step(action)
            if self._free:
                return found[0], 0.5, self._steps == 3, False, found[4]
            return found

    made = trainer(config(tmp_path), env=HalfFree)
    fresh, returns_B, groups_B = collected(made)
    dead = {g for g in groups_B.tolist() if len(set(returns_B[groups_B == g].tolist())) == 1}
    assert dead
    assert dead < set(groups_B.tolist())
    rewards = made._method._judge.rewards(fresh)
    for g, r_S, c in zip(groups_B.tolist(), rewards, made._comparisons, strict=True):
        assert bool((r_S != 0).any())
        assert (g in dead) == bool((c.advantages == 0).all())


@pytest.mark.slow
def test_it_learns_which_episodes_earn_more(tmp_path):
    """From cycle to cycle it says better beforehand which of two new episodes earned more."""
    options = {"rollouts": 64, "group_size": 8, "cycles": 4, "critic_epochs": 4, "beta": 1.0}
    made = trainer(config(tmp_path, learning_rate=1e-5, **options))
    made.train()
    told = [cycle["process_reward_accuracy_unseen"] for cycle in cycles_of(made)]
    assert told[0] == pytest.approx(0.5, abs=0.2)
    assert told[-1] > 0.75, told


def test_without_a_weight_it_is_grpo(tmp_path):
    alone = trainer(config(tmp_path, omega=0.0))
    collected(alone)
    grpo = trainer(
        StepAgentConfig(
            str(tmp_path / "grpo"),
            **{"method": "grpo", "use_cpu": True, "report_to": [], "disable_tqdm": True},
            **{"save_strategy": "no", "max_new_tokens": 1, "rollouts": 16, "group_size": 4},
        )
    )
    grpo._begin_cycle(0)
    for mine, other in zip(alone._comparisons, grpo._comparisons, strict=True):
        np.testing.assert_allclose(mine.advantages, other.advantages, atol=1e-6)


def test_where_all_earn_the_same_it_learns_nothing(tmp_path):
    class Free(Letters):
        def step(self, action: str) -> Any:
            found = super().step(action)
            return (found[0], 0.25, *found[2:3], True, found[4])

    made = trainer(config(tmp_path, weight_decay=0.0), env=Free)
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    assert all("process_reward_loss" not in cycle for cycle in cycles_of(made))
    for mine, other in zip(made.model.parameters(), before, strict=True):
        assert torch.equal(mine, other)


def test_a_run_resumes_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(config(tmp_path, **options))
    whole.train()
    again = trainer(config(tmp_path, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))  # one cycle has ended
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def rank_main(rank: int, folder: str, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.save(learnt(Path(folder), ranks), Path(folder, f"found-{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def learnt(folder: Path, ranks: int) -> dict[str, Any]:
    """In float64, with an optimiser that is linear in the gradients, as Adam is not."""
    args = config(folder, per_device_train_batch_size=8 // ranks, optim="sgd")
    model = tiny_agent().double()
    made = StepAgentTrainer(model, args, trajectories(), babyai_tokenizer(), env=Letters)
    made.train()
    return {
        "weights": torch.cat([p.detach().ravel() for p in made.model.parameters()]),
        "advantages": torch.from_numpy(np.concatenate([c.advantages for c in made._comparisons])),
        "accuracy": [c["process_reward_accuracy_unseen"] for c in cycles_of(made)],
    }


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    mp.spawn(rank_main, (str(tmp_path), 2, free_port()), nprocs=2)
    ranks = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = learnt(tmp_path / "alone", 1)
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["accuracy"] == pytest.approx(alone["accuracy"])
    torch.testing.assert_close(ranks[0]["advantages"], alone["advantages"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ranks[0]["weights"], alone["weights"], atol=1e-6, rtol=0)


def test_an_adapter_is_judged_by_another_on_the_same_base(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = trainer(config(tmp_path, cycles=1), peft_config=lora)
    made.train()
    judge = made._method._judge
    policy = {id(p) for p in made.model.parameters()}
    own = [p for p in judge._model.parameters() if id(p) not in policy]
    assert sorted(map(id, own)) == sorted(map(id, judge._trained().values()))
    assert 0 < len(own) < 10


def test_another_run_s_reward_model_is_refused(tmp_path):
    made = ProcessReward(tiny_agent(), config(tmp_path), 0.05)
    with pytest.raises(FileNotFoundError, match="so the run cannot be resumed"):
        made.load(tmp_path)
    made.save(tmp_path)
    frozen = tiny_agent()
    next(frozen.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="must hold the weights that the policy trains"):
        ProcessReward(frozen, config(tmp_path), 0.05).load(tmp_path)
