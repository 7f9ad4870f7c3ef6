"""Models under FSDP2 and DDP in two processes (gloo): scored, learnt and inspected as in one.

Each process has data of its own; one pair of processes runs all layouts and writes what it found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from tiny_models import END, random_trunks, tiny_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from stepagent.acting.inspection import inspect
from stepagent.models import read_trees, score_trees, unwrapped
from stepagent.trees.tree import TokenTree, pack_step_pairs

RANKS = 2
# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def trees_of(rank: int) -> list[TokenTree]:
    """Unequal in number and size from rank to rank."""
    trunks, branches = random_trunks(np.random.default_rng(rank), count=2 + rank)
    return pack_step_pairs(trunks, branches, max_tokens=70)


def root(model: nn.Module, **options: Any) -> nn.Module:
    for layer in unwrapped(model).model.layers:
        fully_shard(layer)
    return fully_shard(model, **options)


def head_alone(model: nn.Module) -> nn.Module:
    head = unwrapped(model).lm_head
    # Of PEFT's wrapper the weight: it is still sharded where the wrapper is called.
    fully_shard(head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head)
    return root(model)


def tail(model: nn.Module) -> nn.Module:
    """As accelerate does since 1.14; a head tied to the embeddings belongs there with them."""
    base = unwrapped(model)
    parts = [base.model.norm, base.lm_head]
    if base.lm_head.weight is base.model.embed_tokens.weight:
        parts.insert(0, base.model.embed_tokens)
    fully_shard(parts, reshard_after_forward=False)
    return root(model)


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "root": root,
    "root resharded": lambda model: root(model, reshard_after_forward=True),
    "one group": fully_shard,
    "head alone": head_alone,
    "tail": tail,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 2.0}),  # does more to logits after the head
    "adapter": ("llama", {}),  # and a head that is trained whole
    "head adapter": ("llama", {}),  # on the head itself
}
CASES = [
    *((layout, "llama") for layout in LAYOUTS),
    *((layout, name) for layout in ("root resharded", "tail") for name in ("tied", "gemma2")),
    *((layout, "adapter") for layout in ("ddp", "root resharded", "head alone", "tail")),
    *((layout, "head adapter") for layout in LAYOUTS),
]


def scored(model: nn.Module, trees: list[TokenTree]) -> Tensor:
    return score_trees(model, trees)


def entropies(model: nn.Module, trees: list[TokenTree]) -> Tensor:
    return score_trees(model, trees, return_entropy=True)[1]


def states(model: nn.Module, trees: list[TokenTree]) -> Tensor:
    return read_trees(model, trees, [tree.label_rows for tree in trees])[0]


QUANTITIES = {"logps": scored, "entropies": entropies, "states": states}


def loss_of(values: Tensor, rank: int) -> Tensor:
    """A random linear functional, so that every value counts on its own."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(rank))
    return (weights * values).sum()


def gradient(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    grad = torch.zeros_like(parameter) if grad is None else grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def learnt(model: nn.Module, rank: int) -> dict[str, Any]:
    """Each quantity on this rank's trees, and the gradients of the ranks' mean loss."""
    found = {}
    for name, quantity in QUANTITIES.items():
        model.zero_grad()
        values = quantity(model, trees_of(rank))
        loss_of(values, rank).backward()
        found[name] = values.detach(), [gradient(p) for p in model.parameters()]
    return found


def inspected(model: nn.Module) -> list[list[int]]:
    trunks, _ = random_trunks(np.random.default_rng(0), count=3)
    drawn = inspect(model, trunks, samples=2, max_new_tokens=5, eos_token_id=END, seed=4)
    return [b.token_ids.tolist() for steps in drawn for step in steps for b in step]


def make(case: tuple[str, str]) -> nn.Module:
    name, options = MODELS[case[1]]
    model = tiny_model(name, **options)
    if "adapter" not in case[1]:
        return model
    on_head = case[1] == "head adapter"
    torch.manual_seed(0)  # of the adapter's own weights
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "lm_head"] if on_head else ["q_proj"],
        modules_to_save=None if on_head else ["lm_head"],
        init_lora_weights=False,
    )
    return get_peft_model(model, config)


def find(case: tuple[str, str], rank: int) -> dict[str, Any]:
    model = LAYOUTS[case[0]](make(case))
    if isinstance(model, FSDPModule):  # DDP's is the model inside
        first = inspected(model)
        found = learnt(model, rank)
        return {**found, "inspected": [first, inspected(model)]}  # before and after a backward
    return learnt(model, rank)


def bfloat16(rank: int) -> tuple[Tensor, Tensor]:
    """Log-probs under mixed precision, and how far they are from what bfloat16 can hold."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    model = fully_shard(tiny_model("llama"), mp_policy=policy)
    logps = score_trees(model, trees_of(rank)).detach()
    return logps, logps.bfloat16().float()


def rank_main(rank: int, folder: str) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found: dict[Any, Any] = {case: find(case, rank) for case in CASES}
    found["bfloat16"] = bfloat16(rank)
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_layout_scores_and_learns_as_one_process(
    case: tuple[str, str], quantity: str, ranks: list[dict[Any, Any]]
) -> None:
    model = make(case)
    for rank, found in enumerate(ranks):
        values = QUANTITIES[quantity](model, trees_of(rank))
        torch.testing.assert_close(found[case][quantity][0], values, rtol=1e-5, atol=1e-5)
        (loss_of(values, rank) / RANKS).backward()
    for found in ranks:
        for a, parameter in zip(found[case][quantity][1], model.parameters(), strict=True):
            expected = gradient(parameter)
            assert (a - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "ddp"], ids="-".join)
def test_a_sharded_model_is_inspected_as_a_whole_one(
    case: tuple[str, str], ranks: list[dict[Any, Any]]
) -> None:
    expected = inspected(make(case))
    for found in ranks:
        assert found[case]["inspected"] == [expected, expected]


def test_log_probs_are_not_rounded_to_the_outputs_dtype(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks:
        logps, rounded = found["bfloat16"]
        assert logps.dtype == torch.float32
        assert not torch.equal(logps, rounded)
