"""The small experiments of benchmarks/claim compute what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = []

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"claim_{name}", FOLDER / f"claim/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for their own
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in ("common", *loaded):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", range(4))
def test_a_bandits_learner_finds_the_best_arm_and_follows_the_principal(claim, kind):
    principal = claim("principal")

    def rate(paid: float, arm: str) -> float:
        learners = principal.Learners(
            np.full(200, kind), np.full(200, 0.2), np.random.default_rng(0)
        )
        wanted_N = learners.target_N if arm == "target" else learners.means_NA.argmax(1)
        hits = []
        for step in range(principal.STEPS):
            arm_N = learners.act(step)
            learners.learn(arm_N, np.full(200, paid))
            hits.append((arm_N == wanted_N).mean())
        return float(np.mean(hits[-20:]))

    assert rate(0.0, "best") > 1.2 / principal.ARMS
    assert rate(1.0, "target") > 1.5 * rate(0.0, "target")


def test_the_principals_gradient_is_that_of_autograd(claim):
    principal = claim("principal")
    draws = np.random.default_rng(0)
    weights_NF = draws.normal(size=(6, principal.POLICY + principal.SEEN))
    agent = principal.Principal(weights_NF, np.zeros((6, principal.MODEL)), uses_model=False)
    learners = principal.Learners(np.zeros(6, int), np.full(6, 0.5), draws)
    rollout = principal.play(agent, learners)
    found_NF, _ = principal.gradients(rollout, 2, None)
    parameters = torch.tensor(weights_NF, requires_grad=True)
    chance_TN = torch.sigmoid((torch.tensor(rollout.input_TNF) * parameters).sum(2))
    logp_TN = torch.distributions.Bernoulli(chance_TN).log_prob(torch.tensor(rollout.paid_TN))
    togo_TN = np.stack(
        [
            sum(
                principal.GAMMA ** (u - t) * rollout.payoff_TN[u] for u in range(t, principal.STEPS)
            )
            for t in range(principal.STEPS)
        ]
    )
    halves = [togo_TN[:, half] for half in (slice(0, 3), slice(3, 6))]
    advantage_TN = np.concatenate([h - h.mean(1, keepdims=True) for h in halves], axis=1)
    (logp_TN * torch.tensor(advantage_TN)).sum().backward()
    np.testing.assert_allclose(found_NF * principal.STEPS, parameters.grad.numpy(), atol=1e-8)


def test_all_critics_at_once_are_each_by_itself(claim):
    pytest.importorskip("gymnasium")
    explorer = claim("explorer")
    critics = explorer.Critics(3, prior=2.0)
    state, action = torch.randn(5, 2), torch.randn(5, 1)
    x = torch.cat([state, action], 1)

    def alone(parts: Any, e: int) -> torch.Tensor:
        h = torch.relu(x @ parts[0][e] + parts[1][e])
        h = torch.relu(h @ parts[2][e] + parts[3][e])
        return (h @ parts[4][e] + parts[5][e]).squeeze(1)

    for e, found in enumerate(critics(state, action)):
        torch.testing.assert_close(found, alone(critics.own, e) + 2 * alone(critics.fixed, e))


def test_the_sea_pays_for_going_right_all_the_way(claim):
    explorer, draws = claim("explorer"), np.random.default_rng(0)
    right = np.zeros((6, 6, 2))
    right[:, :, 1] = 1
    assert explorer.sea_episode(right, 0.0, draws) == ([0, 1, 2, 3, 4, 5], [1] * 6, True)
    right[3, 3] = [2, 1]
    assert explorer.sea_episode(right, 0.0, draws)[2] is False


def test_a_state_is_noted_where_a_step_is_taken(claim):
    pytest.importorskip("minigrid")
    seen: list[tuple[int, str]] = []
    env = claim("explorer_babyai").Visited(seen)
    first, _ = env.reset(3)
    second, *_ = env.step("turn left")
    env.step("turn left")
    assert seen == [(3, first), (3, second)]
    assert first != second
    assert env.max_steps > 0  # as the environment's own
