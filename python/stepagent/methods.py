"""Ways to learn from an expert, and what a new one is made of.

The public name of `stepagent.learning.methods`.
"""

from .learning.collecting import Acting
from .learning.cycle import CHOSEN, REJECTED, Comparison, StepTable
from .learning.methods import method_class, register_method
from .learning.methods.method import Batch, Method, Run
from .learning.methods.ppo import PPOMethod
from .learning.methods.tasks import TaskMethod
from .learning.trajectory_pairs import Rival, compared_with, trajectory_pair

__all__ = [
    "CHOSEN",
    "REJECTED",
    "Acting",
    "Batch",
    "Comparison",
    "Method",
    "PPOMethod",
    "Rival",
    "Run",
    "StepTable",
    "TaskMethod",
    "compared_with",
    "method_class",
    "register_method",
    "trajectory_pair",
]
