"""Files of ETO and IPR, their preference pairs, and IPR's rule for them.

The public name of `stepagent.records.eto`, `stepagent.records.ipr` and
`stepagent.learning.preferences`.
"""

from .learning.preferences import (
    Judged,
    Thresholds,
    ipr_pairs,
    ipr_preference,
)
from .records.eto import (
    PREAMBLES,
    PreferencePair,
    load_pairs,
    load_rollouts,
    save_pairs,
    save_rollouts,
)
from .records.ipr import (
    ExpertStep,
    Exploration,
    load_expert_steps,
    load_explorations,
    load_samples,
    monte_carlo_rewards,
    save_expert_steps,
    save_explorations,
    save_samples,
)

__all__ = [
    "PREAMBLES",
    "ExpertStep",
    "Exploration",
    "Judged",
    "PreferencePair",
    "Thresholds",
    "ipr_pairs",
    "ipr_preference",
    "load_expert_steps",
    "load_explorations",
    "load_pairs",
    "load_rollouts",
    "load_samples",
    "monte_carlo_rewards",
    "save_expert_steps",
    "save_explorations",
    "save_pairs",
    "save_rollouts",
    "save_samples",
]
