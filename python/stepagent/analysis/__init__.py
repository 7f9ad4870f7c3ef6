"""What episodes show without training the agent: where in its task it is, and how it behaves.

`Subgoals` are phases of a task, found in demonstrations by temporal contrast. `Behaviours` are
kinds of what is done, found by a latent model; `change_points` tells when their shares changed.
Nothing here needs a policy, and only `ModelRows` needs a model.
"""

from .behaviours import Behaviours
from .changes import Change, change_points
from .contrast import ContrastOptions, info_nce
from .describing import Describe, HashedWords, ModelRows
from .latent import LatentOptions
from .subgoals import Subgoals

__all__ = [
    "Behaviours",
    "Change",
    "ContrastOptions",
    "Describe",
    "HashedWords",
    "LatentOptions",
    "ModelRows",
    "Subgoals",
    "change_points",
    "info_nce",
]
