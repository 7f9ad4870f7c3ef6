"""The ops in two processes (gloo): a vocabulary in shards, DDP, FSDP2; checkpointed activations.

One pair of processes runs all cases and writes what it found; the tests compare with one process.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from op_cases import HEAD_LEAVES, head, run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from stepagent import ops, reference

RANKS = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "entropy": {"return_entropy": True},
    "kept logits": {"keep_bytes": 10**6},
    "row n for label n": {"rows_N": None},
}


def shard(arguments: dict[str, Any], rank: int) -> dict[str, Any]:
    return {
        name: value.chunk(RANKS)[rank].clone() if name.endswith(("weight_VH", "bias_V")) else value
        for name, value in arguments.items()
    }


def whole(case: str) -> dict[str, Any]:
    """Arguments of linear_logprobs, a vocabulary of 18; a label at each end of each shard."""
    arguments = {**head(V=18, R=9), **OPTIONS[case]}
    arguments["labels_N"] = torch.tensor([0, 8, 9, 17, -100, 5, 12, 0, 3])
    return arguments


def diff(arguments: dict[str, Any], *, shared: bool) -> dict[str, Any]:
    ref_weight_VH = arguments["weight_VH"] if shared else arguments["weight_VH"].flip(1)
    return {
        **arguments,
        "ref_hidden_RH": arguments["hidden_RH"].flip(0),
        "ref_weight_VH": ref_weight_VH,
        "ref_rows_N": arguments["rows_N"],
        "ref_bias_V": arguments["bias_V"],
    }


class Scorer(nn.Module):
    """A body and a head whose log-probs come from the op."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5, dtype=torch.float64)
        self.head = nn.Linear(5, 18, dtype=torch.float64)

    def forward(self, x_RK: Tensor, labels_N: Tensor) -> Tensor:
        hidden_RH = torch.tanh(self.body(x_RK))
        return ops.linear_logprobs(hidden_RH, self.head.weight, labels_N, bias_V=self.head.bias)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(8, 6, generator=g, dtype=torch.float64), torch.arange(8) * 2


def half_of_the_loss(model: nn.Module, rank: int) -> None:
    """DDP and FSDP2 average the gradients of the ranks."""
    x_RK, labels_N = (tensor.chunk(RANKS)[rank] for tensor in batch())
    (-model(x_RK, labels_N)).mean().backward()


def rank_main(rank: int, folder: str) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found: dict[str, Any] = {}
    group = dist.group.WORLD
    for case in OPTIONS:
        given = {**shard(whole(case), rank), "group": group}
        found[case] = run(ops.linear_logprobs, given, HEAD_LEAVES)
        if case != "entropy":
            found[f"{case}, frozen"] = run(ops.linear_logprobs, given, ["hidden_RH"])
    for shared in (True, False):
        given = {**shard(diff(whole("everything"), shared=shared), rank), "group": group}
        if shared:
            given["ref_weight_VH"] = given["weight_VH"]
            given["ref_bias_V"] = given["bias_V"]
        found[f"diff {shared}"] = run(ops.linear_logprob_diff, given, ["hidden_RH"])
    found["refused"] = refusals(rank, group)
    replica = DistributedDataParallel(Scorer())
    half_of_the_loss(replica, rank)
    found["ddp"] = [parameter.grad for parameter in replica.parameters()]
    sharded = fully_shard(Scorer())
    half_of_the_loss(sharded, rank)
    found["fsdp"] = [parameter.grad.full_tensor() for parameter in sharded.parameters()]
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def refusals(rank: int, group: dist.ProcessGroup) -> list[str]:
    messages = []
    uneven = {**shard(whole("everything"), rank), "labels_N": torch.arange(9)}
    if rank == 0:
        uneven["weight_VH"], uneven["bias_V"] = uneven["weight_VH"][:8], uneven["bias_V"][:8]
    outside = {**shard(whole("everything"), rank), "labels_N": torch.full((9,), 18)}
    for arguments in (uneven, outside):
        try:
            ops.linear_logprobs(**arguments, group=group, check_labels="device")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def assert_equal_shards(found: list[list[Tensor]], expected: list[Tensor], learnt: int) -> None:
    """Outputs and the gradient of hidden_RH on every rank, of the head shard by shard."""
    same = len(expected) - learnt
    for rank, values in enumerate(found):
        for i, (a, e) in enumerate(zip(values, expected, strict=True)):
            part = e if i < same else e.chunk(RANKS)[rank]
            torch.testing.assert_close(a, part, rtol=1e-11, atol=1e-12)
    for a, b in zip(found[0][:same], found[1][:same], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_vocabulary_in_shards_equals_the_reference(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    arguments = {k: v for k, v in whole(case).items() if k != "keep_bytes"}
    expected = run(reference.linear_logprobs, arguments, HEAD_LEAVES)
    assert_equal_shards([found[case] for found in ranks], expected, learnt=2)
    if case != "entropy":
        frozen = [found[f"{case}, frozen"] for found in ranks]
        assert_equal_shards(frozen, expected[:2], learnt=0)


@pytest.mark.parametrize("shared", [True, False])
def test_the_difference_of_two_heads_in_shards(shared: bool, ranks: list[dict[str, Any]]) -> None:
    arguments = diff(whole("everything"), shared=shared)
    expected = run(reference.linear_logprob_diff, arguments, ["hidden_RH"])
    assert_equal_shards([found[f"diff {shared}"] for found in ranks], expected, learnt=0)


def test_uneven_shards_and_labels_outside_all_of_them_are_refused(
    ranks: list[dict[str, Any]],
) -> None:
    for found in ranks:
        uneven, outside = found["refused"]
        assert "each rank of the group must hold a shard of weight_VH of the same size" in uneven
        assert "labels_N[0] must lie in [0, 18), or be -100 to score nothing, got 18" in outside


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_under_ddp_and_fsdp2(wrapper: str, ranks: list[dict[str, Any]]) -> None:
    model = Scorer()
    x_RK, labels_N = batch()
    (-model(x_RK, labels_N)).mean().backward()
    for found in ranks:
        for a, parameter in zip(found[wrapper], model.parameters(), strict=True):
            torch.testing.assert_close(a, parameter.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool, frozen: bool) -> None:
    def gradients(forward: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> list[Tensor]:
        model = Scorer()
        model.head.requires_grad_(not frozen)
        x_RK, labels_N = batch()
        forward(model, x_RK.requires_grad_(), labels_N).sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad] + [x_RK.grad]

    again = gradients(lambda model, *inputs: checkpoint(model, *inputs, use_reentrant=reentrant))
    for a, e in zip(again, gradients(lambda model, *inputs: model(*inputs)), strict=True):
        assert torch.equal(a, e)
