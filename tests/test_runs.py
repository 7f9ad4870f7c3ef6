"""Intervals with training runs as their unit."""

import numpy as np
import pytest

from stepagent.evaluation import bootstrap_runs


def test_the_mean_is_that_of_the_runs_and_not_of_all_episodes():
    result = bootstrap_runs([[1.0], [0.0, 0.0, 0.0, 0.0]])
    assert result.mean == 0.5
    assert result.per_run == (1.0, 0.0)
    assert result.worst == 0.0


def test_runs_that_differ_widen_the_interval_however_many_episodes_they_have():
    """Five runs at −10 … +10 points with 1,000 episodes each: episodes alone would be certain."""
    runs = [np.full(1_000, value) for value in (-0.1, -0.05, 0.0, 0.05, 0.1)]
    result = bootstrap_runs(runs)
    assert result.low is not None
    assert result.high is not None
    assert result.low < -0.05
    assert result.high > 0.05


def test_it_covers_the_truth_as_often_as_it_says():
    """Runs of spread 3 points, episodes of spread 50: the interval of ten runs covers 0."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        runs = rng.normal(rng.normal(0, 0.03, size=(10, 1)), 0.5, size=(10, 50))
        result = bootstrap_runs(list(runs), seed=trial)
        assert result.low is not None
        assert result.high is not None
        covered += result.low <= 0 <= result.high
    assert 50 <= covered <= 60  # 57 ± 3.4; a percentile bootstrap of ten is a bit short


def test_equal_runs_without_spread_have_no_width():
    assert bootstrap_runs([[1.0, 1.0], [1.0, 1.0]]).low == 1.0


def test_one_run_has_no_interval():
    result = bootstrap_runs([[0.0, 1.0]])
    assert (result.mean, result.low, result.high) == (0.5, None, None)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "at least one run"),
        ([[1.0], []], r"runs\[1\] must be a non-empty list"),
        ([[float("nan")]], r"runs\[0\] must be a non-empty list of finite"),
        ([[[1.0]]], r"runs\[0\]"),
    ],
)
def test_what_has_no_mean_is_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_runs(runs)
