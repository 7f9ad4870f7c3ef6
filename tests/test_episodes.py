"""The record of an episode: what it tells, and that nothing of it is lost on the way to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hostile_envs import LEVEL, Labelled, hostile
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import END, babyai_tokenizer, separate_logprobs, tiny_agent

import stepagent as sa
from stepagent.acting.policies import ExpertPolicy, ModelPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.records.episodes import Episode, TerminateReason, load_episodes

SEEDS = [3, 1, 4]


def model_policy(**options: Any) -> ModelPolicy:
    defaults = {"max_new_tokens": 4, "eos_token_id": END, "temperature": 0.7}
    return ModelPolicy(tiny_agent(), babyai_tokenizer(), **defaults | options)


def fields(episode: Episode) -> dict[str, Any]:
    """All of it, as lists."""
    plain = dict(vars(episode))
    trunk, logps = plain.pop("trunk"), plain.pop("logps")
    assert all(step.dtype == np.float32 for step in logps)
    tokens = None if trunk is None else (trunk.input_ids.tolist(), trunk.action_spans.tolist())
    return plain | {"tokens": tokens, "logps": [step.tolist() for step in logps]}


def through_disk(episodes: list[Episode], path: Path) -> list[Episode]:
    sa.save_trajectories(path, [episode.trajectory() for episode in episodes])
    return load_episodes(path)


# ------------------------------------------------------------------ there and back


def test_an_episode_comes_back_from_disk_as_it_was(tmp_path):
    ask = {"expert": lambda env: env.expert_action(), "max_steps": 5}
    with pytest.warns(RuntimeWarning, match="1 of 3 episodes crashed"):
        crashed = run_episodes(hostile("raises", 1), RandomPolicy(), SEEDS, **ask)
    assert crashed[1].crashed is not None
    for episodes in (
        run_episodes(LEVEL, model_policy(), SEEDS, **ask),
        run_episodes(Labelled, RandomPolicy(), SEEDS, max_steps=9, split="test"),
        run_episodes(LEVEL, ExpertPolicy(), SEEDS),
        crashed,
    ):
        again = through_disk(episodes, tmp_path / "episodes.jsonl")
        assert [fields(e) for e in again] == [fields(e) for e in episodes]
        assert [e.trajectory() for e in again] == [e.trajectory() for e in episodes]


def test_no_field_is_left_out(tmp_path):
    episode = Episode(
        environment="chess",
        seed=7,
        policy="runs/mine",
        split="test",
        task="mate",
        difficulty="hard",
        observations=["a", "b"],
        actions=["c", "d"],
        rewards=[0.1, 0.2],
        progress=[0.0, 1 / 3],
        valid=[True, False],
        invalid=[None, "unknown action"],
        expert_actions=[None, "e"],
        step_rewards=[-0.7, None],
        last_observation="f\u2028",
        success=True,
        trunk=sa.Trunk([1, 2, 3, 4], [[1, 2], [3, 4]]),
        logps=[np.array([-0.1], np.float32), np.array([-1e-7], np.float32)],
        crashed="hung",
        gave_up=True,
        system="Play.",
        taken=["c", None],
        truncated=[False, True],
        action_format="react",
        terminate_reason="crashed",
    )
    empty = Episode("chess", 7)
    default = [name for name, value in vars(empty).items() if vars(episode)[name] is value]
    assert default == ["environment", "seed"]
    (again,) = through_disk([episode], tmp_path / "one.jsonl")
    assert fields(again) == fields(episode)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def any_episode(draw: st.DrawFn) -> Episode:
    T = draw(st.integers(1, 4))

    def each(values: st.SearchStrategy[Any], absent: bool = False) -> Any:
        lists = st.lists(values, min_size=T, max_size=T)
        return draw(st.just([]) | lists if absent else lists)

    return Episode(
        draw(texts),
        draw(st.integers()),
        **{name: draw(st.none() | texts) for name in ("policy", "split", "task", "difficulty")},
        observations=each(texts),
        actions=each(texts),
        rewards=each(floats),
        progress=each(floats),
        valid=each(st.booleans()),
        invalid=each(st.none() | texts),
        expert_actions=each(st.none() | texts, absent=True),
        step_rewards=each(st.none() | floats, absent=True),
        last_observation=draw(st.none() | texts),
        success=draw(st.booleans()),
        crashed=draw(st.none() | st.just("hung")),
        gave_up=draw(st.booleans()),
        system=draw(st.none() | texts),
        taken=each(st.none() | texts, absent=True),
        truncated=each(st.booleans(), absent=True),
        action_format=draw(st.sampled_from(["plain", "react"])),
        terminate_reason=draw(st.none() | st.sampled_from(get_args(TerminateReason))),
    )


@given(any_episode())
def test_any_episode_comes_back_from_json_as_it_was(episode):
    line = json.dumps(vars(episode.trajectory()))
    assert Episode.of(sa.Trajectory(**json.loads(line))) == episode


def test_keys_are_written_only_where_there_is_something_to_say():
    (episode,) = run_episodes(LEVEL, ExpertPolicy(), [3])
    T = len(episode.actions)
    assert episode.trajectory().meta == {
        "environment": LEVEL,
        "policy": "expert",
        "seed": 3,
        "split": None,
        "task": "go to",
        "difficulty": "easy",
        "success": True,
        "terminate_reason": "terminated",
        "rewards": episode.rewards,
        "progress": [0.0] * (T - 1) + [1.0],
        "valid": [True] * T,
        "invalid": [None] * T,
        "last_observation": episode.last_observation,
    }
    assert episode.trajectory().reward == sum(episode.rewards) > 0
    asked = run_episodes(LEVEL, model_policy(), [3], expert=lambda _: "left", max_steps=2)
    assert asked[0].trajectory().meta.keys() - episode.trajectory().meta.keys() == {
        "expert_actions",
        "token_ids",
        "action_spans",
        "logps",
        "made_with",
        "truncated",  # the model has not learnt to end
    }


def test_a_record_without_the_keys_of_today_is_read_and_tells_nothing_more():
    message = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    meta = {"environment": "chess", "seed": 1, "success": True, "mine": [1, 2, 3]}
    episode = Episode.of(sa.Trajectory(list(message), reward=1.0, meta=meta))
    expected = Episode("chess", 1, observations=["a"], actions=["b"], success=True)
    assert fields(episode) == fields(expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": ...}, "must be a record of an episode, with 'seed' in its meta, got none"),
        ({"rewards": [1.0]}, r"'rewards' in meta must .* the 2 steps, or none, got \[1.0\]"),
        ({"valid": 1}, "'valid' in meta must .* each of the 2 steps, or none, got 1"),
        ({"logps": [[0.0]] * 3}, "'logps' in meta must .* each of the 2 steps, or none, got"),
    ],
)
def test_what_is_no_record_is_named(changed, message):
    meta = {"environment": "chess", "seed": 1, "success": True} | changed
    meta = {key: value for key, value in meta.items() if value is not ...}
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=f"trajectory 'x':? {message}"):
        Episode.of(sa.Trajectory(turn * 2, id="x", meta=meta))
    with pytest.raises(ValueError, match="roles must be user, assistant in turn, got"):
        Episode.of(sa.Trajectory(turn[::-1], id="x", meta=meta))


def test_an_episode_without_a_step_is_no_trajectory():
    with pytest.raises(ValueError, match="episode chess/3 must have taken a step"):
        Episode("chess", 3, crashed="reset raised").trajectory()


# ------------------------------------------------------------------ what it tells


def test_what_an_environment_tells_is_recorded():
    """Tasks and kinds of invalid actions, and the observation after the last action."""
    (episode,) = run_episodes(Labelled, Blunderer(), [5], max_steps=4)
    assert (episode.task, episode.difficulty) == ("task 5", "hard")
    assert episode.valid == [True, False, True, False]
    assert episode.invalid == [None, "unknown action", None, "unknown action"]
    assert (episode.last_observation or "").startswith("invalid action . ")
    assert episode.observations[2].startswith("invalid action . ")
    assert episode.policy == "expert"


class Blunderer(ExpertPolicy):
    """Turns left, then says what is no action, and so on."""

    def begin(self, seeds: Any) -> None:
        self._turn = 0

    def act(self, observations: Any, envs: Any) -> list[str]:
        self._turn += 1
        return ["left" if self._turn % 2 else "castle"] * len(envs)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probs_are_those_of_a_forward_over_the_whole_episode(temperature):
    policy = model_policy(temperature=temperature)
    for episode in run_episodes(LEVEL, policy, SEEDS, max_steps=6):
        trunk = episode.trunk
        assert [len(step) for step in episode.logps] == np.diff(trunk.action_spans)[:, 0].tolist()
        with torch.no_grad():
            nothing = [[[] for _ in range(trunk.num_steps)]]
            expected = separate_logprobs(policy._model, [trunk], nothing)
        torch.testing.assert_close(
            torch.from_numpy(np.concatenate(episode.logps)), expected, rtol=1e-5, atol=1e-5
        )
    assert expected.max() < -1e-3  # a certain token would show nothing


def test_a_replayed_action_has_no_log_probs_of_the_policy():
    (demonstration,) = run_episodes(LEVEL, ExpertPolicy(), [3])
    (one,) = sa.continue_rollouts(
        model_policy(), LEVEL, [demonstration.trajectory()], samples=1, max_steps=6
    )
    for t, (episode,) in enumerate(one.episodes):
        lengths = np.diff(episode.trunk.action_spans)[:, 0].tolist()
        assert [len(step) for step in episode.logps] == [0] * (t + 1) + lengths[t + 1 :]


def test_an_episode_is_told_of_as_it_ends():
    told: list[Episode] = []
    episodes = run_episodes(LEVEL, ExpertPolicy(), [8, 5, 27, 15, 28], on_end=told.append)
    assert sorted(e.seed for e in told) == [5, 8, 15, 27, 28]
    lengths = [len(e.actions) for e in told]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    assert all(any(e is one for one in told) for e in episodes)
