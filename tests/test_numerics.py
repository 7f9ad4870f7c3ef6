"""Hostile sizes and derivatives of the ops, the losses and the advantages.

Each against a definition in float64 that is written here, or against `stepagent.reference`.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import HEAD_LEAVES, head, logits, on_device
from torch import Tensor

import stepagent as sa
from stepagent import reference
from stepagent.learning.advantages import standardised
from stepagent.learning.losses import kl_terms

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Exact in bfloat16; on both sides of 40, where tangents begin, and of where exp overflows.
SIZES = [0.0, 0.25, -0.25, 3.0, -3.0, 39.5, 40.0, 40.5, -40.0, 96.0, -100.0, 120.0, -800.0, 800.0]
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of a gradient


# ------------------------------------------------------------------- ratios and their KL


def test_a_clipped_ratio_that_overflows_has_the_gradient_0() -> None:
    logps_N = torch.full((60,), -0.4, requires_grad=True)
    loss = sa.ppo_loss(logps_N, torch.full((60,), -2.0), torch.tensor([1.0]), torch.tensor([0, 60]))
    loss.backward()
    assert loss.item() == pytest.approx(-1.2)
    assert logps_N.grad is not None
    assert not logps_N.grad.any()  # NaN is truthy


def test_an_overflowing_ratio_times_no_advantage_is_0() -> None:
    logps_N = torch.full((1,), 100.0, requires_grad=True)
    for ratio in ("step", "token"):
        loss = sa.ppo_loss(
            logps_N, torch.zeros(1), torch.zeros(1), torch.tensor([0, 1]), ratio=ratio
        )
        (grad_N,) = torch.autograd.grad(loss, logps_N)
        assert loss == 0
        assert grad_N == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", ["step", "token"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_ppo_is_its_definition_at_any_ratio(
    dtype: torch.dtype, ratio: str, kl: str, advantage: float
) -> None:
    for size in SIZES:
        given: dict[str, Any] = {
            "old_logps_N": torch.tensor([-1.0, -1.0], dtype=dtype),
            "advantages_S": torch.tensor([advantage]),
            "step_offsets": torch.tensor([0, 2]),
            "ref_logps_N": torch.tensor([-1.0, 1.0], dtype=dtype),
        }
        logps_N = torch.tensor([size - 1.0, -1.0], dtype=dtype, requires_grad=True)
        options: dict[str, Any] = {"ratio": ratio, "kl": kl, "kl_coef": 0.5}
        loss = sa.ppo_loss(logps_N, **given, **options)
        exact = reference.ppo_loss(logps_N, **given, **options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
        actual_N, expected_N = (torch.autograd.grad(x, logps_N)[0] for x in (loss, exact))
        assert actual_N.isfinite().all()
        close = CLOSE[dtype]
        torch.testing.assert_close(actual_N, expected_N, rtol=close, atol=close)


def test_an_action_that_became_far_too_likely_is_still_pulled_back() -> None:
    logps_N = torch.full((1,), 0.0, requires_grad=True)
    loss = sa.ppo_loss(logps_N, torch.tensor([-90.0]), torch.tensor([-1.0]), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert logps_N.grad is not None
    assert logps_N.grad.item() == pytest.approx(math.exp(40))


def k3_by_hand(d: float) -> float:
    rho = math.exp(-d) if d >= -40 else math.exp(40) * (1 - d - 40)
    return rho - 1 + d if abs(d) > 1e-3 else d**2 / 2 - d**3 / 6 + d**4 / 24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_estimator_of_the_kl_is_its_definition_at_any_difference(dtype: torch.dtype) -> None:
    logps_N = torch.tensor([*SIZES, 2.0**-20], dtype=dtype, requires_grad=True)
    by_hand: dict[str, Callable[[float], float]] = {
        "k1": lambda d: d,
        "k2": lambda d: d**2 / 2,
        "k3": k3_by_hand,
    }
    for kl, definition in by_hand.items():
        terms_N = kl_terms(logps_N, torch.zeros_like(logps_N), kl)
        assert terms_N.isfinite().all()
        expected_N = torch.tensor([definition(d) for d in logps_N.tolist()], dtype=torch.float64)
        torch.testing.assert_close(terms_N.double(), expected_N, rtol=1e-6, atol=0)
        (grad_N,) = torch.autograd.grad(terms_N.sum(), logps_N)
        slopes = {"k1": lambda d: 1.0, "k2": lambda d: d, "k3": lambda d: -math.expm1(min(-d, 40))}
        expected_N = torch.tensor([slopes[kl](d) for d in logps_N.tolist()], dtype=torch.float64)
        torch.testing.assert_close(grad_N.double(), expected_N, rtol=CLOSE[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [100.0, 119.0, 120.0, 800.0])
def test_the_kl_of_a_diff_stays_finite(dtype: torch.dtype, gap: float) -> None:
    """The reference is sure of the label, which the policy forbids all but certainly."""
    logits_NV = torch.tensor([[-gap, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    labels_N = torch.tensor([0])
    given = (logits_NV, torch.tensor([[gap, 0.0, 0.0]], dtype=dtype), labels_N)
    _, kl_N = sa.logprob_diff(*given, return_kl=True)
    _, exact_N = reference.logprob_diff(*given, return_kl=True)
    assert kl_N.isfinite()
    torch.testing.assert_close(kl_N.double(), exact_N, rtol=1e-5, atol=0)
    actual_NV, expected_NV = (torch.autograd.grad(x.sum(), logits_NV)[0] for x in (kl_N, exact_N))
    assert actual_NV.isfinite().all()
    torch.testing.assert_close(actual_NV, expected_NV, rtol=1e-2, atol=1e-6)


# --------------------------------------------------------------- losses of any logit


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_loss_of_a_logit_is_its_definition_at_any_size(dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-13 if dtype == torch.float64 else 1e-6, "atol": 0.0}
    for x in [*SIZES, 20.5, -20.5, 35.0, 3e4]:  # torch's softplus is a line from 20 on
        x_1, zero_1 = torch.tensor([x], dtype=dtype), torch.zeros(1, dtype=dtype)
        offsets = torch.tensor([0, 1])
        actual = {
            "implicit": sa.implicit_step_loss(x_1, zero_1),
            "agent": sa.inverse_step_reward(x_1, form="agent"),
            "expert": sa.inverse_step_reward(x_1, form="expert"),
            "difference": sa.inverse_step_reward(x_1, form="difference"),
            "success": sa.outcome_loss(x_1, offsets, torch.tensor([True])),
            "failure": sa.outcome_loss(x_1, offsets, torch.tensor([False])),
            "discriminator": sa.discriminator_loss(-x_1, x_1)[None],
            "pair": sa.step_pair_loss(
                x_1, zero_1, offsets, torch.tensor([0]), torch.tensor([0]), beta=1.0
            ),
        }
        loss = softplus(-x)
        expected = {
            "implicit": loss,
            "agent": loss,
            "expert": -softplus(x),
            "difference": -x,
            "success": loss,
            "failure": softplus(x),
            "discriminator": 2 * loss,
            "pair": math.log(2),
        }
        for name, value in expected.items():
            exact_1 = torch.tensor([value], dtype=torch.float64)
            allowed = {**tolerance, "atol": 1e-37} if dtype == torch.float32 else tolerance
            torch.testing.assert_close(
                actual[name].double(), exact_1, **allowed, msg=f"{name} of {x}: {actual[name]}"
            )


# ---------------------------------------------------------- deviations of rounding errors

NOISE = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64)
ONE_GROUP = torch.zeros(4, dtype=torch.long)
FOUR = torch.arange(5)


def test_rewards_that_differ_by_rounding_are_worth_the_same() -> None:
    assert sa.group_relative(NOISE, ONE_GROUP).abs().max() < 1e-9
    steps = {"trajectory_offsets": FOUR, "trajectory_groups_B": ONE_GROUP}
    assert sa.gigpo(NOISE, **steps, state_groups_S=ONE_GROUP, scale=True).abs().max() < 1e-9
    assert sa.istar(NOISE, NOISE, **steps).abs().max() < 1e-9
    tools = torch.zeros(4, dtype=torch.long)
    assert sa.mt_grpo(NOISE, NOISE, **steps, tool_steps_B=tools).abs().max() < 1e-9
    assert standardised(NOISE).abs().max() < 1e-9
    assert sa.leave_one_out(NOISE, ONE_GROUP).abs().max() < 1e-15  # not over a deviation
    assert sa.group_relative(NOISE.float() + 3e-8 * FOUR[:4], ONE_GROUP).abs().max() < 1e-2


def test_rewards_that_cancel_leave_rounding_too() -> None:
    """Of sizes 0.3 and less: what is left of 0.1 + 0.2 − 0.3 is no return."""
    rewards_S = torch.tensor([0.1, 0.2, -0.3, 0.3, 0.0, -0.3], dtype=torch.float64)
    given = (rewards_S, torch.tensor([0, 3, 6]), torch.zeros(2).long(), torch.arange(6))
    advantages_S = sa.gigpo(*given, gamma=1.0, scale=True)
    assert advantages_S.abs().max() < 1e-9
    expected_S = reference.gigpo(*given, gamma=1.0, scale=True)
    torch.testing.assert_close(advantages_S, expected_S, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_unit_of_rewards_changes_no_advantage(size: float, dtype: torch.dtype) -> None:
    rewards_S = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 5.0], dtype=dtype)
    groups_S = torch.tensor([0, 0, 0, 0, 1, 1])
    expected_S = reference.group_relative(rewards_S, groups_S).to(dtype)
    torch.testing.assert_close(sa.group_relative(rewards_S * size, groups_S), expected_S)


def test_a_floor_leaves_what_is_above_it() -> None:
    rewards_S = torch.tensor([1.0, 1.001, 0.999, 1.0], dtype=torch.float64)
    exact_S = (rewards_S - rewards_S.mean()) / rewards_S.std()
    torch.testing.assert_close(sa.group_relative(rewards_S, ONE_GROUP), exact_S)
    exact_S = (rewards_S - rewards_S.mean()) / rewards_S.std(correction=0)
    torch.testing.assert_close(standardised(rewards_S), exact_S)


# ------------------------------------------------------------------------- derivatives


def differentiable() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every op of what a derivative may be asked for, by any of its inputs."""
    given, frozen = head(), {k: v for k, v in head().items() if k != "hidden_RH"}
    rows = logits()
    values_N = torch.linspace(-2, 0, 6, dtype=torch.float64)
    steps = (torch.zeros(6, dtype=torch.float64), torch.tensor([0, 2, 4, 6]))
    pairs = (torch.tensor([0, 1]), torch.tensor([1, 2]))
    refs = {f"ref_{k}": given[k].flip(0) for k in HEAD_LEAVES}
    cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "linear_logprobs, frozen head": (
            lambda x: sa.linear_logprobs(x, **frozen),
            given["hidden_RH"],
        ),
        "linear_logprob_diff": (
            lambda x: sa.linear_logprob_diff(x, **frozen, **refs, ref_rows_N=given["rows_N"]),
            given["hidden_RH"],
        ),
        "token_logprobs": (
            lambda x: sa.token_logprobs(x, rows["labels_N"], return_entropy=True)[1],
            rows["logits_NV"],
        ),
        "logprob_diff": (
            lambda x: sa.logprob_diff(x, x.detach().flip(0), rows["labels_N"]),
            rows["logits_NV"],
        ),
        "step_pair_loss": (lambda x: sa.step_pair_loss(x, *steps, *pairs, beta=0.5), values_N),
        "step_sums": (lambda x: sa.step_sums(x, steps[1]), values_N),
        "step_rewards": (lambda x: sa.step_rewards(x, *steps, beta=0.5), values_N),
    }
    for leaf in HEAD_LEAVES:
        others = {k: v for k, v in given.items() if k != leaf}
        cases[f"linear_logprobs by {leaf}"] = (
            lambda x, leaf=leaf, others=others: sa.linear_logprobs(**{leaf: x}, **others),
            given[leaf],
        )
    return cases


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
@pytest.mark.parametrize("case", differentiable())
def test_forward_mode_is_refused_by_name(case: str) -> None:
    function, x = differentiable()[case]
    refusal = rf"stepagent::{case.split(',')[0].split(' ')[0]} must be differentiated in reverse"
    with pytest.raises(NotImplementedError, match=refusal):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match=refusal):
        torch.func.jacfwd(function)(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=refusal),
    ):
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
def test_a_constant_in_forward_mode_is_allowed() -> None:
    """The tangent of something else does not refuse the op."""
    offsets = torch.tensor([0, 2])
    _, tangent = torch.func.jvp(
        lambda x: x * sa.step_sums(torch.ones(2), offsets), (torch.ones(1),), (torch.ones(1),)
    )
    assert tangent.item() == 2.0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
def test_forward_mode_through_a_loss_is_refused() -> None:
    def loss(logps_N: Tensor) -> Tensor:
        return sa.ppo_loss(logps_N, torch.zeros(2), torch.ones(1), torch.tensor([0, 2]))

    with pytest.raises(NotImplementedError, match="stepagent::step_rewards must be"):
        torch.func.jvp(loss, (torch.zeros(2),), (torch.ones(2),))


@pytest.mark.parametrize("case", differentiable())
def test_a_second_derivative_is_an_error_and_not_a_part_of_it(case: str) -> None:
    function, x = differentiable()[case]
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"stepagent\..*_backward"):
        torch.autograd.grad(grad.sum(), x)
    if case not in ("step_sums", "step_rewards"):  # these are linear: theirs is 0
        (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"stepagent\..*_backward"):
            torch.autograd.grad(grad.sum(), x)


def test_the_pull_of_a_pair_has_its_gradient_where_the_operator_is_called() -> None:
    """`step_pair_loss` returns the loss alone; `test_gradcheck` covers both results."""
    logps_N = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    inputs = (torch.zeros(2).double(), torch.arange(3), torch.tensor([0]), torch.tensor([1]), 0.5)
    _, pull_P = torch.ops.stepagent.step_pair_loss(logps_N, *inputs)
    (grad_N,) = torch.autograd.grad(pull_P.sum(), logps_N)
    slope = 0.5 * pull_P * (1 - pull_P)
    torch.testing.assert_close(grad_N, torch.cat([-slope, slope]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.usefixtures("triton_path")
def test_triton_kernels_refuse_the_same_derivatives() -> None:
    ref_N, offsets = torch.zeros(4), torch.tensor([0, 2, 4])
    pairs = (torch.tensor([0]), torch.tensor([1]))

    def loss(logps_N: Tensor) -> Tensor:
        given = [x.to(logps_N.device) for x in (ref_N, offsets, *pairs)]
        return sa.step_pair_loss(logps_N, *given, beta=0.5).sum()

    logps_N = on_device(torch.linspace(-2, 0, 4)).requires_grad_()
    (grad_N,) = torch.autograd.grad(loss(logps_N), logps_N, create_graph=True)
    with pytest.raises(RuntimeError, match=r"stepagent\..*_backward"):
        torch.autograd.grad(grad_N.sum(), logps_N)
    with pytest.raises(NotImplementedError, match="stepagent::step_pair_loss must be"):
        torch.func.jvp(loss, (logps_N.detach(),), (torch.ones_like(logps_N),))
