"""Ways to learn from an expert, and what a new one is made of.

The public name of `stepagent.learning.methods`.
"""

from .learning.cycle import Comparison, StepTable
from .learning.methods import method_class, register_method
from .learning.methods.method import Batch, Method, Run
from .learning.methods.ppo import PPOMethod

__all__ = [
    "Batch",
    "Comparison",
    "Method",
    "PPOMethod",
    "Run",
    "StepTable",
    "method_class",
    "register_method",
]
