"""Two processes (gloo) that train with one server: the first tells it, all act there and wait."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from completions_server import ModelServer
from peft import LoraConfig, get_peft_model
from test_engine_training import LEVEL, TOKENIZER, Watched, adapter_of, lora, tokens
from tiny_models import tiny_agent
from torch.distributed.fsdp import fully_shard

from stepagent import StepAgentConfig, encode, inspect
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.engines import CompletionsEngine, Engine, EngineError
from stepagent.engines.adapters import PolicyOnEngine

RANKS = 2
GREEDY = {"max_new_tokens": 5, "temperature": 0.0, "eos_token_id": 2}

pytestmark = [
    pytest.mark.slow,
    # PEFT, of transformers' names.
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def rank_main(rank: int, folder: str, url: str, port: int) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = {"ddp": trained(folder, url), "fsdp": sharded(folder, url), "refused": refused(folder)}
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def trajectories() -> list[Any]:
    return [episode.trajectory() for episode in run_episodes(LEVEL, ExpertPolicy(), range(2))]


def trained(folder: str, url: str) -> dict[str, Any]:
    args = StepAgentConfig(
        output_dir=f"{folder}/run",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        per_device_train_batch_size=1,
        learning_rate=3e-2,
        temperature=0.0,
        max_new_tokens=5,
        cycles=2,
    )
    data = trajectories()
    with pytest.raises(ValueError, match="Deaf is in one process, but 2 train: start a server"):
        Watched(tiny_agent(), args, data, TOKENIZER, peft_config=lora(), engine=Deaf())
    torch.manual_seed(0)
    made = Watched(tiny_agent(), args, data, TOKENIZER, peft_config=lora(), engine=url)
    assert made.accelerator.num_processes == RANKS
    made.train()
    acted = [(here, [tokens(one) for one in there]) for here, there in made.cycles]
    return {"acted": acted, "adapter": adapter_of(made)}


def policy() -> Any:
    torch.manual_seed(1)
    model = get_peft_model(tiny_agent(), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def acts(trunks: list[Any]) -> Callable[[Any], Any]:
    def act(model: Any) -> Any:
        branches = inspect(model, trunks, **GREEDY)
        return [[b.token_ids.tolist() for tried in steps for b in tried] for steps in branches]

    return act


def sharded(folder: str, url: str) -> dict[str, Any]:
    """A policy under FSDP2, each layer and the rest in parts over the processes."""
    model, trunks = policy(), [encode(one, TOKENIZER) for one in trajectories()]
    act = acts(trunks)
    here = act(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    on_engine = PolicyOnEngine(CompletionsEngine(url), Path(folder, "sharded"))
    there = on_engine.publish(model, 7, act)
    again = act(on_engine.actor)
    dist.barrier()  # all have acted
    on_engine.withdraw()
    return {"here": here, "there": there, "again": again}


class Deaf(Engine):
    def sample(self, states: Any, sampling: Any, progress: bool) -> Any:
        raise AssertionError


def refused(folder: str) -> str:
    """What is raised in a process that told the engine nothing, as in the one that did."""
    try:
        PolicyOnEngine(Deaf(), Path(folder, "refused")).publish(policy(), 0, acts([]))
    except EngineError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelServer, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    with ModelServer(tiny_agent()) as server:
        mp.spawn(rank_main, (str(folder), server.url, port), nprocs=RANKS)
    return server, [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(RANKS)]


def test_the_first_process_alone_tells_the_server(run):
    server, _ = run
    told = [(verb, name[-1]) for verb, name in server.told]
    in_turn = [("load", "0"), ("unload", "0"), ("load", "1"), ("unload", "1")]
    assert told == [*in_turn, ("load", "7"), ("unload", "7")]


def test_what_ddp_learnt_acts_in_the_next_cycle(run):
    _, found = run
    for rank in found:
        assert len(rank["ddp"]["acted"]) == 2
        for here, there in rank["ddp"]["acted"]:
            assert here == there
    first, second = (rank["ddp"]["adapter"] for rank in found)
    assert torch.equal(first, second)


def test_an_adapter_in_parts_is_gathered(run):
    _, found = run
    plain = acts([encode(one, TOKENIZER) for one in trajectories()])(tiny_agent())
    for rank in found:
        fsdp = rank["fsdp"]
        assert fsdp["there"] == fsdp["again"] == fsdp["here"] != plain


def test_all_processes_hear_of_a_failure(run):
    _, found = run
    assert [rank["refused"] for rank in found] == ["Deaf takes no adapters"] * RANKS
