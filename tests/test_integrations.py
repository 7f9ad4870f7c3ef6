"""Steps of padded rows, and the adapters that are functions: against float64, one number a time."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepagent.integrations import policy_losses, prime_rl, tinker, verifiers, verl
from stepagent.integrations.masked_steps import MaskedSteps

# Two prompts of two responses; runs of 1 are steps. Rows have 2, 1, 3 and 2 steps.
MASK = torch.tensor(
    [
        [1, 1, 0, 0, 1, 1, 1, 0],
        [0, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 1],
        [1, 1, 1, 0, 1, 0, 0, 0],
    ]
)
UID = ["a", "b", "b", "a"]
REWARDS = [[1.0, 0.5], [2.0], [0.0, -1.0, 0.25], [0.5, 0.75]]


def runs(row: list[int]) -> list[tuple[int, int]]:
    """[start, stop) of each run of ones."""
    edges = [0, *row, 0]
    starts = [t for t, (a, b) in enumerate(pairwise(edges)) if (a, b) == (0, 1)]
    stops = [t for t, (a, b) in enumerate(pairwise(edges)) if (a, b) == (1, 0)]
    return list(zip(starts, stops, strict=True))


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(MASK.shape, generator=generator, dtype=torch.float64).to(dtype)


def expected(value_of: Any) -> Tensor:
    """(B, T) float64 with ``value_of(b, s)`` at each token of step s of row b."""
    out = torch.zeros(MASK.shape, dtype=torch.float64)
    for b, row in enumerate(MASK.tolist()):
        for s, (start, stop) in enumerate(runs(row)):
            out[b, start:stop] = value_of(b, s)
    return out


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------- steps


def test_steps_are_the_runs_of_a_mask() -> None:
    steps = MaskedSteps.of(MASK)
    assert steps.counts_B == [2, 1, 3, 2]
    lengths = [stop - start for row in MASK.tolist() for start, stop in runs(row)]
    assert steps.step_offsets.diff().tolist() == lengths
    values_S = torch.arange(1.0, 9)
    first = [0, 2, 3, 6]
    close(steps.spread(values_S), expected(lambda b, s: values_S[first[b] + s]))
    ends = steps.at_ends(values_S)
    for b, row in enumerate(MASK.tolist()):
        placed = {stop - 1: float(values_S[first[b] + s]) for s, (_, stop) in enumerate(runs(row))}
        assert {t: v for t, v in enumerate(ends[b].tolist()) if v} == placed
    assert MaskedSteps.of(torch.zeros(2, 3)).spread(torch.zeros(0)).shape == (2, 3)


def test_a_reward_belongs_to_the_step_before_it() -> None:
    values = torch.zeros(MASK.shape)
    values[0, 1], values[0, 3], values[0, 7], values[2, 6] = 1.0, 2.0, 4.0, 8.0
    sums = MaskedSteps.of(MASK).sums_until_next(values, "rewards")
    assert sums.tolist() == [3.0, 4.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0]
    values[1, 0] = 1.0
    with pytest.raises(ValueError, match=r"rewards\[1, 0\] must be 0"):
        MaskedSteps.of(MASK).sums_until_next(values, "rewards")


def test_lists_that_do_not_fit_the_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step_rewards\[1\] must have 1 numbers.*got 2"):
        MaskedSteps.of(MASK).join([[1, 2], [1, 2], [1, 2, 3], [1, 2]], "step_rewards")
    with pytest.raises(ValueError, match="must have 4 rows, got 1"):
        MaskedSteps.of(MASK).join([[1, 2]], "step_rewards")
    with pytest.raises(ValueError, match="two-dimensional"):
        MaskedSteps.of(MASK[0])


# -------------------------------------------------------------------------------------- verl


def token_rewards() -> Tensor:
    return verl.step_scores(REWARDS, [0.0] * 4, MASK)


def test_verl_scores_lie_at_the_ends_of_steps_and_the_outcome_with_the_last() -> None:
    scores = verl.step_scores(REWARDS, [10.0, 20.0, 30.0, 40.0], MASK)
    for b, row in enumerate(MASK.tolist()):
        rewards = [*REWARDS[b][:-1], REWARDS[b][-1] + 10.0 * (b + 1)]
        placed = {stop - 1: r for (_, stop), r in zip(runs(row), rewards, strict=True) if r}
        assert {t: v for t, v in enumerate(scores[b].tolist()) if v} == placed


def test_verl_step_returns_are_what_came_after_less_what_others_got() -> None:
    gamma = 0.9

    def after(b: int, s: int) -> float:
        return sum(gamma**k * r for k, r in enumerate(REWARDS[b][s:]))

    def advantage(b: int, s: int) -> float:
        others = [j for j in range(4) if j != b and UID[j] == UID[b]]
        return after(b, s) - sum(after(j, 0) for j in others) / len(others)

    advantages, returns = verl.step_returns(
        token_level_rewards=token_rewards(), response_mask=MASK, config={"gamma": gamma}, index=UID
    )
    close(advantages, expected(advantage))
    close(returns, expected(after))
    with pytest.raises(ValueError, match="two steps or more"):
        verl.step_returns(token_rewards(), MASK, index=["a", "b", "c", "d"])


def test_verl_step_returns_have_no_bias_where_the_policy_chooses_how_long_to_go_on() -> None:
    """verl#7244: the gradient of the number of steps is right on average over all groups.

    The policy stops after one step with probability p, else after two; each step pays 1. The
    expected gradient of the score of that choice has to be d/dp E[R] = d/dp (2 − p) = −1.
    """
    p = 0.3
    lengths = {1: p, 2: 1 - p}
    total = 0.0
    for first, chance in lengths.items():
        for second, other in lengths.items():
            mask = torch.tensor([[1, 0, n > 1, 0] for n in (first, second)])
            rewards = verl.step_scores([[1.0] * first, [1.0] * second], [0.0, 0.0], mask)
            advantages, _ = verl.step_returns(rewards, mask, index=["a", "a"])
            # The choice to stop is part of the first action: its score is d log P / dp.
            score = 1 / p if first == 1 else -1 / (1 - p)
            total += chance * other * score * float(advantages[0, 0])
    assert total == pytest.approx(-1.0, abs=1e-6)


def test_verl_group_advantages_are_those_of_the_steps_of_a_prompt() -> None:
    def advantage(b: int, s: int) -> float:
        group = [r for j in range(4) if UID[j] == UID[b] for r in REWARDS[j]]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        return (REWARDS[b][s] - mean) / std

    advantages, _ = verl.step_group_relative(
        token_level_rewards=token_rewards(), response_mask=MASK, config=None, index=UID
    )
    close(advantages, expected(advantage))


# ---------------------------------------------------------------------------- policy losses

ADVANTAGES = [[1.0, -0.5], [2.0], [0.0, -1.0, 0.25], [-0.5, 0.75]]


def log_ratio(old: Tensor, new: Tensor, b: int, s: int) -> float:
    start, stop = runs(MASK[b].tolist())[s]
    return float((new[b, start:stop] - old[b, start:stop]).sum())


@pytest.mark.parametrize("name", ["step", "implicit"])
def test_policy_losses_are_those_of_steps_in_float64(name: str) -> None:
    old, new = normal(0, torch.float64) / 4, normal(1, torch.float64) / 4
    given = expected(lambda b, s: ADVANTAGES[b][s]).float()

    def loss(b: int, s: int) -> float:
        x, advantage = log_ratio(old, new, b, s), ADVANTAGES[b][s]
        if name == "implicit":
            sign = (advantage > 0) - (advantage < 0)
            return abs(advantage) * math.log1p(math.exp(-sign * 0.3 * x))
        ratio = math.exp(x)
        return -min(ratio * advantage, min(max(ratio, 0.9), 1.3) * advantage)

    options = {"beta": 0.3} if name == "implicit" else {"clip_low": 0.1, "clip_high": 0.3}
    function = getattr(policy_losses, f"{name}_losses")
    logps = new.float().requires_grad_()
    found, _ = function(old.float(), logps, given, MASK, **options)
    close(found.detach(), expected(loss))
    found.sum().backward()
    assert logps.grad is not None
    assert not logps.grad[MASK == 0].any(), "observations are no actions"


# ------------------------------------------------------------------------------------ tinker


class Datum:
    """What the losses read of tinker's: `loss_fn_inputs`, whose values turn into tensors."""

    def __init__(self, **inputs: Tensor) -> None:
        self.loss_fn_inputs = {name: Values(value) for name, value in inputs.items()}


class Values:
    def __init__(self, values: Tensor) -> None:
        self._values = values

    def to_torch(self) -> Tensor:
        return self._values


def test_tinker_pairs_have_the_implicit_loss_in_float64() -> None:
    ref, new = normal(2, torch.float64), normal(3, torch.float64)
    data = [Datum(mask=MASK[b], ref_logprobs=ref[b].float()) for b in range(4)]
    logps = [new[b].float().requires_grad_() for b in range(4)]
    loss, metrics = tinker.implicit_pairs(beta=0.2)(data, logps)
    rewards = [
        0.2 * sum(log_ratio(ref, new, b, s) for s in range(len(REWARDS[b]))) for b in range(4)
    ]
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    right = sum(math.log1p(math.exp(-margin)) for margin in margins) / 2
    assert loss.item() == pytest.approx(right, abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(sum(margins) / 2, abs=1e-5)
    loss.backward()
    for b, each in enumerate(logps):
        assert each.grad is not None
        assert torch.equal(each.grad != 0, MASK[b].bool())


def test_tinker_ppo_has_one_ratio_a_step_in_float64() -> None:
    old, new = normal(4, torch.float64) / 4, normal(5, torch.float64) / 4
    data = [
        Datum(
            mask=MASK[b],
            logprobs=old[b].float(),
            advantages=torch.tensor(tinker.step_advantages(ADVANTAGES[b], MASK[b])),
        )
        for b in range(4)
    ]
    loss, _ = tinker.step_ppo(clip=0.2)(data, [new[b].float().requires_grad_() for b in range(4)])
    terms = [
        -min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        for b in range(4)
        for s, a in enumerate(ADVANTAGES[b])
        for ratio in [math.exp(log_ratio(old, new, b, s))]
    ]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_tinker_losses_say_what_a_datum_lacks() -> None:
    logps = [torch.zeros(8, requires_grad=True) for _ in range(2)]
    good = {"mask": MASK[0], "ref_logprobs": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"data\[1\] must have loss_fn_inputs\['ref_logprobs'\]"):
        tinker.implicit_pairs(beta=1.0)([Datum(**good), Datum(mask=MASK[0])], logps)
    empty = Datum(**{**good, "mask": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"data\[1\] mask must mark"):
        tinker.implicit_pairs(beta=1.0)([Datum(**good), empty], logps)
    with pytest.raises(ValueError, match="must be pairs"):
        tinker.implicit_pairs(beta=1.0)([Datum(**good)], logps[:1])
    with pytest.raises(ValueError, match="shape of its log-probs"):
        tinker.implicit_pairs(beta=1.0)([Datum(**good)] * 2, [torch.zeros(7)] * 2)


# ---------------------------------------------------------------------------------- verifiers


def trace() -> dict[str, Any]:
    """Two branches of one conversation: the second turn was sampled twice."""

    def node(parent: int | None, role: str, ids: list[int], sampled: int = 0) -> dict[str, Any]:
        mask = [False] * (len(ids) - sampled) + [True] * sampled
        return {
            "parent": parent,
            "message": {"role": role, "content": "x"},
            "sampled": bool(sampled),
            "token_ids": ids,
            "mask": mask,
            "logprobs": [-0.5] * sampled,
        }

    return {
        "id": "t",
        "nodes": [
            node(None, "user", [5, 6]),
            node(0, "assistant", [1, 7, 8], 2),
            node(1, "user", [9]),
            node(2, "assistant", [1, 10, 2], 2),
            node(2, "assistant", [1, 11], 1),
        ],
    }


def test_a_trace_is_a_tree_and_credit_goes_back_to_its_nodes() -> None:
    (tree,) = verifiers.trace_trees([trace()])
    assert len(tree.input_ids) == 2 + 3 + 1 + 3 + 1, "what branches share is there once"
    assert sorted(tree.labels.tolist()) == [2, 7, 8, 10, 11]
    assert tree.extras["logps"].tolist() == [-0.5] * 5
    found = trace()
    verifiers.assign_step_advantages(found, [1.0, -2.0, 3.0])
    assert [node.get("advantages") for node in found["nodes"]] == [
        None,
        [1.0, 1.0],
        None,
        [-2.0, -2.0],
        [3.0],
    ]
    steps = [trunk.num_steps for trunk in verifiers.trace_trunks(trace())]
    assert steps == [2, 1], "a message that branches share is scored in the first"
    with pytest.raises(ValueError, match="advantages must have 3 numbers"):
        verifiers.assign_step_advantages(found, [1.0])


# ----------------------------------------------------------------------------------- prime-rl


@pytest.mark.parametrize("name", ["step", "implicit"])
def test_prime_rl_losses_are_sums_over_the_tokens_of_a_sequence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By prime-rl's calling convention; its package needs CUDA to install."""
    monkeypatch.setitem(sys.modules, "prime_rl.trainer.rl.loss", SimpleNamespace(LossOutputs=dict))  # type: ignore[arg-type]
    old, new = normal(6, torch.float64) / 4, normal(7, torch.float64) / 4
    given = expected(lambda b, s: ADVANTAGES[b][s]).float()
    total = 0.0
    for b in range(4):
        inputs = SimpleNamespace(
            trainer_logprobs=new[b].float(),
            inference_logprobs=old[b].float(),
            ref_logprobs=None,
            advantages=given[b],
            loss_mask=MASK[b].bool(),
            loss_weights=None,
        )
        options = {"beta": 0.3} if name == "implicit" else {"clip": 0.2}
        total += float(getattr(prime_rl, f"{name}_loss")(inputs, **options)["loss"])
    right = 0.0
    for b, row in enumerate(MASK.tolist()):
        for s, (start, stop) in enumerate(runs(row)):
            x, a = log_ratio(old, new, b, s), ADVANTAGES[b][s]
            if name == "implicit":
                loss = abs(a) * math.log1p(math.exp(-math.copysign(0.3, a) * x))
            else:
                loss = -min(math.exp(x) * a, min(max(math.exp(x), 0.8), 1.2) * a)
            right += (stop - start) * loss
    assert total == pytest.approx(right, abs=1e-5)
