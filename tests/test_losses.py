"""The objectives against `stepagent.reference`: values, gradients, failures."""

import pytest
import torch

from stepagent import reference
from stepagent.losses import implicit_step_loss


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
        ValueError, match=r"expert_rewards_P is \(2,\) but agent_rewards_P is \(3,\)"
    ):
        implicit_step_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="1 dimensions"):
        implicit_step_loss(torch.zeros(()), torch.zeros(()))
    with pytest.raises(TypeError, match=r"float tensor, got torch\.int64"):
        implicit_step_loss(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(TypeError, match=r"agent_rewards_P is torch\.float64"):
        implicit_step_loss(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
