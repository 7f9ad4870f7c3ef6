"""Line charts as inline SVG, coloured by the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .numbers import formatted, visible

_WIDTH, _HEIGHT = 380, 224  # about a phone's width, where text keeps its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 20, 36
_DIGIT = 7.2  # width of a character of a label, at the most
_MOST_DOTS = 60  # of a line; longer ones are lines alone


@dataclass(frozen=True)
class Line:
    """A run's values; its style is the run's, a CSS class ``run-0``, ``run-1``, …"""

    label: str
    style: str
    xs: Sequence[float]
    ys: Sequence[float]  # NaN: a gap


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, percent: bool = False) -> Markup:
    """The lines in one pair of axes; a dot shows its value when pointed at."""
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys if not math.isnan(y)]
    x_ticks = ticks(min(xs, default=0), max(xs, default=1), whole=True)
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    # Shares start at 0 unless that would flatten them.
    y_ticks = ticks(min(low, 0.0) if percent and low < 0.6 * high else low, high)
    write, unit = _tick_text(y_ticks, percent)
    labels = [write(tick) for tick in y_ticks]
    left = max(_LEFT, math.ceil(_DIGIT * max(map(len, labels))) + 9)
    x_of = _scale(min(xs, default=0), max(xs, default=1), left, _WIDTH - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    marks = [(y_of(tick), label) for tick, label in zip(y_ticks, labels, strict=True)]
    parts = [_axis(x_ticks, marks, x_of, left, unit, x_label)]
    for line in lines:
        parts.append(_drawn(line, x_of, y_of, ".1%" if percent else ".4g"))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, visible(title), Markup("").join(parts)
    )


def ticks(low: float, high: float, *, whole: bool = False, most: int = 6) -> list[float]:
    """Round numbers around [low, high] (within it if whole): steps of 1, 2 or 5 times 10ⁿ."""
    if not high > low:
        low, high = (
            (low, low + 1) if whole else (low - (abs(low) / 2 or 0.5), low + (abs(low) / 2 or 0.5))
        )
    least = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least)
    if whole:
        step = max(1, round(step))
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_text(y_ticks: Sequence[float], percent: bool) -> tuple[Callable[[float], str], str]:
    """How a tick is written, with as many decimals as the step between ticks needs, and the power
    of ten that all of them are times: "" for none. Thousands are k, millions M."""
    size, step = max(abs(tick) for tick in y_ticks), y_ticks[1] - y_ticks[0]
    unit, sign, power = (0.01, "%", "") if percent else (1.0, "", "")
    if size >= 1e10 or (size < 1e-2 and step < 1e-4):
        exponent = math.floor(math.log10(size) + 1e-9)
        unit, sign, power = 10.0**exponent, "", f"×10{str(exponent).translate(_RAISED)}"
    elif size >= 1e4:
        unit, sign = (1e6, "M") if size >= 1e7 else (1e3, "k")
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return lambda tick: formatted(tick / unit, f",.{decimals}f") + sign, power


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _axis(
    x_ticks: Sequence[float],
    y_marks: Sequence[tuple[float, str]],
    x_of: Callable[[float], float],
    left: int,
    unit: str,
    x_label: str,
) -> Markup:
    text = Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>')
    rule = Markup('<path class="rule" d="M{} {:.1f}H{}"/>')
    bottom = _HEIGHT - _BOTTOM
    parts = [rule.format(left, y, _WIDTH - _RIGHT) for y, _ in y_marks]
    parts += [text.format(left - 7, y + 4, "y", label) for y, label in y_marks]
    parts += [text.format(x_of(t), bottom + 16, "x", formatted(t, ",.0f")) for t in x_ticks]
    parts.append(text.format(_WIDTH - _RIGHT, _HEIGHT - 4, "label", x_label))
    if unit:
        parts.append(text.format(2, 12, "unit", unit))
    return Markup("").join(parts)


def _drawn(
    line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float], spec: str
) -> Markup:
    path, pen = [], "M"
    dots = []
    for x, y in zip(line.xs, line.ys, strict=True):
        if math.isnan(y):
            pen = "M"
            continue
        path.append(f"{pen}{x_of(x):.1f} {y_of(y):.1f}")
        pen = "L"
        said = f"{visible(line.label)}, {x:g}: {formatted(y, spec)}"
        dots.append(_DOT.format(x_of(x), y_of(y), said))
    shown = Markup("").join(dots if len(dots) <= _MOST_DOTS else [])
    return Markup('<g class="{}"><path class="line" d="{}"/>{}</g>').format(
        line.style, "".join(path), shown
    )


_DOT = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}</title></circle>')
