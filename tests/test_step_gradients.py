"""The benchmark's table: one gradient, however a step is cut into batches and processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_gradients


@pytest.mark.slow
def test_a_step_has_one_gradient_however_it_is_cut() -> None:
    apart = step_gradients.errors()
    print(step_gradients.table(apart))
    exact = {case: error for case, error in apart.items() if case[3] == "fp32"}
    assert max(exact.values()) < 1e-5, exact
    # bfloat16 rounds products by the shape of a batch: to three digits, and not to a factor.
    assert max(apart.values()) < 0.05, apart
