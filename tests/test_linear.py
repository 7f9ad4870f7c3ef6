"""What `linear_logprobs` keeps for its backward, two heads at once, and both on Triton's path.

Against `stepagent.reference`, on the cases of ``op_cases.py``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import (
    EXACT,
    HEAD_LEAVES,
    SINGLE,
    VARIANTS,
    Recorder,
    assert_like_reference,
    backward_inputs,
    diff_inputs,
    head,
    linear_inputs,
    run,
    variant,
)
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from stepagent import ops, reference
from stepagent.models import check_tree_support, lm_head
from stepagent.ops import blocks, folds, linear, linear_diff
from stepagent.ops import head as head_slices
from stepagent.ops.arguments import what_to_keep

DTYPES = [torch.float64, torch.float32]
FROZEN = ["hidden_RH"]  # the only leaf where the head is frozen


@pytest.fixture(params=["one slice", "slices of 3"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "slices of 3":
        monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 1)
        monkeypatch.setattr(head_slices, "MIN_SLICE", 3)


# ------------------------------------------------------------ what the forward keeps


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VARIANTS)
def test_a_frozen_head_equals_the_reference(case: str, dtype: torch.dtype) -> None:
    assert_like_reference("linear_logprobs", variant(case, dtype), FROZEN)
    with_entropy = {**variant(case, dtype), "return_entropy": True}
    assert_like_reference("linear_logprobs", with_entropy, FROZEN)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("leaves", [HEAD_LEAVES, ["bias_V"], ["weight_VH"]])
@pytest.mark.parametrize("keep_bytes", [1, 200, 10**6])  # of no slice, of a few, of all
@pytest.mark.parametrize("entropy", [False, True])
def test_kept_logits_change_nothing(leaves: list[str], keep_bytes: int, entropy: bool) -> None:
    arguments = {**head(), "return_entropy": entropy}
    kept = run(ops.linear_logprobs, {**arguments, "keep_bytes": keep_bytes}, leaves)
    for a, e in zip(kept, run(ops.linear_logprobs, arguments, leaves), strict=True):
        assert torch.equal(a, e)


def products(function: Any, *inputs: Any) -> tuple[Any, float]:
    """What the function returns, and the floating-point operations of its products."""
    with FlopCounterMode(display=False) as count:
        results = function(*inputs)
    return results, count.get_total_flops()


def passes(N: int = 12, scored: int = 12, **options: Any) -> tuple[float, float]:
    """Operations of forward and backward, in units of N·H·V."""
    arguments = head(N=N, R=N, dtype=torch.float32)
    labels_N = torch.arange(N) % 17
    labels_N[scored:] = -100
    upstream_N = options.pop("upstream_N", torch.ones(N))
    needs = options.pop("needs", [True, True, True])
    inputs = linear_inputs({**arguments, "labels_N": labels_N, "rows_N": None}, **options)
    results, forward = products(linear.linear_logprobs_op.compute, *inputs)
    gradients = backward_inputs(results, inputs, needs, upstream_N)
    _, backward = products(linear.linear_logprobs_backward_op.compute, *gradients)
    unit = N * arguments["hidden_RH"].shape[1] * 17
    return forward / unit, backward / unit


def test_products_cost_what_the_docs_say() -> None:
    assert passes() == (2, 6)
    assert passes(needs=[True, False, False]) == (2, 4)
    assert passes(keep="logits", keep_bytes=10**6) == (2, 4)
    assert passes(keep="gradient", needs=[True, False, False]) == (4, 0)


def test_only_scored_tokens_cost_anything() -> None:
    assert passes(scored=3) == (2 / 4, 6 / 4)
    assert passes(scored=0) == (0, 0)
    assert passes(scored=3, keep="gradient", needs=[True, False, False]) == (1, 0)


def test_tokens_without_upstream_gradient_are_left_out_of_the_backward() -> None:
    upstream_N = torch.zeros(12)
    upstream_N[[2, 5, 7]] = 1.0
    assert passes(upstream_N=upstream_N) == (2, 6 / 4)
    arguments = head(N=7)
    weights_N = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    for function in (ops.linear_logprobs, reference.linear_logprobs):
        leaves = {k: arguments[k].clone().requires_grad_() for k in HEAD_LEAVES}
        logps_N, entropy_N = function(**{**arguments, **leaves}, return_entropy=True)
        (weights_N * logps_N + weights_N.flip(0) * entropy_N).sum().backward()
        grads = [leaf.grad for leaf in leaves.values()]
        if function is ops.linear_logprobs:
            ours = grads
    for a, e in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, e, **EXACT)


@pytest.mark.parametrize("gap", [6.0, 12.0, 25.0])
def test_a_gradient_kept_near_probability_one_keeps_its_digits(gap: float) -> None:
    arguments = {
        "hidden_RH": torch.tensor([[1.0, 0.5]]),
        "weight_VH": torch.tensor([[0.1, 0.2], [gap, 0.3], [-0.1, 0.1]]),
        "labels_N": torch.tensor([1]),
    }
    for a, e in zip(
        run(ops.linear_logprobs, arguments, FROZEN),
        run(reference.linear_logprobs, arguments, FROZEN),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-5, atol=0)


def test_a_kept_gradient_of_forbidden_and_broken_tokens() -> None:
    """As where the logits are computed again: the label alone is left, no other, or a NaN."""
    arguments = {**head(dtype=torch.float32), "softcap": None}
    for columns, value in ((range(1, 17), -torch.inf), ([3], -torch.inf), ([5], torch.nan)):
        bias_V = torch.zeros(17)
        bias_V[list(columns)] = value
        labels_N = torch.tensor([0, 0, 3, 0, -100, 0, 3, 0, 0])
        given = {**arguments, "bias_V": bias_V, "labels_N": labels_N}
        kept = run(ops.linear_logprobs, given, FROZEN)
        again = run(ops.linear_logprobs, given, ["hidden_RH", "weight_VH"])[:2]
        for a, e in zip(kept, again, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_kept_gradient_takes_no_upstream_from_tokens_without_one() -> None:
    """0 times NaN is not 0: a masked token of a broken row stays out of the sum."""
    arguments = {**head(N=3, R=3), "rows_N": None, "labels_N": torch.tensor([1, 2, -100])}
    arguments["hidden_RH"][1] = torch.nan
    leaf = arguments["hidden_RH"].requires_grad_()
    logps_N = ops.linear_logprobs(**arguments)
    logps_N.backward(torch.tensor([1.0, 0.0, torch.nan], dtype=torch.float64))
    assert leaf.grad[0].isfinite().all()
    assert not leaf.grad[1:].any()


def test_without_grad_nothing_is_kept() -> None:
    """No second product for a gradient that nobody will ask for."""
    hidden_RH = torch.randn(3, 4, requires_grad=True)
    weight_VH, labels_N = torch.randn(5, 4), torch.tensor([0, 1, 2])
    assert what_to_keep(hidden_RH, weight_VH, None, False, 0) == ("gradient", 0)
    assert what_to_keep(hidden_RH, weight_VH, None, True, 0) == ("nothing", 0)
    assert what_to_keep(hidden_RH.detach(), weight_VH, None, False, 10) == ("nothing", 0)
    with torch.no_grad():
        assert what_to_keep(hidden_RH, weight_VH, None, False, 10) == ("nothing", 0)
        assert not ops.linear_logprobs(hidden_RH, weight_VH, labels_N).requires_grad


def test_keep_bytes_is_a_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="keep_bytes must be >= 0, got -1"):
        ops.linear_logprobs(**head(), keep_bytes=-1)


# ------------------------------------------------------------ two heads


def two_heads(dtype: torch.dtype = torch.float64, *, shared: bool) -> dict[str, Any]:
    """Arguments of linear_logprob_diff; the reference may have a head of its own."""
    policy = head(dtype=dtype)
    if shared:
        other = {**head(seed=1, dtype=dtype), **{k: policy[k] for k in ("weight_VH", "bias_V")}}
    else:
        other = head(seed=1, R=8, H=3, dtype=dtype)
    names = ("hidden_RH", "weight_VH", "rows_N", "bias_V")
    return {**policy, **{f"ref_{name}": other[name] for name in names}}


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("leaves", [HEAD_LEAVES, FROZEN])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_linear_logprob_diff_equals_the_reference(
    leaves: list[str], kl: bool, shared: bool
) -> None:
    for dtype in DTYPES:
        for rows in ({}, {"rows_N": None, "N": 7}, {"ref_rows_N": None, "N": 7}):
            arguments = {**two_heads(dtype, shared=shared), "return_kl": kl, **rows}
            if arguments.pop("N", None):
                arguments = {k: fit(k, v) for k, v in arguments.items()}
            assert_like_reference("linear_logprob_diff", arguments, leaves)


def fit(name: str, value: Any) -> Any:
    """7 labels, for the 7 rows of a head whose rows_N is None."""
    if name in ("labels_N", "temperature", "rows_N", "ref_rows_N") and value is not None:
        return value[:7]
    return value[:7] if name == "ref_hidden_RH" else value


@pytest.mark.parametrize("keep_bytes", [200, 10**6])
def test_linear_logprob_diff_with_kept_logits_changes_nothing(keep_bytes: int) -> None:
    arguments = two_heads(shared=True)
    kept = run(ops.linear_logprob_diff, {**arguments, "keep_bytes": keep_bytes}, HEAD_LEAVES)
    again = run(ops.linear_logprob_diff, arguments, HEAD_LEAVES)
    for a, e in zip(kept, again, strict=True):
        torch.testing.assert_close(a, e, **EXACT)


def test_a_shared_head_is_multiplied_once() -> None:
    for shared in (False, True):
        arguments = {**two_heads(torch.float32, shared=True)}
        if not shared:
            arguments["ref_weight_VH"] = arguments["ref_weight_VH"].clone()
        with Recorder() as recorder:
            linear_diff.linear_logprob_diff_op.compute(*diff_inputs(arguments))
        assert recorder.products == (1 if shared else 2)


def test_the_same_model_twice_differs_by_exactly_zero() -> None:
    arguments = two_heads(torch.float32, shared=True)
    arguments |= {"ref_hidden_RH": arguments["hidden_RH"], "ref_rows_N": arguments["rows_N"]}
    assert not ops.linear_logprob_diff(**arguments).any()


def test_the_reference_of_a_diff_gets_no_gradient() -> None:
    arguments = two_heads(shared=False)
    names = ("ref_hidden_RH", "ref_weight_VH", "ref_bias_V", "hidden_RH")
    leaves = {name: arguments[name].requires_grad_() for name in names}
    ops.linear_logprob_diff(**arguments).sum().backward()
    assert [leaf.grad is None for leaf in leaves.values()] == [True, True, True, False]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"ref_weight_VH": torch.zeros(16, 3)},
            ValueError,
            "share one vocabulary, got V = 17 and 16",
        ),
        ({"ref_weight_VH": torch.zeros(17, 4)}, ValueError, r"ref_weight_VH must be \(V, 3\)"),
        (
            {"ref_rows_N": torch.tensor([0])},
            ValueError,
            "ref_rows_N must have 9 entries, .*, got 1",
        ),
        (
            {"ref_rows_N": torch.full((9,), 8)},
            ValueError,
            r"ref_rows_N\[0\] must lie in .* ref_hidden.*, got 8",
        ),
        (
            {"ref_hidden_RH": torch.zeros(8, 3).half()},
            TypeError,
            "ref_weight_VH must have the dtype of",
        ),
        ({"labels_N": torch.full((9,), 17)}, ValueError, r"labels_N\[0\] must lie in .*, got 17"),
    ],
)
def test_linear_logprob_diff_refuses(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**two_heads(torch.float32, shared=False), "ref_bias_V": None, **changes}
    with pytest.raises(error, match=message):
        ops.linear_logprob_diff(**arguments)


# ------------------------------------------------------------ Triton's path


interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of log 0 = −inf


@interpreted
@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("case", VARIANTS)
def test_triton_equals_the_reference(case: str, entropy: bool) -> None:
    arguments = {**variant(case, torch.float32), "return_entropy": entropy}
    assert_like_reference("linear_logprobs", arguments, HEAD_LEAVES)
    assert_like_reference("linear_logprobs", arguments, FROZEN)


@interpreted
@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("shared", [False, True])
def test_triton_equals_the_reference_on_two_heads(shared: bool) -> None:
    for leaves in (HEAD_LEAVES, FROZEN):
        arguments = two_heads(torch.float32, shared=shared)
        assert_like_reference("linear_logprob_diff", arguments, leaves)


@interpreted
@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("offset", [-120.0, 120.0])
def test_triton_on_logits_far_from_zero(offset: float) -> None:
    arguments = {**head(dtype=torch.float32), "softcap": None, "return_entropy": True}
    arguments["bias_V"] = (arguments["bias_V"] * 64).round() / 64 + offset
    arguments["hidden_RH"] = arguments["hidden_RH"] / 64
    expected = run(reference.linear_logprobs, arguments, HEAD_LEAVES)
    for a, e in zip(run(ops.linear_logprobs, arguments, HEAD_LEAVES), expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.usefixtures("triton_path")
def test_triton_lets_nothing_of_a_masked_token_through() -> None:
    arguments = head(dtype=torch.float32)
    arguments["rows_N"] = torch.tensor([0, 6, 1, 2, 6, 3, 4, 5, 5])  # 6: of the masked ones
    clean = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    frozen = run(ops.linear_logprobs, arguments, FROZEN)
    arguments["hidden_RH"][6] = torch.nan
    broken = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    for a, e in zip(broken, clean, strict=True):
        assert torch.equal(a, e)
    for a, e in zip(run(ops.linear_logprobs, arguments, FROZEN), frozen, strict=True):
        assert torch.equal(a, e)


@interpreted
@pytest.mark.usefixtures("triton_path")
def test_triton_and_torch_agree_to_float32_on_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the products take halves and give float32; here they are upcast to the same."""
    product, add_product = head_slices.product, head_slices.add_product

    def upcast(function: Any) -> Any:
        return lambda out, *factors: function(out, *(factor.float() for factor in factors))

    monkeypatch.setattr(
        head_slices, "product", lambda a, b, out: product(a.float(), b.float(), out)
    )
    for module in (linear, folds):
        monkeypatch.setattr(module, "add_product", upcast(add_product))
    for leaves in (HEAD_LEAVES, FROZEN):
        arguments = {**head(dtype=torch.bfloat16), "return_entropy": True}
        expected = run(reference.linear_logprobs, arguments, leaves)
        actual = run(ops.linear_logprobs, arguments, leaves)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            loose = {"rtol": 2e-2, "atol": 2e-2} if i >= 2 else SINGLE
            torch.testing.assert_close(a.double(), e.double(), **loose)


@interpreted
@pytest.mark.usefixtures("triton_path")
def test_on_rocm_halves_are_upcast_before_they_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch has no product of halves with float32 results there; nor on CPU, where it raises."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    arguments = {**head(dtype=torch.bfloat16), "return_entropy": True}
    for rows_N in (arguments["rows_N"], None):
        if rows_N is None:
            arguments |= {"hidden_RH": arguments["hidden_RH"][[0, 1, 2, 3, 4, 5, 6, 0, 1]]}
        arguments["rows_N"] = rows_N
        expected = run(reference.linear_logprobs, arguments, HEAD_LEAVES)
        for i, (a, e) in enumerate(
            zip(run(ops.linear_logprobs, arguments, HEAD_LEAVES), expected, strict=True)
        ):
            loose = {"rtol": 2e-2, "atol": 2e-2} if i >= 2 else SINGLE
            torch.testing.assert_close(a.double(), e.double(), **loose)


@interpreted
@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("case", ["everything", "row n for label n"])
def test_the_batch_invariant_path_equals_the_reference(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepagent.kernels import fused_linear

    tile = fused_linear.Config(rows=16, vocab=16, hidden=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(fused_linear, "choose_config", lambda *_: tile)
    monkeypatch.setattr(fused_linear, "programs", lambda _: 2)
    arguments = {**variant(case, torch.float32), "return_entropy": True}
    assert_like_reference("linear_logprobs", arguments, HEAD_LEAVES, batch_invariant=True)
    arguments["return_entropy"] = False
    assert_like_reference("linear_logprobs", arguments, FROZEN, batch_invariant=True)


def test_batch_invariance_is_refused_where_it_cannot_be_kept(
    request: pytest.FixtureRequest,
) -> None:
    with pytest.raises(ValueError, match=r"for batch_invariant=True.*, got torch.float64 on cpu"):
        ops.linear_logprobs(**head(), batch_invariant=True)
    request.getfixturevalue("triton_path")
    with pytest.raises(ValueError, match=r"torch.float64 on cpu"):
        ops.linear_logprobs(**head(), batch_invariant=True)


@interpreted
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_one_row_with_40_labels(path: str, request: pytest.FixtureRequest) -> None:
    """What siblings at one branch point are."""
    if path == "triton":
        request.getfixturevalue("triton_path")
    arguments = {**head(R=2, N=40, dtype=torch.float32), "rows_N": torch.ones(40).long()}
    assert_like_reference("linear_logprobs", {**arguments, "return_entropy": True}, HEAD_LEAVES)
    assert_like_reference("linear_logprobs", arguments, FROZEN)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has a host to wait for")
def test_with_rows_nothing_waits_for_the_gpu() -> None:
    arguments = {
        k: v.cuda() if isinstance(v, torch.Tensor) else v
        for k, v in head(dtype=torch.float32).items()
    }
    leaf = arguments["hidden_RH"].requires_grad_()
    ops.linear_logprobs(**arguments).sum().backward()  # compiles, and fills what is cached
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear_logprobs(**arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad is not None


# ------------------------------------------------------------ the caller's TF32


def _old_way() -> None:
    torch.set_float32_matmul_precision("high")


def _old_way_of_cuda() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def _new_way() -> None:
    torch.backends.fp32_precision = "tf32"  # what transformers' `tf32=True` sets


def _new_way_of_products() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def precision() -> list[str]:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends)
    return [backend.fp32_precision for backend in backends]


@pytest.fixture
def restore_precision() -> Iterator[None]:
    before = precision()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert precision() == before


@pytest.mark.usefixtures("restore_precision")
@pytest.mark.parametrize(
    "allow", [_old_way, _old_way_of_cuda, _new_way, _new_way_of_products], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tf32_rounds_nothing_and_stays_as_the_caller_set_it(
    allow: Callable[[], None], dtype: torch.dtype
) -> None:
    """Before and after a first op. torch refuses to read one way's setting after the other's."""
    arguments = head(R=40, H=300, N=40, dtype=dtype) | {"rows_N": None}
    expected = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    allow()
    allowed = precision()
    for _ in range(2):
        for a, e in zip(run(ops.linear_logprobs, arguments, HEAD_LEAVES), expected, strict=True):
            assert torch.equal(a, e)
        assert precision() == allowed


@pytest.mark.usefixtures("restore_precision")
def test_a_setting_for_all_of_torch_goes_on_to_be_followed() -> None:
    torch.backends.fp32_precision = "tf32"
    ops.linear_logprobs(**head())
    torch.backends.fp32_precision = "ieee"
    assert precision() == ["ieee"] * 3


@pytest.mark.usefixtures("restore_precision")
def test_logits_for_sampling_are_not_rounded_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `inspect`: what multiplies them runs under the guard."""
    from stepagent.models import head as model_head

    seen, product = [], model_head._product
    monkeypatch.setattr(
        model_head, "_product", lambda *given: (seen.append(precision()), product(*given))[1]
    )
    _new_way_of_products()
    hidden_RH = torch.randn(3, 32)
    lm_head(tiny_model("llama")).logits(hidden_RH)
    assert "ieee" in seen[0]
    assert precision() == ["tf32", "bf16", "none"]


@pytest.mark.usefixtures("restore_precision")
def test_a_model_is_supported_where_tf32_is_on() -> None:
    _new_way()
    check_tree_support(tiny_model("llama"))
