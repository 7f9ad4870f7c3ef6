"""Every tensor argument of every op, as a view: strided, offset or expanded, on each path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import HEAD_LEAVES, head, logits, run
from torch import Tensor

from stepagent import ops

OFFSETS = torch.tensor([0, 2, 2, 5, 9])
NOTHING = 2**20  # where a view does not look; a kernel that does is far off


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, NOTHING)], -1)[..., 0]


def offset(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x[:1], NOTHING), x])[1:]


def expanded(x: Tensor) -> Tensor:
    """Its first entry for all, on the memory of one: beyond it lies what belongs to others."""
    return x[:1].clone().expand_as(x)


def columns_first(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.ndim == 2 else x.flip(0).contiguous().flip(0)


def two_heads() -> dict[str, Any]:
    policy, ref = head(dtype=torch.float32), head(seed=1, R=6, dtype=torch.float32)
    refs = {f"ref_{k}": ref[k] for k in ("hidden_RH", "weight_VH", "rows_N", "bias_V")}
    return {**policy, **refs}


def unshared() -> dict[str, Any]:
    """Row n for label n."""
    return {**head(N=7, dtype=torch.float32), "rows_N": None}


def two_logits() -> dict[str, Any]:
    policy = logits(dtype=torch.float32)
    return {**policy, "ref_logits_NV": policy["logits_NV"].roll(1, 0)}


def steps() -> dict[str, Any]:
    logps_N = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    return {"logps_N": logps_N, "ref_logps_N": logps_N.roll(1), "step_offsets": OFFSETS}


def pairs() -> dict[str, Any]:
    expert_P, agent_P = torch.tensor([0, 2, 3]), torch.tensor([2, 3, 0])
    return {**steps(), "expert_steps_P": expert_P, "agent_steps_P": agent_P, "beta": 0.3}


def gae() -> dict[str, Any]:
    made = steps()
    names = ("rewards_S", "values_S", "trajectory_offsets")
    return {
        **dict(zip(names, made.values(), strict=True)),
        "bootstrap_values": torch.tensor([0.5, 1.0, -1.0, 2.0]),
        "gamma": 0.9,
        "lam": 0.8,
    }


def step_gae(**arguments: Any) -> Any:
    from stepagent import step_gae

    return step_gae(**arguments)


# Op, its arguments, and the leaves that get a gradient.
CASES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], list[str]]] = {
    "linear_logprobs": (ops.linear_logprobs, lambda: head(dtype=torch.float32), HEAD_LEAVES),
    "linear_logprobs, frozen": (ops.linear_logprobs, unshared, ["hidden_RH"]),
    "linear_logprobs, unshared": (ops.linear_logprobs, unshared, HEAD_LEAVES),
    "linear_logprob_diff": (ops.linear_logprob_diff, two_heads, HEAD_LEAVES),
    "token_logprobs": (ops.token_logprobs, lambda: logits(dtype=torch.float32), ["logits_NV"]),
    "logprob_diff": (ops.logprob_diff, two_logits, ["logits_NV"]),
    "step_sums": (
        ops.step_sums,
        lambda: {"values_N": steps()["logps_N"], "step_offsets": OFFSETS},
        ["values_N"],
    ),
    "step_rewards": (ops.step_rewards, lambda: {**steps(), "beta": 0.3}, ["logps_N"]),
    "step_pair_loss": (ops.step_pair_loss, pairs, ["logps_N"]),
    "step_gae": (step_gae, gae, []),
}
ARGUMENTS = [
    (case, name)
    for case, (_, make, _) in CASES.items()
    for name, value in make().items()
    if isinstance(value, Tensor)
]


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest) -> None:
    if request.param == "triton":
        request.getfixturevalue("triton_path")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of log 0 = −inf
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("view", [strided, offset, expanded, columns_first])
@pytest.mark.parametrize(("case", "name"), ARGUMENTS)
def test_a_view_is_what_its_copy_is(case: str, name: str, view: Callable[[Tensor], Tensor]) -> None:
    op, make, leaves = CASES[case]
    arguments = make()
    if view is expanded and "offsets" in name:
        return  # one offset for all is no ragged array
    seen = view(arguments[name])
    actual = run(op, {**arguments, name: seen}, leaves, clone=lambda x: x)
    expected = run(op, {**arguments, name: seen.contiguous()}, leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", [case for case, (_, _, leaves) in CASES.items() if leaves])
def test_upstream_gradients_may_be_views(case: str) -> None:
    op, make, leaves = CASES[case]

    def gradients(sum_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        fresh = {k: make()[k].clone().requires_grad_() for k in leaves}
        sum_of(op(**{**make(), **fresh})).backward()
        return [fresh[k].grad for k in leaves]

    expected = gradients(lambda out: (out * torch.ones_like(out)).sum())
    for sum_of in (torch.sum, lambda out: torch.stack([out, out], -1)[..., 0].sum()):
        for a, e in zip(gradients(sum_of), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)
