"""The objectives against `stepagent.reference`: values, gradients, failures."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepagent import reference
from stepagent.learning.losses import (
    discriminator_loss,
    implicit_step_loss,
    inverse_step_reward,
    kl_terms,
    outcome_loss,
    ppo_loss,
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_implicit_step_loss_equals_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    rewards = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for function in (implicit_step_loss, reference.implicit_step_loss):
        expert_P, agent_P = (r.clone().requires_grad_() for r in rewards)
        loss_P = function(expert_P, agent_P)
        loss_P.backward(torch.arange(1.0, 9.0).to(loss_P.dtype))
        results.append((loss_P, expert_P.grad, agent_P.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=tolerance, atol=tolerance
        )


def test_implicit_step_loss_is_stable_at_any_difference() -> None:
    difference_P = torch.tensor([-1e4, -120.0, 0.0, 120.0, 1e4], requires_grad=True)
    loss_P = implicit_step_loss(difference_P, torch.zeros(5))
    loss_P.sum().backward()
    expected_P = torch.tensor([1e4, 120.0, 0.6931472, 0.0, 0.0])
    torch.testing.assert_close(loss_P.detach(), expected_P)
    torch.testing.assert_close(difference_P.grad, torch.tensor([-1.0, -1.0, -0.5, 0.0, 0.0]))


def test_implicit_step_loss_of_no_pair_is_a_connected_zero() -> None:
    expert_P = torch.zeros(0, requires_grad=True)
    implicit_step_loss(expert_P, torch.zeros(0)).sum().backward()
    assert expert_P.grad is not None


def test_implicit_step_loss_refuses_what_does_not_pair() -> None:
    with pytest.raises(
        ValueError,
        match=r"expert_rewards_P must have the shape of agent_rewards_P, \(3,\), got \(2,\)",
    ):
        implicit_step_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="1 dimensions"):
        implicit_step_loss(torch.zeros(()), torch.zeros(()))
    with pytest.raises(TypeError, match=r"float tensor, got torch\.int64"):
        implicit_step_loss(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(
        TypeError, match=r"agent_rewards_P must have the dtype .*, got torch\.float64"
    ):
        implicit_step_loss(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


# ------------------------------------------------------------------ discriminator and reward


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_discriminator_loss_equals_the_reference(smoothing: float) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=g) * 3, torch.randn(12, generator=g) * 3
    results = []
    for function in (discriminator_loss, reference.discriminator_loss):
        expert_P, agent_Q = (x.clone().requires_grad_() for x in logits)
        loss = function(expert_P, agent_Q, smoothing=smoothing)
        loss.backward()
        results.append((loss, expert_P.grad, agent_Q.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_an_undecided_discriminator_costs_two_log_two_and_a_sure_one_the_logit() -> None:
    assert discriminator_loss(torch.zeros(3), torch.zeros(2)).item() == pytest.approx(
        2 * math.log(2)
    )
    # sure and wrong on both sides, where exp would overflow; sure and right costs nothing
    assert discriminator_loss(torch.full((3,), 1e4), torch.full((2,), -1e4)).item() == 2e4
    assert discriminator_loss(torch.full((3,), -1e4), torch.full((2,), 1e4)).item() == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_the_best_discriminator_is_the_agents_share(smoothing: float) -> None:
    """D* = ρ_π / (ρ_π + ρ_E), by gradient descent on five actions; ½ where both are equal."""
    pi_V = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    expert_V = torch.tensor([0.1, 0.2, 0.5, 0.1, 0.1], dtype=torch.float64)
    samples = 1000
    agent = torch.arange(5).repeat_interleave((pi_V * samples).round().long())
    expert = torch.arange(5).repeat_interleave((expert_V * samples).round().long())
    logits_V = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits_V], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = discriminator_loss(logits_V[expert], logits_V[agent], smoothing=smoothing)
        loss.backward()
        return loss

    optimizer.step(closure)
    mixed_pi = (1 - smoothing) * pi_V + smoothing * expert_V
    best_V = mixed_pi / (pi_V + expert_V)
    torch.testing.assert_close(torch.sigmoid(logits_V.detach()), best_V, atol=1e-5, rtol=0)
    assert float(torch.sigmoid(logits_V.detach())[1]) == pytest.approx(0.5, abs=1e-6)


def test_a_smoothed_label_bounds_the_best_logit() -> None:
    logit = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    discriminator_loss(-logit, logit, smoothing=0.1).backward()
    assert logit.grad is not None
    assert abs(float(logit.grad)) < 1e-6


@pytest.mark.parametrize("form", ["agent", "expert", "difference"])
def test_inverse_step_reward_equals_the_reference_and_falls_with_D(form: str) -> None:
    logits_S = torch.linspace(-20, 20, 41)
    rewards_S = inverse_step_reward(logits_S, form=form)
    expected_S = reference.inverse_step_reward(logits_S, form=form)
    torch.testing.assert_close(rewards_S.double(), expected_S, rtol=1e-5, atol=1e-6)
    assert bool((rewards_S.diff() < 0).all())


def test_inverse_step_reward_at_equality_and_far_out() -> None:
    far_S = torch.tensor([-1e4, 0.0, 1e4])
    log2 = math.log(2)
    for form, expected in {
        "agent": [1e4, log2, 0.0],
        "expert": [0.0, -log2, -1e4],
        "difference": [1e4, 0.0, -1e4],
    }.items():
        torch.testing.assert_close(
            inverse_step_reward(far_S, form=form), torch.tensor(expected), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([], [1.0]),
            ValueError,
            "expert_logits_P must not be empty, as a discriminator needs actions of both",
        ),
        (([1.0], []), ValueError, "agent_logits_Q must not be empty"),
        (([math.nan], [1.0]), ValueError, r"expert_logits_P\[0\] must be finite, got nan"),
        (([1.0], [2.0, math.inf]), ValueError, r"agent_logits_Q\[1\] must be finite, got inf"),
    ],
)
def test_discriminator_loss_refuses_one_side_and_nan(
    arguments: tuple[list[float], list[float]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        discriminator_loss(*(torch.tensor(side) for side in arguments))


def test_rewards_refuse_nan_and_unknown_forms() -> None:
    with pytest.raises(ValueError, match=r"agent_logits_S\[1\] must be finite, got nan"):
        inverse_step_reward(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="form must be one of 'agent', 'expert', 'difference'"):
        inverse_step_reward(torch.zeros(1), form="gail")
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 0.5\), got 0.5"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), smoothing=0.5)


def test_outcome_loss_equals_the_reference() -> None:
    g = torch.Generator().manual_seed(2)
    rewards_S, offsets = torch.randn(9, generator=g), torch.tensor([0, 4, 4, 9])
    correct_B = torch.tensor([True, False, True])
    torch.testing.assert_close(
        outcome_loss(rewards_S, offsets, correct_B).double(),
        reference.outcome_loss(rewards_S, offsets, correct_B),
        rtol=1e-6,
        atol=1e-6,
    )


# ------------------------------------------------------------------ PPO


@st.composite
def ppo_cases(draw: st.DrawFn) -> tuple[list[int], int, float, str, float, str]:
    return (
        draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)),
        draw(st.integers(0, 999)),
        draw(st.sampled_from([0.05, 0.2, 1.0])),
        draw(st.sampled_from(["step", "token"])),
        draw(st.sampled_from([0.0, 0.5])),
        draw(st.sampled_from(["k2", "k3"])),
    )


@settings(max_examples=60)
@given(ppo_cases())
def test_ppo_loss_equals_the_reference(case: tuple[list[int], int, float, str, float, str]) -> None:
    lengths, seed, clip, ratio, kl_coef, kl = case
    g = torch.Generator().manual_seed(seed)
    N, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    old_N, ref_N, move_N = -3 * torch.rand(3, N, generator=g, dtype=torch.float64)
    advantages_S = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    results = []
    for function in (ppo_loss, reference.ppo_loss):
        logps_N = (old_N + 0.3 * (move_N + 1.5)).requires_grad_()
        loss = function(
            logps_N, old_N, advantages_S, offsets, clip=clip, ratio=ratio, kl_coef=kl_coef, kl=kl,
            ref_logps_N=ref_N if kl_coef else None,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), logps_N.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ratio", ["step", "token"])
def test_the_first_gradient_of_ppo_is_the_policy_gradient(ratio: str) -> None:
    """At π = π_old the ratio is 1, the loss −mean A, the gradient −A / count for every token."""
    logps_N = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    advantages_S, offsets = torch.tensor([2.0, -1.0]), torch.tensor([0, 3, 4])
    loss = ppo_loss(logps_N, logps_N.detach(), advantages_S, offsets, ratio=ratio)
    loss.backward()
    count = 2 if ratio == "step" else 4
    expected_N = -advantages_S.repeat_interleave(torch.tensor([3, 1])) / count
    torch.testing.assert_close(logps_N.grad, expected_N)
    weights = torch.tensor([1.0, 1.0]) if ratio == "step" else torch.tensor([3.0, 1.0])
    assert loss.item() == pytest.approx(-(weights * advantages_S).sum().item() / count)


def test_ppo_stops_pushing_where_the_ratio_left_the_clip() -> None:
    offsets = torch.tensor([0, 1, 2, 3, 4])
    logps_N = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)  # ratios 1.65 and 0.61
    ppo_loss(logps_N, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), offsets).backward()
    assert logps_N.grad is not None
    # good and already likelier, bad and already rarer: no more; the other way round: still
    assert (logps_N.grad == 0).tolist() == [True, False, False, True]


def test_ppo_of_no_step_is_a_connected_zero() -> None:
    logps_N = torch.zeros(0, requires_grad=True)
    loss = ppo_loss(logps_N, torch.zeros(0), torch.zeros(0), torch.zeros(1, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert logps_N.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantages_S": torch.tensor([math.nan])}, r"advantages_S\[0\] must be finite, got nan"),
        ({"advantages_S": torch.zeros(2)}, "advantages_S must have 1 entries, .*, got 2"),
        ({"clip": 0.0}, "clip must be positive and finite, got 0.0"),
        ({"ratio": "sequence"}, "ratio must be one of 'step', 'token', got 'sequence'"),
        ({"kl_coef": 0.1}, "ref_logps_N must be given with kl_coef=0.1"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0 and finite, got -1.0"),
        ({"kl": "k1"}, "kl must be 'k2' or 'k3', got 'k1', whose gradient"),
        ({"old_logps_N": torch.zeros(3)}, "old_logps_N must have the shape of"),
        ({"step_offsets": torch.tensor([0, 1])}, "must be 2, the number of values, as the last"),
    ],
)
def test_ppo_refuses_by_name(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logps_N": torch.zeros(2),
        "old_logps_N": torch.zeros(2),
        "advantages_S": torch.zeros(1),
        "step_offsets": torch.tensor([0, 2]),
    }
    with pytest.raises(ValueError, match=message):
        ppo_loss(**(arguments | options))


def test_kl_estimates_agree_in_the_mean_and_k3_is_never_negative() -> None:
    g = torch.Generator().manual_seed(5)
    p_V, q_V = torch.rand(2, 6, generator=g, dtype=torch.float64).softmax(1)
    kl = float((p_V * (p_V / q_V).log()).sum())
    drawn = torch.multinomial(p_V, 200_000, replacement=True, generator=g)
    logps_N, ref_N = p_V.log()[drawn], q_V.log()[drawn]
    k1, k3 = kl_terms(logps_N, ref_N, "k1"), kl_terms(logps_N, ref_N, "k3")
    assert float(k1.mean()) == pytest.approx(kl, rel=0.1)
    assert float(k3.mean()) == pytest.approx(kl, rel=0.02)
    assert float(k3.min()) >= 0
    assert float(k1.std()) > 3 * float(k3.std())
