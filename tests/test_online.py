"""Online RL: what an environment pays becomes advantages of steps, without bias, and is learnt."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_ranks import trajectories
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent.envs import ExpertUnavailable
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.methods.online import GRPO, GiGPO, anchors
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.records.episodes import Episode

METHODS = ("grpo", "gigpo", "istar", "ppo")
_slow = pytest.mark.slow


class Letters:
    """Three steps; a word pays 1 if it begins with a letter up to m. One with an s ends it."""

    name = "letters"
    actions = ()
    max_steps = 3

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self._steps, self._word = 0, "red" if seed % 2 else "ball"
        return f"go to {self._word}", self._info(True)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        pays = float(action[:1].lower() <= "m" and action[:1].isalpha())
        over = action.startswith("s")
        view = f"go to {self._word}" if pays else "nothing"
        return view, pays, over, not over and self._steps == 3, self._info(bool(action))

    def expert_action(self) -> str:
        raise ExpertUnavailable("nobody may be asked")

    def close(self) -> None:
        """Nothing to free."""

    def _info(self, valid: bool) -> dict[str, Any]:
        return {"valid": valid, "success": False, "progress": 0.0}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def make(**options: Any) -> StepAgentConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "method": "grpo",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "max_new_tokens": 1,
            "cycles": 2,
            "rollouts": 16,
        }
        if options.get("method") != "ppo":
            defaults["group_size"] = 4
        return StepAgentConfig(**defaults | options)

    return make


def trainer(args: StepAgentConfig, **others: Any) -> StepAgentTrainer:
    options = {"env": Letters} | others
    return StepAgentTrainer(tiny_agent(), args, trajectories(), babyai_tokenizer(), **options)


def cycles_of(made: StepAgentTrainer) -> list[dict[str, Any]]:
    return [entry for entry in made.state.log_history if "cycle" in entry]


# ------------------------------------------------------------------ advantages, by definition


def episode(seed: int, *steps: tuple[str, float]) -> Episode:
    observations, rewards = zip(*steps, strict=True)
    made = Episode("letters", seed, observations=list(observations), rewards=list(rewards))
    made.actions = [f"a{t}" for t in range(len(steps))]
    return made


EPISODES = [
    episode(7, ("x", 0.0), ("y", 0.0), ("x", 1.0)),
    episode(7, ("x", 0.0), ("z", 0.0)),
    episode(7, ("x", 0.5)),
    episode(8, ("x", 1.0)),  # the same text in another task is another state
    episode(8, ("x", 0.0), ("y", 1.0)),
]


def credit(method: Any, episodes: list[Episode]) -> tuple[np.ndarray, dict[str, float]]:
    advantages_S, figures = method.credit(episodes, [], 0)
    assert advantages_S.dtype == torch.float64
    return advantages_S.numpy(), figures


def outcomes(episodes: list[Episode], scale: bool) -> list[float]:
    """GRPO's A of each episode: its task's mean taken off, over the sample's deviation."""
    found = []
    for e in episodes:
        R = np.array([sum(o.rewards) for o in episodes if o.seed == e.seed])
        spread = R.std(ddof=1) if scale else 1.0
        found.append((sum(e.rewards) - R.mean()) / spread if np.ptp(R) else 0.0)
    return found


def test_grpo_compares_what_episodes_of_a_task_earned(config):
    """By hand: returns 1, 0, ½ (mean ½, deviation ½) and 1, 1 (a dead group)."""
    advantages_S, figures = credit(GRPO(config()), EPISODES)
    np.testing.assert_allclose(advantages_S, [1, 1, 1, -1, -1, 0, 0, 0, 0], atol=1e-12)
    assert (figures["groups"], figures["dead_groups"]) == (2, 1)
    unscaled, _ = credit(GRPO(config(scale_advantages=False)), EPISODES)
    np.testing.assert_allclose(unscaled, advantages_S / 2, atol=1e-12)


def test_gigpo_compares_steps_at_one_state_as_well(config):
    """By hand, with γ = ½: of task 7 the steps at x return ¼, 1, 0, ½ (mean 7/16)."""
    options = {"method": "gigpo", "gamma": 0.5, "omega": 2.0}
    advantages_S, figures = credit(GiGPO(config(**options)), EPISODES)
    mean = 7 / 16
    step = [1 / 4 - mean, 0, 1 - mean, 0 - mean, 0, 1 / 2 - mean, 1 / 4, -1 / 4, 0]
    outcome = [0.5, 0.5, 0.5, -0.5, -0.5, 0, 0, 0, 0]
    np.testing.assert_allclose(advantages_S, np.array(outcome) + 2 * np.array(step), atol=1e-12)
    assert figures["anchored_steps"] == pytest.approx(6 / 9)
    alone, _ = credit(GiGPO(config(method="gigpo", omega=0.0, scale_advantages=True)), EPISODES)
    np.testing.assert_allclose(alone, credit(GRPO(config()), EPISODES)[0], atol=1e-12)


def test_a_state_is_an_observation_or_a_history():
    now, since = (anchors(EPISODES, anchor).tolist() for anchor in ("observation", "history"))
    assert [now[i] == now[0] for i in range(9)] == [1, 0, 1, 1, 0, 1, 0, 0, 0]
    assert [since[i] == since[0] for i in range(9)] == [1, 0, 0, 1, 0, 1, 0, 0, 0]


def test_success_is_never_read(config):
    flagged = [episode(7, ("x", 0.0)), episode(7, ("x", 1.0))]
    flagged[0].success = True
    assert credit(GRPO(config()), flagged)[0][1] > 0


@pytest.mark.parametrize("method", ["grpo", "gigpo", "ppo"])  # iStar: test_istar.py
def test_a_cycle_gives_its_own_episodes_advantages(config, monkeypatch, method):
    """End to end: real rollouts, whose records are worked out by the definitions in float64."""
    made = trainer(config(method=method))
    seen: list[Episode] = []
    own = made._method.credit

    def recorded(episodes: Any, comparisons: Any, cycle: int) -> Any:
        seen.extend(episodes)
        return own(episodes, comparisons, cycle)

    monkeypatch.setattr(made._method, "credit", recorded)
    made._begin_cycle(0)
    found = np.concatenate([c.advantages for c in made._comparisons])
    assert len({tuple(e.actions) for e in seen}) > 4
    if method == "ppo":  # V is 0 in the first cycle, so A is what was earned from there on
        expected = np.concatenate([discounted(e.rewards, 0.95 * 0.95) for e in seen])
        expected = (expected - expected.mean()) / expected.std()
    else:
        assert [e.seed for e in seen] == [s for s in range(4) for _ in range(4)]
        expected = np.repeat(outcomes(seen, method == "grpo"), [len(e.actions) for e in seen])
    if method == "gigpo":
        expected = expected + at_states(seen, 0.95)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for c, e in zip(made._comparisons, seen, strict=True):
        assert c.expert_answers == 0
        np.testing.assert_allclose(c.old_logps, np.concatenate(e.logps), atol=1e-4)


def discounted(rewards: list[float], factor: float) -> list[float]:
    return [sum(factor**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def at_states(episodes: list[Episode], gamma: float) -> np.ndarray:
    keys = [(e.seed, o) for e in episodes for o in e.observations]
    returns = np.concatenate([discounted(e.rewards, gamma) for e in episodes])
    means = [np.mean([r for k, r in zip(keys, returns, strict=True) if k == key]) for key in keys]
    return returns - np.array(means)


# ------------------------------------------------------------------ no bias by the number of turns

STOP, GO = 0, 1
PAY = 1.0  # of each step but the last, whatever is done
P = np.array([[0.6, 0.4], [0.3, 0.7], [1.0, 0.0]])  # [turn, action]; the third turn always stops


def runs(bonus: float) -> list[tuple[float, list[int], list[float]]]:
    """Probability, actions and rewards of each episode there can be.

    Going on pays at once and costs as much at the end, so that all earn the same in all; but for a
    bonus to those that go on to the third turn.
    """
    found = []
    for length in (1, 2, 3):
        actions = [GO] * (length - 1) + [STOP]
        probability = np.prod([P[t, a] for t, a in enumerate(actions)])
        rewards = [PAY] * (length - 1) + [bonus * (length == 3) - PAY * (length - 1)]
        found.append((float(probability), actions, rewards))
    return found


def scores(actions: list[int]) -> list[np.ndarray]:
    """∇ log π of each step, by the logits of going on at the first and at the second turn."""
    found = []
    for t, action in enumerate(actions):
        step = np.zeros(2)
        if t < 2:
            step[t] = action - P[t, GO]
        found.append(step)
    return found


def expected_gradient(bonus: float, advantages: Any) -> np.ndarray:
    """E Σ A ∇ log π over groups of two episodes, exactly: every group there can be."""
    total = np.zeros(2)
    for group in itertools.product(runs(bonus), repeat=2):
        A_S = iter(advantages([rewards for _, _, rewards in group]))
        steps = [score for _, actions, _ in group for score in scores(actions)]
        total += np.prod([p for p, _, _ in group]) * sum(next(A_S) * s for s in steps)
    return total


def true_gradient(bonus: float) -> np.ndarray:
    """Of what an episode is expected to earn."""
    each = [p * sum(R) * np.sum(scores(actions), axis=0) for p, actions, R in runs(bonus)]
    return np.sum(each, axis=0)


def by_turn(group: list[list[float]]) -> list[float]:
    """Each turn's reward less the mean of those who took it, added up from there on (the wrong way:
    how many terms are taken off is decided by the action)."""

    def mean(t: int) -> float:
        return float(np.mean([rewards[t] for rewards in group if len(rewards) > t]))

    return [
        sum(rewards[k] - mean(k) for k in range(t, len(rewards)))
        for rewards in group
        for t in range(len(rewards))
    ]


@pytest.mark.parametrize("bonus", [0.0, 0.5])
@pytest.mark.parametrize("method", ["grpo", "gigpo"])
def test_turns_that_the_policy_decides_are_neither_paid_nor_fined(config, method, bonus):
    """verl-project/verl#7244. Over groups of n = 2, GRPO's expectation is n − 1 times the gradient;
    GiGPO adds once more of a turn's, as often as both of those who can reach it do. A baseline by
    turns takes off, of those who go on alone, what they are to lose later: it pays for going on,
    whether that is worth anything or not."""
    options = {"gamma": 1.0, "anchor": "history"} if method == "gigpo" else {}
    made = (GRPO if method == "grpo" else GiGPO)(
        config(method=method, scale_advantages=False, **options)
    )

    def advantages(group: list[list[float]]) -> list[float]:
        episodes = [episode(7, *((f"turn {t}", r) for t, r in enumerate(R))) for R in group]
        return made.credit(episodes, [], 0)[0].tolist()

    found, true = expected_gradient(bonus, advantages), true_gradient(bonus)
    if method == "grpo":
        np.testing.assert_allclose(found, true, atol=1e-12)
    else:
        np.testing.assert_allclose(found, true * [2, 1 + P[0, GO]], atol=1e-12)
    assert bool(true.any()) == bool(bonus)
    assert (expected_gradient(bonus, by_turn) > true + 0.02).all()


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize(
    "method", ["grpo", pytest.param("gigpo", marks=_slow), pytest.param("ppo", marks=_slow)]
)
def test_a_tiny_policy_learns_what_pays(config, method):
    made = trainer(config(method=method, cycles=8, rollouts=32, epochs_per_cycle=2))
    made.train()
    earned = [cycle["episode_reward"] for cycle in cycles_of(made)]
    assert earned[0] < 2
    assert earned[-1] > earned[0] + 0.7, earned
    assert all("agreement" not in cycle for cycle in cycles_of(made))


@pytest.mark.parametrize(
    "method", ["ppo", pytest.param("grpo", marks=_slow), pytest.param("gigpo", marks=_slow)]
)
def test_a_run_resumes_bit_for_bit(config, tmp_path, method):
    options = {"method": method, "save_strategy": "steps", "save_steps": 1, "cycles": 3}
    whole = trainer(config(**options))
    whole.train()
    assert whole.state.global_step == 6
    for step in (3, 4):  # within a cycle, and where one ended
        again = trainer(config(**options))
        again.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
        for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_where_all_groups_are_dead_nothing_is_learnt(config):
    class Free(Letters):
        def step(self, action: str) -> Any:
            found = super().step(action)
            return (found[0], 0.25, *found[2:3], True, found[4])

    made = trainer(config(weight_decay=0.0), env=Free)
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    assert [cycle["dead_groups"] for cycle in cycles_of(made)] == [4, 4]
    for mine, other in zip(made.model.parameters(), before, strict=True):
        assert torch.equal(mine, other)


def test_episodes_that_crash_are_left_out(config):
    class Fragile(Letters):
        def step(self, action: str) -> Any:
            if action[:1] > "t":
                raise OSError("broken")
            return super().step(action)

    made = trainer(config(rollouts=32), env=Fragile)
    with pytest.warns(RuntimeWarning, match="crashed and have no outcome"):
        made.train()
    assert 4 <= len(made._comparisons) < 32


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2 with method='grpo', .* got 1"),
        ({"group_size": 5}, "rollouts must be a multiple of group_size=5, got 16"),
        ({"temperature": 0.0}, "temperature must be 1: .* with method='grpo', got 0.0"),
        ({"temperature": 0.7}, "temperature must be 1: .* got 0.7"),
        ({"states": "expert"}, "states must be 'agent': .* got 'expert'"),
        ({"sft_weight": 0.5}, "sft_weight must be 0: .* got 0.5"),
        ({"kl_in": "reward", "kl_coef": 0.1}, "kl_in must be 'loss': .* got 'reward'"),
        ({"ask": "unsure"}, "ask must be left out: .* got 'unsure'"),
        ({"teacher_share": 0.5}, "teacher_share must be 0: .* got 0.5"),
        ({"omega": 2.0}, "omega is an option of method='gigpo' or 'istar', got omega=2.0 with"),
        ({"gamma": 0.5}, "gamma is an option of method='inverse' or 'gigpo' or 'ppo', got"),
        (
            {"method": "istar", "fp16": True, "use_cpu": False},
            "fp16 must be False with method='istar'",
        ),
        ({"method": "gigpo", "omega": -1.0}, "omega must be finite and >= 0, got -1.0"),
        ({"method": "gigpo", "anchor": "room"}, "anchor must be one of .* got 'room'"),
        ({"method": "ppo", "group_size": 4}, "group_size is an option of method='grpo' or 'gigpo'"),
    ],
)
def test_what_it_cannot_do_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("method", METHODS)
def test_an_environment_is_needed(config, method):
    with pytest.raises(ValueError, match="needs env"):
        trainer(config(method=method), env=None)
