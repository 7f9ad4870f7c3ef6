"""How numbers and foreign text are written on the page; None and NaN are "n/a"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

MINUS = "−"
# Controls; then what turns or hides text: marks of direction, spaces of no width, line separators.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
    r"\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)


def number(value: float | None) -> float:
    """NaN stands for every value that is not available."""
    return value if value is not None and math.isfinite(value) else math.nan


def formatted(value: float | None, spec: str) -> str:
    x = number(value)
    return "n/a" if math.isnan(x) else format(x, spec).replace("-", MINUS)


def percent(value: float | None) -> str:
    return formatted(value, ".1%")


def interval(bounds: Sequence[float | None] | None) -> str:
    low, high = bounds or (None, None)
    return f"{percent(low).rstrip('%')}–{percent(high)}"


def points(value: float | None) -> str:
    """A difference of two rates in percentage points."""
    return formatted(100 * number(value), "+.1f")


def signed(value: float | None) -> str:
    return formatted(value, "+.2f")


def count(value: float | None) -> str:
    return formatted(value, ",.0f")


def times(value: float | None, base: float | None) -> str:
    """How many times ``base`` the value is."""
    return formatted(number(value) / (number(base) or math.nan), ".1f") + "×"


def plain(value: object) -> str:
    """A hyper-parameter or a logged number in its shortest form."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return f"{value:.4g}".replace("-", MINUS) if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    if math.isnan(x := number(seconds)):
        return "n/a"
    minutes, rest = divmod(round(x), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def gigabytes(size: float | None) -> str:
    """A size in bytes."""
    return formatted(number(size) / 1e9, ".1f") + ("" if math.isnan(number(size)) else " GB")


def visible(text: object) -> str:
    """Control characters as their pictures (NUL is ␀), lone surrogates as �: HTML has neither.

    What turns the direction of text or hides in it is named, as ⟨U+202E⟩.
    """
    return _CONTROL.sub(_picture, str(text))


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    if code >= 0x80:
        return f"\u27e8U+{code:04X}\u27e9"
    return "\u2421" if code == 0x7F else chr(0x2400 + code)


FILTERS: tuple[Callable[..., str], ...] = (
    *(percent, interval, points, signed, count, times, plain, duration, gigabytes, visible),
)
