"""What the ops refuse: checks of arguments at the boundary, and of values inside the operators."""

import math
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

LabelCheck: TypeAlias = Literal["sync", "device", "off"]
LABEL_CHECKS: tuple[LabelCheck, ...] = get_args(LabelCheck)
IGNORE = -100  # the label that scores nothing: log-prob 0, entropy 0, no gradient

Index = Tensor | np.ndarray[Any, np.dtype[Any]]


# ---------------------------------------------- checks at the boundary


def as_numpy(values: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Numbers as an array, whatever holds them.

    Raises:
        TypeError: where numpy knows no such array: a bfloat16 tensor, a ragged list.
    """
    try:
        return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"must be an array of numbers, got {_kind(values)}: {error}") from error


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Of the results: float32, float64 where one of these is float64."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def check_floats(*arguments: tuple[str, object, int]) -> None:
    """Each is a float tensor of its rank; all share the first one's dtype and device."""
    first_name, first, _ = arguments[0]
    for name, tensor, ndim in arguments:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {_kind(tensor)}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
        assert isinstance(first, Tensor)
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}"
            )


def check_pair(name: str, tensor: Tensor, ref_name: str, ref: Tensor) -> None:
    if tensor.shape != ref.shape:
        raise ValueError(
            f"{name} must have the shape of {ref_name}, {tuple(ref.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != ref.device:
        raise ValueError(
            f"{name} must be on the device of {ref_name}, {ref.device}, got {tensor.device}"
        )


def check_length(name: str, tensor: Tensor, length: int, of: str) -> None:
    if tensor.shape[0] != length:
        raise ValueError(f"{name} must have {length} entries, as {of}, got {tensor.shape[0]}")


def check_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_nonnegative(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def check_finite(name: str, values: Tensor) -> None:
    """On CUDA, and under torch.compile, nothing is looked at."""
    if not torch.compiler.is_compiling():
        flat = values.detach().flatten()
        _refuse(~flat.isfinite(), name, flat, "be finite")


def as_index(name: str, index: object, device: torch.device, ndim: int = 1) -> Tensor:
    """As an int64 tensor on `device`; numpy arrays are copied there."""
    if isinstance(index, np.ndarray):
        index = torch.tensor(index, device=device)  # as_tensor would warn about read-only arrays
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor or array, got {_kind(index)}")
    if index.ndim != ndim:
        dimensions = f"{ndim} dimension" + "s" * (ndim > 1)
        raise ValueError(f"{name} must have {dimensions}, got shape {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"{name} must be on {device}, got {index.device}")
    return index.to(torch.int64)


def as_offsets(name: str, offsets: object, device: torch.device) -> Tensor:
    offsets = as_index(name, offsets, device)
    if offsets.shape[0] == 0:
        raise ValueError(f"{name} must have at least one entry, the 0 it starts with, got none")
    return offsets


def as_temperature(temperature: float | Tensor, labels_N: Tensor, dtype: torch.dtype) -> Tensor:
    """As a tensor () or (N,): an operator's schema takes no `float | Tensor`."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return torch.full((), temperature, dtype=dtype, device=labels_N.device)
    if not temperature.is_floating_point():
        raise TypeError(f"temperature must be a float or a float tensor, got {_kind(temperature)}")
    if temperature.ndim != 0 and temperature.shape != labels_N.shape:
        allowed, got = tuple(labels_N.shape), tuple(temperature.shape)
        raise ValueError(f"temperature must have shape () or {allowed}, got {got}")
    if temperature.device != labels_N.device:
        raise ValueError(f"temperature must be on {labels_N.device}, got {temperature.device}")
    if temperature.requires_grad:
        raise ValueError("temperature must not require grad, as no gradient flows to it: detach it")
    return temperature.to(dtype)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, (Tensor, np.ndarray)) else type(value).__name__


# ------------------------- checks of values, inside the operators: the compiler never sees them


def _refuse(bad_N: Tensor, name: str, values_N: Tensor, rule: str, *, wait: bool = False) -> None:
    """Name the first value that breaks the rule; on CUDA, where that waits, only with `wait`."""
    if (wait or bad_N.device.type == "cpu") and bool(bad_N.any()):
        first = int(bad_N.nonzero()[0])
        raise ValueError(f"{name}[{first}] must {rule}, got {values_N[first].item()}")


def check_label_values(labels_N: Tensor, V: int, check: str, op: str) -> None:
    """As `check` says, one of LABEL_CHECKS; the device assertion cannot name the value."""
    if check == "off":
        return
    rule = f"lie in [0, {V}), or be {IGNORE} to score nothing"
    if check == "device" and labels_N.device.type != "cpu":
        torch._assert_async(_known_on_device(labels_N, V), f"stepagent::{op}: labels_N must {rule}")
    else:
        _refuse(_unknown(labels_N, V), "labels_N", labels_N, rule, wait=True)


def _unknown(labels_N: Tensor, V: int) -> Tensor:
    return (labels_N != IGNORE) & ((labels_N < 0) | (labels_N >= V))


def _known_on_device(labels_N: Tensor, V: int) -> Tensor:
    """Whether all labels are known, (); one launch where there is Triton, in place of seven."""
    if find_spec("triton") is None:
        return ~_unknown(labels_N, V).any()
    from stepagent.kernels.labels import all_known  # loads triton: only here

    known: Tensor = all_known(labels_N, V)
    return known


def check_kept(labels_N: Tensor, kept_NK: Tensor, V: int, check: str, op: str) -> Tensor:
    """The labels; V, which scores NaN, for one outside its own set that may not be looked at."""
    unknown_NK = (kept_NK < -1) | (kept_NK >= V)
    absent_N = (labels_N != IGNORE) & ~(kept_NK == labels_N[:, None]).any(1)
    rule = f"lie in [0, {V}), or be -1 for none"
    if check == "sync" or (check == "device" and labels_N.device.type == "cpu"):
        if bool(unknown_NK.any()):
            n, k = unknown_NK.nonzero()[0].tolist()
            raise ValueError(f"kept_NK[{n}, {k}] must {rule}, got {kept_NK[n, k].item()}")
        if bool(absent_N.any()):
            n = int(absent_N.nonzero()[0])
            raise ValueError(f"labels_N[{n}] must be among kept_NK[{n}], got {labels_N[n].item()}")
    elif check == "device":
        torch._assert_async(~unknown_NK.any(), f"stepagent::{op}: kept_NK must {rule}")
    return labels_N.masked_fill(absent_N, V)


def check_rows(name: str, rows_N: Tensor | None, of: str, R: int) -> None:
    if rows_N is not None and rows_N.device.type == "cpu":
        _refuse((rows_N < 0) | (rows_N >= R), name, rows_N, f"lie in [0, {R}), the rows of {of}")


def check_shard(size_n: Tensor, V: int) -> None:
    """Another rank's shard is as large as this one."""
    rule = "each rank of the group must hold a shard of weight_VH of the same size"
    if size_n.device.type != "cpu":
        torch._assert_async((size_n == V).all(), f"stepagent: {rule}")
    elif not bool((size_n == V).all()):
        raise ValueError(f"{rule}, got {V} here and {int(size_n[0])} elsewhere")


def check_temperature_values(temperature: Tensor) -> None:
    if temperature.device.type == "cpu":
        flat, rule = temperature.reshape(-1), "be positive and finite"
        _refuse(~((flat > 0) & flat.isfinite()), "temperature", flat, rule)


def check_steps(name: str, steps_P: Tensor, S: int) -> None:
    _refuse((steps_P < 0) | (steps_P >= S), name, steps_P, f"lie in [0, {S})")


def check_offsets(name: str, offsets: Tensor, N: int) -> None:
    ends = torch.zeros_like(offsets, dtype=torch.bool)
    ends[0] = offsets[0] != 0
    _refuse(ends, name, offsets, "be 0, as the first")
    falls = torch.zeros_like(ends)
    falls[1:] = offsets[1:] < offsets[:-1]
    _refuse(falls, name, offsets, "not be less than the one before it")
    ends[-1] = offsets[-1] != N
    _refuse(ends, name, offsets, f"be {N}, the number of values, as the last")
