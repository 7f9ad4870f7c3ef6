"""The Triton kernels of steps against `stepagent.reference`, interpreted where there is no GPU.

The interpreter takes about 2 ms a program and tile, so shapes are tiny and the tile is cut to 4.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

pytest.importorskip("triton")

from stepagent import reference
from stepagent.kernels import step_gae as gae_module
from stepagent.kernels import step_rewards as rewards_module
from stepagent.kernels.step_gae import step_gae
from stepagent.kernels.step_rewards import (
    step_pair_loss,
    step_pair_loss_backward,
    step_rewards,
    step_rewards_backward,
)
from stepagent.ops import gae, paths, rewards, sums
from stepagent.ops import pairs as pair_steps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf − inf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDED = {"rtol": 1.2e-7, "atol": 0.0}  # float64 but for one rounding to float32

# Steps of 0, 1, less than a tile, a tile, more, many tiles and none at the end.
OFFSETS = torch.tensor([0, 0, 1, 4, 8, 13, 24, 24])
N = 24


@pytest.fixture(autouse=True)
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gae_module, "BLOCK", 4)
    monkeypatch.setattr(rewards_module, "BLOCK", 4)


def on_device(inputs: Any) -> Any:
    return tree_map(lambda x: x.to(DEVICE) if torch.is_tensor(x) else x, inputs)


def launch(kernel: Any, *inputs: Any) -> Any:
    return tree_map(lambda x: x.cpu(), kernel(*on_device(inputs)))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (8 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


# ------------------------------------------------------- step_sums and step_rewards


@pytest.mark.parametrize("ref_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rewards_equal_the_reference(dtype: torch.dtype, ref_dtype: torch.dtype) -> None:
    logps_N, ref_logps_N = random(N, dtype=dtype), random(N).flip(0).to(ref_dtype)
    rewards_S = launch(step_rewards, logps_N, ref_logps_N, OFFSETS, 0.3)
    expected_S = reference.step_rewards(logps_N, ref_logps_N, OFFSETS, beta=0.3)
    assert rewards_S.dtype == torch.float32
    torch.testing.assert_close(rewards_S.double(), expected_S, **ROUNDED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_equal_the_reference(dtype: torch.dtype) -> None:
    values_N = random(N, dtype=dtype)
    sums_S = launch(step_rewards, values_N, None, OFFSETS, 1.0)
    torch.testing.assert_close(sums_S.double(), reference.step_sums(values_N, OFFSETS), **ROUNDED)


def test_sums_add_in_float64() -> None:
    values_N = torch.tensor([1e8, 1.0, -1e8, 2.0])
    assert launch(step_rewards, values_N, None, torch.tensor([0, 3, 4]), 1.0).tolist() == [1.0, 2.0]


def test_beta_is_not_rounded() -> None:
    inputs = (torch.ones(1), None, torch.tensor([0, 1]), 0.1, torch.float64)
    assert launch(step_rewards, *inputs).tolist() == [0.1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_that_of_each_step(dtype: torch.dtype) -> None:
    upstream_S = random(7)
    grad_N = launch(step_rewards_backward, upstream_S, OFFSETS, 0.3, N, dtype)
    expected_N = (0.3 * upstream_S.double()).repeat_interleave(OFFSETS.diff())
    assert grad_N.dtype == dtype
    # Not half of it: the interpreter cuts where a GPU rounds to bfloat16.
    eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else torch.finfo(dtype).eps / 2
    torch.testing.assert_close(grad_N.double(), expected_N, rtol=eps, atol=0)


def test_strided_inputs_and_expanded_upstream_gradients() -> None:
    wide = random(N, 2).to(DEVICE)
    logps_N, ref_logps_N = wide.unbind(1)
    offsets = OFFSETS.repeat_interleave(2)[::2].to(DEVICE)
    contiguous = (logps_N.contiguous(), ref_logps_N.contiguous(), OFFSETS.to(DEVICE), 0.3)
    assert torch.equal(step_rewards(logps_N, ref_logps_N, offsets, 0.3), step_rewards(*contiguous))
    one_S = torch.ones((), device=DEVICE).expand(7)
    grad_N = step_rewards_backward(one_S, offsets, 0.5, N, torch.float32)
    assert torch.equal(grad_N.cpu(), torch.full((N,), 0.5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_token_stays_in_its_step(bad: float) -> None:
    logps_N = random(N)
    sound_S = launch(step_rewards, logps_N, None, OFFSETS, 1.0)
    logps_N[12] = bad
    broken_S = launch(step_rewards, logps_N, None, OFFSETS, 1.0)
    torch.testing.assert_close(broken_S[4], torch.tensor(bad), equal_nan=True)
    others_S = torch.arange(7) != 4
    assert torch.equal(broken_S[others_S], sound_S[others_S])


@pytest.mark.parametrize(
    ("offsets", "broken"),
    [
        ([1, 4, 24], [True, False]),
        ([0, 5, 4, 24], [False, True, False]),
        ([0, 2**40, 24], [True, True]),
        ([0, -(2**40), 24], [True, True]),
        ([0, 8, 20], [False, True]),
    ],
)
def test_offsets_that_break_the_rule_give_nan_and_read_nothing(
    offsets: list[int], broken: list[bool]
) -> None:
    rewards_S = launch(step_rewards, random(N), None, torch.tensor(offsets), 1.0)
    assert rewards_S.isnan().tolist() == broken
    _, returns_S = launch(step_gae, random(N), random(N), torch.tensor(offsets), None, 1.0, 1.0)
    sound_S = torch.zeros(N, dtype=torch.bool)
    for start, stop, bad in zip(offsets, offsets[1:], broken, strict=False):
        if not bad:
            sound_S[start:stop] = True
    assert torch.equal(~returns_S.isnan(), sound_S)
    # A gradient too, of a token that no sound step holds: it is not left as memory was.
    upstream_S = torch.ones(len(offsets) - 1)
    grad_N = launch(step_rewards_backward, upstream_S, torch.tensor(offsets), 0.5, N, torch.float32)
    assert torch.equal(grad_N[sound_S], torch.full_like(grad_N[sound_S], 0.5))
    assert grad_N[~sound_S].isnan().all()


def test_no_step_and_no_token() -> None:
    none, start = torch.zeros(0), torch.zeros(1, dtype=torch.int64)
    empty = torch.zeros(3, dtype=torch.int64)
    index = torch.zeros(0, dtype=torch.int64)
    assert launch(step_rewards, none, none, start, 1.0).shape == (0,)
    assert launch(step_rewards, none, none, empty, 1.0).tolist() == [0.0, 0.0]
    for offsets in (start, empty):
        upstream_S = torch.zeros(len(offsets) - 1)
        grad_N = launch(step_rewards_backward, upstream_S, offsets, 1.0, 0, torch.float32)
        assert grad_N.shape == (0,)
        loss_P, pull_P = launch(step_pair_loss, upstream_S.double(), index, index)
        assert loss_P.shape == (0,)
        inputs = (loss_P, pull_P, offsets, index, index, 1.0, 0, torch.float32)
        assert launch(step_pair_loss_backward, *inputs).shape == (0,)
        assert [r.shape for r in launch(step_gae, none, none, offsets, None, 1.0, 1.0)] == [
            (0,)
        ] * 2


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes minutes for 70,000 programs")
def test_more_steps_than_the_second_axis_of_a_grid_has() -> None:
    S = 70_000
    values_N, offsets = torch.arange(S, dtype=torch.float32), torch.arange(S + 1)
    pairs = (torch.arange(S), torch.arange(S).flip(0))
    assert torch.equal(launch(step_rewards, values_N, None, offsets, 1.0), values_N)
    grad_N = launch(step_rewards_backward, values_N, offsets, 1.0, S, torch.float32)
    assert torch.equal(grad_N, values_N)
    loss_P, pull_P = launch(step_pair_loss, values_N.double(), *pairs)
    inputs = (loss_P, pull_P, offsets, *pairs, 1.0, S, torch.float32)
    torch.testing.assert_close(
        launch(step_pair_loss_backward, *inputs),
        pair_steps.step_pair_loss_backward_op.compute(*inputs),
    )
    advantages_S, _ = launch(step_gae, values_N, 0 * values_N, offsets, None, 1.0, 1.0)
    assert torch.equal(advantages_S, values_N)


# ------------------------------------------------------------------ step_pair_loss

# The first step in five pairs, more than a tile; steps without tokens; one with itself; 5 in none.
EXPERT_STEPS = torch.tensor([1, 1, 1, 1, 1, 4, 3, 2])
AGENT_STEPS = torch.tensor([2, 3, 4, 0, 6, 2, 3, 4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_equal_the_reference(dtype: torch.dtype) -> None:
    """At most twice the error of plain torch in float32, plus its rounding of a value."""
    logps_N, ref_logps_N, upstream_P = random(N, dtype=dtype), random(N).flip(0), random(8)
    pairs = (EXPERT_STEPS, AGENT_STEPS)
    rewards_S = launch(step_rewards, logps_N, ref_logps_N, OFFSETS, 0.1, torch.float64)
    loss_P, pull_P = launch(step_pair_loss, rewards_S, *pairs)
    grad_N = launch(step_pair_loss_backward, upstream_P, pull_P, OFFSETS, *pairs, 0.1, N, dtype)
    truth, plain = [], []
    for results, wide in ((truth, torch.float64), (plain, torch.float32)):
        leaf_N = logps_N.to(wide).requires_grad_()
        expected_P = reference.step_pair_loss(
            leaf_N, ref_logps_N, OFFSETS, *pairs, beta=0.1, dtype=wide
        )
        expected_P.backward(upstream_P.to(wide))
        results += [expected_P.detach(), leaf_N.grad]
    assert (loss_P.dtype, grad_N.dtype) == (torch.float32, dtype)
    for ours, theirs, exact in zip((loss_P, grad_N), plain, truth, strict=True):
        assert not ours.isnan().any()
        eps = max(torch.finfo(ours.dtype).eps, 4e-7)  # what rounds a value, once
        allowed = 2 * (theirs - exact).abs().max() + eps * exact.abs() + 1e-7
        assert ((ours - exact).abs() <= allowed).all()
    assert not grad_N[13:24].any()  # of the step in no pair


def test_pairs_of_differences_of_any_size() -> None:
    d_S = torch.tensor([-1e4, -120.0, -5.0, -1e-3, 0.0, 5.0, 80.0, 1e4], dtype=torch.float64)
    agent_P = torch.full((8,), 8)
    loss_P, pull_P = launch(step_pair_loss, torch.cat([d_S, d_S[4:5]]), torch.arange(8), agent_P)
    expected_P = torch.nn.functional.logsigmoid(d_S).neg()
    torch.testing.assert_close(loss_P.double(), expected_P, rtol=1e-6, atol=0)
    torch.testing.assert_close(pull_P.double(), torch.sigmoid(-d_S), rtol=1e-6, atol=0)


def test_large_rewards_that_are_close_keep_the_digits_of_their_difference() -> None:
    rewards_S = torch.tensor([1e6 + 1e-3, 1e6], dtype=torch.float64)
    loss_P, _ = launch(step_pair_loss, rewards_S, torch.tensor([0]), torch.tensor([1]))
    expected = torch.nn.functional.softplus(rewards_S[1] - rewards_S[0])
    torch.testing.assert_close(loss_P[0].double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_reward_shows_in_its_pairs(bad: float) -> None:
    rewards_S = torch.tensor([bad, 0.0, 1.0], dtype=torch.float64)
    expert_P, agent_P = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 0, 2])
    loss_P, pull_P = launch(step_pair_loss, rewards_S, expert_P, agent_P)
    d_P = rewards_S[expert_P] - rewards_S[agent_P]
    expected = (-torch.nn.functional.logsigmoid(d_P), torch.sigmoid(-d_P))
    for actual, exact in zip((loss_P, pull_P), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("outside", [-1, 3, 2**40, -(2**40)])
def test_a_step_that_is_none_gives_nan_and_no_gradient(outside: int) -> None:
    offsets = torch.tensor([0, 1, 2, 3])
    pairs = (torch.tensor([outside, 0]), torch.tensor([1, 2]))
    loss_P, pull_P = launch(step_pair_loss, torch.zeros(3, dtype=torch.float64), *pairs)
    assert loss_P.isnan().tolist() == [True, False]
    inputs = (torch.ones(2), pull_P, offsets, *pairs, 1.0, 3, torch.float32)
    grad_N = launch(step_pair_loss_backward, *inputs)
    torch.testing.assert_close(grad_N, torch.tensor([-0.5, torch.nan, 0.5]), equal_nan=True)


# ------------------------------------------------------------------------ step_gae


@pytest.mark.parametrize(("gamma", "lam"), [(0.95, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gae_equals_the_reference(
    dtype: torch.dtype, bootstrap: bool, gamma: float, lam: float
) -> None:
    rewards_S, values_S = random(2, N, dtype=dtype).flip(1)
    bootstrap_B = random(7) if bootstrap else None
    actual = launch(step_gae, rewards_S, values_S, OFFSETS, bootstrap_B, gamma, lam)
    expected = reference.step_gae(
        rewards_S, values_S, OFFSETS, gamma=gamma, lam=lam, bootstrap_values=bootstrap_B
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        # Another order in float64: where terms cancel, its error is that of the terms.
        torch.testing.assert_close(a.double(), e, rtol=1.2e-7, atol=1e-13)


def test_gae_of_strided_inputs() -> None:
    rewards_S, values_S = random(N, 2).to(DEVICE).unbind(1)
    bootstrap_B, offsets = random(7, 2)[:, 1].to(DEVICE), OFFSETS.to(DEVICE)
    strided = step_gae(
        rewards_S, values_S, offsets.repeat_interleave(2)[::2], bootstrap_B, 0.9, 0.8
    )
    contiguous = (x.contiguous() for x in (rewards_S, values_S, offsets, bootstrap_B))
    for a, e in zip(strided, step_gae(*contiguous, 0.9, 0.8), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1])  # a reward, a value
@pytest.mark.parametrize("step", [0, 4, 7, 13, 23])  # ends of trajectories, within tiles
def test_gae_keeps_a_broken_value_in_its_trajectory(step: int, which: int, bad: float) -> None:
    inputs = list(random(2, N))
    sound = launch(step_gae, *inputs, OFFSETS, None, 0.95, 0.9)
    inputs[which][step] = bad
    expected = reference.step_gae(*inputs, OFFSETS, gamma=0.95, lam=0.9)
    trajectory_S = torch.arange(7).repeat_interleave(OFFSETS.diff())
    others_S = trajectory_S != trajectory_S[step]
    broken = launch(step_gae, *inputs, OFFSETS, None, 0.95, 0.9)
    for actual, before, exact in zip(broken, sound, expected, strict=True):
        assert torch.equal(actual[others_S], before[others_S])
        assert torch.equal(actual.isfinite(), exact.isfinite())


# --------------------------------------------------------------------- all of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernels, the torch path
def test_the_operators_on_a_gpu_return_what_they_do_on_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logps_N, ref_logps_N = random(2, N, dtype=dtype)
    pairs = (OFFSETS, EXPERT_STEPS, AGENT_STEPS)
    _, pull_P = pair_steps.step_pair_loss_op.compute(logps_N, ref_logps_N, *pairs, 0.1)
    upstream = random(8, dtype=dtype)
    bootstrap = upstream[:7]
    calls = (
        (sums.step_sums_op.compute, (logps_N, OFFSETS)),
        (rewards.step_rewards_op.compute, (logps_N, ref_logps_N, OFFSETS, 0.1)),
        (sums.step_rewards_backward_op.compute, (bootstrap, OFFSETS, 0.1, N, dtype)),
        (pair_steps.step_pair_loss_op.compute, (logps_N, ref_logps_N, *pairs, 0.1)),
        (pair_steps.step_pair_loss_backward_op.compute, (upstream, pull_P, *pairs, 0.1, N, dtype)),
        (gae.step_gae_op.compute, (logps_N, ref_logps_N, OFFSETS, bootstrap, 0.95, 0.9)),
    )
    expected = [operator(*inputs) for operator, inputs in calls]
    monkeypatch.setattr(paths, "on_gpu", lambda tensor: True)
    for (operator, inputs), e in zip(calls, expected, strict=True):
        torch.testing.assert_close(launch(operator, *inputs), e, rtol=1e-6, atol=1e-12)


def test_the_same_inputs_give_the_same_bits() -> None:
    inputs = (random(8), random(8).sigmoid(), OFFSETS, EXPERT_STEPS, AGENT_STEPS, 0.1)
    once, again = (launch(step_pair_loss_backward, *inputs, N, torch.float32) for _ in range(2))
    assert torch.equal(once, again)
