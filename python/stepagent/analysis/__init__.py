"""What episodes show without training the agent: where in its task it is, and how it behaves.

`Subgoals` are phases of a task, found in demonstrations by temporal contrast. Nothing here needs a
policy, and only what reads observations by a model needs one.
"""

from .contrast import ContrastOptions, info_nce
from .describing import Describe, HashedWords, ModelRows
from .subgoals import Subgoals

__all__ = [
    "ContrastOptions",
    "Describe",
    "HashedWords",
    "ModelRows",
    "Subgoals",
    "info_nce",
]
