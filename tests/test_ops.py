"""The torch path of the ops against `stepagent.reference`: values, gradients, failures."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    EXACT,
    HALVES,
    HEAD_LEAVES,
    SINGLE,
    VARIANTS,
    Recorder,
    assert_like_reference,
    backward_inputs,
    head,
    linear_inputs,
    logits,
    run,
    variant,
)
from torch import Tensor

from stepagent import ops, reference
from stepagent.ops import blocks, linear, tokens
from stepagent.ops import head as head_slices


@pytest.fixture
def tiny_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices of 3 vocabulary entries, or one row at a time."""
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(head_slices, "MIN_SLICE", 3)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", VARIANTS)
def test_linear_logprobs_equals_the_reference(case: str, dtype: torch.dtype, entropy: bool) -> None:
    arguments = {**variant(case, dtype), "return_entropy": entropy}
    assert_like_reference("linear_logprobs", arguments, HEAD_LEAVES)


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_slices_equal_the_reference_when_v_is_no_multiple(dtype: torch.dtype) -> None:
    for V in (17, 18, 19):  # slices of 3: remainders 2, 0, 1
        arguments = {**head(dtype=dtype, V=V), "return_entropy": True}
        assert_like_reference("linear_logprobs", arguments, HEAD_LEAVES)


def logit_pair(dtype: torch.dtype = torch.float64, **shapes: int) -> dict[str, Any]:
    """Arguments of logprob_diff."""
    ref_logits_NV = logits(seed=3, dtype=dtype, **shapes)["logits_NV"]
    return {**logits(dtype=dtype, **shapes), "ref_logits_NV": ref_logits_NV}


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_token_logprobs_equals_the_reference(
    dtype: torch.dtype, temperature: float | None, entropy: bool
) -> None:
    arguments = {**logits(dtype=dtype), "return_entropy": entropy}
    if temperature is not None:
        arguments["temperature"] = temperature
    assert_like_reference("token_logprobs", arguments, ["logits_NV"])


@pytest.mark.usefixtures("tiny_workspace")
def test_token_logprobs_row_by_row_equals_the_reference() -> None:
    assert_like_reference("token_logprobs", {**logits(), "return_entropy": True}, ["logits_NV"])


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logprob_diff_equals_the_reference(dtype: torch.dtype, kl: bool) -> None:
    assert_like_reference("logprob_diff", {**logit_pair(dtype), "return_kl": kl}, ["logits_NV"])


@pytest.mark.usefixtures("tiny_workspace")
def test_logprob_diff_row_by_row_equals_the_reference() -> None:
    assert_like_reference("logprob_diff", {**logit_pair(), "return_kl": True}, ["logits_NV"])


def test_logprob_diff_is_the_difference_of_two_token_logprobs() -> None:
    arguments = logit_pair(torch.bfloat16)
    ref_logits_NV = arguments.pop("ref_logits_NV")
    expected_N = ops.token_logprobs(**arguments)
    expected_N -= ops.token_logprobs(**{**arguments, "logits_NV": ref_logits_NV})
    assert torch.equal(ops.logprob_diff(ref_logits_NV=ref_logits_NV, **arguments), expected_N)


def test_logprob_diff_takes_two_dtypes() -> None:
    pair = logit_pair()
    for dtype, ref_dtype in ((torch.float16, torch.float32), (torch.float32, torch.float64)):
        arguments = {
            **pair,
            "logits_NV": pair["logits_NV"].to(dtype),
            "ref_logits_NV": pair["ref_logits_NV"].to(ref_dtype),
        }
        diff_N, grad_NV = run(ops.logprob_diff, arguments, ["logits_NV"])
        assert diff_N.dtype == ref_dtype
        assert grad_NV.dtype == dtype
        expected_N = reference.logprob_diff(**arguments)
        torch.testing.assert_close(diff_N.double(), expected_N, **SINGLE)


@pytest.mark.parametrize("offset", [0.0, 20.0])  # 20: where bf16 logits lose whole digits
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_logprob_diff_errs_at_most_twice_plain_torch(dtype: torch.dtype, offset: float) -> None:
    arguments = {**logit_pair(dtype, N=32, V=600), "return_kl": True}
    arguments["logits_NV"] = arguments["logits_NV"] + offset
    assert_errs_at_most_twice("logprob_diff", arguments, ["logits_NV"])


def test_the_kl_of_close_models_keeps_its_digits() -> None:
    logits_NV = logits(dtype=torch.float32)["logits_NV"]
    ref_logits_NV, labels_N = logits_NV.clone(), torch.zeros(6, dtype=torch.int64)
    ref_logits_NV[:, 0] += 1e-3
    diff_N, kl_N = ops.logprob_diff(logits_NV, ref_logits_NV, labels_N, return_kl=True)
    expected_N = torch.expm1(-diff_N.double()) + diff_N.double()
    torch.testing.assert_close(kl_N.double(), expected_N, rtol=1e-6, atol=0)
    assert (kl_N > 0).all()


def test_logprob_diff_gives_the_reference_model_no_gradient() -> None:
    arguments = logits()
    ref_logits_NV = arguments["logits_NV"].clone().requires_grad_()
    arguments["logits_NV"].requires_grad_()
    ops.logprob_diff(ref_logits_NV=ref_logits_NV, **arguments).sum().backward()
    assert ref_logits_NV.grad is None
    assert arguments["logits_NV"].grad.abs().sum() > 0


# ------------------------------------------------ precision, against the baseline's own error


@pytest.mark.parametrize("offset", [0.0, 20.0])  # 20: where bf16 logits lose whole digits
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_token_logprobs_errs_at_most_twice_plain_torch(dtype: torch.dtype, offset: float) -> None:
    arguments = {**logits(N=32, V=600, dtype=dtype), "return_entropy": True}
    arguments["logits_NV"] = arguments["logits_NV"] + offset
    assert_errs_at_most_twice("token_logprobs", arguments, ["logits_NV"])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_linear_logprobs_errs_at_most_twice_plain_torch(dtype: torch.dtype) -> None:
    arguments = {**head(N=32, H=64, V=600, dtype=dtype), "return_entropy": True}
    assert_errs_at_most_twice("linear_logprobs", arguments, HEAD_LEAVES)


def assert_errs_at_most_twice(name: str, arguments: dict[str, Any], leaves: list[str]) -> None:
    """Truth is float64 on the same inputs; the baseline is plain torch on them in float32."""
    truth = run(getattr(reference, name), arguments, leaves)
    plain = run(lambda **a: getattr(reference, name)(**a, dtype=torch.float32), arguments, leaves)
    ours = run(getattr(ops, name), arguments, leaves)
    for o, p, t in zip(ours, plain, truth, strict=True):
        assert o.dtype == p.dtype
        assert not o.isnan().any()
        eps = torch.finfo(o.dtype).eps * (1 + t.abs().max())
        assert (o - t).abs().max() <= 2 * (p - t).abs().max() + eps


def test_every_dtype_in_gives_float32_out_and_gradients_in_the_input_dtype() -> None:
    for dtype in (*HALVES, torch.float32):
        logps_N, grad = run(ops.token_logprobs, logits(dtype=dtype), ["logits_NV"])
        assert logps_N.dtype == torch.float32
        assert grad.dtype == dtype


def test_temperature_divides_after_the_upcast() -> None:
    arguments = {**logits(dtype=torch.bfloat16), "temperature": 0.7}
    upcast = {**arguments, "logits_NV": arguments["logits_NV"].float()}
    assert torch.equal(ops.token_logprobs(**arguments), ops.token_logprobs(**upcast))


def test_autocast_casts_the_factors_of_the_product_and_nothing_else() -> None:
    arguments = head(dtype=torch.float32)
    halves = {name: arguments[name].bfloat16() for name in HEAD_LEAVES}
    expected = run(ops.linear_logprobs, {**arguments, **halves}, HEAD_LEAVES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
        mixed = run(
            ops.linear_logprobs, {**arguments, "hidden_RH": halves["hidden_RH"]}, HEAD_LEAVES
        )
        double = run(ops.linear_logprobs, head(), HEAD_LEAVES)
        token = run(ops.token_logprobs, logits(dtype=torch.float32), ["logits_NV"])
    for a, m, e in zip(actual, mixed, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))
        assert torch.equal(m, e.to(m.dtype))
    assert [a.dtype for a in actual] == [torch.float32] * 4
    for a, e in zip(double, run(ops.linear_logprobs, head(), HEAD_LEAVES), strict=True):
        assert torch.equal(a, e)
    expected = run(ops.token_logprobs, logits(dtype=torch.float32), ["logits_NV"])
    for a, e in zip(token, expected, strict=True):
        assert torch.equal(a, e)


def test_every_token_has_its_own_upstream_gradient() -> None:
    """Liger #968: with reduction="none" all gradients were scaled by the first token's."""
    logits_NV = logits()["logits_NV"].requires_grad_()
    labels_N = torch.arange(6)
    upstream_N = torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    ops.token_logprobs(logits_NV, labels_N).backward(upstream_N)
    onehot_NV = torch.nn.functional.one_hot(labels_N, 11)
    expected = upstream_N[:, None] * (onehot_NV - logits_NV.detach().softmax(1))
    torch.testing.assert_close(logits_NV.grad, expected, **EXACT)


@pytest.mark.parametrize("offset", [-120.0, -1e4, 1e4])
def test_logits_all_far_from_zero(offset: float) -> None:
    """verl: a merge that starts from max = 0 gives +inf log-probs and NaN entropy near −120."""
    arguments = {**logits(dtype=torch.float32), "return_entropy": True}
    arguments["logits_NV"] = (64 * arguments["logits_NV"]).round() / 64 + offset  # exact in float32
    arguments["temperature"] = 1.0
    for a, e in zip(
        run(ops.token_logprobs, arguments, ["logits_NV"]),
        run(reference.token_logprobs, arguments, ["logits_NV"]),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), e.double(), **SINGLE)


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_bias_of_120_in_many_slices(sign: int) -> None:
    arguments = {**head(dtype=torch.float32), "softcap": None, "return_entropy": True}
    arguments["bias_V"] = arguments["bias_V"] + sign * 120
    expected = run(reference.linear_logprobs, arguments, HEAD_LEAVES)
    for a, e in zip(run(ops.linear_logprobs, arguments, HEAD_LEAVES), expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=2e-4)


def test_a_masked_label_is_exactly_zero_whatever_its_row_holds() -> None:
    """verl: label −100 returned uninitialised memory."""
    arguments = {**logits(), "return_entropy": True}
    arguments["logits_NV"][2] = torch.nan
    logps_N, entropy_N, grad_NV = run(ops.token_logprobs, arguments, ["logits_NV"])
    assert logps_N[2] == 0
    assert entropy_N[2] == 0
    assert not grad_NV[2].any()
    assert not grad_NV.isnan().any()


def test_a_hidden_row_without_a_valid_label_is_never_read() -> None:
    arguments = {**head(), "return_entropy": True}
    unread = torch.ones(7, dtype=torch.bool)
    unread[arguments["rows_N"][arguments["labels_N"] != -100]] = False
    assert unread.any()
    arguments["hidden_RH"][unread] = torch.nan
    results = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    assert not any(r.isnan().any() for r in results)
    assert not results[2][unread].any()


@pytest.mark.parametrize("gap", [6.0, 12.0, 25.0])  # label probability 0.98, 0.99995, 1 − 1e−10
def test_the_label_gradient_keeps_its_digits_near_probability_one(gap: float) -> None:
    """Liger #1329: rounding p before subtracting 1 left it 20 to 100 % wrong."""
    logits_NV = torch.zeros(1, 8)
    logits_NV[0, 3] = gap
    arguments = {"logits_NV": logits_NV, "labels_N": torch.tensor([3]), "return_entropy": True}
    actual = run(ops.token_logprobs, arguments, ["logits_NV"])
    expected = run(
        reference.token_logprobs, {**arguments, "logits_NV": logits_NV.double()}, ["logits_NV"]
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-5, atol=0)


def test_no_tensor_of_n_by_v_and_no_upcast_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    N, V, H = 64, 1024, 48
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 4 * N * 128)
    monkeypatch.setattr(head_slices, "MIN_SLICE", 32)
    inputs = linear_inputs(head(N=N, V=V, H=H, R=50, dtype=torch.bfloat16))
    with Recorder() as forward:
        results = linear.linear_logprobs_op.compute(*inputs)
    with Recorder() as backward:
        linear.linear_logprobs_backward_op.compute(
            *backward_inputs(results, inputs, [True, False, False])
        )
    assert max(forward.sizes) <= N * 128
    assert max(backward.sizes) <= N * 128  # less than the V·H of the weights too


def test_a_frozen_head_allocates_no_weight_gradient() -> None:
    """TRL #7076, Liger #1441."""
    N, V, H = 9, 64, 96
    inputs = linear_inputs(head(N=N, V=V, H=H, dtype=torch.float32))
    results = linear.linear_logprobs_op.compute(*inputs)
    with Recorder() as recorder:
        grads = linear.linear_logprobs_backward_op.compute(
            *backward_inputs(results, inputs, [True, False, False])
        )
    assert [g.numel() for g in grads] == [7 * H, 0, 0]
    assert V * H not in recorder.sizes
    with Recorder() as recorder:
        grads = linear.linear_logprobs_backward_op.compute(
            *backward_inputs(results, inputs, [False, True, False])
        )
    assert [g.numel() for g in grads] == [0, V * H, 0]


def test_token_logprobs_keeps_to_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    N, V = 64, 128
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 4 * V * 8)
    arguments = logits(N=N, V=V, dtype=torch.float32)
    with Recorder() as recorder:
        tokens.token_logprobs_op.compute(
            arguments["logits_NV"], arguments["labels_N"], torch.ones(()), True, "off"
        )
    assert max(recorder.sizes) <= 8 * V


def test_a_hidden_row_goes_through_the_head_once() -> None:
    arguments = {**head(), "rows_N": torch.tensor([4, 2, 4, 4, 2, 2, 2, 2, 4])}
    inputs = linear_inputs(arguments)
    assert head_slices.select(inputs[0], inputs[2], inputs[3], inputs[5]).hidden_UH.shape == (2, 5)
    assert_like_reference("linear_logprobs", {**arguments, "return_entropy": True}, HEAD_LEAVES)


def test_all_masked_is_a_connected_zero() -> None:
    arguments = {**head(), "labels_N": torch.full((9,), -100), "return_entropy": True}
    results = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    assert all(not r.any() for r in results)  # NaN is truthy
    arguments = {**logits(), "labels_N": torch.full((6,), -100), "return_entropy": True}
    assert all(not r.any() for r in run(ops.token_logprobs, arguments, ["logits_NV"]))


def test_no_token_at_all_is_a_connected_zero() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    arguments = {**head(), "labels_N": none, "rows_N": none, "temperature": 1.0}
    logps_N, *grads = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    assert logps_N.shape == (0,)
    assert all(not g.any() for g in grads)
    logits_0V = torch.zeros(0, 4, requires_grad=True)
    ops.token_logprobs(logits_0V, none).sum().backward()
    assert logits_0V.grad.shape == (0, 4)


def test_non_contiguous_inputs() -> None:
    arguments = {**head(), "return_entropy": True}
    strided = {**arguments, "hidden_RH": arguments["hidden_RH"].T.contiguous().T}
    strided["weight_VH"] = torch.stack([arguments["weight_VH"]] * 2, -1)[..., 1]
    strided["labels_N"] = arguments["labels_N"].repeat_interleave(2)[::2]
    strided["temperature"] = arguments["temperature"].repeat_interleave(3)[::3]
    assert_like_reference("linear_logprobs", strided, HEAD_LEAVES)
    transposed = logits()
    transposed["logits_NV"] = transposed["logits_NV"].T.contiguous().T
    assert_like_reference("token_logprobs", transposed, ["logits_NV"])


def test_a_logit_of_minus_infinity_forbids_its_token() -> None:
    arguments = {**logits(), "return_entropy": True}
    arguments["labels_N"][:] = 0
    arguments["logits_NV"][:, 5:8] = -torch.inf
    arguments["logits_NV"][1, 1:] = -torch.inf  # the label is all that is left
    assert_like_reference("token_logprobs", arguments, ["logits_NV"])
    logps_N, entropy_N = ops.token_logprobs(**arguments)
    assert (logps_N[1], entropy_N[1]) == (0, 0)


@pytest.mark.usefixtures("tiny_workspace")
def test_slices_of_nothing_but_minus_infinity() -> None:
    arguments = {**head(), "softcap": None, "return_entropy": True}
    arguments["labels_N"][arguments["labels_N"] >= 0] = 7
    arguments["bias_V"][:6] = -torch.inf
    assert_like_reference("linear_logprobs", arguments, ["hidden_RH", "weight_VH"])


def test_a_forbidden_label_has_log_prob_minus_infinity() -> None:
    logits_NV = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    logps_N, entropy_N = ops.token_logprobs(logits_NV, torch.tensor([1]), return_entropy=True)
    assert logps_N.item() == -torch.inf
    assert 0 < entropy_N.item() < 1
    logps_N.backward()
    torch.testing.assert_close(logits_NV.grad, torch.tensor([[-0.2689414, 1.0, -0.7310586]]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 3])  # the label's, another one's
def test_a_broken_logit_shows(bad: float, column: int) -> None:
    logits_NV = torch.zeros(2, 5)
    logits_NV[0, column] = bad
    logps_N, entropy_N = ops.token_logprobs(logits_NV, torch.tensor([0, 0]), return_entropy=True)
    assert logps_N.isnan().tolist() == [True, False]
    assert entropy_N.isnan().tolist() == [True, False]


# ----------------------------------------------------------------------- properties

hostile = st.sampled_from([0.0, -0.0, 1.0, -120.0, 88.0, 1e-30, -1e4, 1e4]) | st.floats(-40, 40)


@settings(max_examples=60)
@given(st.data())
def test_hostile_logits_equal_the_reference(data: st.DataObject) -> None:
    N, V = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    rows = st.lists(st.lists(hostile, min_size=V, max_size=V), min_size=N, max_size=N)
    label = st.just(-100) | st.integers(0, V - 1)
    arguments = {
        "logits_NV": torch.tensor(data.draw(rows), dtype=torch.float64),
        "labels_N": torch.tensor(data.draw(st.lists(label, min_size=N, max_size=N))),
        "temperature": data.draw(st.sampled_from([0.1, 1.0, 7.0])),
        "return_entropy": True,
    }
    expected = run(reference.token_logprobs, arguments, ["logits_NV"])
    actual = run(ops.token_logprobs, arguments, ["logits_NV"])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    R=st.integers(2, 6),
    N=st.integers(2, 8),
    V=st.integers(1, 13),
    slice_width=st.integers(1, 5),
)
def test_any_shape_and_slice_equals_the_reference(
    seed: int, R: int, N: int, V: int, slice_width: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "WORKSPACE_BYTES", 1)
        patch.setattr(head_slices, "MIN_SLICE", slice_width)
        arguments = {**head(seed=seed, R=R, N=N, V=V), "return_entropy": True}
        assert_like_reference("linear_logprobs", arguments, HEAD_LEAVES)


@given(shift=st.floats(-1e3, 1e3))
@settings(max_examples=20)
def test_a_shift_of_all_logits_changes_nothing(shift: float) -> None:
    arguments = {**logits(), "return_entropy": True}
    shifted = {**arguments, "logits_NV": arguments["logits_NV"] + shift}
    results = run(ops.token_logprobs, arguments, ["logits_NV"])
    for a, e in zip(run(ops.token_logprobs, shifted, ["logits_NV"]), results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    assert results[2].sum(1).abs().max() < 1e-12  # hence the gradient sums to 0 over the vocabulary


def test_probabilities_of_all_labels_sum_to_one_and_give_the_entropy() -> None:
    arguments = head(V=17)
    row = {"rows_N": torch.full((17,), 3), "labels_N": torch.arange(17), "temperature": 0.8}
    logps_V, entropy_V = ops.linear_logprobs(**{**arguments, **row}, return_entropy=True)
    p_V = logps_V.exp()
    torch.testing.assert_close(p_V.sum(), torch.ones((), dtype=torch.float64), **EXACT)
    torch.testing.assert_close(entropy_V, -(p_V * logps_V).sum().expand(17), **EXACT)


def test_the_same_inputs_give_the_same_bits() -> None:
    arguments = {**head(dtype=torch.float32), "return_entropy": True}
    once, again = (run(ops.linear_logprobs, arguments, HEAD_LEAVES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# --------------------------------------------------------------------- failures

BAD_HEADS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"hidden_RH": torch.zeros(7, 4, dtype=torch.float64)},
        ValueError,
        r"weight_VH must be \(V, 4\)",
    ),
    (
        {"hidden_RH": torch.zeros(7, 5)},
        TypeError,
        "weight_VH must have the dtype of hidden_RH, torch.float32, got torch.float64",
    ),
    (
        {"hidden_RH": torch.zeros(7, 5, dtype=torch.int64)},
        TypeError,
        "float tensor, got torch.int64",
    ),
    ({"hidden_RH": torch.zeros(5, dtype=torch.float64)}, ValueError, "must have 2 dimensions"),
    ({"hidden_RH": [[0.0]]}, TypeError, "hidden_RH must be a float tensor, got list"),
    ({"weight_VH": torch.zeros(0, 5, dtype=torch.float64)}, ValueError, "V >= 1"),
    (
        {"bias_V": torch.zeros(16, dtype=torch.float64)},
        ValueError,
        r"bias_V must be \(17,\), got \(16,\)",
    ),
    ({"labels_N": torch.zeros(9)}, TypeError, "int32 or int64 tensor or array, got torch.float32"),
    ({"labels_N": [1, 2]}, TypeError, "got list"),
    ({"labels_N": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "1 dimension"),
    (
        {"labels_N": torch.tensor([0, -100, 3, 17, 99, 0, 0, 0, 0])},
        ValueError,
        r"labels_N\[3\] must lie in .*17\), .*, got 17",
    ),
    (
        {"labels_N": torch.tensor([0, -1, 3, 17, 99, 0, 0, 0, 0])},
        ValueError,
        r"labels_N\[1\] must .*, got -1",
    ),
    (
        {"rows_N": torch.tensor([0, 7, 0, 0, 0, 0, 0, 0, 0])},
        ValueError,
        r"rows_N\[1\] must lie in \[0, 7\), .*, got 7",
    ),
    ({"rows_N": torch.tensor([0, 1])}, ValueError, "rows_N must have 9 entries, .*, got 2"),
    ({"rows_N": None}, ValueError, "labels_N must have 7 entries, .*, got 9"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "got nan"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    ({"temperature": torch.ones(8)}, ValueError, r"shape \(\) or \(9,\), got \(8,\)"),
    (
        {"temperature": torch.tensor([1.0] * 8 + [-2.0])},
        ValueError,
        r"temperature\[8\] must be .*, got -2\.0",
    ),
    ({"temperature": torch.ones(9, dtype=torch.int64)}, TypeError, "float tensor, got torch.int64"),
    ({"temperature": torch.ones(9, requires_grad=True)}, ValueError, "no gradient flows"),
    (
        {"temperature": torch.ones(9, device="meta")},
        ValueError,
        "temperature must be on cpu, got meta",
    ),
    ({"softcap": -1.0}, ValueError, "softcap must be positive and finite, got -1.0"),
    (
        {"weight_VH": torch.zeros(17, 5, dtype=torch.float64, device="meta")},
        ValueError,
        "weight_VH must be on the device of hidden_RH, cpu, got meta",
    ),
    (
        {"labels_N": torch.zeros(9, dtype=torch.int64, device="meta")},
        ValueError,
        "labels_N must be on cpu, got meta",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_HEADS)
def test_linear_logprobs_refuses(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.linear_logprobs(**{**head(), **change})


def test_token_logprobs_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"labels_N must have 3 entries, .*, got 2"):
        ops.token_logprobs(torch.zeros(3, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels_N\[0\] must lie in .*, got 4"):
        ops.token_logprobs(torch.zeros(1, 4), torch.tensor([4]))
    with pytest.raises(ValueError, match="V >= 1"):
        ops.token_logprobs(torch.zeros(1, 0), torch.tensor([-100]))
    with pytest.raises(
        ValueError, match=r"logits_NV must have the shape of ref_logits_NV, \(1, 5\), got \(1, 4\)"
    ):
        ops.logprob_diff(torch.zeros(1, 4), torch.zeros(1, 5), torch.tensor([0]))


# ------------------------------------------------------------ labels outside the vocabulary


def labelled(labels_N: Tensor, **options: Any) -> dict[str, Tensor]:
    """Each op's log-probs, or differences, of 17 logits for these labels."""
    arguments = {**head(N=len(labels_N), dtype=torch.float32), "labels_N": labels_N, **options}
    names = ("hidden_RH", "weight_VH", "rows_N", "bias_V")
    logits_NV = torch.randn(len(labels_N), 17)
    return {
        "linear_logprobs": ops.linear_logprobs(**arguments),
        "linear_logprob_diff": ops.linear_logprob_diff(
            **arguments, **{f"ref_{name}": arguments[name] for name in names}
        ),
        "token_logprobs": ops.token_logprobs(logits_NV, labels_N, **options),
        "logprob_diff": ops.logprob_diff(logits_NV, 2 * logits_NV, labels_N, **options),
    }


@pytest.mark.parametrize("label", [-1, -101, 17, 2**40])
def test_unchecked_labels_outside_the_vocabulary_score_nan(label: int) -> None:
    labels_N = torch.tensor([3, label, -100, 16])
    for op, scores_N in labelled(labels_N, check_labels="off").items():
        assert scores_N.isnan().tolist() == [False, True, False, False], op


@pytest.mark.parametrize("check", ["device", "sync"])
def test_checked_labels_outside_the_vocabulary_are_named(check: str) -> None:
    with pytest.raises(ValueError, match=r"labels_N\[1\] must lie in \[0, 17\), .*, got 17"):
        labelled(torch.tensor([3, 17, -100, 18]), check_labels=check)


def test_a_check_of_labels_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="check_labels must be one of 'sync', 'device', 'off'"):
        labelled(torch.tensor([3, 4, 5, 6]), check_labels="never")


# ------------------------------------------------------------ sizes


def test_more_rows_than_a_grid_axis_has_programs() -> None:
    """Liger #1294: 65,535 programs are the limit of every grid axis but the first."""
    N = 70_000
    logits_NV = torch.randn(N, 3)
    labels_N = torch.arange(N) % 3
    expected = run(
        reference.token_logprobs, {"logits_NV": logits_NV, "labels_N": labels_N}, ["logits_NV"]
    )
    identity_VH = torch.eye(3)
    for actual in (
        run(ops.token_logprobs, {"logits_NV": logits_NV, "labels_N": labels_N}, ["logits_NV"]),
        run(
            ops.linear_logprobs,
            {"hidden_RH": logits_NV, "weight_VH": identity_VH, "labels_N": labels_N},
            ["hidden_RH"],
        ),
    ):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e.double(), **SINGLE)


def test_a_step_of_64_tokens_from_bf16_is_close_to_float64_at_a_real_vocabulary() -> None:
    """Logits rounded to bf16 move such a sum by 0.17 nat on average; the bound is 0.002."""
    N, H, V = 64, 32, 128_256
    g = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(N, H, generator=g).bfloat16()
    weight_VH = (torch.randn(V, H, generator=g) / 2).bfloat16()
    labels_N = torch.randint(V, (N,), generator=g)
    exact_N = reference.linear_logprobs(hidden_RH, weight_VH, labels_N)
    ours_N = ops.linear_logprobs(hidden_RH, weight_VH, labels_N)
    error = ops.step_sums(ours_N, torch.tensor([0, N])).double() - exact_N.sum()
    assert error.abs() <= 2e-3
    rounded_N = reference.token_logprobs((hidden_RH @ weight_VH.T), labels_N)
    assert (rounded_N.sum() - exact_N.sum()).abs() > 2e-2  # the bound can fail


# ------------------------------------------------------------ what else went wrong elsewhere


def test_forward_and_backward_see_the_same_probabilities() -> None:
    """marin #8217: rounded on one side only, they differ by 11.5 % at logits of 40."""
    V = 23
    g = torch.Generator().manual_seed(0)
    hidden_RH = (4 * torch.randn(V, 8, generator=g)).bfloat16()
    weight_VH = (4 * torch.randn(V, 8, generator=g)).bfloat16()
    hidden_RH[:] = hidden_RH[0]  # one state, every label once
    assert (hidden_RH[0].float() @ weight_VH.float().T).abs().max() > 40
    identity_VH = torch.eye(V, requires_grad=True)
    logits_NV = (hidden_RH.float() @ weight_VH.float().T).requires_grad_()
    logps_N = ops.token_logprobs(logits_NV, torch.arange(V))
    (grad_NV,) = torch.autograd.grad(logps_N.sum(), logits_NV)
    torch.testing.assert_close(1 - grad_NV.diag(), logps_N.exp(), rtol=1e-5, atol=1e-7)
    logps_N = ops.linear_logprobs(logits_NV.detach(), identity_VH, torch.arange(V))
    (grad_VV,) = torch.autograd.grad(logps_N[0], identity_VH)
    expected_V = -logps_N.exp().detach()[:, None] * logits_NV.detach()[0]
    torch.testing.assert_close(grad_VV[1:], expected_V[1:], rtol=1e-5, atol=1e-7)


def test_inputs_are_left_as_they_are() -> None:
    """SkyRL #2141: a tuner that runs a kernel in place several times. Here nothing is in place."""
    arguments = {**head(dtype=torch.float32), "return_entropy": True}
    scored = logits(dtype=torch.float32)
    for function, inputs, leaves in (
        (ops.linear_logprobs, arguments, HEAD_LEAVES),
        (ops.token_logprobs, {**scored, "return_entropy": True}, ["logits_NV"]),
    ):
        before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
        run(function, inputs, leaves)
        for name, value in before.items():
            assert torch.equal(inputs[name], value), name
