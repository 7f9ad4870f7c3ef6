"""Advantages against `stepagent.reference`: values, invariants, failures."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stepagent as sa
from stepagent import reference
from stepagent.learning import advantages
from stepagent.learning.advantages import (
    gigpo,
    group_relative,
    leave_one_out,
    mt_grpo,
    prime,
    step_gae,
)
from stepagent.ops.gae import step_gae_op

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
    torch.library.opcheck(step_gae_op.custom_op, (*arguments.values(), gamma, lam))
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
        (
            {"values_S": torch.zeros(8)},
            ValueError,
            r"rewards_S must have the shape of values_S, \(8,\), got \(9,\)",
        ),
        (
            {"values_S": torch.zeros(9, device="meta")},
            ValueError,
            "rewards_S must be on the device of values_S, meta",
        ),
        ({"rewards_S": torch.zeros(9, dtype=torch.int64)}, TypeError, "rewards_S .* torch.int64"),
        ({"rewards_S": torch.zeros(3, 3)}, ValueError, "rewards_S must have 1 dimensions"),
        (
            {"bootstrap_values": torch.zeros(5)},
            ValueError,
            r"bootstrap_values must have the shape .*, \(6,\), got \(5,\)",
        ),
        ({"bootstrap_values": 0.0}, TypeError, "bootstrap_values must be a float tensor"),
        ({"trajectory_offsets": np.zeros(0, np.int64)}, ValueError, "trajectory_offsets must have"),
        ({"trajectory_offsets": torch.zeros(7)}, TypeError, "int32 or int64 tensor or array"),
        (
            {"trajectory_offsets": torch.tensor([0, 4, 3, 4, 5, 6, 9])},
            ValueError,
            r"trajectory_offsets\[2\] must not be less .*, got 3",
        ),
        (
            {"trajectory_offsets": torch.tensor([0, 1, 2, 3, 4, 5, 6])},
            ValueError,
            r"trajectory_offsets\[6\] must be 9, .*, got 6",
        ),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        step_gae(**{**episodes(), **change})


# ------------------------------------------------------------------ baselines and other methods

groups_and_seed = given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 999), st.booleans()
)


def random_rewards(count: int, seed: int, whole: bool) -> Tensor:
    """With whole numbers, rewards of a group are often equal."""
    g = torch.Generator().manual_seed(seed)
    if whole:
        return torch.randint(0, 2, (count,), generator=g).double()
    return torch.randn(count, generator=g, dtype=torch.float64)


@settings(max_examples=60)
@groups_and_seed
def test_group_relative_equals_the_reference(groups: list[int], seed: int, whole: bool) -> None:
    rewards_S, groups_S = random_rewards(len(groups), seed, whole), torch.tensor(groups)
    for scale in (True, False):
        actual_S = group_relative(rewards_S, groups_S, scale=scale)
        expected_S = reference.group_relative(rewards_S, groups_S, scale=scale)
        torch.testing.assert_close(actual_S, expected_S, **EXACT)
        for group in set(groups):
            assert float(actual_S[groups_S == group].sum()) == pytest.approx(0, abs=1e-9)


@settings(max_examples=60)
@groups_and_seed
def test_leave_one_out_equals_the_reference(groups: list[int], seed: int, whole: bool) -> None:
    groups = [*groups, *groups]  # none is alone
    rewards_S, groups_S = random_rewards(len(groups), seed, whole), torch.tensor(groups)
    actual_S = leave_one_out(rewards_S, groups_S)
    torch.testing.assert_close(actual_S, reference.leave_one_out(rewards_S, groups_S), **EXACT)
    for group in set(groups):
        of_group = groups_S == group
        n = int(of_group.sum())
        centred = rewards_S[of_group] - rewards_S[of_group].mean()
        torch.testing.assert_close(actual_S[of_group], n / (n - 1) * centred, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_have_no_advantage_whatever_rounding_does(dtype: torch.dtype) -> None:
    """0.1 has no exact mean in binary; divided by its own rounding it would be of size 1."""
    rewards_S, groups_S = torch.full((7,), 0.1, dtype=dtype), torch.zeros(7, dtype=torch.long)
    assert group_relative(rewards_S, groups_S).tolist() == [0.0] * 7
    assert leave_one_out(rewards_S, groups_S).tolist() == [0.0] * 7


def test_a_group_of_one_is_zero_for_group_relative_and_an_error_for_leave_one_out() -> None:
    rewards_S, groups_S = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([4, 4, -9])
    assert float(group_relative(rewards_S, groups_S)[2]) == 0.0
    with pytest.raises(ValueError, match=r"groups must have two steps .*, got step 2 alone"):
        leave_one_out(rewards_S, groups_S)


@pytest.mark.parametrize("function", [leave_one_out, group_relative])
def test_baselines_refuse_nan_and_other_shapes(function: Any) -> None:
    with pytest.raises(ValueError, match=r"rewards_S\[1\] must be finite, got nan"):
        function(torch.tensor([1.0, math.nan]), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"groups_S must have 2 entries, .*, got 3"):
        function(torch.zeros(2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="groups_S must be an int32 or int64"):
        function(torch.zeros(2), torch.zeros(2))


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Trajectories of one to four steps, of tasks that have two trajectories or more."""
    tasks = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
    tasks = [*tasks, *tasks]
    lengths = draw(st.lists(st.integers(1, 4), min_size=len(tasks), max_size=len(tasks)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    S = sum(lengths)
    return {
        "rewards_S": torch.randn(S, generator=g, dtype=torch.float64),
        "outcomes_B": torch.randint(0, 2, (len(tasks),), generator=g).double(),
        "turns_B": torch.randn(len(tasks), generator=g, dtype=torch.float64),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
        "tasks_B": torch.tensor(tasks),
        "states_S": torch.randint(0, 3, (S,), generator=g),
        "tools_B": torch.tensor([int(torch.randint(0, n, (), generator=g)) for n in lengths]),
    }


@settings(max_examples=40)
@given(batches(), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_other_methods_advantages_equal_the_reference(
    batch: dict[str, Any], weight: float, scale: bool
) -> None:
    rewards_S, offsets, tasks_B = batch["rewards_S"], batch["offsets"], batch["tasks_B"]
    outcomes_B = batch["outcomes_B"]
    states_S, turns_B, tools_B = batch["states_S"], batch["turns_B"], batch["tools_B"]
    cases: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("gigpo", (rewards_S, offsets, tasks_B, states_S), {"omega": weight, "scale": scale}),
        ("istar", (outcomes_B, rewards_S, offsets, tasks_B), {"omega": weight, "scale": scale}),
        ("prime", (outcomes_B, rewards_S, offsets, tasks_B), {"gamma": weight}),
        ("mt_grpo", (turns_B, outcomes_B, offsets, tasks_B, tools_B), {"lam": weight}),
    ]
    for name, arguments, options in cases:
        actual_S = getattr(advantages, name)(*arguments, **options)
        expected_S = getattr(reference, name)(*arguments, **options)
        torch.testing.assert_close(actual_S, expected_S, rtol=1e-9, atol=1e-9, msg=name)


@settings(max_examples=30)
@given(batches())
def test_gigpo_without_steps_is_grpo_and_each_anchor_group_sums_to_zero(
    batch: dict[str, Any],
) -> None:
    rewards_S, offsets, tasks_B = batch["rewards_S"], batch["offsets"], batch["tasks_B"]
    of = (rewards_S, offsets, tasks_B, batch["states_S"])
    episode_S = gigpo(*of, omega=0.0, scale=True)
    grpo_B = group_relative(sa.step_sums(rewards_S, offsets), tasks_B)
    torch.testing.assert_close(episode_S, grpo_B.repeat_interleave(offsets.diff()), **EXACT)
    steps_S = gigpo(*of, omega=1.0, scale=True) - episode_S
    for state in range(3):
        at = batch["states_S"] == state
        assert float(steps_S[at].sum()) == pytest.approx(0, abs=1e-8)
        if int(at.sum()) == 1:
            assert float(steps_S[at]) == pytest.approx(0, abs=1e-12)


def test_mt_grpo_pays_the_tool_until_it_was_called() -> None:
    one = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    advantages_S = mt_grpo(
        *one, torch.tensor([0, 3, 5]), torch.tensor([7, 7]), torch.tensor([1, 0])
    )
    half = 0.5**0.5
    torch.testing.assert_close(advantages_S, torch.tensor([half, half, 0.0, -half, 0.0]))
    with pytest.raises(
        ValueError, match=r"tool_steps_B\[1\] must fit the trajectory's 2 steps, got 2"
    ):
        mt_grpo(*one, torch.tensor([0, 3, 5]), torch.tensor([7, 7]), torch.tensor([1, 2]))


def test_prime_refuses_a_trajectory_without_tokens() -> None:
    with pytest.raises(ValueError, match="trajectory 1 has no tokens"):
        prime(torch.zeros(2), torch.zeros(3), torch.tensor([0, 3, 3]), torch.tensor([0, 0]))


def test_nan_stays_in_its_own_trajectory() -> None:
    """What step_gae makes of NaN: it reaches the steps before it, and no other trajectory."""
    rewards_S = torch.tensor([1.0, math.nan, 1.0, 2.0, 3.0])
    advantages_S, _ = step_gae(
        rewards_S, torch.zeros(5), torch.tensor([0, 3, 5]), gamma=1.0, lam=1.0
    )
    assert advantages_S.isnan().tolist() == [True, True, False, False, False]
    assert advantages_S[2:].tolist() == [1.0, 5.0, 3.0]
