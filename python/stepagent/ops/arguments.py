"""What the ops on logits and on heads share in what they are given, checked.

N scored tokens, R hidden rows, H hidden size, V vocabulary.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stepagent.checks import Index, as_index, check_floats, check_length
from stepagent.checks import LabelCheck as LabelCheck
from stepagent.ops.head import UNASKED


class LogitOptions(TypedDict, total=False):
    """For type checkers: what the overloads of an op on logits share."""

    temperature: float | Tensor
    check_labels: LabelCheck


class HeadOptions(LogitOptions, total=False):
    """Of an op on a head."""

    rows_N: Index | None
    bias_V: Tensor | None
    softcap: float | None
    group: ProcessGroup | None
    keep_bytes: int | None


def as_head(
    prefix: str, hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden rows, weights and bias that fit each other, as autocast gives them to a product."""
    hidden_RH, weight_VH, bias_V = map(_autocast, (hidden_RH, weight_VH, bias_V))
    floats = [(f"{prefix}hidden_RH", hidden_RH, 2), (f"{prefix}weight_VH", weight_VH, 2)]
    check_floats(*floats, *([] if bias_V is None else [(f"{prefix}bias_V", bias_V, 1)]))
    V = weight_VH.shape[0]
    if weight_VH.shape[1] != hidden_RH.shape[1] or V == 0:
        raise ValueError(
            f"{prefix}weight_VH must be (V, {hidden_RH.shape[1]}) with V >= 1 to match "
            f"{prefix}hidden_RH, got {tuple(weight_VH.shape)}"
        )
    if bias_V is not None and bias_V.shape[0] != V:
        raise ValueError(f"{prefix}bias_V must be ({V},), got {tuple(bias_V.shape)}")
    return hidden_RH, weight_VH, bias_V


def _autocast(tensor: Any) -> Any:
    """Cast where autocast would: float32 and halves of a device for which it is on."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def as_labelled_rows(
    prefix: str, hidden_RH: Tensor, labels_N: Index, rows_N: Index | None
) -> tuple[Tensor, Tensor | None]:
    labels_N = as_index("labels_N", labels_N, hidden_RH.device)
    rows, hidden = f"{prefix}rows_N", f"{prefix}hidden_RH"
    if rows_N is None:
        check_length(
            "labels_N", labels_N, hidden_RH.shape[0], f"the rows of {hidden}, as {rows} is None"
        )
        return labels_N, None
    rows_N = as_index(rows, rows_N, hidden_RH.device)
    check_length(rows, rows_N, labels_N.shape[0], "labels_N")
    return labels_N, rows_N


def what_to_keep(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    entropy: bool,
    keep_bytes: int | None,
) -> tuple[str, int]:
    """What the forward keeps for the backward, as ``linear.py`` knows it."""
    if keep_bytes is None:
        keep_bytes = UNASKED if hidden_RH.is_cuda else 0
    elif keep_bytes < 0:
        raise ValueError(f"keep_bytes must be >= 0, got {keep_bytes}")
    head_learns = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if not torch.is_grad_enabled() or not (head_learns or hidden_RH.requires_grad):
        return "nothing", 0
    if not head_learns and not entropy:
        return "gradient", 0
    return ("logits", keep_bytes) if keep_bytes else ("nothing", 0)


def as_labels(logits_NV: Tensor, labels_N: Index) -> Tensor:
    """The labels as int64, one for each row of logits."""
    labels_N = as_index("labels_N", labels_N, logits_NV.device)
    if logits_NV.shape[1] == 0:
        raise ValueError(f"logits_NV must have V >= 1, got {tuple(logits_NV.shape)}")
    check_length("labels_N", labels_N, logits_NV.shape[0], "the rows of logits_NV")
    return labels_N
