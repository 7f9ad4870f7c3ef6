"""CSO's verification: an answer counts where the agent itself succeeds after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_envs import LEVEL, hostile
from test_alternatives import demonstrations
from test_resume import weights
from test_rollouts import model_policy, talker
from tiny_models import babyai_tokenizer, generate

import stepagent as sa
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import own_expert, run_episodes
from stepagent.acting.verifying import verify
from stepagent.envs import ExpertUnavailable, make

SEEDS = [3, 8, 5]


def failures(seeds: Any = SEEDS, env: Any = LEVEL) -> Any:
    return run_episodes(env, model_policy(), seeds, expert=own_expert, max_steps=6)


def test_with_the_expert_going_on_every_answer_turns_a_failure():
    episodes = failures()
    assert not any(episode.success for episode in episodes)
    answers = [[[a, "left"] for a in e.expert_actions] for e in episodes]
    assert verify(ExpertPolicy(), LEVEL, episodes, answers) == [
        [[True, True]] * len(e.actions) for e in episodes
    ]


def test_the_agent_itself_goes_on_after_the_answer():
    episodes = [episode for episode in failures(range(8)) if not episode.success]
    policy, env = model_policy(talker(), temperature=0.0), make(LEVEL)
    answers = [[[a] for a in e.expert_actions] for e in episodes]
    found = verify(policy, LEVEL, episodes, answers, max_steps=6)
    for episode, turned in zip(episodes, found, strict=True):
        for t, answer in enumerate(episode.expert_actions):
            assert turned[t] == [
                succeeds(policy, env, episode.seed, [*episode.actions[:t], answer])
            ]
    assert {flag for steps in found for step in steps for flag in step} == {True, False}


def succeeds(policy: Any, env: Any, seed: int, actions: list[str]) -> bool:
    """One environment: these actions, then the greedy agent's, six in all."""
    messages: list[dict[str, str]] = []
    observation, info = env.reset(seed)
    for step in range(6):
        messages.append({"role": "user", "content": observation})
        text = actions[step] if step < len(actions) else says(policy, messages)
        messages.append({"role": "assistant", "content": text})
        observation, _, terminated, truncated, info = env.step(text)
        if terminated or truncated:
            break
    return bool(info["success"])


def says(policy: Any, messages: list[dict[str, str]]) -> str:
    ids = policy._tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    told = policy._tokenizer.decode(generate(policy._model, ids, 4))
    return str(told).replace("<|im_end|>", "").strip()


@pytest.mark.slow
def test_more_than_half_of_the_continuations_have_to_succeed():
    episodes, policy = failures(), model_policy(talker(), temperature=1.0)
    answers = [[[a] for a in e.expert_actions] for e in episodes]
    found = verify(policy, LEVEL, episodes, answers, samples=4, max_steps=6)
    for i, (episode, turned) in enumerate(zip(episodes, found, strict=True)):
        for t, answer in enumerate(episode.expert_actions):
            messages = [*episode.trajectory().messages[: 2 * t + 1]]
            messages.append({"role": "assistant", "content": answer})
            one = sa.Trajectory(messages, meta={"seed": episode.seed})
            options: dict[str, Any] = {"samples": 4, "places": [i], "max_steps": 6}
            (after,) = sa.continue_rollouts(policy, LEVEL, [one], **options)
            assert turned[t] == [sum(e.success for e in after.episodes[t]) > 2]


def test_there_is_nothing_to_turn_in_a_success_or_a_crash():
    (success,) = run_episodes(LEVEL, ExpertPolicy(), [3])
    answers = [[["left"]] * len(success.actions)]
    assert verify(ExpertPolicy(), LEVEL, [success], answers) == [[[False]] * len(success.actions)]
    with pytest.warns(RuntimeWarning, match="crashed"):
        (crashed,) = failures([8], hostile("raises", 8, at=3))
    answers = [[["left"]] * len(crashed.actions)]
    assert verify(ExpertPolicy(), LEVEL, [crashed], answers) == [[[False]] * len(crashed.actions)]
    assert verify(ExpertPolicy(), LEVEL, [], []) == []


def test_other_numbers_of_steps_are_refused():
    episodes = failures([8])
    with pytest.raises(ValueError, match="each of the 6 steps"):
        verify(ExpertPolicy(), LEVEL, episodes, [[["left"]]])


# ------------------------------------------------------------------ in training


def trainer_of(folder: Path, expert: Any = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "method": "implicit",
        "states": "agent",
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "cycles": 1,
        "rollouts": 4,
        "max_steps_per_episode": 6,
        "max_new_tokens": 3,
        "seed": 3,
    }
    args = sa.StepAgentConfig(**defaults | options)
    rows = demonstrations(seeds=[8, 5])
    return sa.StepAgentTrainer(talker(), args, rows, babyai_tokenizer(), env=LEVEL, expert=expert)


@pytest.mark.parametrize("method", ["implicit", "dagger"])
def test_only_answers_that_turn_a_failure_are_learnt_from(method, tmp_path):
    plain = trainer_of(tmp_path, method=method)
    plain.begin_epoch(0)
    verified = trainer_of(tmp_path, method=method, verify=3)
    verified.begin_epoch(0)
    figures = verified._cycle_log
    assert 0 < figures["answers_verified"] < figures["answers_tried"]
    assert figures["expert_answers"] == plain._cycle_log["expert_answers"]
    all_of = {tuple(c.trunk.input_ids): c for c in plain._comparisons}
    kept = [c for c in verified._comparisons if not c.expert_trunk]
    assert sum(len(step) for c in kept for step in c.branches) == figures["answers_verified"]
    for comparison in kept:
        whole = all_of[tuple(comparison.trunk.input_ids)]
        assert any(comparison.branches)
        for some, every in zip(comparison.branches, whole.branches, strict=True):
            assert [ids.tolist() for ids in some] in ([], [ids.tolist() for ids in every])
    verified.train()


def test_the_agents_own_alternatives_need_no_expert(tmp_path):
    def nobody(env: Any) -> str:
        raise ExpertUnavailable("there is none")

    trainer = trainer_of(tmp_path, nobody, verify=1, alternatives=4, temperature=2.0)
    trainer.begin_epoch(0)
    figures = trainer._cycle_log
    assert figures["expert_answers"] == 0
    assert figures["answers_tried"] > 10
    for comparison in trainer._comparisons:
        spans = comparison.trunk.action_spans
        for (start, stop), step in zip(spans, comparison.branches, strict=True):
            own = comparison.trunk.input_ids[start:stop].tolist()
            tried = [ids.tolist() for ids in step]
            assert own not in tried
            assert len({tuple(ids) for ids in tried}) == len(tried)
    trainer.train()


def test_where_nothing_turns_a_failure_nothing_is_learnt(tmp_path):
    far: dict[str, Any] = {"rollout_seed_start": 8, "rollouts": 1, "max_steps_per_episode": 2}
    trainer = trainer_of(tmp_path, lambda env: "drop", verify=1, **far)
    before = weights(trainer)
    with pytest.warns(RuntimeWarning, match="no answer that turns"):
        trainer.train()
    assert torch.equal(weights(trainer), before)


def test_verification_without_what_it_needs_is_refused(tmp_path):
    for options, why in (
        ({"states": "expert", "rollouts": None}, "verify=1 needs states='agent'"),
        ({"teacher_share": 0.5}, "rollouts of the agent alone"),
        ({"verify": 0}, "verify must be"),
        ({"verify": None, "alternatives": 2}, "alternatives=2 needs verify"),
    ):
        with pytest.raises(ValueError, match=why):
            trainer_of(tmp_path, **{"verify": 1} | options)
