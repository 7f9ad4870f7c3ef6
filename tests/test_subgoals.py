"""Sub-goals: the loss, what the embedding may not know, the reward, files, and bad input."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent import reference
from stepagent.analysis import ContrastOptions, HashedWords, ModelRows, Subgoals, info_nce
from stepagent.analysis.contrast import draw_pairs
from stepagent.cli import main
from stepagent.data.trajectory import save_trajectories
from stepagent.episodes import Episode
from stepagent.records.episodes import load_episodes
from stepagent.report import load_run
from stepagent.report.payload import payload

pytest.importorskip("sklearn")
ROOMS = ("hall", "cellar", "vault", "garden", "tower", "well")
QUICK = ContrastOptions(updates=120, hidden=32, size=8, learning_rate=1e-2)


def walk(rooms: list[str], seed: int, *, success: bool = True) -> Episode:
    """An episode through rooms, each seen in words of which some are of this step alone."""
    rng = np.random.default_rng(seed)
    seen = [
        f"you stand in the {room} and see a {rng.choice(['cat', 'dog', 'hen'])}" for room in rooms
    ]
    steps = len(rooms) - 1
    return Episode(
        environment="rooms",
        seed=seed,
        observations=seen[:-1],
        actions=["on"] * steps,
        rewards=[0.0] * steps,
        progress=[(t + 1) / steps for t in range(steps)],
        valid=[True] * steps,
        last_observation=seen[-1],
        success=success,
    )


@pytest.fixture(scope="module")
def fitted() -> Subgoals:
    return Subgoals.fit([walk(list(ROOMS), s) for s in range(12)], phases=3, options=QUICK)


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("some", [False, True])
def test_info_nce_is_its_definition_in_float64(some: bool) -> None:
    torch.manual_seed(0)
    anchors, keys = torch.randn(7, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    positives = torch.tensor([3, 0, 8, 8, 1, 2, 7])
    candidates = torch.stack([torch.randperm(9)[:4] for _ in range(7)])
    candidates = torch.cat([positives[:, None], candidates], dim=1)
    candidates[2, 2:] = -1
    for row in candidates:  # each once: a set
        for k in range(1, 5):
            row[k] = -1 if row[k] in row[:k] else row[k]
    options = {"temperature": 0.3, "candidates_BK": candidates if some else None}
    found = info_nce(anchors, keys, positives, **options)
    slow = reference.info_nce(anchors, keys, positives, **options)
    assert found.item() == pytest.approx(slow.item(), abs=1e-6)
    ours = torch.autograd.grad(found, (anchors, keys))
    theirs = torch.autograd.grad(slow, (anchors, keys))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_negatives_are_far_steps_and_other_episodes() -> None:
    episodes = np.repeat([0, 1, 2], [5, 2, 4])
    options = ContrastOptions(near=2, far_steps=3, others=2)
    for seed in range(20):
        pairs = draw_pairs(episodes, options, np.random.default_rng(seed))
        assert pairs.anchors_B.tolist() == [0, 1, 2, 3, 5, 7, 8, 9]
        for a, p, row in zip(pairs.anchors_B, pairs.positives_B, pairs.candidates_BK, strict=True):
            assert row[0] == p
            assert episodes[p] == episodes[a]
            assert 1 <= p - a <= 2
            negatives = row[1:][row[1:] >= 0]
            own = negatives[episodes[negatives] == episodes[a]]
            assert (np.abs(own - a) > 2).all()
            assert len(negatives) - len(own) == 2


# ------------------------------------------------------------------ phases


def test_phases_are_the_stages_of_demonstrations(fitted: Subgoals) -> None:
    for seed in (100, 101):
        episode = walk(list(ROOMS), seed)
        assert fitted.phases(episode).tolist() == [0, 0, 1, 1, 2, 2]
        assert fitted.path(episode) == [0, 1, 2]
    assert fitted.potentials_K == pytest.approx([0.1, 0.5, 0.9])
    for name, rooms in zip(fitted.names, (ROOMS[:2], ROOMS[2:4], ROOMS[4:]), strict=True):
        assert any(room in name for room in rooms)
    assert fitted.edges == ((0, 1, 12), (1, 2, 12))
    assert fitted.shares == pytest.approx([1 / 3] * 3)


def test_a_phase_does_not_know_the_step(fitted: Subgoals) -> None:
    """The history shuffled: each observation keeps its phase, wherever it stands."""
    episode = walk(list(ROOMS), 7)
    order = [3, 0, 5, 1, 4, 2]
    seen = [*episode.observations, episode.last_observation]
    shuffled = walk(list(ROOMS), 7)
    shuffled.observations = [seen[n] for n in order[:-1]]
    shuffled.last_observation = seen[order[-1]]
    assert fitted.phases(shuffled).tolist() == fitted.phases(episode)[order].tolist()


def test_demonstrations_in_no_order_give_no_order() -> None:
    rng = np.random.default_rng(0)
    lost = [walk(rng.permutation(ROOMS).tolist(), s) for s in range(40)]
    found = Subgoals.fit(lost, phases=6, options=QUICK)
    assert np.ptp(found.potentials_K) < 0.5


def test_a_models_rows_are_those_of_a_text_alone() -> None:
    model, tokenizer = tiny_agent(), babyai_tokenizer()
    describe = ModelRows(model, tokenizer)
    both = describe(["red ball ahead 2", "nothing"])
    assert both.shape == (2, describe.size)
    np.testing.assert_allclose(describe(["nothing"])[0], both[1], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)


# ------------------------------------------------------------------ the reward


def test_the_reward_is_the_gain_of_the_potential(fitted: Subgoals) -> None:
    episode = walk(["hall", "vault", "garden", "cellar", "well"], 3)
    assert fitted.reward(episode) == pytest.approx([0.4, 0.0, -0.4, 0.8])
    assert fitted.reward(episode).sum() == pytest.approx(0.8)
    assert fitted.reward(episode, discount=0.5) == pytest.approx([0.15, -0.25, -0.45, 0.35])


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_shaping_is_worth_the_same_in_every_episode(fitted: Subgoals, discount: float) -> None:
    """Σ γ^t F_t = −Φ(s_0), whatever was done and wherever it ended: the best policy stays."""
    rng = np.random.default_rng(1)
    plain = set()
    for seed in range(20):
        rooms = ["cellar", *rng.choice(ROOMS, rng.integers(1, 9)).tolist()]
        episode = walk(rooms, seed)
        powers = discount ** np.arange(len(episode.actions))
        shaped = fitted.reward(episode, discount=discount, shaping=True)
        assert (powers * shaped).sum() == pytest.approx(-0.1)
        plain.add(round(float(fitted.reward(episode).sum()), 6))
    assert len(plain) > 1, "as progress alone, an end in a late phase is worth more"


def test_the_best_policy_of_a_task_is_left_as_it_is(fitted: Subgoals) -> None:
    """Two ends: the well, far along and worth 0.3, and the cellar, worth 1. Best is the cellar."""
    ends = {"cellar": 1.0, "well": 0.3}
    episodes = {end: walk(["hall", end], 0) for end in ends}
    returns = {
        shaping: {
            end: value + fitted.reward(episodes[end], shaping=shaping).sum()
            for end, value in ends.items()
        }
        for shaping in (True, False)
    }
    assert max(returns[True], key=returns[True].get) == "cellar"
    assert max(returns[False], key=returns[False].get) == "well", "which shaping is there against"


def test_an_end_that_is_not_known_has_no_gain(fitted: Subgoals) -> None:
    episode = walk(["hall", "vault", "well"], 0)
    episode.last_observation = None
    assert len(fitted.phases(episode)) == 2
    with pytest.raises(ValueError, match="must hold its last observation"):
        fitted.reward(episode)
    assert fitted.reward(episode, shaping=True) == pytest.approx([0.4, -0.5])
    with pytest.raises(ValueError, match=r"discount must lie in \(0, 1\], got 1.5"):
        fitted.reward(episode, discount=1.5)


# ------------------------------------------------------------------ files, bad input


def test_what_is_saved_is_loaded(fitted: Subgoals, tmp_path: Path) -> None:
    fitted.save(tmp_path / "kept")
    loaded = Subgoals.load(tmp_path / "kept")
    episode = walk(list(ROOMS), 50)
    np.testing.assert_array_equal(loaded.reward(episode), fitted.reward(episode))
    assert loaded.as_dict() == fitted.as_dict()
    with pytest.raises(ValueError, match="describe must have size 2048"):
        Subgoals.load(tmp_path / "kept", describe=HashedWords(16))
    (tmp_path / "kept" / "subgoals.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match="must be of format 1, got 9"):
        Subgoals.load(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"must be a folder of Subgoals\.save"):
        Subgoals.load(tmp_path)


def test_the_same_seed_gives_the_same_phases() -> None:
    shown = [walk(list(ROOMS), s) for s in range(5)]
    options = ContrastOptions(updates=5, hidden=8, size=4)
    one, again = (Subgoals.fit(shown, phases=3, options=options, seed=4) for _ in range(2))
    np.testing.assert_array_equal(one.centres_KH, again.centres_KH)


def test_what_cannot_be_clustered_is_refused() -> None:
    good = [walk(list(ROOMS), s) for s in range(3)]
    with pytest.raises(ValueError, match="phases must be at least 2, got 1"):
        Subgoals.fit(good, phases=1)
    with pytest.raises(ValueError, match="phases must be at most the number of different"):
        Subgoals.fit(good, phases=100)
    with pytest.raises(ValueError, match="at least 2 episodes"):
        Subgoals.fit(good[:1], phases=2)
    with pytest.raises(ValueError, match="different observations, 0"):
        Subgoals.fit([], phases=2)
    with pytest.raises(ValueError, match="must have succeeded, got rooms/1, which failed"):
        Subgoals.fit([*good, walk(list(ROOMS), 1, success=False)], phases=2)
    with pytest.raises(ValueError, match="others must be at least 0"):
        ContrastOptions(far_steps=0, others=0)


def test_the_command_finds_phases_and_keeps_them(tmp_path: Path) -> None:
    episodes = [walk(list(ROOMS), s, success=s > 0) for s in range(6)]
    path = tmp_path / "expert.jsonl"
    save_trajectories(path, [episode.trajectory() for episode in episodes])
    command = ["subgoals", str(path), "--phases", "6", "--output", str(tmp_path / "kept")]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["demonstrations"], report["left_out"]) == (5, 1)
    assert len(report["phases"]) == 6
    assert Subgoals.load(tmp_path / "kept").phases(load_episodes(path)[1]).shape == (6,)
    shown = CliRunner().invoke(main, command)
    assert "nearest observation" in shown.stdout
    assert "5 demonstrations" in shown.stdout


def test_the_report_shows_phases_and_behaviours(fitted: Subgoals, tmp_path: Path) -> None:
    path, kept = tmp_path / "expert.jsonl", tmp_path / "kept"
    save_trajectories(path, [walk(list(ROOMS), s).trajectory() for s in range(2)])
    fitted.save(kept)
    told = {
        "gain": 0.5,
        "behaviours": [{"name": "on 100%", "exemplars": [{"run": "expert", "seed": 1}]}],
        "points": [{"run": "expert", "cycle": 3, "shares": [1.0]}],
        "changes": [{"point": 0, "p": 0.001}],
    }
    (tmp_path / "behaviours.json").write_text(json.dumps(told))
    page = tmp_path / "report.html"
    command = ["report", str(path), "--subgoals", str(kept), "--output", str(page)]
    command += ["--behaviours", str(tmp_path / "behaviours.json")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "on 100%" in text
    assert "expert, seed 1" in text
    assert "expert, cycle 3" in text
    assert json.dumps(fitted.names[0]) in text
    index, (block,) = payload([load_run(path)], fitted)
    assert index["phases"] == list(fitted.names)
    steps = json.loads(gzip.decompress(base64.b64decode(block)))["episodes"][0]
    assert steps["phases"] == [0, 0, 1, 1, 2, 2]
    (tmp_path / "behaviours.json").write_text("[]")
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "behaviours must be what stepagent behaviours --output wrote" in refused.stderr
