"""The Triton kernels against `stepagent.reference`, in Triton's interpreter where there is no GPU.

The interpreter takes about 2 ms a program and tile, so shapes are tiny and the tile is cut to 16.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

pytest.importorskip("triton")

from stepagent import reference
from stepagent.kernels import online_softmax
from stepagent.kernels.logprob_diff import logprob_diff
from stepagent.kernels.token_logprobs import token_logprobs, token_logprobs_backward
from stepagent.ops import paths, token_diff, tokens

# The kernels rely on log 0 = −inf and inf − inf = NaN; numpy warns of them in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_softmax, "MAX_BLOCK", 16)


def random_logits(N: int, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (3 * torch.randn(N, V, generator=g)).to(dtype)


def on_device(logits_NV: Tensor) -> Tensor:
    """With their strides, which `.to` does not keep where memory lies between the elements."""
    if DEVICE == "cpu":
        return logits_NV
    copy_NV = torch.empty_strided(
        logits_NV.shape, logits_NV.stride(), dtype=logits_NV.dtype, device=DEVICE
    )
    return copy_NV.copy_(logits_NV)


def launch(
    logits_NV: Tensor, labels_N: Tensor, temperature: float | Tensor = 1.0, entropy: bool = True
) -> tuple[Tensor, ...]:
    temperature = torch.as_tensor(temperature).to(DEVICE)
    results = token_logprobs(
        on_device(logits_NV), labels_N.to(DEVICE), temperature, with_entropy=entropy
    )
    return tuple(result.cpu() for result in results)


def launch_backward(
    logits_NV: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor,
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    results: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Gradient of the logits, after the kernel's forward or with these results of another."""
    if results is None:
        results = launch(logits_NV, labels_N, temperature, grad_entropy_N is not None)
    upstreams = [None if g is None else g.to(DEVICE) for g in (grad_logps_N, grad_entropy_N)]
    inputs = (on_device(logits_NV), labels_N.to(DEVICE), torch.as_tensor(temperature).to(DEVICE))
    return token_logprobs_backward(*upstreams, [r.to(DEVICE) for r in results], *inputs).cpu()


def reference_gradient(
    logits_NV: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor,
    upstreams: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    leaf_NV = logits_NV.detach().to(dtype).requires_grad_()
    outputs = reference.token_logprobs(
        leaf_NV, labels_N, temperature=temperature, return_entropy=True, dtype=dtype
    )
    torch.autograd.backward(outputs[: len(upstreams)], [u.to(dtype) for u in upstreams])
    return leaf_NV.grad


def assert_gradient_like_reference(
    logits_NV: Tensor, labels_N: Tensor, temperature: float | Tensor = 1.0
) -> None:
    """With another upstream for every token: at most twice the error of plain torch in float32."""
    g = torch.Generator().manual_seed(1)
    upstreams = list(torch.randn(2, len(labels_N), generator=g))
    for used, grad_entropy_N in ((upstreams, upstreams[1]), (upstreams[:1], None)):
        ours = launch_backward(logits_NV, labels_N, temperature, upstreams[0], grad_entropy_N)
        truth, plain = (
            reference_gradient(logits_NV, labels_N, temperature, used, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        assert ours.dtype == logits_NV.dtype
        assert not ours.isnan().any()
        assert not ours[labels_N == -100].any()
        eps = max(torch.finfo(ours.dtype).eps, 4e-7)  # what rounds a value, once
        allowed = 2 * (plain - truth).abs().max() + eps * truth.abs() + 1e-7
        assert ((ours - truth).abs() <= allowed).all()


def assert_like_reference(
    logits_NV: Tensor, labels_N: Tensor, temperature: float | Tensor = 1.0
) -> None:
    """At most twice the error of plain torch in float32, plus its rounding of a value."""
    truth, plain = (
        reference.token_logprobs(
            logits_NV, labels_N, temperature=temperature, return_entropy=True, dtype=dtype
        )
        for dtype in (torch.float64, torch.float32)
    )
    logps_N, entropy_N, max_N, log_sum_N = launch(logits_NV, labels_N, temperature)
    for ours, theirs, exact in zip((logps_N, entropy_N), plain, truth, strict=True):
        assert not ours.isnan().any()
        allowed = 2 * (theirs - exact).abs().max() + 4e-7 * (1 + exact.abs())
        assert ((ours - exact).abs() <= allowed).all()
    scored = labels_N != -100
    scaled_NV = logits_NV.double() / torch.as_tensor(temperature).reshape(-1, 1)
    largest_N = scaled_NV.amax(1).where(scored, 0.0)
    expected_N = (scaled_NV - largest_N[:, None]).logsumexp(1).where(scored, 0.0)
    # A GPU divides by the temperature to 2 units in the last place.
    torch.testing.assert_close(max_N.double(), largest_N, rtol=3e-7, atol=0)
    torch.testing.assert_close(log_sum_N.double(), expected_N, rtol=2e-6, atol=1e-6)
    logps_only_N, zeros_N, *_ = launch(logits_NV, labels_N, temperature, entropy=False)
    assert torch.equal(logps_only_N, logps_N)
    assert not zeros_N.any()
    assert_gradient_like_reference(logits_NV, labels_N, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, 16, 17, 50])  # one, less than a tile, a tile, more, many
def test_every_width_equals_the_reference(V: int, dtype: torch.dtype) -> None:
    assert_like_reference(random_logits(3, V, dtype), torch.tensor([0, V - 1, V // 2]))


@pytest.mark.parametrize("offset", [-120.0, 20.0, 1e4])
def test_logits_far_from_zero(offset: float) -> None:
    logits_NV = (random_logits(3, 37) * 64).round() / 64 + offset
    assert_like_reference(logits_NV, torch.tensor([0, 20, 36]))


def test_a_temperature_of_each_token() -> None:
    temperature = torch.tensor([0.2, 1.0, 3.0])
    assert_like_reference(random_logits(3, 37), torch.tensor([5, 6, 7]), temperature)
    assert_like_reference(random_logits(3, 37), torch.tensor([5, 6, 7]), 0.7)


@pytest.mark.parametrize("gap", [6.0, 12.0, 25.0])
def test_a_label_probability_close_to_one_keeps_its_digits(gap: float) -> None:
    logits_NV = torch.zeros(1, 20)
    logits_NV[0, 18] = gap
    labels_N = torch.tensor([18])
    expected = reference.token_logprobs(logits_NV, labels_N, return_entropy=True)
    for actual, exact in zip(launch(logits_NV, labels_N), expected, strict=False):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)
    one = torch.ones(1)
    for grad_entropy_N, upstreams in ((None, [one]), (one, [one, one])):
        grad_NV = launch_backward(logits_NV, labels_N, 1.0, one, grad_entropy_N)
        exact = reference_gradient(logits_NV, labels_N, 1.0, upstreams, torch.float64)
        torch.testing.assert_close(grad_NV.double(), exact, rtol=1e-5, atol=0)


def test_strided_logits() -> None:
    wide_NV = random_logits(4, 80)
    labels_N = torch.tensor([0, 9, -100, 19])
    assert_like_reference(wide_NV[:, ::2], torch.tensor([0, 9, -100, 39]))  # a column stride
    assert_like_reference(wide_NV[:, 7:27], labels_N)  # a row stride
    assert_like_reference(wide_NV[:, :20].T.contiguous().T, labels_N)  # columns first
    assert_like_reference(wide_NV[:, :20], labels_N.repeat_interleave(2)[::2])


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**27)])  # by row, by column
def test_offsets_beyond_32_bits(strides: tuple[int, int]) -> None:
    """TRL #7266, fla #1080: N·V > 2³¹. Of the memory only the pages in use become real."""
    memory = torch.empty(20 * 2**27, dtype=torch.float16)
    logits_NV = memory.as_strided((3, 20), strides).copy_(random_logits(3, 20))
    labels_N = torch.tensor([0, 7, 19])
    assert_like_reference(logits_NV, labels_N)
    assert_diff_like_reference(logits_NV, logits_NV.flip(1), labels_N)
    assert_diff_like_reference(logits_NV.flip(1), logits_NV, labels_N)


def test_a_masked_row_is_zero_whatever_it_holds() -> None:
    logits_NV = random_logits(3, 20)
    logits_NV[1] = torch.nan
    labels_N = torch.tensor([0, -100, 1])
    for result_N in launch(logits_NV, labels_N):
        assert result_N[1] == 0
        assert not result_N.isnan().any()
    upstream_N = torch.tensor([1.0, torch.nan, 2.0])
    grad_NV = launch_backward(logits_NV, labels_N, 1.0, upstream_N, upstream_N)
    assert not grad_NV[1].any()
    assert not grad_NV.isnan().any()


def test_minus_infinity_forbids_a_token() -> None:
    logits_NV = random_logits(3, 50)
    logits_NV[0, :40] = -torch.inf  # whole tiles
    logits_NV[1, 1:] = -torch.inf  # all but the label
    logits_NV[2, 3] = -torch.inf  # the label
    labels_N = torch.tensor([45, 0, 3])
    logps_N, entropy_N, *_ = launch(logits_NV, labels_N)
    expected = reference.token_logprobs(logits_NV, labels_N, return_entropy=True)
    torch.testing.assert_close(logps_N.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy_N.double(), expected[1], rtol=1e-6, atol=1e-6)
    upstream_N = torch.tensor([1.0, -2.0, 3.0])
    grad_NV = launch_backward(logits_NV, labels_N, 1.0, upstream_N, None)
    onehot_NV = torch.nn.functional.one_hot(labels_N, 50)
    expected_NV = upstream_N[:, None] * (onehot_NV - logits_NV.double().softmax(1))
    torch.testing.assert_close(grad_NV.double(), expected_NV, rtol=1e-6, atol=1e-6)
    with_entropy_NV = launch_backward(logits_NV, labels_N, 1.0, upstream_N, upstream_N)
    assert not with_entropy_NV.isnan().any()
    assert not with_entropy_NV[0, :40].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 30])  # the label's, another one's
def test_a_broken_logit_shows(bad: float, column: int) -> None:
    logits_NV = random_logits(2, 37)
    logits_NV[0, column] = bad
    logps_N, entropy_N, *_ = launch(logits_NV, torch.tensor([0, 0]))
    assert logps_N.isnan().tolist() == [True, False]
    assert entropy_N.isnan().tolist() == [True, False]


@pytest.mark.parametrize("label", [-1, 20, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan(label: int) -> None:
    logps_N, entropy_N, *_ = launch(random_logits(1, 20), torch.tensor([label]))
    assert logps_N.isnan().all()
    assert entropy_N.isnan().all()
    one = torch.ones(1)
    grad_NV = launch_backward(random_logits(1, 20), torch.tensor([label]), 1.0, one, None)
    assert grad_NV.isnan().all()


def test_no_row_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [r.shape for r in launch(torch.zeros(0, 4), none)] == [(0,)] * 4
    assert launch_backward(torch.zeros(0, 4), none, 1.0, torch.zeros(0), None).shape == (0, 4)
    assert [r.shape for r in launch_diff(torch.zeros(0, 4), torch.zeros(0, 4), none)] == [(0,)] * 4


def test_upstream_gradients_may_be_expanded() -> None:
    logits_NV, labels_N = random_logits(3, 20), torch.tensor([0, 5, 19])
    grads = [
        launch_backward(logits_NV, labels_N, 1.0, one_N, one_N)
        for one_N in (torch.ones(()).expand(3), torch.ones(3))
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_backwards_of_triton_and_torch_exchange_their_results(entropy: bool) -> None:
    logits_NV, labels_N = random_logits(3, 37), torch.tensor([0, -100, 36])
    upstreams = (torch.tensor([1.0, 2.0, -3.0]), torch.ones(3) if entropy else None)
    inputs = (logits_NV, labels_N, torch.tensor(0.7))
    from_torch = tokens.token_logprobs_op.compute(*inputs, entropy, "device")
    expected_NV = tokens.token_logprobs_backward_op.compute(*upstreams, list(from_torch), *inputs)
    for results in (from_torch, launch(*inputs, entropy=entropy)):
        grad_NV = launch_backward(*inputs, *upstreams, results=results)
        torch.testing.assert_close(grad_NV, expected_NV, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------- logprob_diff


def launch_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, ...]:
    inputs = (labels_N.to(DEVICE), torch.as_tensor(temperature).to(DEVICE))
    results = logprob_diff(on_device(logits_NV), on_device(ref_logits_NV), *inputs)
    return tuple(result.cpu() for result in results)


def assert_diff_like_reference(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor = 1.0,
) -> None:
    """As `token_logprobs`, also in what the backward takes, which the two share."""
    truth_N, plain_N = (
        reference.logprob_diff(
            logits_NV, ref_logits_NV, labels_N, temperature=temperature, dtype=dtype
        )
        for dtype in (torch.float64, torch.float32)
    )
    diff_N, *policy = launch_diff(logits_NV, ref_logits_NV, labels_N, temperature)
    allowed = 2 * (plain_N - truth_N).abs().max() + 8e-7 * (1 + truth_N.abs())
    assert ((diff_N - truth_N).abs() <= allowed).all()
    logps_N, _, *others = launch(logits_NV, labels_N, temperature, entropy=False)
    for ours_N, theirs_N in zip(policy, [logps_N, *others], strict=True):
        torch.testing.assert_close(ours_N, theirs_N, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, 16, 17, 50])  # one, less than a tile, a tile, more, many
def test_diff_of_every_width_equals_the_reference(V: int, dtype: torch.dtype) -> None:
    ref_logits_NV = random_logits(3, V, dtype).flip(1)
    labels_N = torch.tensor([0, V - 1, V // 2])
    assert_diff_like_reference(random_logits(3, V, dtype), ref_logits_NV, labels_N)


@pytest.mark.parametrize("offset", [-120.0, 20.0])
def test_diff_of_logits_far_from_zero(offset: float) -> None:
    logits_NV = (random_logits(3, 37) * 64).round() / 64
    labels_N = torch.tensor([0, 20, 36])
    assert_diff_like_reference(logits_NV + offset, logits_NV.flip(1) - offset, labels_N)


def test_diff_takes_two_layouts_two_dtypes_and_a_temperature_of_each_token() -> None:
    wide_NV = random_logits(3, 74)
    ref_logits_NV = random_logits(3, 37, torch.float16).flip(1).T.contiguous().T
    labels_N, temperature = torch.tensor([0, -100, 36]), torch.tensor([0.2, 1.0, 3.0])
    assert_diff_like_reference(wide_NV[:, ::2], ref_logits_NV, labels_N, temperature)


def test_diff_of_a_masked_row_is_zero_whatever_it_holds() -> None:
    logits_NV = random_logits(2, 20)
    logits_NV[1] = torch.nan
    for result_N in launch_diff(logits_NV, logits_NV, torch.tensor([3, -100])):
        assert result_N[1] == 0
        assert not result_N.isnan().any()


def test_diff_of_a_token_that_the_policy_forbids() -> None:
    logits_NV, labels_N = random_logits(2, 37), torch.tensor([3, 36])
    logits_NV[0, 3] = -torch.inf
    logits_NV[1, :32] = -torch.inf  # whole tiles
    diff_N, *_ = launch_diff(logits_NV, random_logits(2, 37).flip(1), labels_N)
    expected_N = reference.logprob_diff(logits_NV, random_logits(2, 37).flip(1), labels_N)
    torch.testing.assert_close(diff_N.double(), expected_N, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernels, the torch path
def test_the_operators_on_a_gpu_return_what_they_do_on_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_NV, labels_N = random_logits(3, 37, dtype), torch.tensor([0, -100, 36])
    inputs = (logits_NV, labels_N, torch.full((), 0.7, dtype=dtype))
    two_logits = (logits_NV, logits_NV.flip(1), *inputs[1:])
    grads_N = (torch.tensor([1.0, 2.0, -3.0], dtype=dtype), torch.ones(3, dtype=dtype))
    results = list(tokens.token_logprobs_op.compute(*inputs, True, "device"))
    calls = (
        (tokens.token_logprobs_op.compute, (*inputs, True, "device")),
        (tokens.token_logprobs_backward_op.compute, (*grads_N, results, *inputs)),
        (token_diff.logprob_diff_op.compute, (*two_logits, "device")),
    )
    expected = [operator(*arguments) for operator, arguments in calls]
    monkeypatch.setattr(paths, "on_gpu", lambda tensor: True)
    for (operator, arguments), e in zip(calls, expected, strict=True):
        actual = operator(*tree_map(lambda x: x.to(DEVICE) if torch.is_tensor(x) else x, arguments))
        torch.testing.assert_close(tree_map(lambda x: x.cpu(), actual), e, rtol=1e-5, atol=1e-6)
