"""Action formats in rollouts: what the environment is given, the agent told, the record holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tiny_models import END, babyai_tokenizer, tiny_agent
from tiny_tokenizers import byte_level_bpe

import stepagent as sa
from stepagent import envs
from stepagent.acting.answers import Answer
from stepagent.acting.policies import ExpertPolicy, ModelPolicy, RandomPolicy
from stepagent.acting.rollout import action_tokens, run_episodes, trunks_and_answers
from stepagent.data.actions import FORMATS, call_text
from stepagent.data.branch import action_agreement, agreement
from stepagent.envs.pool import expert_actions
from stepagent.evaluation import metrics
from stepagent.records.episodes import Episode

LEVEL = "babyai:GoToLocalS6N2"
SEEDS = [3, 1, 4]
WRAPPINGS = {
    "plain": "Thought: I know the way.\nAction: {}\nObservation: You won!",
    "react": "Thought: I know the way.\nAction: {}\nObservation: You won!\nAction: drop",
    "json": '```json\n{{"thought": "I know the way.", "action": "{}"}}\n```',
}


class Wordy:
    """The expert, who says more than the action."""

    name = "wordy"

    def __init__(self, wrap: Any) -> None:
        self._wrap = wrap

    def begin(self, seeds: Sequence[int]) -> None: ...

    def resume(self, seeds: Any, trajectories: Any, steps: Any) -> None: ...

    def act(self, observations: Sequence[str], envs: Any) -> list[Any]:
        return [a and self._wrap(a) for a in expert_actions(envs)]

    def keep(self, rows: Sequence[int]) -> None: ...


@pytest.fixture(scope="module")
def silent() -> list[Episode]:
    """The expert's own episodes."""
    return run_episodes(LEVEL, ExpertPolicy(), SEEDS, expert=sa_expert)


def sa_expert(env: Any) -> str:
    return str(env.expert_action())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", [*WRAPPINGS, "tool_call"])
def test_what_is_wrapped_is_done_and_recorded(name: str, workers: int, silent: Any) -> None:
    def wrap(action: str) -> str:
        if name == "tool_call":
            return f"I know the way.\n{call_text('act', {'action': action})}"
        return WRAPPINGS[name].format(action)

    episodes = run_episodes(
        LEVEL, Wordy(wrap), SEEDS, action_format=name, expert=sa_expert, workers=workers
    )
    for one, same in zip(episodes, silent, strict=True):
        assert one.taken == one.done == same.actions
        assert one.actions == [wrap(action) for action in same.actions]
        assert (one.observations, one.rewards, one.valid) == (
            same.observations,
            same.rewards,
            same.valid,
        )
        assert (one.success, one.action_format) == (True, name)
        assert metrics.agreement(one) == metrics.agreement(same) == 1.0
        assert metrics.grounding_accuracy(one) == 1.0
        assert Episode.of(one.trajectory()) == one


@pytest.mark.parametrize("workers", [0, 2])
def test_letters_and_a_period_do_not_make_a_right_action_wrong(workers: int, silent: Any) -> None:
    wordy = Wordy(lambda action: f"{action.upper()}.")
    for one, same in zip(run_episodes(LEVEL, wordy, SEEDS, workers=workers), silent, strict=True):
        assert (one.taken, one.success) == (same.actions, True)


class Literal:
    """One action, which looks wrapped and is meant to the letter."""

    name, actions, max_steps = "literal", ('Say "hello."', "say 'Hello'"), 3

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        return "speak", {"valid": True, "success": False, "progress": 0.0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        known = action in self.actions
        info = {"valid": known, "success": known, "progress": float(known)}
        return "heard", float(known), known, False, info

    def expert_action(self) -> str:
        return self.actions[0]

    def close(self) -> None: ...


def test_an_action_to_the_letter_is_meant_whatever_it_looks_like() -> None:
    for text in Literal.actions:
        (episode,) = run_episodes(Literal, Wordy(lambda _, text=text: text), [0])
        assert (episode.success, episode.done) == (True, [text])
    for policy in (ExpertPolicy(), RandomPolicy()):
        assert run_episodes(Literal, policy, [0])[0].success


def test_what_does_not_parse_is_told_the_agent_and_counts_as_invalid() -> None:
    told: list[str] = []

    class Stubborn(Wordy):
        def act(self, observations: Sequence[str], envs: Any) -> list[Any]:
            told.append(observations[0])
            (action,) = expert_actions(envs)
            return ["I am thinking." if len(told) % 2 else f"Action: {action}"]

    (episode,) = run_episodes(LEVEL, Stubborn(str), [3], action_format="react")
    (same,) = run_episodes(LEVEL, ExpertPolicy(), [3])
    T = len(same.actions)
    refusal = "Invalid format. The answer must contain 'Action: '."
    assert told == episode.observations
    assert episode.observations[1::2] == [refusal] * T
    assert episode.taken == [a for action in same.actions for a in (None, action)]
    assert episode.valid == [False, True] * T
    assert episode.invalid == ["no action", None] * T
    assert metrics.grounding_accuracy(episode) == 0.5
    assert metrics.invalid_actions([episode]) == {"no action": T}
    assert episode.rewards[1::2] == same.rewards
    assert Episode.of(episode.trajectory()) == episode


@pytest.mark.parametrize("workers", [0, 1])
def test_an_agent_that_never_parses_runs_out_of_steps(workers: int) -> None:
    env = envs.make(LEVEL)
    env.reset(3)
    wordy = Wordy(lambda action: "…")
    (episode,) = run_episodes(LEVEL, wordy, [3], action_format="json", workers=workers)
    assert len(episode.actions) == env.max_steps
    assert (episode.terminate_reason, episode.success) == ("truncated", False)
    (short,) = run_episodes(LEVEL, wordy, [3], action_format="json", max_steps=2)
    assert (len(short.actions), short.terminate_reason) == (2, "max_steps")


def test_why_an_episode_ended_is_recorded() -> None:
    (done,) = run_episodes(LEVEL, ExpertPolicy(), [3])
    (cut,) = run_episodes(LEVEL, ExpertPolicy(), [3], max_steps=1)
    (lost,) = run_episodes(LEVEL, Wordy(lambda action: "left"), [3])
    (none,) = run_episodes(LEVEL, Wordy(lambda action: None), [3])
    reasons = [episode.terminate_reason for episode in (done, cut, lost, none)]
    assert reasons == ["terminated", "max_steps", "truncated", "gave_up"]


# ------------------------------------------------------------------ a model


def model_policy(**options: Any) -> ModelPolicy:
    return ModelPolicy(
        tiny_agent(),
        babyai_tokenizer(),
        **{"max_new_tokens": 3, "eos_token_id": END, **options},
    )


def test_an_answer_cut_at_the_token_limit_is_marked() -> None:
    for episode in run_episodes(LEVEL, model_policy(), SEEDS, max_steps=4):
        ends = [int(episode.trunk.input_ids[stop - 1]) for _, stop in episode.trunk.action_spans]
        cut = [end != END for end in ends]
        assert (episode.truncated or [False] * len(cut)) == cut
        assert Episode.of(episode.trajectory()).truncated == episode.truncated


def test_a_system_message_is_the_first_and_recorded() -> None:
    tokenizer = babyai_tokenizer()
    system = "go to the red ball"
    (episode,) = run_episodes(LEVEL, model_policy(system=system), [3], max_steps=3)
    trajectory = episode.trajectory()
    assert trajectory.messages[0] == {"role": "system", "content": system}
    first = tokenizer.apply_chat_template(
        trajectory.messages[:2], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(first, add_special_tokens=False).input_ids
    assert episode.trunk.input_ids[: len(ids)].tolist() == ids
    assert episode.trunk.action_spans[0, 0] == len(ids)
    again = Episode.of(trajectory)
    assert (again.system, again.actions) == (system, episode.actions)


def test_continuations_go_on_after_the_same_system_message() -> None:
    system = "go to the red ball"

    class Demonstrator(ExpertPolicy):
        pass

    demonstrator: Any = Demonstrator()
    demonstrator.system = system
    (shown,) = run_episodes(LEVEL, demonstrator, [3])
    trajectory = shown.trajectory()
    (all_steps,) = sa.continue_rollouts(
        model_policy(system=system), LEVEL, [trajectory], samples=1, max_steps=2
    )
    trunk = sa.encode(trajectory, babyai_tokenizer())
    for step, (one,) in enumerate(all_steps.episodes):
        stop = trunk.action_spans[min(step, trunk.num_steps - 1), 1]
        np.testing.assert_array_equal(one.trunk.input_ids[:stop], trunk.input_ids[:stop])
        assert one.system == system
    with pytest.raises(ValueError, match=r"system message of the policy, None, got .*'system'"):
        sa.continue_rollouts(model_policy(), LEVEL, [trajectory], samples=1)


def test_continuations_replay_answers_in_their_format() -> None:
    wordy = Wordy(lambda action: f"Thought: x\nAction: {action}")
    (shown,) = run_episodes(LEVEL, wordy, [3], action_format="react")
    (steps,) = sa.continue_rollouts(
        ExpertPolicy(), LEVEL, [shown.trajectory()], samples=1, action_format="react"
    )
    assert all(one.success and one.taken == shown.taken for (one,) in steps.episodes)


# ------------------------------------------------------------------ agreement, and the expert


def test_agreement_compares_actions_whatever_the_thought() -> None:
    tokenizer = byte_level_bpe()
    end = "<|im_end|>"
    texts = [f"Thought: {thought}\nAction: go to kitchen" for thought in ("red", "the apple")]
    texts += ["Thought: red\nAction: take apple", "go to kitchen"]
    tried = [np.array(tokenizer(text + end).input_ids, np.int32) for text in texts]
    trunk = sa.Trunk([9, *tried[0], 9], [[1, 1 + len(tried[0])]])
    react, plain = FORMATS["react"], FORMATS["plain"]

    def each(measure: Any, **options: Any) -> list[float]:
        return [measure([trunk], [[[action]]], **options) for action in tried]

    assert each(agreement, form=react, tokenizer=tokenizer) == [1, 1, 0, 0]
    assert each(agreement) == [1, 0, 0, 0]
    assert each(action_agreement, form=react, tokenizer=tokenizer) == [1, 1, 0, 0]
    assert each(action_agreement, form=plain, tokenizer=tokenizer) == [1, 1, 0, 1]
    cut = tried[1][:-1]  # at the token limit: the action is the same
    assert agreement([trunk], [[[cut]]], form=react, tokenizer=tokenizer) == 1
    with pytest.raises(ValueError, match="'react' must have a tokenizer"):
        agreement([trunk], [[[tried[0]]]], form=react)


def test_thoughts_under_a_thinking_template_do_not_make_an_action_another() -> None:
    tokenizer, end = byte_level_bpe(), "<|im_end|>"
    said = [f"<think>\n{thought}\n</think>\n\ngo{end}" for thought in ("a", "b")]
    own, tried = (np.array(tokenizer(text).input_ids, np.int32) for text in said)
    trunk = sa.Trunk([9, *own], [[1, 1 + len(own)]])
    plain = FORMATS["plain"]
    assert agreement([trunk], [[[tried]]]) == 0
    assert action_agreement([trunk], [[[tried]]], form=plain, tokenizer=tokenizer) == 1


def test_the_experts_answers_are_written_in_the_agents_format() -> None:
    (episode,) = run_episodes(LEVEL, ExpertPolicy(), [3], action_format="json")
    assert json.loads(episode.actions[0]) == {"action": episode.taken[0]}
    tokenizer = babyai_tokenizer()
    (asked,) = run_episodes(LEVEL, model_policy(), [3], expert=sa_expert, max_steps=2)
    trunks, answers = trunks_and_answers([asked], tokenizer)
    assert len(trunks) == 1
    for (answer,), action in zip(answers[0], asked.expert_actions, strict=True):
        np.testing.assert_array_equal(answer, action_tokens(action, tokenizer))


def test_an_answer_is_a_text_that_knows_more() -> None:
    answer = Answer("left", truncated=True)
    assert (answer, answer.text, type(answer.text)) == ("left", "left", str)
    assert (answer.truncated, answer.problem, answer.action) == (True, None, None)
