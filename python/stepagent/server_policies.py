"""What acts in an environment from an inference server or engine.

The public name of `stepagent.acting.server_policies`.
"""

from .acting.server_policies import (
    ChatPolicy,
    EnginePolicy,
)

__all__ = [
    "ChatPolicy",
    "EnginePolicy",
]
