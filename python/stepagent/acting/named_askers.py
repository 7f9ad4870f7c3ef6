"""The names of askers, apart from the askers: help needs these alone, and at once."""

from typing import Literal, TypeAlias, get_args

Ask: TypeAlias = Literal["always", "unsure", "random", "worth"]
ASKS: tuple[Ask, ...] = get_args(Ask)
