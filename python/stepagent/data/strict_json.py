"""JSON as the standard has it: no NaN, and every failure is a ValueError."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: For malformed JSON (json.JSONDecodeError, with its place), for NaN and
            infinities, and for values nested deeper than Python's stack.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it must be nested less deeply: too deep to be read") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads makes one a call
