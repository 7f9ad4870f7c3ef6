"""Metrics of episodes: their definitions, on records made by hand, at random, and in BabyAI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hostile_envs import LEVEL, Labelled
from hypothesis import given
from hypothesis import strategies as st

from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.evaluation import metrics
from stepagent.evaluation.metrics import (
    METRICS,
    compare,
    invalid_actions,
    mean_progress_curve,
    progress_curve,
    split_by,
    summarize,
)
from stepagent.records.episodes import Episode


def episode(seed: int = 0, **fields: Any) -> Episode:
    """With as many turns as its longest list, unless it has its own."""
    steps = max((len(v) for v in fields.values() if isinstance(v, list)), default=1)
    turns = {"observations": ["o"] * steps, "actions": [f"a{t}" for t in range(steps)]}
    return Episode("chess", seed, **turns | fields)


def told(one: Episode) -> dict[str, float | None]:
    return {name: metric(one) for name, metric in METRICS.items()}


# ------------------------------------------------------------------ of one episode


def test_each_metric_is_what_its_definition_says():
    assert told(
        episode(
            actions=["left", "left", "left", "jump"],
            observations=["a", "b", "b", "b"],
            rewards=[0.0, 0.25, -0.5, 1.0],
            progress=[0.0, 0.5, 0.25, 0.75],
            valid=[True, True, True, False],
            invalid=[None, None, None, "unknown action"],
            expert_actions=["left", None, "right", "jump"],
            step_rewards=[0.5, None, -1.0, None],
            success=True,
        )
    ) == {
        "success": 1.0,
        "reward": 0.75,
        "progress_rate": 0.75,
        "grounding_accuracy": 0.75,
        "steps": 4.0,
        "repetition": 0.25,  # the third: the second was made at another observation
        "agreement": 2 / 3,
        "step_reward": -0.25,
    }


def test_what_a_record_does_not_tell_is_none_and_not_a_number():
    nothing = {"success": 0.0, "steps": 1.0, "repetition": 0.0}
    assert told(episode()) == dict.fromkeys(METRICS) | nothing
    unanswered = episode(expert_actions=[None], step_rewards=[None])
    assert told(unanswered)["agreement"] is told(unanswered)["step_reward"] is None


@pytest.mark.parametrize(
    ("observations", "actions", "expected"),
    [
        ("aaaa", "xxxx", 3 / 4),
        ("aaaa", "xyxy", 0),
        ("abab", "xxxx", 0),
        ("aabb", "xxxx", 2 / 4),
        ("a", "x", 0),
    ],
)
def test_repetition_is_doing_the_same_where_nothing_changed(observations, actions, expected):
    one = episode(observations=list(observations), actions=list(actions))
    assert metrics.repetition(one) == expected


rates = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(rates, st.booleans())
def test_progress_is_agentboards(progress, done):
    """In [0, 1], from 0, never falling, the best so far, and 1 in the end where it is done."""
    one = episode(progress=[*progress, 1.0] if done else progress, success=done)
    curve = progress_curve(one)
    assert len(curve) == len(one.progress) + 1
    assert curve[0] == 0
    assert ((curve >= 0) & (curve <= 1)).all()
    assert (np.diff(curve) >= 0).all()
    assert curve[1:].tolist() == [max(one.progress[: t + 1]) for t in range(len(one.progress))]
    assert metrics.progress_rate(one) == curve[-1] == (1 if done else max(progress))


@pytest.mark.parametrize("policy", [ExpertPolicy(), RandomPolicy()])
def test_progress_is_agentboards_in_babyai(policy):
    episodes = run_episodes("babyai:GoToSeqS5R2", policy, range(6))
    for one in episodes:
        curve = progress_curve(one)
        assert curve[0] == 0
        assert (np.diff(curve) >= 0).all()
        assert (curve[-1] == 1) == one.success
        assert 0 < metrics.grounding_accuracy(one) <= 1
    curve = mean_progress_curve(episodes)
    assert curve[-1] == pytest.approx(summarize(episodes).metrics["progress_rate"].mean)
    assert any(0 < value < 1 for one in episodes for value in one.progress)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_progress_outside_of_0_and_1_is_named(value):
    with pytest.raises(ValueError, match=r"chess/7 must lie in \[0, 1\], got \S+ at step 1"):
        progress_curve(episode(7, progress=[0.5, value]))


# ------------------------------------------------------------------ of many


def test_a_curve_that_ended_goes_on_with_its_last_value():
    short, long = episode(progress=[0.5]), episode(progress=[0.0, 0.2, 1.0, 0.4])
    assert mean_progress_curve([short, long]).tolist() == [0, 0.25, 0.35, 0.75, 0.75]
    assert mean_progress_curve([short, long], 1).tolist() == [0, 0.25]
    assert mean_progress_curve([short, long], 5).tolist() == [0, 0.25, 0.35, 0.75, 0.75, 0.75]
    without = [episode(), episode(progress=[0.0], crashed="hung")]
    assert mean_progress_curve([short, *without]).tolist() == [0, 0.5]
    assert mean_progress_curve([episode()]).tolist() == []


def test_a_summary_is_over_episodes_that_ended_and_tell():
    found = summarize(
        [
            episode(0, rewards=[1.0], success=True, valid=[True], expert_actions=["a0"]),
            episode(1, rewards=[0.0, 0.5], valid=[False, True], invalid=["unknown action", None]),
            episode(2),
            episode(3, rewards=[-100.0], valid=[False], crashed="hung"),
        ]
    )
    assert (found.episodes, found.crashed) == (3, 1)
    assert {name: interval.mean for name, interval in found.metrics.items()} == {
        "success": pytest.approx(1 / 3),
        "reward": 0.75,
        "grounding_accuracy": 0.75,
        "steps": pytest.approx(4 / 3),
        "repetition": 0,
        "agreement": 1,
    }
    assert found.metrics["reward"].low == 0.5
    assert found.metrics["reward"].high == 1.0
    assert found.invalid_actions == {"unknown action": 1}
    assert found.progress_curve == []


def test_nothing_has_no_summary():
    with pytest.raises(ValueError, match="episodes must hold at least one"):
        summarize([])
    with pytest.raises(
        ValueError, match="an episode must have ended, got 2 that crashed, the first: hung"
    ):
        summarize([episode(crashed="hung"), episode(crashed="raised")])


def test_kinds_of_invalid_actions_are_counted():
    one = episode(valid=[False, True, False], invalid=["no such object", None, None])
    two = episode(valid=[False, False], invalid=["no such object", "ambiguous"])
    old = episode(valid=[False, True])
    assert list(invalid_actions([one, two, old]).items()) == [
        ("no such object", 2),
        ("unnamed", 2),
        ("ambiguous", 1),
    ]


def test_episodes_are_split_by_what_the_environment_says():
    episodes = run_episodes(Labelled, RandomPolicy(), [5, 2, 3], max_steps=2)
    assert {k: [e.seed for e in v] for k, v in split_by("difficulty", episodes).items()} == {
        "easy": [2, 3],
        "hard": [5],
    }
    assert list(split_by("task", episodes)) == ["task 2", "task 3", "task 5"]
    assert split_by("split", run_episodes(LEVEL, RandomPolicy(), [1], max_steps=1)) == {}


# ------------------------------------------------------------------ two policies


def test_a_comparison_is_of_pairs_whatever_their_order():
    strong = [episode(s, success=s < 6, rewards=[float(s)]) for s in range(8)]
    weak = [episode(s, success=s < 2, rewards=[s - 0.5]) for s in reversed(range(8))]
    found = compare(strong, weak)
    assert (found.pairs, found.crashed) == (8, 0)
    # Eight equal differences of a number without bounds: how sure that is, they do not tell.
    assert found.differences["reward"] == metrics.Interval(0.5, None, None)
    assert found.differences["success"].mean == 0.5
    assert 0 < found.differences["success"].low < 0.5 < found.differences["success"].high < 1
    back = compare(weak, strong).differences["success"]
    assert back.mean == -0.5
    assert "progress_rate" not in found.differences


def test_a_pair_with_a_crash_is_left_out():
    whole = [episode(s, success=True) for s in range(3)]
    holed = [episode(0), episode(1, crashed="hung"), episode(2)]
    for one, other, mean in ((whole, holed, 1.0), (holed, whole, -1.0)):
        found = compare(one, other)
        assert (found.pairs, found.crashed) == (2, 1)
        assert found.differences["success"].mean == mean
    with pytest.raises(ValueError, match="a pair of episodes must have ended, got 1 that crashed"):
        compare([episode(0)], [episode(0, crashed="hung")])


@pytest.mark.parametrize(
    ("these", "others", "message"),
    [
        ([0, 1], [0], "against must have the episodes of episodes, got none of chess seed 1"),
        (
            [0],
            [0, 4, 5],
            "episodes must have the episodes of against, got none of chess seed 4, chess seed 5",
        ),
        (range(9), [0], "chess seed 5 and 3 more"),
        (
            [0, 1, 1],
            [0, 1],
            "episodes must have each episode once, got more than one of chess seed 1",
        ),
    ],
)
def test_unmatched_seeds_are_refused_by_name(these, others, message):
    with pytest.raises(ValueError, match=message):
        compare([episode(seed) for seed in these], [episode(seed) for seed in others])


def test_the_same_seed_of_another_split_or_environment_is_no_match():
    with pytest.raises(
        ValueError,
        match=r"against must have the episodes of episodes, got none of chess \(test\) seed 3",
    ):
        compare([episode(3, split="test")], [episode(3, split="dev")])
    with pytest.raises(
        ValueError, match="against must have the episodes of episodes, got none of chess seed 3"
    ):
        compare([episode(3)], [Episode("go", 3, observations=["a"], actions=["b"])])
