"""Behaviours: the model's parts, clusters, change points, the command, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from stepagent import optional
from stepagent.analysis import Behaviours, LatentOptions, change_points
from stepagent.analysis.clusters import Clusters
from stepagent.analysis.describing import HashedWords
from stepagent.analysis.latent import Gaussian, LatentModel
from stepagent.analysis.tracks import Actions, make_tracks
from stepagent.cli import main
from stepagent.data.trajectory import save_trajectories
from stepagent.episodes import Episode
from stepagent.records.cycle_file import ROLLOUTS, write_cycle

metrics = pytest.importorskip("sklearn.metrics")
QUICK = LatentOptions(updates=150, hidden=24, joint=2, local=2, learning_rate=1e-2)


def lived(habit: str, seed: int, steps: int = 12) -> Episode:
    """Of an agent that is cold or warm: "right" answers each, "wrong" the other, "still" none."""
    rng = np.random.default_rng(seed)
    cold = rng.permutation(steps) < steps // 2
    answers = {"right": ("heat", "fan"), "wrong": ("fan", "heat"), "still": ("wait", "wait")}[habit]
    return Episode(
        environment="room",
        seed=seed,
        observations=["it is cold" if c else "it is warm" for c in cold],
        actions=[answers[0] if c else answers[1] for c in cold],
        rewards=[0.0] * steps,
        success=habit == "right",
        last_observation="the day is over",
    )


HABITS = ("right", "wrong", "still")


def mixed(each: int, start: int = 0) -> list[Episode]:
    return [lived(habit, start + s) for habit in HABITS for s in range(each)]


@pytest.fixture(scope="module")
def fitted() -> Behaviours:
    return Behaviours.fit(mixed(16), count=3, options=QUICK)


# ------------------------------------------------------------------ clusters


def test_behaviours_are_found_on_held_out_episodes(fitted: Behaviours) -> None:
    """ "right" and "wrong" do the same actions as often: only what they answer tells them apart."""
    labels = fitted.assign(mixed(8, 1000))
    assert metrics.adjusted_rand_score(np.repeat([0, 1, 2], 8), labels) == 1
    assert fitted.gain > 0.5
    assert "wait 100%" in fitted.names


def test_exemplars_are_episodes_of_their_behaviour(fitted: Behaviours) -> None:
    episodes = mixed(4, 2000)
    labels, shown = fitted.assign(episodes), fitted.exemplars(episodes, 2)
    for k, places in enumerate(shown):
        assert [labels[place] for place in places] == [k, k]


def test_two_halves_of_an_episode_have_local_behaviours(fitted: Behaviours) -> None:
    assert fitted.assign_local(mixed(2)).shape == (6, 2)
    joint, local = fitted.latents(mixed(2))
    assert joint.shape == (6, 2)
    assert local.shape == (6, 2, 2)


@pytest.mark.slow
def test_joint_clusters_find_the_convention_and_local_ones_the_role() -> None:
    rng = np.random.default_rng(0)
    joints, sides, leads = [], rng.integers(2, size=120), rng.integers(2, size=120)
    for e in range(120):
        near = rng.random(12) < 0.5
        told = ["near" if n else "free" for n in near]
        agents = []
        for agent in range(2):
            habit = "go" if agent == leads[e] else "wait"
            done = [("left", "right")[sides[e]] if n else habit for n in near]
            agents.append(Episode("road", e, observations=list(told), actions=done))
        joints.append(agents)
    options = LatentOptions(updates=400)
    found = Behaviours.fit(joints, count=2, options=options)
    roles = np.stack([leads != 0, leads != 1], axis=1)
    assert metrics.adjusted_rand_score(sides, found.assign(joints)) > 0.9
    assert metrics.adjusted_rand_score(roles.ravel(), found.assign_local(joints).ravel()) > 0.9


def spread(each: int, seed: int) -> np.ndarray:
    """Points of a narrow cluster, and of a long one that k-means would cut in two."""
    rng = np.random.default_rng(seed)
    narrow = rng.normal(size=(each, 2)) * 0.1
    long = rng.normal(size=(2 * each, 2)) * (3, 0.1) + (0, 1)
    return np.concatenate([narrow, long])


def test_clusters_of_other_shapes_are_told_apart_and_the_largest_comes_first() -> None:
    found = Clusters.fit(spread(60, 0), 2, seed=0)
    labels = found.assign(spread(40, 1))
    assert metrics.adjusted_rand_score(np.repeat([1, 0], [40, 80]), labels) > 0.95
    assert labels.sum() < 60  # 0 is the long one


def test_the_scale_and_the_turn_of_latents_say_nothing() -> None:
    points, turn = spread(60, 0), np.array([[100.0, 0.1], [0.0, 0.1]])
    one = Clusters.fit(points, 2, seed=0).assign(points)
    other = Clusters.fit(points @ turn, 2, seed=0).assign(points @ turn)
    assert metrics.adjusted_rand_score(one, other) > 0.95


def test_the_densest_point_is_the_most_typical() -> None:
    found = Clusters.fit(spread(60, 0), 2, seed=0)
    centre, edge = found.density(np.array([[0.0, 0.0], [0.3, 0.0]]))
    assert centre > edge


# ------------------------------------------------------------------ the model


def test_kl_is_torchs() -> None:
    torch.manual_seed(0)
    a, b = Gaussian(*torch.randn(2, 5)), Gaussian(*torch.randn(2, 5))
    one, other = (torch.distributions.Normal(g.mean, g.log_std.exp()) for g in (a, b))
    torch.testing.assert_close(a.kl(b), torch.distributions.kl_divergence(one, other))


def test_padding_and_neighbours_change_nothing() -> None:
    """An episode has the same latents and log-probs alone and beside a longer one."""
    torch.manual_seed(0)
    short, long = lived("right", 0, steps=5), lived("wrong", 1, steps=20)
    actions = Actions.of(short.actions + long.actions, 8)
    model = LatentModel(64, len(actions.names), QUICK)
    alone = make_tracks([short], actions, HashedWords(64), 2)
    both = make_tracks([long, short], actions, HashedWords(64), 2)
    one = model.latents(alone, np.array([0]), draw=False)
    two = model.latents(both, np.array([0, 1]), draw=False)
    torch.testing.assert_close(one.joint.mean[0], two.joint.mean[1])
    torch.testing.assert_close(one.local.mean[0], two.local.mean[1])
    z = one.local.mean
    logps = model.logps(both, np.array([1]), z)
    torch.testing.assert_close(logps.sum(), model.logps(alone, np.array([0]), z).sum())
    assert int((logps != 0).sum()) == 5


def test_agents_are_exchangeable() -> None:
    torch.manual_seed(0)
    pair = [lived("right", 0), lived("still", 1)]
    actions = Actions.of([a for e in pair for a in e.actions], 8)
    model = LatentModel(64, len(actions.names), QUICK)
    tracks = make_tracks([pair, pair[::-1]], actions, HashedWords(64), 1)
    found = model.latents(tracks, np.array([0, 1]), draw=False)
    torch.testing.assert_close(found.joint.mean[0], found.joint.mean[1])
    torch.testing.assert_close(found.local.mean[0], found.local.mean[1].flip(0))


def test_many_actions_are_known_by_their_first_word() -> None:
    few = Actions.of(["go", "go", "stop"], 2)
    assert (few.whole, few.names) == (True, ("go", "stop", "other"))
    many = Actions.of(["take key", "take book", "Open box", "go"], 2)
    assert (many.whole, many.names[0], many.names[-1]) == (False, "take", "other")
    assert many.index(["take lamp", "sing", ""]).tolist() == [0, 2, 2]


# ------------------------------------------------------------------ changes


def test_a_switch_is_found_where_it_is() -> None:
    rng = np.random.default_rng(0)
    for at in (1, 3, 6):
        cycles = [rng.choice(3, 30, p=[0.7, 0.2, 0.1]) for _ in range(at)]
        cycles += [rng.choice(3, 30, p=[0.1, 0.2, 0.7]) for _ in range(7 - at)]
        (change,) = change_points(cycles)
        assert abs(change.at - at) <= 1
        assert change.p < 0.01


def test_two_switches_are_two_changes() -> None:
    cycles = [np.full(20, k) for k in (0, 0, 1, 1, 2)]
    assert [change.at for change in change_points(cycles)] == [2, 4]


def test_chance_is_no_change() -> None:
    rng = np.random.default_rng(1)
    found = [len(change_points([rng.integers(3, size=20) for _ in range(6)])) for _ in range(20)]
    assert sum(n > 0 for n in found) <= 1
    assert change_points([np.zeros(5, int)]) == []


def test_a_point_without_episodes_is_refused() -> None:
    with pytest.raises(ValueError, match="got none at point 1"):
        change_points([np.zeros(3, int), np.zeros(0, int)])


# ------------------------------------------------------------------ bad input


def test_too_few_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="episodes must be at least 10 for 3 behaviours, got 6"):
        Behaviours.fit(mixed(2), count=3)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        Behaviours.fit(mixed(8), count=1)
    with pytest.raises(ValueError, match="at least 2 steps, got 1 in room/0"):
        Behaviours.fit([*mixed(8), lived("right", 0, steps=1)], count=2)
    with pytest.raises(ValueError, match=r"one number of agents, got \[1, 2\]"):
        Behaviours.fit([*mixed(8), mixed(1)[:2]], count=2, parts=1)


def test_one_policy_is_one_behaviour() -> None:
    with pytest.raises(ValueError, match="they show one behaviour only"):
        Behaviours.fit([lived("right", s) for s in range(40)], count=2, options=QUICK)


@pytest.mark.slow
def test_the_command_tells_shares_and_changes(tmp_path: Path) -> None:
    """Of a run whose records tell their cycle: three of one habit, then three of another."""
    for cycle in range(6):
        own = [lived(HABITS[cycle // 3], 100 * cycle + s) for s in range(10)]
        write_cycle(tmp_path / "run" / ROLLOUTS, cycle, own)
    output = tmp_path / "behaviours.json"
    command = ["behaviours", str(tmp_path / "run"), "--count", "2", "--output", str(output)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    report = json.loads(output.read_text())
    assert [change["point"] for change in report["changes"]] == [3]
    assert "behaviour changed at run, cycle 3" in done.stdout
    assert [point["cycle"] for point in report["points"]] == list(range(6))
    assert {tuple(point["shares"]) for point in report["points"]} == {(1.0, 0.0), (0.0, 1.0)}
    of_wrong, of_right = sorted(kind["success"] for kind in report["behaviours"])
    assert (of_wrong[0], of_right[0]) == (0, 1)
    assert of_wrong[2] < of_right[1]  # the intervals are apart
    assert "100% (89%–100%)" in done.stdout
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused = CliRunner().invoke(main, ["behaviours", str(empty)])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ")


def test_a_folder_without_episodes_is_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["behaviours", str(tmp_path)])
    assert refused.exit_code == 1
    assert "must hold rollouts.jsonl, which training with --save_rollouts writes" in refused.stderr


@pytest.mark.parametrize("command", ["subgoals", "behaviours"])
def test_without_scikit_learn_the_extra_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda module: None)
    path = tmp_path / "run.jsonl"
    save_trajectories(path, [lived("right", s).trajectory() for s in range(3)])
    refused = CliRunner().invoke(main, [command, str(path)])
    assert refused.exit_code == 1
    assert "needs sklearn: pip install 'stepagent[analysis]'" in refused.stderr
