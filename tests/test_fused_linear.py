"""The fused head against `stepagent.reference`, in Triton's interpreter where there is no GPU.

The interpreter multiplies bfloat16 wrongly, so its dtypes are float32 and float16, and it takes
about 2 ms for a step of a loop, so tiles are cut to 16 and a split of the vocabulary to two tiles.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from stepagent import reference
from stepagent.kernels import fused_linear
from stepagent.kernels.fused_linear import Config, fused_linear_logprobs
from stepagent.ops import linear

# The kernels rely on log 0 = −inf and inf − inf = NaN; numpy warns of them in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Config(rows=16, vocab=16, hidden=16, num_warps=4, num_stages=2)

PLAIN = ("nothing", 0, "", "off", False)  # options of the hybrid: it keeps nothing


SHIPPED = fused_linear.choose_config


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "choose_config", lambda *_: TILE)
    monkeypatch.setattr(fused_linear, "SPLIT", 32)
    monkeypatch.setattr(fused_linear, "GROUP", 2)
    monkeypatch.setattr(fused_linear, "JOIN_HIDDEN", 16)


@pytest.fixture
def persist(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """How many programs the items share."""
    return lambda count: monkeypatch.setattr(fused_linear, "programs", lambda _: count)


def random_head(
    n: int, V: int, H: int = 20, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_nH, weight_VH and labels_n, with logits of about ±3."""
    g = torch.Generator().manual_seed(0)
    hidden_nH, weight_VH = (torch.randn(rows, H, generator=g).to(dtype) for rows in (n, V))
    return hidden_nH, weight_VH * (3 / H**0.5), torch.randint(V, (n,), generator=g)


def launch(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    labels_n: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
) -> tuple[Tensor, ...]:
    tensors = (hidden_nH, weight_VH, labels_n, bias_V, torch.as_tensor(temperature))
    on_device = (None if tensor is None else tensor.to(DEVICE) for tensor in tensors)
    results = fused_linear_logprobs(*on_device, softcap, with_entropy=entropy)
    return tuple(result.cpu() for result in results)


def assert_like_reference(
    hidden_nH: Tensor, weight_VH: Tensor, labels_n: Tensor, **options: object
) -> None:
    """At most twice the error of plain torch in float32, plus its rounding of a value."""
    inputs = (hidden_nH, weight_VH, labels_n)
    truth, plain = (
        reference.linear_logprobs(*inputs, **options, return_entropy=True, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    logps_n, entropy_n, max_n, log_sum_n = launch(*inputs, **options)
    for ours, theirs, exact in zip((logps_n, entropy_n), plain, truth, strict=True):
        assert ours.dtype == torch.float32
        allowed = 2 * (theirs - exact).abs().max() + 4e-7 * (1 + exact.abs())
        assert ((ours - exact).abs() <= allowed).all()
    temperature = torch.as_tensor(options.get("temperature", 1.0))
    head = (options.get("bias_V"), temperature, options.get("softcap"))
    expected = linear.linear_logprobs_op.compute(
        hidden_nH.float(), weight_VH.float(), labels_n, None, *head, True, *PLAIN
    )
    torch.testing.assert_close(max_n, expected[2], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(max_n + log_sum_n, expected[2] + expected[3], rtol=2e-6, atol=4e-6)
    logps_only_n, zeros_n, *others = launch(*inputs, **options, entropy=False)
    assert not zeros_n.any()
    for with_entropy_n, without_n in zip(
        (logps_n, max_n, log_sum_n), (logps_only_n, *others), strict=True
    ):
        assert torch.equal(with_entropy_n, without_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("n", "V", "H"),
    [
        (1, 1, 1),
        (1, 32, 16),  # a whole split
        (16, 33, 17),  # a vocabulary entry and a hidden column more than the tiles hold
        (17, 100, 40),  # a row more
    ],
)
def test_every_shape_equals_the_reference(n: int, V: int, H: int, dtype: torch.dtype) -> None:
    assert_like_reference(*random_head(n, V, H, dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": torch.tensor([0.2, 1.0, 3.0])},
        {"softcap": 2.0},
        {"softcap": 30.0, "temperature": torch.tensor([0.5, 2.0, 1.0]), "bias_V": True},
        {"bias_V": True},
    ],
)
def test_temperature_softcap_and_bias(options: dict[str, object]) -> None:
    hidden_nH, weight_VH, labels_n = random_head(3, 50)
    if "bias_V" in options:
        options = {**options, "bias_V": torch.linspace(-3, 3, 50)}
    assert_like_reference(hidden_nH, weight_VH, labels_n, **options)


def test_the_softcap_is_exact_from_small_logits_to_large() -> None:
    x_n = torch.logspace(-6, 4, 16)
    hidden_n1, weight_11 = x_n[:, None], torch.ones(1, 1)
    *_, max_n, _ = launch(hidden_n1, weight_11, torch.zeros(16, dtype=torch.int64), softcap=30.0)
    exact_n = 30 * torch.tanh(x_n.double() / 30)
    torch.testing.assert_close(max_n.double(), exact_n, rtol=4e-7, atol=0)
    labels_n = torch.zeros(16, dtype=torch.int64)
    assert_like_reference(hidden_n1, torch.tensor([[1.0], [-1.0]]), labels_n, softcap=30.0)


@pytest.mark.parametrize("offset", [-120.0, 120.0])
def test_logits_far_from_zero(offset: float) -> None:
    hidden_nH, weight_VH, labels_n = random_head(3, 50)
    hidden_nH[:, 0], weight_VH[:, 0] = 1.0, offset
    assert_like_reference(hidden_nH, weight_VH, labels_n)


@pytest.mark.parametrize("gap", [7.0, 12.0, 25.0])
def test_a_label_probability_close_to_one_keeps_its_digits(gap: float) -> None:
    hidden_11, weight_V1, labels_n = torch.ones(1, 1), torch.zeros(50, 1), torch.tensor([40])
    weight_V1[40] = gap + 3
    expected = reference.linear_logprobs(
        hidden_11, weight_V1, labels_n, return_entropy=True, bias_V=torch.zeros(50)
    )
    assert expected[0].exp() > 0.99
    for actual, exact in zip(launch(hidden_11, weight_V1, labels_n), expected, strict=False):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


def test_minus_infinity_in_the_bias_forbids_a_token() -> None:
    hidden_nH, weight_VH, _ = random_head(3, 50)
    labels_n, bias_V = torch.tensor([45, 3, 49]), torch.zeros(50)
    bias_V[:40] = -torch.inf  # a whole split; the second label
    options = {"bias_V": bias_V}
    logps_n, entropy_n, *_ = launch(hidden_nH, weight_VH, labels_n, **options)
    expected = reference.linear_logprobs(
        hidden_nH, weight_VH, labels_n, **options, return_entropy=True
    )
    torch.testing.assert_close(logps_n.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy_n.double(), expected[1], rtol=1e-6, atol=1e-6)
    bias_V[40:45] = bias_V[46:] = -torch.inf  # all but the first label
    logps_n, entropy_n, *_ = launch(hidden_nH, weight_VH, labels_n, **options)
    assert logps_n.tolist() == [0.0, -torch.inf, -torch.inf]
    assert entropy_n.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 30])  # the label's, another one's
def test_a_broken_logit_shows(bad: float, column: int) -> None:
    hidden_nH, weight_VH, _ = random_head(2, 37)
    weight_VH[column] = bad
    hidden_nH[0], hidden_nH[1] = hidden_nH[0].abs(), 0.0  # 0 · inf = NaN
    for result_n in launch(hidden_nH, weight_VH, torch.tensor([0, 0]))[:2]:
        assert result_n.isnan().all()


def test_a_broken_row_breaks_no_other() -> None:
    hidden_nH, weight_VH, labels_n = random_head(3, 37)
    whole = launch(hidden_nH, weight_VH, labels_n)
    hidden_nH[1] = torch.nan
    broken = launch(hidden_nH, weight_VH, labels_n)
    assert broken[0].isnan().tolist() == broken[1].isnan().tolist() == [False, True, False]
    for broken_n, whole_n in zip(broken, whole, strict=True):
        assert torch.equal(broken_n[::2], whole_n[::2])


@pytest.mark.parametrize("label", [-1, 40, 45, 2**32 + 3, 2**40])  # 45: in the last tile
def test_a_label_outside_the_vocabulary_gives_nan(label: int) -> None:
    hidden_nH, weight_VH, _ = random_head(2, 40)
    logps_n, entropy_n, *_ = launch(hidden_nH, weight_VH, torch.tensor([label, 3]))
    assert logps_n.isnan().tolist() == [True, False]
    assert entropy_n.isnan().tolist() == [True, False]


def test_masked_rows_are_zero_whatever_they_hold() -> None:
    hidden_nH, weight_VH, labels_n = random_head(3, 37)
    hidden_nH[1], labels_n[1] = torch.nan, -100
    for result_n in launch(hidden_nH, weight_VH, labels_n):
        assert result_n[1] == 0
        assert not result_n.isnan().any()
    for result_n in launch(hidden_nH, weight_VH, torch.full((3,), -100)):
        assert not result_n.any()


def test_no_row_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [r.shape for r in launch(torch.zeros(0, 4), torch.zeros(5, 4), none)] == [(0,)] * 4


def test_strided_inputs() -> None:
    hidden_nH, weight_VH, labels_n = random_head(6, 74, 40)
    temperature = torch.linspace(0.5, 2, 6)
    assert_like_reference(
        hidden_nH[::2, ::2],
        weight_VH.T.contiguous().T[::2, :20],
        (labels_n // 2)[::2],
        bias_V=torch.linspace(-1, 1, 74)[::2],
        temperature=temperature[::2],
    )


def bits(results: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(results, 1).view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_is_the_same_to_the_bit_in_any_batch(dtype: torch.dtype) -> None:
    hidden_nH, weight_VH, labels_n = random_head(40, 70, 40, dtype)
    temperature = torch.linspace(0.5, 2, 40)
    if DEVICE == "cpu":
        # BLAS, by which the interpreter multiplies, rounds a row by its place: nothing to round.
        hidden_nH, weight_VH = (hidden_nH * 8).round() / 8, (weight_VH * 8).round() / 8

    def at(rows: Tensor) -> Tensor:
        options = {"temperature": temperature[rows]}
        return bits(launch(hidden_nH[rows], weight_VH, labels_n[rows], **options))

    whole = at(torch.arange(40))
    assert torch.equal(at(torch.arange(40)), whole)  # again
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for rows in (
        torch.tensor([7]),  # alone
        torch.arange(7, 21),  # a part, at other places
        shuffled,  # among others, in other tiles
        torch.cat([shuffled, shuffled[:9]]),  # more of them
    ):
        assert torch.equal(at(rows), whole[rows])


@pytest.mark.parametrize("count", [2, 5, 1000])
def test_the_number_of_programs_changes_nothing(count: int, persist: Callable[[int], None]) -> None:
    head = random_head(40, 70)
    persist(1)
    one = bits(launch(*head))
    persist(count)
    assert torch.equal(bits(launch(*head)), one)


def test_the_backward_of_the_torch_path_takes_its_results() -> None:
    hidden_nH, weight_VH, labels_n = random_head(3, 37)
    labels_n[1] = -100
    inputs = (hidden_nH, weight_VH, labels_n, None, None, torch.tensor(0.7), 5.0)
    g = torch.Generator().manual_seed(1)
    upstreams = torch.randn(2, 3, generator=g)
    *expected, kept = linear.linear_logprobs_op.compute(*inputs, True, *PLAIN)
    actual = launch(hidden_nH, weight_VH, labels_n, temperature=0.7, softcap=5.0)
    grads = [
        linear.linear_logprobs_backward_op.compute(
            *upstreams, list(results[:4]), *inputs, kept, "nothing", "", [True, True, False]
        )
        for results in (actual, expected)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes minutes for a shipped tile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("H", [1000, 1004])  # 16-byte rows of halves, which the copy engine reads
def test_the_shipped_configuration(
    dtype: torch.dtype, softcap: float | None, H: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "choose_config", SHIPPED)
    monkeypatch.setattr(fused_linear, "SPLIT", 1024)
    monkeypatch.setattr(fused_linear, "GROUP", 16)
    monkeypatch.setattr(fused_linear, "JOIN_HIDDEN", 256)
    hidden_nH, weight_VH, labels_n = random_head(300, 2500, H, dtype)
    options = {"softcap": softcap, "temperature": torch.linspace(0.5, 2, 300)}
    truth = reference.linear_logprobs(
        hidden_nH, weight_VH, labels_n, return_entropy=True, dtype=torch.float64, **options
    )
    results = launch(hidden_nH, weight_VH, labels_n, **options)
    for ours, exact in zip(results[:2], truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    some = torch.tensor([299, 7, 130])
    options["temperature"] = options["temperature"][some]
    part = launch(hidden_nH[some], weight_VH, labels_n[some], **options)
    assert torch.equal(bits(part), bits(results)[some])
