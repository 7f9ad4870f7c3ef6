"""CSO's verification: an answer counts where the agent itself succeeds after it."""

from __future__ import annotations

from typing import Any

import pytest
from hostile_envs import LEVEL, hostile
from test_alternatives import by_hand
from test_rollouts import model_policy, talker

from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import own_expert, run_episodes
from stepagent.acting.verifying import verify
from stepagent.envs import make

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


def test_the_agent_itself_goes_on_and_most_of_its_episodes_have_to_succeed():
    episodes, policy, env = failures(), model_policy(talker(), temperature=0.0), make(LEVEL)
    answers = [[[a] for a in e.expert_actions] for e in episodes]
    found = verify(policy, LEVEL, episodes, answers, max_steps=6)
    seen = []
    for episode, steps, turned in zip(episodes, answers, found, strict=True):
        trajectory = episode.trajectory()
        for t, (answer,) in enumerate(steps):
            outcome = by_hand(env, trajectory, t, answer)
            if outcome.ended:  # the expert's last action: what the agent would do does not matter
                seen.append(t)
                assert turned[t] == [env.step is not None]
            else:
                actions = [m["content"] for m in trajectory.messages[1 : 2 * t + 1 : 2]]
                assert turned[t] == [_goes_on(policy, env, episode, [*actions, answer])]
    assert len({flag for steps in found for step in steps for flag in step}) == 2 or not seen


def _goes_on(policy: Any, env: Any, episode: Any, actions: list[str]) -> bool:
    """One environment: these actions, then the greedy agent up to six."""
    messages: list[dict[str, str]] = []
    observation, info = env.reset(episode.seed)
    for action in actions:
        messages += [
            {"role": "user", "content": observation},
            {"role": "assistant", "content": action},
        ]
        observation, _, terminated, truncated, info = env.step(action)
    over = terminated or truncated
    while not over and len(messages) < 12:
        messages.append({"role": "user", "content": observation})
        ids = policy._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        from tiny_models import generate

        text = policy._tokenizer.decode(generate(policy._model, ids, 4)).replace("<|im_end|>", "")
        messages.append({"role": "assistant", "content": text.strip()})
        observation, _, terminated, truncated, info = env.step(text.strip())
        over = terminated or truncated
    return bool(info["success"])


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
