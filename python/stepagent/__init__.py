"""Step-wise rewards for LLM agents, at the price of one forward pass.

The public names are those of ``__init__.pyi``, which type checkers and the documentation read too.
Each is imported when it is first used: ``import stepagent`` alone loads neither torch nor
transformers.
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)

__version__ = _version("stepagent")
