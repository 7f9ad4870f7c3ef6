"""Ways to learn from an expert: a file each, chosen by ``method=``.

`Method` (method.py) is what a run asks of each. A method of one's own is a subclass of it in any
module: ``@register_method("name")`` gives it a name, or ``method="package.module:Class"`` finds it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import StepAgentConfig
    from .method import Method

# Where each lies; read when one is asked for.
_FILES = {
    "sft": "stepagent.learning.methods.sft:SFT",
    "dagger": "stepagent.learning.methods.dagger:DAgger",
    "implicit": "stepagent.learning.methods.implicit:Implicit",
    "inverse": "stepagent.learning.methods.inverse:Inverse",
    "early_experience": "stepagent.learning.methods.early_experience:EarlyExperience",
    "srl": "stepagent.learning.methods.srl:SRL",
    "distillation": "stepagent.learning.methods.distillation:Distillation",
    "eto": "stepagent.learning.methods.eto:ETO",
    "rft": "stepagent.learning.methods.rft:RFT",
    "ipr": "stepagent.learning.methods.ipr:IPR",
    "grpo": "stepagent.learning.methods.online:GRPO",
    "gigpo": "stepagent.learning.methods.online:GiGPO",
    "istar": "stepagent.learning.methods.istar:IStar",
    "ppo": "stepagent.learning.methods.online:PPO",
}
_registered: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """A decorator that makes a `Method` known as ``method=name``.

    Raises:
        ValueError: where the name is another method's.
    """

    def register(method: type[Method]) -> type[Method]:
        known = _registered.get(name)
        same = known is not None and known.__qualname__ == method.__qualname__
        if name in _FILES or (known is not None and not same):  # a notebook's cell runs again
            raise ValueError(f"name must be a new method's, got {name!r}, which there is already")
        _registered[name] = method
        return method

    return register


def method_class(name: str, states: str | None = None) -> type[Method]:
    """The method of this name, or of ``module:Class``.

    ``method="sft"`` at other states than the expert's is DAgger.

    Raises:
        ValueError: where there is none of this name.
    """
    if name == "sft" and states not in (None, "expert"):
        name = "dagger"
    if name in _registered:
        return _registered[name]
    path = _FILES.get(name, name)
    if ":" not in path:
        known = [*_FILES, *_registered]
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(
            f"method must be one of {', '.join(known)}, or module:Class of your own, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return _imported(path)


def _imported(path: str) -> type[Method]:
    from .method import Method

    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method must be importable, got {path!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"method must be a subclass of stepagent.methods.Method, got {path!r}: {found!r}"
        )
    return found


def method_of(args: StepAgentConfig) -> Method:
    """The method of a run, with its options."""
    return method_class(args.method, args.states)(args)
