"""Intervals by random signs: against all signs written out, and what they must never accept."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from stepagent.evaluation.sign_flips import sign_flip_interval


def rejected(differences: np.ndarray, center: float) -> float:
    """The share of all sign patterns whose mean is at least as large: the exact one-sided p."""
    centred = differences - center
    signs = np.array(list(product((1, -1), repeat=len(differences))))
    return float(np.mean((signs @ centred) >= centred.sum() - 1e-12))


@pytest.mark.parametrize("seed", range(5))
def test_its_ends_are_those_of_the_test_by_all_signs(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.3, 1, 12).round(2)
    found = sign_flip_interval(differences)
    assert found.low is not None
    assert found.high is not None
    assert found.mean == pytest.approx(differences.mean())
    # Between the random test of 4,000 signs and that of all there is noise of a few ranks.
    assert rejected(differences, found.low - 0.05) < 0.025 < rejected(differences, found.low + 0.05)
    mirrored = sign_flip_interval(-differences)
    assert mirrored.low == pytest.approx(-found.high, abs=0.05)


def test_equal_play_has_no_width_and_is_never_above_0() -> None:
    found = sign_flip_interval(np.zeros(500))
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_gain_that_is_always_the_same_is_sure_once_there_are_enough() -> None:
    for pairs in range(1, 6):
        found = sign_flip_interval([1.0] * pairs)
        assert (found.low, found.high) == (None, None), pairs
    assert sign_flip_interval([1.0] * 8).low == 1.0


@pytest.mark.parametrize(("differing", "sure"), [(1, False), (4, False), (5, False), (8, True)])
def test_few_pairs_that_differ_say_little_however_many_agree(differing: int, sure: bool) -> None:
    """Four gains and no loss happen to a proposal without effect once in 16 times."""
    low = sign_flip_interval([1.0] * differing + [0.0] * 996).low
    assert low is not None
    assert (low > 0) == sure


@pytest.mark.parametrize("share", [1.0, 0.1, 0.02])
def test_the_level_is_kept_at_any_share_of_differing_pairs(share: float) -> None:
    rng = np.random.default_rng(1)
    accepted = 0
    for _ in range(150):
        differences = rng.choice((-2, -1, 1, 2), 200) * (rng.random(200) < share)
        low = sign_flip_interval(differences).low
        accepted += low is not None and low > 0
    assert accepted <= 9  # 2.5 % of 150 are 3.75; 10 or more happen once in 200 times


def test_of_many_pairs_it_is_the_normal_one() -> None:
    differences = np.random.default_rng(2).normal(0.1, 1.0, 2000)
    half = 1.96 * differences.std() / 2000**0.5
    found = sign_flip_interval(differences)
    assert found.low == pytest.approx(differences.mean() - half, abs=0.005)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.005)


@pytest.mark.parametrize("values", [[], [[1.0]], [np.nan], [np.inf, 0.0]])
def test_what_are_no_differences_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="differences must be a non-empty list of finite numbers"):
        sign_flip_interval(values)
