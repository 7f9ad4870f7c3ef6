"""What acts in an environment: a model, the environment's expert, or chance.

The public name of `stepagent.acting.policies`.
"""

from .acting.policies import (
    ExpertPolicy,
    ModelPolicy,
    Policy,
    RandomPolicy,
)

__all__ = [
    "ExpertPolicy",
    "ModelPolicy",
    "Policy",
    "RandomPolicy",
]
