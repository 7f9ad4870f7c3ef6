"""Somebody else's program, for type checkers alone: it uses every public name of stepagent.

`tests/test_types.py` has mypy and pyright check it, and that no name is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import stepagent as sa


def data(tokenizer: PreTrainedTokenizerBase) -> list[sa.TokenTree]:
    trajectories = sa.load_trajectories("expert.jsonl")
    trajectories.append(sa.as_trajectory({"messages": trajectories[0].messages}))
    assert_type(trajectories, list[sa.Trajectory])
    sa.save_trajectories("copy.jsonl", trajectories)
    trunk = sa.encode(sa.Trajectory([{"role": "user", "content": "go"}], reward=1.0), tokenizer)
    assert_type(trunk, sa.Trunk)
    branch = sa.Branch(np.array([8], dtype=np.int32), np.zeros(1, dtype=np.float32))
    trees = sa.pack_step_pairs([trunk, sa.Trunk([5, 6, 7], [(1, 3)])], [[[[8], branch]]])
    assert_type(trees, list[sa.TokenTree])
    assert_type(sa.pack_sequences([[5, 6]], [[0, 1]], max_tokens=8), list[sa.TokenTree])
    assert_type(sa.tree_kwargs(trees[0], device="cpu"), dict[str, Any])
    assert_type(sa.trl_row(trees[0]), dict[str, Tensor])
    return trees


def packing(config: object) -> None:
    assert_type(sa.pack_bins([3, 4], capacity=8), list[list[int]])
    assert_type(sa.train_flops([3, 4], config), NDArray[np.float64])
    assert_type(sa.balance([1.0, 2.0], 2, equal_size=True), list[list[int]])


def alignment() -> None:
    tokens = sa.align_tokens([(0, 2)], [(0, 1), (1, 2)])
    assert_type(tokens, sa.TokenAlignment)
    assert_type(tokens.seams, NDArray[np.int32])
    steps = sa.align_steps(["go"], ["stop"], method="lcs")
    assert_type(steps, sa.StepAlignment)
    assert_type(steps.first_divergence, int | None)
    assert_type(sa.token_spans([(0, 2)], [(0, 2)]), NDArray[np.int32])
    assert_type(sa.char_spans([(0, 1)], [(0, 2)]), NDArray[np.int64])
    assert_type(sa.edit_distance("go", [1, 2], cutoff=3), int)


def ops(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor, offsets: Tensor) -> Tensor:
    logps_N = sa.linear_logprobs(hidden_RH, weight_VH, labels_N)
    assert_type(logps_N, Tensor)
    both = sa.linear_logprobs(hidden_RH, weight_VH, labels_N, return_entropy=True)
    assert_type(both, tuple[Tensor, Tensor])
    heads = (hidden_RH, weight_VH, hidden_RH, weight_VH)
    assert_type(sa.linear_logprob_diff(*heads, labels_N, check_labels="off"), Tensor)
    assert_type(sa.token_logprobs(weight_VH, labels_N), Tensor)
    assert_type(sa.logprob_diff(weight_VH, weight_VH, labels_N), Tensor)
    diff = sa.logprob_diff(weight_VH, weight_VH, labels_N, return_kl=True)
    assert_type(diff, tuple[Tensor, Tensor])
    assert_type(sa.step_sums(logps_N, offsets), Tensor)
    return sa.step_rewards(logps_N, logps_N, offsets, beta=1.0)


def objectives(rewards_S: Tensor, logps_N: Tensor, offsets: Tensor, groups: Tensor) -> None:
    assert_type(sa.implicit_step_loss(rewards_S, rewards_S), Tensor)
    pairs = (torch.tensor([0]), torch.tensor([1]))
    assert_type(sa.step_pair_loss(logps_N, logps_N, offsets, *pairs, beta=1.0), Tensor)
    assert_type(sa.discriminator_loss(rewards_S, rewards_S, smoothing=0.05), Tensor)
    assert_type(sa.inverse_step_reward(rewards_S, form="difference"), Tensor)
    assert_type(sa.ppo_loss(logps_N, logps_N, rewards_S, offsets, ratio="token"), Tensor)
    assert_type(sa.outcome_loss(rewards_S, offsets, rewards_S), Tensor)
    gae = sa.step_gae(rewards_S, rewards_S, offsets, gamma=0.9, lam=0.9)
    assert_type(gae, tuple[Tensor, Tensor])
    assert_type(sa.leave_one_out(rewards_S, groups), Tensor)
    assert_type(sa.group_relative(rewards_S, groups), Tensor)
    assert_type(sa.gigpo(rewards_S, offsets, groups, groups), Tensor)
    assert_type(sa.istar(rewards_S, rewards_S, offsets, groups), Tensor)
    assert_type(sa.prime(rewards_S, rewards_S, offsets, groups), Tensor)
    assert_type(sa.mt_grpo(rewards_S, rewards_S, offsets, groups, groups), Tensor)


def models(model: PreTrainedModel, trees: list[sa.TokenTree]) -> None:
    sa.check_tree_support(model)
    assert_type(sa.score_trees(model, trees), Tensor)
    assert_type(sa.score_trees(model, trees, return_entropy=True), tuple[Tensor, Tensor])


def acting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    trunks, _ = sa.load_branches("steps.jsonl")
    branches: list[list[list[sa.Branch]]] = sa.inspect(model, trunks, max_new_tokens=8)
    sa.pack_step_pairs(trunks, branches)
    tried = sa.rollout_and_query(
        model, "babyai:GoToLocalS6N2", tokenizer=tokenizer, seeds=range(4), max_new_tokens=8
    )
    assert_type(tried[0], list[sa.Trunk])
    sa.rollout_and_query(
        model,
        "babyai:GoToLocalS6N2",
        tokenizer=tokenizer,
        seeds=range(4),
        max_new_tokens=8,
        ask=sa.askers.WorthAsker(),
        budget=10,
    )
    policy = sa.policies.ModelPolicy(model, tokenizer, max_new_tokens=8)
    onward = sa.continue_rollouts(policy, "babyai:GoToLocalS6N2", sa.load_trajectories("a.jsonl"))
    assert_type(onward, list[sa.Continuations])
    (episode,) = sa.rollout.run_episodes("babyai:GoToLocalS6N2", policy, [0])
    assert_type(episode, sa.episodes.Episode)
    found = sa.evaluation.diagnose(
        model, trunks, tokenizer=tokenizer, env="babyai:GoToLocalS6N2", seeds=range(4)
    )
    assert_type(found, sa.evaluation.Diagnosis)
    assert_type(found.verdict, str)
    follow = sa.evolve.told(policy)
    better = sa.evolve.evolve("blackjack", follow, "", lambda asked: asked.guideline, Path("runs"))
    assert_type(better, sa.evolve.Evolved)
    assert_type(better.guideline, str)


def training(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    args = sa.StepAgentConfig(output_dir="runs/mine", method="implicit", cycles=5, beta=1.0)
    trainer = sa.StepAgentTrainer(model, args, sa.load_trajectories("a.jsonl"), tokenizer)
    trainer.train()


def modules() -> tuple[object, ...]:
    """The public modules, each by one of its names."""
    return (
        sa.askers.WorthAsker(),
        sa.analysis.Subgoals.reward,
        sa.engines.CompletionsEngine("http://localhost:8000"),
        sa.envs.make("babyai:GoToLocalS6N2"),
        sa.episode_file.open_episodes,
        sa.evaluation.bootstrap([0.0, 1.0]).low,
        sa.evolve.Caps(depth=3).proposals,
        sa.methods.register_method,
        sa.metrics.METRICS["success"],
        sa.models.LMHead,
        sa.preferences.load_pairs("pairs.json")[0].chosen,
        sa.ranks.over_ranks,
        sa.reference.step_sums,
        sa.report.load_runs,
        sa.server_policies.ChatPolicy,
        sa.__version__,
        sa.__all__,
    )
