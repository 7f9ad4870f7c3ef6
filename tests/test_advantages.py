"""Step GAE against `stepagent.reference`: values, invariants, failures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepagent import reference
from stepagent.advantages import step_gae
from stepagent.operators.advantages import step_gae_op

EXACT = {"rtol": 1e-12, "atol": 1e-12}
OFFSETS = torch.tensor([0, 0, 3, 4, 4, 9, 9])  # three empty trajectories, first and last among them


def episodes(S: int = 9, B: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    rewards_S, values_S = torch.randn(2, S, generator=g, dtype=torch.float64).to(dtype)
    return {
        "rewards_S": rewards_S,
        "values_S": values_S,
        "trajectory_offsets": OFFSETS,
        "gamma": 0.95,
        "lam": 0.9,
        "bootstrap_values": torch.randn(B, generator=g, dtype=torch.float64).to(dtype),
    }


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_equals_the_reference(dtype: torch.dtype, bootstrap: bool) -> None:
    arguments = episodes(dtype=dtype)
    if not bootstrap:
        arguments["bootstrap_values"] = None
    wide = dtype == torch.float64
    for actual, expected in zip(
        step_gae(**arguments), reference.step_gae(**arguments), strict=True
    ):
        assert actual.dtype == (torch.float64 if wide else torch.float32)
        tolerance = EXACT if wide else {"rtol": 1.2e-7, "atol": 0.0}  # float64 but for one rounding
        torch.testing.assert_close(actual.double(), expected, **tolerance)


@pytest.mark.parametrize("name", ["rewards_S", "values_S", "bootstrap_values"])
def test_takes_several_dtypes(name: str) -> None:
    arguments = episodes(dtype=torch.float32)
    for dtype, result in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        mixed = {**arguments, name: arguments[name].to(dtype)}
        for actual, expected in zip(step_gae(**mixed), reference.step_gae(**mixed), strict=True):
            assert actual.dtype == result
            torch.testing.assert_close(actual, expected.to(result), rtol=1.2e-7, atol=0)


lengths_and_seed = given(st.lists(st.integers(0, 7), max_size=6), st.integers(0, 999))


def random_episodes(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    g = torch.Generator().manual_seed(seed)
    rewards_S, values_S = torch.randn(2, sum(lengths), generator=g, dtype=torch.float64)
    return rewards_S, values_S, np.cumsum([0, *lengths]).astype(np.int32)


@settings(max_examples=60)
@lengths_and_seed
def test_any_lengths_equal_the_reference(lengths: list[int], seed: int) -> None:
    inputs = random_episodes(lengths, seed)
    g = torch.Generator().manual_seed(seed + 1)
    gamma, lam = torch.rand(2, generator=g).tolist()
    bootstrap_B = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "bootstrap_values": bootstrap_B}
    for actual, expected in zip(
        step_gae(*inputs, **options), reference.step_gae(*inputs, **options), strict=True
    ):
        torch.testing.assert_close(actual, expected, **EXACT)


@settings(max_examples=30)
@lengths_and_seed
def test_without_discount_returns_are_rewards_to_go(lengths: list[int], seed: int) -> None:
    rewards_S, values_S, offsets = random_episodes(lengths, seed)
    advantages_S, returns_S = step_gae(rewards_S, values_S, offsets, gamma=1, lam=1)
    to_go_S = torch.cat(
        [episode_T.flip(0).cumsum(0).flip(0) for episode_T in rewards_S.split(lengths)]
        or [rewards_S]
    )
    torch.testing.assert_close(returns_S, to_go_S, **EXACT)
    torch.testing.assert_close(advantages_S, to_go_S - values_S, **EXACT)


@settings(max_examples=30)
@lengths_and_seed
def test_lambda_zero_is_the_one_step_td_error(lengths: list[int], seed: int) -> None:
    rewards_S, values_S, offsets = random_episodes(lengths, seed)
    next_S = values_S.roll(-1)
    next_S[[int(stop) - 1 for stop, length in zip(offsets[1:], lengths, strict=True) if length]] = 0
    advantages_S, _ = step_gae(rewards_S, values_S, offsets, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages_S, rewards_S + 0.9 * next_S - values_S, **EXACT)


def test_the_last_step_keeps_its_reward() -> None:
    """A known bug elsewhere: the reward of a trajectory's last step vanishes."""
    one = torch.ones(1)
    for bootstrap_B, expected in ((None, 1.0), (torch.tensor([2.0]), 2.0)):
        advantages_S, returns_S = step_gae(
            one, 0 * one, np.array([0, 1]), gamma=0.5, lam=1.0, bootstrap_values=bootstrap_B
        )
        assert (advantages_S.item(), returns_S.item()) == (expected, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["rewards_S", "values_S"])
@pytest.mark.parametrize("step", range(9))
def test_a_broken_value_stays_in_its_trajectory(name: str, step: int, bad: float) -> None:
    arguments = episodes()
    sound = step_gae(**arguments)
    arguments[name][step] = bad
    trajectory_S = torch.arange(6).repeat_interleave(OFFSETS.diff())
    others_S = trajectory_S != trajectory_S[step]
    for actual, expected in zip(step_gae(**arguments), sound, strict=True):
        assert torch.equal(actual[others_S], expected[others_S])
        assert not actual[step].isfinite()


def test_no_gradient_flows() -> None:
    arguments = episodes()
    for name in ("rewards_S", "values_S", "bootstrap_values"):
        arguments[name].requires_grad_()
    assert not any(result_S.requires_grad for result_S in step_gae(**arguments))


def test_float32_adds_in_float64() -> None:
    rewards_S = torch.tensor([1.0, 1e8, -1e8])
    advantages_S, _ = step_gae(rewards_S, torch.zeros(3), np.array([0, 3]), gamma=1, lam=1)
    assert advantages_S.tolist() == [1.0, 0.0, -1e8]


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize("bootstrap", [False, True])
def test_opcheck_and_fullgraph(bootstrap: bool) -> None:
    arguments = episodes()
    gamma, lam = arguments.pop("gamma"), arguments.pop("lam")
    if not bootstrap:
        arguments["bootstrap_values"] = None
    torch.library.opcheck(step_gae_op, (*arguments.values(), gamma, lam))
    compiled: Callable[..., Any] = torch.compile(step_gae, fullgraph=True, backend="aot_eager")
    expected = step_gae(**arguments, gamma=gamma, lam=lam)
    for a, e in zip(compiled(**arguments, gamma=gamma, lam=lam), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": 1.1}, ValueError, r"gamma must be in \[0, 1\], got 1.1"),
        ({"gamma": float("nan")}, ValueError, "gamma must be .* got nan"),
        ({"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"),
        ({"lam": torch.ones(9)}, TypeError, "lam must be a number, got torch.float32"),
        ({"values_S": torch.zeros(8)}, ValueError, r"rewards_S is \(9,\) but values_S is \(8,\)"),
        ({"values_S": torch.zeros(9, device="meta")}, ValueError, "values_S is on meta"),
        ({"rewards_S": torch.zeros(9, dtype=torch.int64)}, TypeError, "rewards_S .* torch.int64"),
        ({"rewards_S": torch.zeros(3, 3)}, ValueError, "rewards_S must have 1 dimensions"),
        (
            {"bootstrap_values": torch.zeros(5)},
            ValueError,
            r"bootstrap_values is \(5,\) but trajectory_offsets\[1:\] is \(6,\)",
        ),
        ({"bootstrap_values": 0.0}, TypeError, "bootstrap_values must be a float tensor"),
        ({"trajectory_offsets": np.zeros(0, np.int64)}, ValueError, "trajectory_offsets must have"),
        ({"trajectory_offsets": torch.zeros(7)}, TypeError, "int32 or int64 tensor or array"),
        (
            {"trajectory_offsets": torch.tensor([0, 4, 3, 4, 5, 6, 9])},
            ValueError,
            r"trajectory_offsets\[2\] = 3, but offsets must ascend",
        ),
        (
            {"trajectory_offsets": torch.tensor([0, 1, 2, 3, 4, 5, 6])},
            ValueError,
            r"trajectory_offsets\[6\] = 6, but the last must be 9",
        ),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        step_gae(**{**episodes(), **change})
