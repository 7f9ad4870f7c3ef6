"""Success rates, intervals and agreement."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import END, VOCAB, generate, random_trunks, tiny_model

from stepagent.acting.rollout import Episode
from stepagent.data.encoding import Trunk
from stepagent.evaluation import (
    Interval,
    bootstrap,
    expert_agreement,
    stratified_bootstrap,
    success_rate,
)


def test_success_rate_is_the_share_of_successes():
    episodes = [Episode("fake", seed, success=seed < 3) for seed in range(4)]
    assert success_rate(episodes) == 0.75
    with pytest.raises(ValueError, match="episodes is empty"):
        success_rate([])


# ------------------------------------------------------------------ intervals


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """150 samples of 100 Bernoulli(0.8) episodes: 95 %, within four standard errors."""
    rng = np.random.default_rng(0)
    samples = rng.random((150, 100)) < 0.8
    intervals = [bootstrap(sample, seed=i) for i, sample in enumerate(samples)]
    covered = np.mean([i.low <= 0.8 <= i.high for i in intervals])
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 150) ** 0.5


def test_an_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    interval = bootstrap(values)
    half = 1.96 * values.std() / 2000**0.5
    assert interval.mean == values.mean()
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_an_interval_depends_on_its_seed_alone():
    values = np.random.default_rng(2).random(50)
    assert bootstrap(values, seed=1) == bootstrap(list(values), seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_a_constant_has_no_spread():
    assert bootstrap([0.5] * 10) == Interval(0.5, 0.5, 0.5)


def test_pairing_removes_what_two_policies_share():
    """Two policies on the same episodes, one better in a tenth of them and never worse."""
    rng = np.random.default_rng(3)
    weak = (rng.random(200) < 0.5).astype(float)
    strong = np.maximum(weak, rng.random(200) < 0.1)
    paired = bootstrap(strong - weak)
    assert paired.mean == pytest.approx(strong.mean() - weak.mean())
    assert paired.low > 0
    # Apart, the two intervals overlap.
    assert bootstrap(strong).low < bootstrap(weak).high


def test_groups_weigh_the_same_and_spread_only_within():
    groups = [[0.0] * 30, [1.0] * 10]
    assert stratified_bootstrap(groups) == Interval(0.5, 0.5, 0.5)
    assert bootstrap([*groups[0], *groups[1]]).high > 0.3
    rng = np.random.default_rng(4)
    spread = [rng.random(100), rng.random(300)]
    interval = stratified_bootstrap(spread)
    half = 1.96 * (sum(group.var() / len(group) for group in spread) / 4) ** 0.5
    assert interval.mean == pytest.approx((spread[0].mean() + spread[1].mean()) / 2)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups is empty"),
        ([[1.0], []], "group 1 must be a non-empty list of finite numbers"),
        ([[1.0, float("nan")]], "group 0 must be a non-empty list of finite numbers"),
        ([[float("inf")]], "group 0 must be"),
        ([[[1.0, 2.0]]], "group 0 must be"),
    ],
)
def test_values_that_have_no_mean_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        stratified_bootstrap(groups)


# ------------------------------------------------------------------ agreement


def test_agreement_is_the_share_of_steps_at_which_the_greedy_agent_is_the_expert():
    model = tiny_model("llama")
    trunks, _ = random_trunks(np.random.default_rng(5))
    options = {"max_new_tokens": 4, "eos_token_id": END}
    assert expert_agreement(model, trunks, **options) == 0
    # An expert who does at its last step what the agent would.
    copied = [greedy_at_the_end(model, trunk) for trunk in trunks]
    steps = sum(trunk.num_steps for trunk in trunks)
    assert expert_agreement(model, copied, **options) == len(trunks) / steps


def greedy_at_the_end(model, trunk: Trunk) -> Trunk:
    start = int(trunk.action_spans[-1, 0])
    action = generate(model, trunk.input_ids[:start], 4)
    spans = [*trunk.action_spans[:-1].tolist(), [start, start + len(action)]]
    return Trunk(np.append(trunk.input_ids[:start], action), spans)


def test_an_action_cut_short_is_no_agreement():
    model = tiny_model("llama")
    prefix = np.arange(3, 9)
    action = generate(model, prefix, 4, end=VOCAB)
    trunk = Trunk(np.append(prefix, action), [(6, 10)])
    agree = {
        n: expert_agreement(model, [trunk], max_new_tokens=n, eos_token_id=END) for n in (3, 4)
    }
    assert agree == {3: 0.0, 4: 1.0}


def test_agreement_over_nothing_is_an_error():
    with pytest.raises(ValueError, match="trunks is empty"):
        expert_agreement(tiny_model("llama"), [], max_new_tokens=3)
