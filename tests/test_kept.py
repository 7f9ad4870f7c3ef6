"""Log-probs over a kept set per token, as top-k and top-p sampling leave it: `kept_NK`.

Against `stepagent.reference`, on torch's path and on Triton's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from op_cases import (
    EXACT,
    HEAD_LEAVES,
    Recorder,
    assert_like_reference,
    backward_inputs,
    head,
    linear_inputs,
    run,
    variant,
)
from torch import Tensor

from stepagent import ops, reference
from stepagent.ops import blocks, linear
from stepagent.ops import head as head_slices

FROZEN = ["hidden_RH"]  # the only leaf where the head is frozen

interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of log 0 = −inf


@pytest.fixture(params=["one slice", "slices of 3", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "slices of 3":
        monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 1)
        monkeypatch.setattr(head_slices, "MIN_SLICE", 3)
    elif request.param == "triton":
        request.getfixturevalue("triton_path")
    return request.param


def drawn_from(labels_N: Tensor, V: int, K: int = 5, seed: int = 0) -> Tensor:
    """Random sets that hold their labels, of 1 to K tokens: some named twice, -1 in the rest."""
    g = torch.Generator().manual_seed(seed)
    N = len(labels_N)
    kept_NK = torch.randint(V, (N, K), generator=g)
    kept_NK[torch.rand(N, K, generator=g) < 0.3] = -1
    place_N = torch.randint(K, (N,), generator=g)
    kept_NK[torch.arange(N), place_N] = torch.where(labels_N == -100, -1, labels_N.long())
    return kept_NK


def with_sets(arguments: dict[str, Any], **options: int) -> dict[str, Any]:
    V = arguments["weight_VH"].shape[0]
    return {**arguments, "kept_NK": drawn_from(arguments["labels_N"], V, **options)}


CASES = (
    "everything",  # tokens that share a row, each with a set of its own
    "no softcap",
    "each row once",
    "row n for label n",
    "torch int32",
    "one vocabulary entry",
)


@interpreted
@pytest.mark.parametrize("leaves", [HEAD_LEAVES, FROZEN], ids=["learns", "frozen"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_sets_equal_the_reference(path: str, case: str, entropy: bool, leaves: list[str]) -> None:
    for dtype in (torch.float32,) if path == "triton" else (torch.float64, torch.float32):
        arguments = {**with_sets(variant(case, dtype)), "return_entropy": entropy}
        assert_like_reference("linear_logprobs", arguments, leaves)


@interpreted
def test_plain_logits(path: str) -> None:
    """No bias, cap or temperature: nothing but the mask stands between product and fold."""
    dtype = torch.float32 if path == "triton" else torch.float64
    arguments = {**head(dtype=dtype), "bias_V": None, "softcap": None, "temperature": 1.0}
    for rows in ({}, {"rows_N": None, "labels_N": torch.tensor([0, 3, -100, 16, 2, 8, 8])}):
        for leaves in (HEAD_LEAVES[:2], FROZEN):
            assert_like_reference("linear_logprobs", with_sets({**arguments, **rows}), leaves)


@interpreted
@pytest.mark.parametrize("keep_bytes", [200, 10**6])  # of a few slices, of all
@pytest.mark.parametrize("case", ["everything", "plain"])
def test_kept_logits_are_those_before_the_mask(path: str, case: str, keep_bytes: int) -> None:
    dtype, leaves = torch.float32 if path == "triton" else torch.float64, HEAD_LEAVES
    arguments = {**with_sets(head(dtype=dtype)), "return_entropy": True}
    if case == "plain":  # a fold reads the products where they are kept
        leaves = HEAD_LEAVES[:2]
        plain = {"bias_V": None, "softcap": None, "temperature": torch.ones((), dtype=dtype)}
        arguments = {**with_sets(variant("row n for label n", dtype)), **plain}
    kept = run(ops.linear_logprobs, {**arguments, "keep_bytes": keep_bytes}, leaves)
    again = run(ops.linear_logprobs, {**arguments, "keep_bytes": 0}, leaves)
    for a, e in zip(kept, again, strict=True):
        assert torch.equal(a, e)
    inputs = linear_inputs(arguments, "logits", keep_bytes)
    masked, bare = (linear.linear_logprobs_op.compute(*given)[4] for given in (inputs, inputs[:-1]))
    torch.testing.assert_close(masked, bare, rtol=0, atol=0, equal_nan=True)  # pads are NaN


@interpreted
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("leaves", [HEAD_LEAVES, FROZEN], ids=["learns", "frozen"])
def test_a_token_alone_is_certain(path: str, leaves: list[str], entropy: bool) -> None:
    arguments = {**head(dtype=torch.float32), "return_entropy": entropy}
    arguments["kept_NK"] = arguments["labels_N"].where(arguments["labels_N"] >= 0, -1)[:, None]
    for values in run(ops.linear_logprobs, arguments, leaves):
        assert not values.any()


@interpreted
@pytest.mark.parametrize("leaves", [HEAD_LEAVES, FROZEN], ids=["learns", "frozen"])
def test_a_set_of_all_tokens_is_no_set(path: str, leaves: list[str]) -> None:
    arguments = head(dtype=torch.float32 if path == "triton" else torch.float64)
    every_NK = torch.stack([torch.randperm(17) for _ in range(9)])
    given = {**arguments, "kept_NK": every_NK}
    for a, e in zip(
        run(ops.linear_logprobs, given, leaves),
        run(ops.linear_logprobs, arguments, leaves),
        strict=True,
    ):
        assert torch.equal(a, e)


def test_neither_order_nor_repeats_nor_pads_nor_layout_matter() -> None:
    arguments = with_sets(head(dtype=torch.float32))
    kept_NK = arguments["kept_NK"]
    pads_NK = torch.full_like(kept_NK, -1)
    storage = torch.stack([kept_NK, torch.zeros_like(kept_NK)], 2)
    others = (
        kept_NK.flip(1),
        torch.cat([kept_NK, pads_NK, kept_NK], 1),
        kept_NK.int(),
        kept_NK.numpy().astype(np.int32),
        storage[:, :, 0],
        kept_NK.T.contiguous().T,
    )
    expected = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    for other in others:
        for a, e in zip(
            run(ops.linear_logprobs, {**arguments, "kept_NK": other}, HEAD_LEAVES),
            expected,
            strict=True,
        ):
            assert torch.equal(a, e)


@interpreted
def test_tokens_outside_the_set_count_for_nothing(path: str) -> None:
    """However large their logits; their weights get no gradient."""
    arguments = head(dtype=torch.float32)
    arguments |= {"labels_N": torch.arange(9) % 4, "kept_NK": torch.tensor([[3, 0, 1, 2]] * 9)}
    for softcap in (None, 3.0):
        arguments["softcap"] = softcap
        quiet = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
        loud_V = arguments["bias_V"].clone()
        loud_V[4:] += 1e4
        loud = run(ops.linear_logprobs, {**arguments, "bias_V": loud_V}, HEAD_LEAVES)
        for a, e in zip(loud, quiet, strict=True):
            torch.testing.assert_close(a, e)
        for gradient in loud[2:]:
            assert gradient[:4].any()
            assert not gradient[4:].any()


def test_masked_labels_need_no_set() -> None:
    arguments = {**head(), "labels_N": torch.full((9,), -100)}
    for K in (0, 3):
        arguments["kept_NK"] = torch.full((9, K), -1)
        for values in run(ops.linear_logprobs, arguments, HEAD_LEAVES):
            assert not values.any()


@interpreted
def test_unchecked_a_label_outside_its_set_scores_nan(path: str) -> None:
    """As on CUDA, where no value is looked at."""
    arguments = with_sets(head(dtype=torch.float32))
    label = int(arguments["labels_N"][2])
    arguments["kept_NK"][2] = (label + 1) % 17
    for leaves in (HEAD_LEAVES, FROZEN):
        given = {**arguments, "check_labels": "off"}
        logps_N, hidden_grad_RH, *_ = run(ops.linear_logprobs, given, leaves)
        assert logps_N.isnan().tolist() == [n == 2 for n in range(9)]
        row = arguments["rows_N"][2]
        assert hidden_grad_RH.isnan().all(1).tolist() == [r == row for r in range(7)]


def test_a_mask_is_of_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    N, V = 64, 1024
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 4 * N * 128)
    monkeypatch.setattr(head_slices, "MIN_SLICE", 32)
    inputs = linear_inputs(with_sets(head(N=N, V=V, R=50, dtype=torch.float32)))
    with Recorder() as recorder:
        results = linear.linear_logprobs_op.compute(*inputs)
        linear.linear_logprobs_backward_op.compute(
            *backward_inputs(results, inputs, [True, True, True])
        )
    assert max(recorder.sizes) <= N * (128 + 1)


@pytest.mark.parametrize(
    ("kept_NK", "error", "message"),
    [
        (torch.zeros(9, 2), TypeError, "kept_NK must be an int32 or int64 tensor or array"),
        (torch.zeros(9).long(), ValueError, r"kept_NK must have 2 dimensions, got shape \(9,\)"),
        (torch.zeros(8, 2).long(), ValueError, "kept_NK must have 9 entries, .*, got 8"),
        (torch.zeros(9, 2).long(), ValueError, r"labels_N\[3\] must be among kept_NK\[3\], got 5"),
        (torch.zeros(9, 0).long(), ValueError, r"labels_N\[0\] must be among kept_NK\[0\], got 0"),
        (
            torch.full((9, 2), 17),
            ValueError,
            r"kept_NK\[0, 0\] must lie in \[0, 1.*, got 17",
        ),
        (torch.full((9, 2), -2), ValueError, r"kept_NK\[0, 0\] must .* -1 for none, got -2"),
    ],
)
def test_refusals(kept_NK: Tensor, error: type[Exception], message: str) -> None:
    labels_N = torch.tensor([0, -100, 0, 5, 0, 0, 0, 0, 0])
    for check in ("device", "sync"):
        options = {"labels_N": labels_N, "kept_NK": kept_NK, "check_labels": check}
        with pytest.raises(error, match=message):
            ops.linear_logprobs(**{**head(), **options})


@pytest.mark.usefixtures("triton_path")
def test_triton_refuses_sets_with_batch_invariance() -> None:
    arguments = with_sets(head(dtype=torch.float32))
    with pytest.raises(ValueError, match="kept_NK must be None with batch_invariant=True"):
        ops.linear_logprobs(**arguments, batch_invariant=True)


def test_the_fused_kernel_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is faster it takes a forward that keeps nothing, but it knows no sets."""
    asked = []
    monkeypatch.setattr(linear, "fused_is_faster", lambda *_: asked.append(1))
    ops.linear_logprobs(**head())
    assert asked
    asked.clear()
    ops.linear_logprobs(**with_sets(head()))
    assert not asked


# ------------------------------------------------------------ as an operator


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize("keep", ["nothing", "logits", "gradient"])
def test_opcheck_and_gradcheck(keep: str) -> None:
    leaves = FROZEN if keep == "gradient" else HEAD_LEAVES
    arguments = with_sets(head(R=3, H=2, V=4, N=3), K=3)
    arguments["temperature"] = arguments["temperature"].double()
    for name in leaves:
        arguments[name].requires_grad_()
    inputs = linear_inputs(arguments, keep, 10**6 if keep == "logits" else 0)
    torch.library.opcheck(linear.linear_logprobs_op.custom_op, inputs)
    torch.autograd.gradcheck(lambda *a: linear.linear_logprobs_op.custom_op(*a), inputs)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_compile_fullgraph_gives_the_same() -> None:
    def score(**arguments: Any) -> Tensor:
        return 2 * ops.linear_logprobs(**arguments)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    expected = run(score, with_sets(head()), HEAD_LEAVES)
    actual = run(lambda **a: compiled(**a), with_sets(head()), HEAD_LEAVES)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **EXACT)


# ------------------------------------------------------------ a vocabulary in two shards


def whole() -> dict[str, Any]:
    """A vocabulary of 18; labels and sets at both ends of both shards."""
    labels_N = torch.tensor([0, 8, 9, 17, -100, 5, 12, 0, 3])
    arguments = with_sets({**head(V=18), "labels_N": labels_N})
    arguments["kept_NK"][3] = torch.tensor([17, 9, 8, 0, -1])
    return {**arguments, "return_entropy": True}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    arguments = {**whole(), "group": dist.group.WORLD}
    for name in ("weight_VH", "bias_V"):
        arguments[name] = arguments[name].chunk(2)[rank].clone()
    learns = run(ops.linear_logprobs, arguments, HEAD_LEAVES)
    frozen = run(ops.linear_logprobs, {**arguments, "return_entropy": False}, FROZEN)
    torch.save([learns, frozen], Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_sets_of_a_vocabulary_in_shards(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    expected = run(reference.linear_logprobs, whole(), HEAD_LEAVES)
    expected_frozen = run(reference.linear_logprobs, {**whole(), "return_entropy": False}, FROZEN)
    for rank in range(2):
        learns, frozen = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        shard = [*expected[:3], *(e.chunk(2)[rank] for e in expected[3:])]
        for a, e in zip([*learns, *frozen], [*shard, *expected_frozen], strict=True):
            torch.testing.assert_close(a, e, **EXACT)
