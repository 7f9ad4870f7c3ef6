"""How good an agent is, and how sure one can be.

``metrics.py`` has what is measured of an episode and of a run, ``statistics.py`` the means, their
intervals and the agreement with the expert, ``runs.py`` intervals over training runs,
``sign_flips.py`` one for few pairs, ``diagnosis.py`` what training can gain, told before it, and
``findings.py`` how it is said; ``agentboard.py`` and ``subskills.py`` are of AgentBoard's results.
"""

from .diagnosis import diagnose
from .findings import Departure, Diagnosis, ExpertStates, GreedyEpisodes
from .runs import RunsInterval, bootstrap_runs
from .statistics import (
    Interval,
    bootstrap,
    expert_agreement,
    mean_interval,
    paired_rate_interval,
    rate_interval,
    share_interval,
    stratified_bootstrap,
    success_rate,
)

__all__ = [
    "Departure",
    "Diagnosis",
    "ExpertStates",
    "GreedyEpisodes",
    "Interval",
    "RunsInterval",
    "bootstrap",
    "bootstrap_runs",
    "diagnose",
    "expert_agreement",
    "mean_interval",
    "paired_rate_interval",
    "rate_interval",
    "share_interval",
    "stratified_bootstrap",
    "success_rate",
]
