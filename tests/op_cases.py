"""Cases for the ops, and how they are compared with `stepagent.reference`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepagent import ops, reference

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64 against float64
HALVES = [torch.float16, torch.bfloat16]
SINGLE = {"rtol": 2e-5, "atol": 2e-6}  # float32 against float64


def head(
    seed: int = 0,
    R: int = 7,
    H: int = 5,
    V: int = 17,
    N: int = 9,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Arguments of linear_logprobs: rows that labels share, a row unused, two labels masked."""
    g = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(V, (N,), generator=g)
    labels_N[[1, N // 2]] = -100
    return {
        "hidden_RH": torch.randn(R, H, generator=g, dtype=torch.float64).to(dtype),
        "weight_VH": torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype),
        "labels_N": labels_N,
        "rows_N": torch.randint(R - 1, (N,), generator=g),
        "bias_V": torch.randn(V, generator=g, dtype=torch.float64).to(dtype),
        "temperature": 0.5 + torch.rand(N, generator=g),
        "softcap": 3.0,
    }


# Where the ops are run: conftest.py's `triton_path` sets it to the GPU where there is one.
device = torch.device("cpu")


def on_device(value: Any) -> Any:
    """With its strides, which `.to` does not keep where memory lies between the elements."""
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    if not value.numel():
        return value.to(device)
    storage = value.untyped_storage()
    copy = torch.empty(storage.nbytes() // value.itemsize, dtype=value.dtype, device=device)
    copy.untyped_storage().copy_(storage)
    return copy.as_strided(value.shape, value.stride(), value.storage_offset())


def run(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    leaves: list[str],
    clone: Callable[[Tensor], Tensor] = torch.clone,
) -> list[Tensor]:
    """Outputs, then gradients of the leaves, with another upstream for every token and output.

    clone: of a leaf; what it returns is what the function gets.
    """
    arguments = {name: on_device(value) for name, value in arguments.items()}
    fresh = {k: clone(arguments[k].detach()).requires_grad_() for k in leaves}
    with device:  # where the reference makes its zeros
        outputs = function(**{**arguments, **fresh})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not leaves:
        return [o.cpu() for o in outputs]
    g = torch.Generator().manual_seed(1)
    upstreams = [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outputs]
    torch.autograd.backward(outputs, [u.to(o) for u, o in zip(upstreams, outputs, strict=True)])
    return [*(o.detach().cpu() for o in outputs), *(fresh[k].grad.cpu() for k in leaves)]


def assert_like_reference(
    name: str, arguments: dict[str, Any], leaves: list[str], **options: Any
) -> None:
    """options: of the op alone."""
    expected = run(getattr(reference, name), arguments, leaves)
    actual = run(getattr(ops, name), {**arguments, **options}, leaves)
    tolerance = EXACT if arguments[leaves[0]].dtype == torch.float64 else SINGLE
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), **tolerance)


HEAD_LEAVES = ["hidden_RH", "weight_VH", "bias_V"]

# Each drops or changes one thing of head(): every branch of the op, once.
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no softcap": {"softcap": None},
    "one temperature": {"temperature": 0.7},
    "temperature of shape ()": {"temperature": torch.tensor(0.7)},
    "each row once": {"rows_N": torch.tensor([6, 5, 4, 3, 2, 1, 0]), "N": 7},
    "row n for label n": {"rows_N": None, "N": 7},
    "numpy int32": {"rows_N": np.array([0, 0, 1, 2, 2, 2, 3, 3, 3], dtype=np.int32)},
    "torch int32": {"labels_N": torch.tensor([5, -100, 0, 1, 16, 2, 3, 3, 3], dtype=torch.int32)},
    "one vocabulary entry": {"V": 1},
}


def variant(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of linear_logprobs for one of the VARIANTS."""
    changes = dict(VARIANTS[name])
    shapes = {k: changes.pop(k) for k in ("N", "V") if k in changes}
    return {**head(dtype=dtype, **shapes), **changes}


def logits(
    seed: int = 0, N: int = 6, V: int = 11, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(V, (N,), generator=g)
    labels_N[2] = -100
    return {
        "logits_NV": (3 * torch.randn(N, V, generator=g, dtype=torch.float64)).to(dtype),
        "labels_N": labels_N,
        "temperature": 0.5 + torch.rand(N, generator=g),
    }


class Recorder(TorchDispatchMode):
    """The sizes of all tensors that are made, and how many products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.sizes.append(tensor.numel())
        self.products += func.overloadpacket == torch.ops.aten.mm
        return out


def linear_inputs(
    arguments: dict[str, Any], keep: str = "nothing", keep_bytes: int = 0
) -> tuple[Any, ...]:
    """Arguments of the operator below linear_logprobs, with entropy unless a gradient is kept."""
    values = [arguments[k] for k in ("hidden_RH", "weight_VH", "labels_N", "rows_N", "bias_V")]
    temperature = torch.as_tensor(arguments["temperature"])
    options = (arguments["softcap"], keep != "gradient", keep, keep_bytes, "", "device", False)
    return (*values, temperature, *options, arguments.get("kept_NK"))


def backward_inputs(
    results: tuple[Tensor, ...],
    inputs: tuple[Any, ...],
    needs: list[bool],
    upstream_N: Tensor | None = None,
) -> tuple[Any, ...]:
    """Arguments of the operator of its backward; upstream gradients are 1 unless given."""
    *results, kept = results
    with_entropy, keep, _, group, _, _, kept_NK = inputs[7:]
    upstream_N = torch.ones_like(results[0]) if upstream_N is None else upstream_N
    grads = (upstream_N, upstream_N if with_entropy else None)
    return (*grads, results, *inputs[:7], kept, keep, group, needs, kept_NK)


def diff_inputs(arguments: dict[str, Any], keep: str = "nothing") -> tuple[Any, ...]:
    """Arguments of the operator below linear_logprob_diff."""
    names = ("hidden_RH", "weight_VH", "ref_hidden_RH", "ref_weight_VH", "labels_N", "rows_N")
    values = [arguments[k] for k in (*names, "ref_rows_N", "bias_V", "ref_bias_V")]
    options = (arguments["softcap"], keep, 0, "", "device")
    return (*values, torch.as_tensor(arguments["temperature"]), *options)
