"""ETO and RFT: which rollouts are preferred, kept and learnt, by hand and in float64."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from click.testing import CliRunner
from hostile_envs import LEVEL
from test_ranks import free_port
from test_resume import Seen, weights
from test_rollouts import talker
from test_trajectory_pairs import apart
from tiny_models import babyai_tokenizer

import stepagent as sa
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.cli import main
from stepagent.envs.babyai import BabyAITextEnv, level_id
from stepagent.learning.methods.eto import Preference, preference
from stepagent.learning.methods.tasks import gold, outcome
from stepagent.records.episodes import Episode

pytest.importorskip("minigrid")

LIMIT = 6  # steps of a rollout
# What the task of each seed pays at its end, whatever was done: less than the demonstrations' 0.5,
# more, as much, and what is no reward.
PAID = {1: 0.2, 3: 1.0, 4: 0.5, 9: math.nan}
WORSE, BETTER, SAME, BROKEN = PAID


class Paying(BabyAITextEnv):
    """A level that pays what ``PAID`` says, and calls every episode a success."""

    def __init__(self) -> None:
        super().__init__(level_id("GoToLocalS6N2"))

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self._paid, self._taken = PAID.get(seed, 0.0), 0
        return super().reset(seed)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, _, over, _, info = super().step(action)
        self._taken += 1
        ended = self._taken >= LIMIT or over
        return observation, self._paid * ended, over, ended and not over, info | {"success": True}


def demonstrations(seeds: Any = PAID, reward: float | None = 0.5) -> list[sa.Trajectory]:
    rows = [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), list(seeds))]
    for row in rows:
        row.reward = reward
    return rows


def make(folder: Path, rows: Any = None, callbacks: Any = (), **options: Any) -> Any:
    env = options.pop("env", Paying)
    defaults: dict[str, Any] = {
        "method": "eto",
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 2e-3,
        "adam_epsilon": 1e-2,
        "per_device_train_batch_size": 2,
        "cycles": 2,
        "epochs_per_cycle": 2,
        "max_new_tokens": 3,
        "temperature": 1.0,
        "seed": 3,
    }
    rows = demonstrations() if rows is None else rows
    args = sa.StepAgentConfig(**defaults | options)
    return sa.StepAgentTrainer(
        talker(), args, rows, babyai_tokenizer(), env=env, callbacks=list(callbacks)
    )


def cycles_of(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "cycle" in entry]


crashing = pytest.mark.filterwarnings("ignore:.* episodes crashed:RuntimeWarning")

# ------------------------------------------------------------------ which side is preferred


@pytest.mark.parametrize(
    ("expert", "agent", "messages", "steps", "cut", "expected"),
    [
        (1.0, 0.2, 6, 4, True, Preference("expert", 4)),  # the agent did worse
        (0.5, 0.7, 6, 30, True, Preference("agent", 30)),  # the expert is rejected, nothing is cut
        (1.0, 0.0, 6, 30, True, Preference("expert", 8)),  # 6 + 10 messages
        (1.0, 0.0, 6, 8, True, Preference("expert", 8)),
        (1.0, 0.0, 7, 30, True, Preference("expert", 8)),  # the 17th is the environment's
        (1.0, 0.0, 6, 30, False, Preference("expert", 30)),  # ALFWorld
        (0.5, 0.5, 6, 4, True, None),
        (1.0, sum([0.1] * 10), 6, 4, True, None),  # 0.9999999999999999
        (1.0, 0.9999, 6, 4, True, Preference("expert", 4)),
    ],
)
def test_the_better_side_is_chosen_and_a_worse_rollout_cut(
    expert, agent, messages, steps, cut, expected
):
    found = preference(expert, agent, expert_messages=messages, agent_steps=steps, cut=cut)
    assert found == expected


def test_an_outcome_is_the_reward_and_not_the_success():
    trunk = sa.encode(demonstrations([1])[0], babyai_tokenizer())
    done = Episode("e", 1, rewards=[0.0, 0.25], success=True, trunk=trunk)
    assert outcome(done) == (trunk, 0.25)
    assert outcome(Episode("e", 1, rewards=[math.nan], trunk=trunk)) is None
    assert outcome(Episode("e", 1, rewards=[1.0], trunk=trunk, crashed="KeyError")) is None
    assert outcome(Episode("e", 1, gave_up=True)) is None


def test_a_demonstration_that_does_not_say_earned_1():
    assert [gold(demonstrations([1], reward)[0]) for reward in (None, 0.5, 0.0)] == [1.0, 0.5, 0.0]


# ------------------------------------------------------------------ a cycle


@crashing
def test_a_cycle_pairs_demonstrations_with_rollouts_of_their_tasks(tmp_path):
    trainer = make(tmp_path, cycles=1)
    trainer.begin_epoch(0)
    worse, better = trainer._comparisons
    for pair, seed in ((worse, WORSE), (better, BETTER)):
        expert = trainer._trunks[list(PAID).index(seed)]
        first = expert if seed == WORSE else None
        chosen = pair.trunk.first_steps(int((pair.sides_KT[0] & 1).sum()))
        if first is not None:  # the expert is chosen, and comes first
            assert chosen.input_ids.tolist() == expert.input_ids.tolist()[: len(chosen.input_ids)]
        own = pair.step_tokens()
        side = 1 if seed == WORSE else 2
        steps = [ids.tolist() for ids, s in zip(own, pair.sides_KT[0], strict=True) if s & side]
        spans = expert.action_spans.tolist()
        assert steps == [expert.input_ids[start:stop].tolist() for start, stop in spans]
    log = trainer._cycle_log
    expected = {
        "pairs": 2,
        "pairs_agent_chosen": 1,
        "pairs_tied": 1,
        "pairs_too_long": 0,
        "rollouts": 3,
        "rollouts_without_reward": 1,
        "rollout_reward": pytest.approx((0.2 + 1.0 + 0.5) / 3),
    }
    assert {name: log[name] for name in expected} == expected
    assert log["tokens_unique"] < log["tokens_naive"]
    assert "agreement" not in log


def test_a_worse_rollout_is_cut_ten_messages_beyond_its_demonstration(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LIMIT", 20)
    rows = demonstrations([WORSE])
    steps = rows[0].num_steps
    for cut, expected in ((True, steps + 5), (False, 20)):
        trainer = make(tmp_path, rows, cycles=1, cut_rollouts=cut)
        trainer.begin_epoch(0)
        (pair,) = trainer._comparisons
        assert int((pair.sides_KT[0] & 2 > 0).sum()) == expected


def test_pairs_that_do_not_fit_are_left_out(tmp_path):
    rows = demonstrations([WORSE, BETTER])
    longest = max(len(sa.encode(row, babyai_tokenizer()).input_ids) for row in rows)
    trainer = make(tmp_path, rows, cycles=1, max_tokens=longest)
    too_long = f"leaves out 2 pairs of more than max_tokens={longest}"
    with (
        pytest.warns(RuntimeWarning, match="cycle 0 has no pair"),
        pytest.warns(RuntimeWarning, match=too_long),
    ):
        trainer.begin_epoch(0)


@pytest.mark.parametrize("method", ["eto", "rft"])
@crashing
def test_a_cycle_without_anything_to_learn_from_says_so(method, tmp_path):
    own = {} if method == "eto" else {"keep_reward": 0.9}
    trainer = make(tmp_path, demonstrations([SAME, BROKEN]), method=method, samples=1, **own)
    before, match = weights(trainer), "has no pair" if method == "eto" else "keeps none of 1 rollo"
    with pytest.warns(RuntimeWarning, match=match):
        trainer.train()
    assert torch.equal(weights(trainer), before) == (method == "eto")
    assert [("mean_loss" in cycle) for cycle in cycles_of(trainer)] == [method == "rft"] * 2


# ------------------------------------------------------------------ the loss


@crashing
def test_the_loss_is_the_one_worked_out_in_float64(tmp_path):
    trainer = make(tmp_path, cycles=1, beta=0.3)
    trainer.begin_epoch(0)
    reference = copy.deepcopy(trainer.model).double().eval()
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    policy = copy.deepcopy(trainer.model).double().eval()
    margins = []
    for pair in trainer._comparisons:
        chosen, rejected = sides_of(pair)
        with torch.no_grad():
            rewards = [apart(policy, t) - apart(reference, t) for t in (chosen, rejected)]
        margins.append(0.3 * (rewards[0] - rewards[1]))
    expected = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
    batch = trainer._collate(trainer._comparisons)
    loss = trainer.compute_loss(trainer.model, batch).detach()
    assert abs(float(expected) - math.log(2)) > 0.01
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)


def sides_of(pair: Any) -> tuple[Any, Any]:
    """The trunks of both sides, each a line of its own, by the tree's steps alone."""
    trunk, found = pair.trunk, []
    for side in (1, 2):
        ids, spans = [], []
        for step in np.flatnonzero(pair.sides_KT[0] & side):
            start, stop = trunk.action_spans[step]
            ids = [*trunk.state_ids(step).tolist()]
            spans.append((len(ids), len(ids) + int(stop - start)))
            ids += trunk.input_ids[start:stop].tolist()
        found.append(sa.Trunk(ids, spans))
    return found[0], found[1]


@crashing
def test_it_learns_to_prefer_what_earned_more(tmp_path):
    trainer = make(tmp_path, cycles=1, epochs_per_cycle=8, learning_rate=1e-2)
    trainer.train()
    (cycle,) = cycles_of(trainer)
    assert cycle["reward_accuracy"] > 0.7
    assert cycle["mean_loss"] < math.log(2)


# ------------------------------------------------------------------ RFT


def test_rft_imitates_what_earned_as_much_as_the_demonstration_once(tmp_path):
    trainer = make(tmp_path, demonstrations([WORSE, BETTER, SAME]), method="rft", samples=3)
    trainer.begin_epoch(0)
    learnt = [c.trunk.input_ids.tolist() for c in trainer._comparisons]
    assert learnt[:3] == [trunk.input_ids.tolist() for trunk in trainer._trunks]
    assert 5 <= len(learnt) == 3 + trainer._cycle_log["kept_new"] <= 9
    assert len({tuple(ids) for ids in learnt}) == len(learnt)
    begins = [trunk.state_ids(0).tolist() for trunk in trainer._trunks]
    assert not any(ids[: len(begins[0])] == begins[0] for ids in learnt[3:])  # it earned less
    assert trainer._cycle_log["kept"] == 6
    assert all(c.expert_T.all() for c in trainer._comparisons)


@pytest.mark.parametrize(("least", "kept"), [(0.0, 9), (0.5, 6), (0.9, 3), (1.1, 0)])
@pytest.mark.filterwarnings("ignore:.*keeps none:RuntimeWarning")
def test_a_rollout_is_kept_that_earned_enough(least, kept, tmp_path):
    rows = demonstrations([WORSE, BETTER, SAME])
    trainer = make(tmp_path, rows, method="rft", samples=3, keep_reward=least)
    trainer.begin_epoch(0)
    assert trainer._cycle_log["kept"] == kept


def test_rft_that_keeps_nothing_is_supervised_training(tmp_path):
    rows = demonstrations([WORSE, BETTER])
    ours = make(tmp_path / "a", rows, method="rft", samples=1, keep_reward=5.0)
    with pytest.warns(RuntimeWarning, match="keeps none of 2 rollouts"):
        ours.train()
    assert ours.state.global_step == 8  # of which every other one had nothing to learn from
    alone = make(
        tmp_path / "b",
        rows,
        method="sft",
        env=None,
        cycles=5,
        epochs_per_cycle=1,
        num_train_epochs=4.0,
        lr_scheduler_type="constant",
    )
    again = make(
        tmp_path / "c",
        rows,
        method="rft",
        samples=1,
        keep_reward=5.0,
        lr_scheduler_type="constant",
    )
    alone.train()
    with pytest.warns(RuntimeWarning, match="keeps none"):
        again.train()
    assert torch.equal(weights(again), weights(alone))


# ------------------------------------------------------------------ runs


# In a cycle's first epoch, in its second, in the next cycle.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["eto", "rft"])
@pytest.mark.parametrize("stop", [1, 3, 5])
@crashing
def test_a_resumed_run_equals_an_undisturbed_one(method, stop, tmp_path):
    options: dict[str, Any] = {"method": method, "samples": 1, "save_total_limit": 1}
    options |= {"save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    make(tmp_path / "cut", callbacks=[Seen(stop_at=stop)], **options).train()
    resumed = make(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert torch.equal(weights(resumed), weights(whole))
    assert cycles_of(resumed)[0] == cycles_of(whole)[0]


@crashing
def test_held_out_trajectories_are_measured_without_acting_at_their_states(tmp_path):
    for method in ("eto", "rft"):
        rows = demonstrations([WORSE, BETTER])
        trainer = make(tmp_path, rows, method=method, samples=1, cycles=1)
        trainer._evaluator.begin_cycle(trainer.model, 0)
        assert trainer.evaluate(demonstrations([SAME]))["eval_nll"] > 0


def test_what_it_cannot_do_without_is_asked_for_before_any_work(tmp_path):
    for method in ("eto", "rft"):
        with pytest.raises(ValueError, match=f"method={method!r} must have env, .*got None"):
            make(tmp_path, method=method, env=None)
        with pytest.raises(ValueError, match="tasks of the demonstrations, got states='agent'"):
            make(tmp_path, method=method, states="agent", samples=1)
        with pytest.raises(ValueError, match=r"temperature must be > 0 .* got 0 with samples=2"):
            make(tmp_path, method=method, temperature=0.0, samples=2)
        rows = demonstrations([WORSE, BETTER])
        rows[1].meta.pop("seed")
        with pytest.raises(ValueError, match=r"train_dataset\[1\] .*meta\['seed'\], .* got None"):
            make(tmp_path, rows, method=method)
    with pytest.raises(ValueError, match="keep_reward is an option of method='rft'"):
        make(tmp_path, keep_reward=0.5)
    with pytest.raises(ValueError, match="keep_reward must be finite, got nan"):
        make(tmp_path, method="rft", keep_reward=math.nan)
    with pytest.raises(ValueError, match="cut_rollouts is an option of method='eto'"):
        make(tmp_path, method="rft", cut_rollouts=False)


def test_etos_own_defaults_are_its_papers(tmp_path):
    args = sa.StepAgentConfig(str(tmp_path), method="eto", use_cpu=True)
    assert (args.beta, args.temperature, args.samples, args.cut_rollouts) == (0.1, 0.0, 1, True)
    args = sa.StepAgentConfig(str(tmp_path), method="implicit", use_cpu=True)
    assert (args.beta, args.temperature, args.samples) == (1.0, 1.0, 1)


def test_demonstrations_of_other_tasks_end_the_run(tmp_path):
    rows = demonstrations([WORSE, BETTER])
    rows[1].meta["seed"] = WORSE
    trainer = make(tmp_path, rows)
    with pytest.raises(ValueError, match=r"train_dataset\[1\] .* must begin as env does with its"):
        trainer.train()


def test_demonstrations_begin_with_one_system_message_which_the_agent_is_given(tmp_path):
    rows = demonstrations([WORSE, BETTER])
    for row in rows:
        row.messages.insert(0, {"role": "system", "content": "go to the red ball"})
    trainer = make(tmp_path, rows, cycles=1)
    trainer.begin_epoch(0)
    assert trainer._cycle_log["pairs"] == 2
    rows[1].messages[0]["content"] = "pick up the red ball"
    with pytest.raises(ValueError, match="train_dataset must have one system message"):
        make(tmp_path, rows)


def rank_main(rank: int, folder: str, method: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    made = make(Path(folder), method=method, samples=2, per_device_train_batch_size=1)
    made.train()
    found = {"weights": weights(made), "cycles": cycles_of(made), "steps": made.state.global_step}
    torch.save(found, Path(folder, f"found-{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eto", "rft"])
@crashing
def test_two_processes_learn_what_one_does(method, tmp_path):
    mp.spawn(rank_main, (str(tmp_path), method, free_port()), nprocs=2)
    ranks = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = make(tmp_path / "alone", method=method, samples=2)
    alone.train()
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], weights(alone), atol=2e-5, rtol=0)
    assert ranks[0]["steps"] == alone.state.global_step
    for ours, one in zip(ranks[0]["cycles"], cycles_of(alone), strict=True):
        for name in ("rollouts", "rollout_reward", "tokens_unique"):
            assert ours[name] == one[name]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eto", "rft"])
def test_they_train_from_the_command_line(method, tmp_path):
    rows = [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), [3, 1])]
    sa.save_trajectories(tmp_path / "rows.jsonl", rows)
    talker().save_pretrained(tmp_path / "model")
    babyai_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["train", "--model", str(tmp_path / "model"), "--env", LEVEL, "--method", method]
    arguments += ["--data", str(tmp_path / "rows.jsonl"), "--cycles", "1", "--use_cpu", "--json"]
    arguments += ["--max-new-tokens", "3", "--output_dir", str(tmp_path / "run")]
    arguments += ["--no_cut_rollouts"] if method == "eto" else ["--keep-reward", "0"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (cycle,) = json.loads(result.stdout)["cycles"]
    assert cycle["rollouts"] == (2 if method == "eto" else 8)
