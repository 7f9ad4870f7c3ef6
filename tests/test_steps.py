"""Sums, rewards and pair losses over steps, in torch, against `stepagent.reference`."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    EXACT,
    HALVES,
    SINGLE,
    assert_like_reference,
    run,
)
from torch import Tensor

from stepagent import ops, reference
from stepagent.learning.losses import implicit_step_loss

OFFSETS = torch.tensor([0, 2, 2, 5, 6, 6])  # two empty steps, one of them last


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_step_sums_equals_the_reference(dtype: torch.dtype) -> None:
    values_N = torch.randn(6, generator=torch.Generator().manual_seed(0)).to(dtype)
    arguments = {"values_N": values_N, "step_offsets": OFFSETS}
    assert_like_reference("step_sums", arguments, ["values_N"])
    sums_S, grad_N = run(ops.step_sums, arguments, ["values_N"])
    assert sums_S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad_N.dtype == dtype
    assert sums_S[1] == sums_S[4] == 0


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_step_sums_of_nothing(offsets: list[int]) -> None:
    arguments = {"values_N": torch.zeros(0), "step_offsets": np.array(offsets, dtype=np.int32)}
    sums_S, grad_N = run(ops.step_sums, arguments, ["values_N"])
    assert sums_S.tolist() == [0.0] * (len(offsets) - 1)
    assert grad_N.shape == (0,)


def test_step_sums_add_in_float64() -> None:
    values_N = torch.tensor([1e8, 1.0, -1e8, 2.0])
    assert ops.step_sums(values_N, torch.tensor([0, 3, 4])).tolist() == [1.0, 2.0]


def test_a_broken_value_stays_in_its_step() -> None:
    values_N = torch.tensor([1.0, torch.inf, torch.nan, 2.0])
    sums_S = ops.step_sums(values_N, torch.tensor([0, 1, 2, 3, 4]))
    assert sums_S[[0, 1, 3]].tolist() == [1.0, torch.inf, 2.0]
    assert sums_S[2].isnan()


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(0, 4), max_size=6), seed=st.integers(0, 99))
def test_steps_of_any_length_equal_the_reference(lengths: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values_N = torch.randn(sum(lengths), generator=g, dtype=torch.float64)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    assert_like_reference(
        "step_sums", {"values_N": values_N, "step_offsets": offsets}, ["values_N"]
    )


def test_step_rewards_equal_the_reference_with_gradient_to_the_policy_only() -> None:
    g = torch.Generator().manual_seed(0)
    logps_N, ref_logps_N = -torch.rand(2, 6, generator=g, dtype=torch.float64)
    arguments = {
        "logps_N": logps_N,
        "ref_logps_N": ref_logps_N,
        "step_offsets": OFFSETS,
        "beta": 0.3,
    }
    assert_like_reference("step_rewards", arguments, ["logps_N"])
    ref_logps_N.requires_grad_()
    logps_N.requires_grad_()
    ops.step_rewards(logps_N, ref_logps_N, OFFSETS, beta=0.3).sum().backward()
    assert ref_logps_N.grad is None


def test_step_rewards_subtract_after_the_upcast() -> None:
    logps_N = torch.tensor([-100.0, -7.03125], dtype=torch.bfloat16)
    ref_logps_N = torch.tensor([-0.0078125, -0.0078125], dtype=torch.bfloat16)
    rewards_S = ops.step_rewards(logps_N, ref_logps_N, np.array([0, 2]), beta=1.0)
    assert rewards_S.tolist() == [-107.015625]


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_step_rewards_take_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    arguments = step_pairs()
    for name, dtype in zip(("logps_N", "ref_logps_N"), dtypes, strict=True):
        arguments[name] = arguments[name].to(dtype)
    rewards_S = ops.step_rewards(*list(arguments.values())[:3], beta=0.3)
    expected_S = reference.step_rewards(*list(arguments.values())[:3], beta=0.3)
    assert rewards_S.dtype == dtypes[1]
    torch.testing.assert_close(rewards_S.double(), expected_S, rtol=1.2e-7, atol=0)


def test_many_steps() -> None:
    S = 70_000  # more than a grid's second axis has
    values_N = torch.arange(S, dtype=torch.float32)
    assert torch.equal(ops.step_sums(values_N, torch.arange(S + 1)), values_N)


def step_pairs(dtype: torch.dtype = torch.float64, **changes: Any) -> dict[str, Any]:
    """Arguments of step_pair_loss: steps in three pairs, empty, in none, one with itself."""
    g = torch.Generator().manual_seed(0)
    logps_N, ref_logps_N = (-8 * torch.rand(2, 9, generator=g, dtype=torch.float64)).to(dtype)
    return {
        "logps_N": logps_N,
        "ref_logps_N": ref_logps_N,
        "step_offsets": torch.tensor([0, 2, 2, 5, 6, 9]),
        "expert_steps_P": torch.tensor([0, 0, 0, 2]),
        "agent_steps_P": torch.tensor([1, 2, 4, 2]),
        "beta": 0.3,
        **changes,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_step_pair_loss_equals_the_reference(dtype: torch.dtype) -> None:
    arguments = step_pairs(dtype)
    expected = run(reference.step_pair_loss, arguments, ["logps_N"])
    loss_P, grad_N = run(ops.step_pair_loss, arguments, ["logps_N"])
    assert loss_P.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad_N.dtype == dtype
    for actual, exact in zip((loss_P, grad_N), expected, strict=True):
        eps = 2 * torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.double(), exact.double(), rtol=eps, atol=eps)
    assert not grad_N[5:6].any()  # of the step in no pair


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_step_pair_loss_is_the_loss_of_the_rewards(dtype: torch.dtype) -> None:
    def composed(expert_steps_P: Tensor, agent_steps_P: Tensor, **steps: Any) -> Tensor:
        rewards_S = ops.step_rewards(**steps)
        return implicit_step_loss(rewards_S[expert_steps_P], rewards_S[agent_steps_P])

    arguments = step_pairs(dtype)
    expected = run(composed, arguments, ["logps_N"])
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    for a, e in zip(run(ops.step_pair_loss, arguments, ["logps_N"]), expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    P=st.integers(0, 8),
    seed=st.integers(0, 999),
)
def test_any_steps_and_pairs_equal_the_reference(lengths: list[int], P: int, seed: int) -> None:
    rng, S = np.random.default_rng(seed), len(lengths)
    arguments = {
        "logps_N": torch.from_numpy(-rng.random(sum(lengths))),
        "ref_logps_N": torch.from_numpy(-rng.random(sum(lengths))),
        "step_offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "expert_steps_P": rng.integers(S, size=P),
        "agent_steps_P": rng.integers(S, size=P).astype(np.int32),
        "beta": 2.0,
    }
    assert_like_reference("step_pair_loss", arguments, ["logps_N"])


def test_step_pair_loss_of_differences_of_any_size() -> None:
    difference_P = torch.tensor([-1e4, -120.0, -5.0, 0.0, 5.0, 80.0, 1e4])
    arguments = {
        "logps_N": difference_P,
        "ref_logps_N": torch.zeros(7),
        "step_offsets": torch.tensor([0, *range(1, 8), 7]),
        "expert_steps_P": torch.arange(7),
        "agent_steps_P": torch.full((7,), 7),
        "beta": 1.0,
    }
    upstream = {**arguments, "logps_N": difference_P.double()}
    loss_P, grad_N = run(ops.step_pair_loss, arguments, ["logps_N"])
    expected_P, expected_N = run(ops.step_pair_loss, upstream, ["logps_N"])
    torch.testing.assert_close(loss_P.double(), expected_P, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_N.double(), expected_N, rtol=1e-6, atol=0)
    assert loss_P[:2].tolist() == [1e4, 120.0]
    assert 0 < loss_P[5] < 1e-34
    assert 0 < abs(grad_N[5]) < 1e-34


def test_large_rewards_that_are_close_keep_the_digits_of_their_difference() -> None:
    logps_N = torch.tensor([-3e4, -1e-3, -3e4])
    loss_P = ops.step_pair_loss(
        logps_N, 0 * logps_N, np.array([0, 2, 3]), np.array([0]), np.array([1]), beta=1.0
    )
    expected_P = torch.nn.functional.softplus(torch.tensor([1e-3], dtype=torch.float64))
    torch.testing.assert_close(loss_P.double(), expected_P, rtol=1e-7, atol=0)


def test_step_pair_loss_starts_at_log_2_and_pulls_half_of_beta() -> None:
    """At π = π_ref; an identical pair has no gradient."""
    arguments = step_pairs(expert_steps_P=np.array([0, 2]), agent_steps_P=np.array([4, 2]))
    logps_N = arguments["logps_N"].requires_grad_()
    loss_P = ops.step_pair_loss(**{**arguments, "ref_logps_N": logps_N})
    loss_P.sum().backward()
    assert torch.equal(loss_P, torch.full((2,), 2.0, dtype=torch.float64).log())
    expected_N = 0.15 * torch.tensor([-1.0, -1, 0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)
    assert torch.equal(logps_N.grad, expected_N)


def test_a_broken_step_breaks_its_pairs_only() -> None:
    arguments = step_pairs(expert_steps_P=np.array([0, 2]), agent_steps_P=np.array([4, 3]))
    arguments["logps_N"][0] = torch.nan
    loss_P, grad_N = run(ops.step_pair_loss, arguments, ["logps_N"])
    assert loss_P.isnan().tolist() == [True, False]
    assert grad_N.isnan().tolist() == [True] * 2 + [False] * 4 + [True] * 3


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 4], r"step_offsets\[0\] must be 0, as the first, got 1"),
        ([0, 3, 2, 4], r"step_offsets\[2\] must not be less .*, got 2"),
        ([0, 3], r"step_offsets\[1\] must be 4, .*, got 3"),
        ([0], r"step_offsets\[0\] must be 4, .*, got 0"),
        ([], "at least|>= 1"),
    ],
)
def test_step_sums_refuse_offsets(offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.step_sums(torch.zeros(4), np.array(offsets, dtype=np.int64))


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_step_rewards_refuse_beta(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be positive and finite, got"):
        ops.step_rewards(torch.zeros(2), torch.zeros(2), np.array([0, 2]), beta=beta)


def test_step_rewards_refuse_two_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"logps_N must have the shape of ref_logps_N, \(3,\), got \(2,\)"
    ):
        ops.step_rewards(torch.zeros(2), torch.zeros(3), np.array([0, 2]), beta=1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"expert_steps_P": np.array([0, 1, 5, 0])},
            ValueError,
            r"expert_steps_P\[2\] must lie in \[0, 5\), got 5",
        ),
        (
            {"agent_steps_P": torch.tensor([0, -1, 0, 0])},
            ValueError,
            r"agent_steps_P\[1\] must lie in .*, got -1",
        ),
        (
            {"agent_steps_P": np.array([0])},
            ValueError,
            "agent_steps_P must have 4 entries, .*, got 1",
        ),
        ({"expert_steps_P": [0]}, TypeError, "expert_steps_P must be an int32 or int64"),
        ({"beta": -1.0}, ValueError, "beta must be positive"),
        ({"ref_logps_N": torch.zeros(8)}, ValueError, r"logps_N must have the shape of .*"),
        (
            {"step_offsets": np.array([0, 1, 2, 3, 4, 8])},
            ValueError,
            r"step_offsets\[5\] must be .*, got 8",
        ),
    ],
)
def test_step_pair_loss_refuses(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.step_pair_loss(**step_pairs(**change))
