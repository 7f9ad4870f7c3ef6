"""What is measured of episodes.

The public name of `stepagent.evaluation.metrics`.
"""

from .evaluation.metrics import (
    METRICS,
    Metric,
    PairedComparison,
    Summary,
    agreement,
    compare,
    grounding_accuracy,
    invalid_actions,
    mean_progress_curve,
    progress_curve,
    progress_rate,
    repetition,
    reward,
    split_by,
    step_reward,
    steps,
    success,
    summarize,
)

__all__ = [
    "METRICS",
    "Metric",
    "PairedComparison",
    "Summary",
    "agreement",
    "compare",
    "grounding_accuracy",
    "invalid_actions",
    "mean_progress_curve",
    "progress_curve",
    "progress_rate",
    "repetition",
    "reward",
    "split_by",
    "step_reward",
    "steps",
    "success",
    "summarize",
]
