"""Success rates, intervals and agreement."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from tiny_models import END, VOCAB, generate, random_trunks, tiny_model

from stepagent.acting.rollout import Episode
from stepagent.data.encoding import Trunk
from stepagent.evaluation import (
    Interval,
    bootstrap,
    expert_agreement,
    mean_interval,
    paired_rate_interval,
    rate_interval,
    stratified_bootstrap,
    success_rate,
)


def test_success_rate_is_the_share_of_successes():
    episodes = [Episode("fake", seed, success=seed < 3) for seed in range(4)]
    assert success_rate(episodes) == 0.75
    with pytest.raises(ValueError, match="episodes must hold at least one, got none"):
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


def test_a_constant_tells_resampling_nothing():
    assert bootstrap([0.5] * 10) == Interval(0.5, None, None)


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
    assert stratified_bootstrap(groups) == Interval(0.5, None, None)
    assert bootstrap([*groups[0], *groups[1]]).high > 0.3
    rng = np.random.default_rng(4)
    spread = [rng.random(100), rng.random(300)]
    interval = stratified_bootstrap(spread)
    half = 1.96 * (sum(group.var() / len(group) for group in spread) / 4) ** 0.5
    assert interval.mean == pytest.approx((spread[0].mean() + spread[1].mean()) / 2)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)


Z = NormalDist().inv_cdf(0.975)


def test_five_of_five_is_not_certain():
    """Wilson's: 57 to 100 %, not 100 to 100 %."""
    all_five, none_of_four = rate_interval([1] * 5), rate_interval([0] * 4)
    assert (all_five.mean, all_five.high) == (1, 1)
    assert all_five.low == pytest.approx(5 / (5 + Z**2))  # 0.566
    assert (none_of_four.mean, none_of_four.low) == (0, 0)
    assert none_of_four.high == pytest.approx(Z**2 / (4 + Z**2))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Of Newcombe (1998), Statistics in Medicine 17, table I: Wilson's without correction.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_rates_interval_is_the_published_one(successes, n, low, high):
    found = rate_interval([1] * successes + [0] * (n - successes))
    assert found.mean == successes / n
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 2), (3, 7), (50, 100), (99, 100)])
def test_a_rates_interval_ends_where_the_score_test_rejects(successes, n):
    found = rate_interval([1] * successes + [0] * (n - successes))
    for p in (found.low, found.high):
        assert abs(successes - n * p) == pytest.approx(Z * (n * p * (1 - p)) ** 0.5)


def test_one_episode_has_no_interval():
    assert rate_interval([1]) == Interval(1, None, None)
    assert mean_interval([7.0]) == Interval(7, None, None)
    assert mean_interval([0.5], bounds=(0, 1)) == Interval(0.5, None, None)
    assert paired_rate_interval([1], [0]) == Interval(1, None, None)


def reference_score(won: int, lost: int, n: int, delta: float) -> float:
    """The score test's z of the difference δ: the likeliest share of lost pairs on a grid."""
    share = np.linspace(max(0.0, -delta), (1 - delta) / 2, 200_001)[1:-1]
    with np.errstate(divide="ignore"):
        likelihood = (
            won * np.log(share + delta)
            + lost * np.log(share)
            + (n - won - lost) * np.log(1 - 2 * share - delta)
        )
    q = share[likelihood.argmax()]
    return (won - lost - n * delta) / (n * (2 * q + delta - delta**2)) ** 0.5


@pytest.mark.parametrize(
    ("won", "lost", "n"), [(12, 2, 50), (3, 1, 9), (2, 3, 10), (1, 1, 4), (40, 30, 200)]
)
def test_a_paired_interval_ends_where_the_score_test_rejects(won, lost, n):
    ours = [1] * won + [0] * lost + [1] * (n - won - lost)
    theirs = [0] * won + [1] * lost + [1] * (n - won - lost)
    found = paired_rate_interval(ours, theirs)
    assert found.mean == pytest.approx((won - lost) / n)
    assert reference_score(won, lost, n, found.low) == pytest.approx(Z, abs=1e-3)
    assert reference_score(won, lost, n, found.high) == pytest.approx(-Z, abs=1e-3)
    other = paired_rate_interval(theirs, ours)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("n", [2, 5, 30])
def test_pairs_that_all_agree_or_all_differ_are_not_certain(n):
    unseen = Z**2 / (n + Z**2)
    tied = paired_rate_interval([1] * n, [1] * n)
    assert (tied.low, tied.mean, tied.high) == pytest.approx((-unseen, 0, unseen))
    won = paired_rate_interval([1] * n, [0] * n)
    assert (won.low, won.mean, won.high) == pytest.approx((1 - 2 * unseen, 1, 1))


def test_a_bounded_mean_knows_what_it_has_not_seen():
    alike = mean_interval([0.9] * 5, bounds=(0, 1))
    unseen = Z**2 / (5 + Z**2)
    assert alike.low == pytest.approx(0.9 - 0.9 * unseen)
    assert alike.high == pytest.approx(0.9 + 0.1 * unseen)
    nearly = mean_interval([1.0] * 4 + [0.999], bounds=(0, 1))
    assert nearly.low == pytest.approx(5 / (5 + Z**2), abs=1e-3)
    # Where values spread, it is the bootstrap's.
    values = np.random.default_rng(5).random(400)
    assert mean_interval(values, bounds=(0, 1)) == bootstrap(values)
    # Without bounds, equal values tell nothing.
    assert mean_interval([3.0] * 9) == Interval(3, None, None)


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.97])
def test_a_rates_interval_covers_the_truth_at_the_boundary_too(rate):
    """2,000 samples of 20 episodes: Wilson's covers 95 % on average, and at least 91 % here."""
    counts = np.random.default_rng(6).binomial(20, rate, 2000)
    ends = {int(k): rate_interval([1] * k + [0] * (20 - k)) for k in set(counts.tolist())}
    assert np.mean([ends[int(k)].low <= rate <= ends[int(k)].high for k in counts]) > 0.91


def test_outcomes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="outcomes must each be 0 or 1"):
        rate_interval([1, 0.5])
    with pytest.raises(ValueError, match="others must have length 2, got 1"):
        paired_rate_interval([1, 0], [1])
    with pytest.raises(ValueError, match=r"values must lie in \[0, 1\], got 0.5 to 2.0"):
        mean_interval([0.5, 2.0], bounds=(0, 1))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups must hold at least one, got none"),
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
    with pytest.raises(ValueError, match="trunks must hold at least one, got none"):
        expert_agreement(tiny_model("llama"), [], max_new_tokens=3)
