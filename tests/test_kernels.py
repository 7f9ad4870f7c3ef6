"""The Triton kernels against `stepagent.reference`, in Triton's interpreter where there is no GPU.

The interpreter takes about 2 ms a program and tile, so shapes are tiny and the tile is cut to 16.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from stepagent import reference
from stepagent.kernels import token_logprobs as kernel

# The kernel relies on log 0 = −inf and inf − inf = NaN; numpy warns of them in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MAX_BLOCK", 16)


def random_logits(N: int, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (3 * torch.randn(N, V, generator=g)).to(dtype)


def launch(
    logits_NV: Tensor, labels_N: Tensor, temperature: float | Tensor = 1.0, entropy: bool = True
) -> tuple[Tensor, ...]:
    temperature = torch.as_tensor(temperature).to(DEVICE)
    results = kernel.token_logprobs(
        logits_NV.to(DEVICE), labels_N.to(DEVICE), temperature, with_entropy=entropy
    )
    return tuple(result.cpu() for result in results)


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
    torch.testing.assert_close(max_N.double(), largest_N, rtol=1e-7, atol=0)
    torch.testing.assert_close(log_sum_N.double(), expected_N, rtol=2e-6, atol=1e-6)
    logps_only_N, zeros_N, *_ = launch(logits_NV, labels_N, temperature, entropy=False)
    assert torch.equal(logps_only_N, logps_N)
    assert not zeros_N.any()


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


def test_strided_logits() -> None:
    wide_NV = random_logits(4, 80)
    labels_N = torch.tensor([0, 9, -100, 19])
    assert_like_reference(wide_NV[:, ::2], torch.tensor([0, 9, -100, 39]))  # a column stride
    assert_like_reference(wide_NV[:, 7:27], labels_N)  # a row stride
    assert_like_reference(wide_NV[:, :20].T.contiguous().T, labels_N)  # columns first
    assert_like_reference(wide_NV[:, :20], labels_N.repeat_interleave(2)[::2])


def test_a_masked_row_is_zero_whatever_it_holds() -> None:
    logits_NV = random_logits(3, 20)
    logits_NV[1] = torch.nan
    for result_N in launch(logits_NV, torch.tensor([0, -100, 1])):
        assert result_N[1] == 0
        assert not result_N.isnan().any()


def test_minus_infinity_forbids_a_token() -> None:
    logits_NV = random_logits(3, 50)
    logits_NV[0, :40] = -torch.inf  # whole tiles
    logits_NV[1, 1:] = -torch.inf  # all but the label
    logits_NV[2, 3] = -torch.inf  # the label
    logps_N, entropy_N, *_ = launch(logits_NV, torch.tensor([45, 0, 3]))
    expected = reference.token_logprobs(logits_NV, torch.tensor([45, 0, 3]), return_entropy=True)
    torch.testing.assert_close(logps_N.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy_N.double(), expected[1], rtol=1e-6, atol=1e-6)


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


def test_no_row_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [r.shape for r in launch(torch.zeros(0, 4), none)] == [(0,)] * 4
