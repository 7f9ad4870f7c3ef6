"""What an action is drawn with: checked options, and random numbers that depend on its place.

The same seed, trunk, step and sample give the same numbers in any batch, on any device, and in an
engine as in a model.
"""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is a whole number and at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def check_temperature(temperature: float) -> None:
    """Raise unless ``temperature`` is finite and not negative: one samples greedily at 0.

    The ops divide by theirs, so `checks.check_temperature_values` refuses 0.
    """
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")


def uniforms(seed: int, *keys: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) that depend on ``seed`` and the integer ``keys`` alone.

    A counter-based generator (the finaliser of SplitMix64, Steele et al. 2014, over the keys in
    turn): the number for (trunk, step, sample, token) does not depend on the batch.
    """
    return next_uniforms(streams(seed, *keys[:-1]), np.asarray(keys[-1], dtype=np.int64))


def streams(seed: int, *keys: ArrayLike) -> NDArray[np.int64]:
    """The state of the generator after ``seed`` and ``keys``."""
    with np.errstate(over="ignore"):
        state: NDArray[np.int64] = _mix(np.asarray(seed, dtype=np.int64))
        for key in keys:
            state = _mix(state ^ _mix(np.asarray(key, dtype=np.int64)))
    return state


@overload
def next_uniforms(streams: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.float64]: ...
@overload
def next_uniforms(streams: Tensor, keys: Tensor) -> Tensor: ...
def next_uniforms(streams: Any, keys: Any) -> Any:
    """``uniforms(seed, *first, keys)`` of ``streams(seed, *first)``, the same bits anywhere."""
    with np.errstate(over="ignore"):
        bits = _shifted(_mix(streams ^ _mix(keys)), 11)
    return (bits.double() if isinstance(bits, Tensor) else bits.astype(np.float64)) * 2.0**-53


def _mix(state: Any) -> Any:
    """Of int64, which wraps as the generator's uint64 does and which torch can multiply."""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Any, bits: int) -> Any:
    """To the right, zeros moving in."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
