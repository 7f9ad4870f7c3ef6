"""What says which of the agent's states are worth an answer of the expert's.

The public name of `stepagent.acting.askers`.
"""

from .acting.askers import (
    Asker,
    RandomAsker,
    UnsureAsker,
    WorthAsker,
    load_asker,
    save_asker,
)

__all__ = [
    "Asker",
    "RandomAsker",
    "UnsureAsker",
    "WorthAsker",
    "load_asker",
    "save_asker",
]
