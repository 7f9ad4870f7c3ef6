"""Training whose acting an engine does: a server that loads the real adapter and acts with it."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from completions_server import ModelServer, drop
from peft import LoraConfig, get_peft_model
from tiny_models import babyai_tokenizer, tiny_agent
from transformers import TrainerCallback

from stepagent import StepAgentConfig, StepAgentTrainer, Trajectory, inspect
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import rollout_and_query, run_episodes
from stepagent.engines import CompletionsEngine, Engine, EngineError
from stepagent.learning.collecting import Collector

LEVEL = "babyai:GoToLocalS6N2"
TOKENIZER = babyai_tokenizer()
AGENT = {"states": "agent", "env": LEVEL, "rollouts": 3, "max_steps_per_episode": 3}
# PEFT, of transformers' names.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def trajectories() -> list[Trajectory]:
    episodes = run_episodes(LEVEL, ExpertPolicy(), range(20))
    shortest = sorted(episodes, key=lambda episode: len(episode.actions))[:2]
    return [episode.trajectory() for episode in shortest]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer(tiny_agent()) as server:
        yield server


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **options}
    )


@pytest.fixture
def trainer(tmp_path, trajectories):
    def make(kind: type = StepAgentTrainer, model: Any = None, **options: Any) -> Any:
        names = ("peft_config", "env", "callbacks", "engine", "train_dataset")
        mine = {name: options.pop(name) for name in names if name in options}
        mine = {"peft_config": lora(), "train_dataset": trajectories, **mine}
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 3,
            "learning_rate": 3e-2,
            "temperature": 0.0,
            "max_new_tokens": 5,
            "cycles": 3,
        }
        torch.manual_seed(0)  # of the adapter's start
        args = StepAgentConfig(**defaults | options)
        return kind(model or tiny_agent(), args, processing_class=TOKENIZER, **mine)

    return make


class Watched(StepAgentTrainer):
    """Notes what the policy here would do where a cycle begins, and what was learnt from."""

    def _begin_cycle(self, cycle: int) -> None:
        mine = self._collector
        acted, mine._on_engine = mine._on_engine, None
        here = [tokens(c) for c in mine.collect(self._policy, cycle, sharded=False)]
        mine._on_engine = acted
        super()._begin_cycle(cycle)
        self.cycles = [*getattr(self, "cycles", []), (here, self._comparisons[-len(here) :])]


def tokens(comparison: Any) -> Any:
    """Of the trunk, which is the agent's at its own states, and of the branches."""
    branches = [[branch.tolist() for branch in step] for step in comparison.branches]
    return comparison.trunk.input_ids.tolist(), branches


def adapter_of(trainer: StepAgentTrainer) -> torch.Tensor:
    named = trainer.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "lora_" in name])


def engine(server: ModelServer, **options: Any) -> CompletionsEngine:
    return CompletionsEngine(server.url, **{"retries": 1, "backoff": 0.001, **options})


# ------------------------------------------------------------------ what is learnt acts


@pytest.mark.parametrize(
    ("method", "states"),
    [
        ("implicit", "expert"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(("implicit", "agent"), ("sft", "agent")),
                *(("inverse", "expert"), ("inverse", "agent")),
            ]
        ),
    ],
)
def test_what_was_learnt_in_a_cycle_acts_in_the_next(server, trainer, method, states):
    options = {"method": method, **(AGENT if states == "agent" else {"samples": 2})}
    made = trainer(Watched, engine=engine(server), **options)
    made.train()
    for here, learnt_from in made.cycles:
        assert [tokens(comparison) for comparison in learnt_from] == here
    acted = [here for here, _ in made.cycles]
    if states == "expert":
        assert acted[0] != acted[1] != acted[2]
    figures = [entry for entry in made.state.log_history if "cycle" in entry]
    assert len(figures) == 3
    assert all(entry["engine_gap"] < 1e-4 for entry in figures)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, AGENT])
def test_a_run_with_an_engine_ends_as_one_without(server, trainer, options):
    there, here = trainer(engine=server.url, **options), trainer(**options)
    start = adapter_of(there)
    for made in (there, here):
        made.train()
    assert torch.equal(adapter_of(there), adapter_of(here))
    assert not torch.equal(adapter_of(there), start)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_engine_rolls_out_as_its_model_does(server, share):
    options = {
        "teacher_share": share,
        "tokenizer": TOKENIZER,
        "seeds": range(3),
        "max_new_tokens": 4,
        "temperature": 0.0,
        "max_steps": 3,
    }
    here = rollout_and_query(tiny_agent(), LEVEL, eos_token_id=2, **options)
    there = rollout_and_query(engine(server), LEVEL, eos_token_id=2, **options)
    assert [t.input_ids.tolist() for t in there[0]] == [t.input_ids.tolist() for t in here[0]]
    branches = [
        [[[b.tolist() for b in s] for s in steps] for steps in part] for _, part in (here, there)
    ]
    assert branches[0] == branches[1]
    with pytest.raises(ValueError, match="an engine needs eos_token_id"):
        rollout_and_query(engine(server), LEVEL, **options)


# ------------------------------------------------------------------ what the server is told


def test_one_adapter_at_a_time_each_under_a_name_of_its_own(server, trainer, tmp_path):
    seen = []

    class Seen(Watched):
        def _begin_cycle(self, cycle: int) -> None:
            super()._begin_cycle(cycle)
            folders = [path.name for path in (tmp_path / "run" / "engine").iterdir()]
            assert folders == list(server.adapters)
            seen.extend(folders)

    made = trainer(Seen, engine=server.url)
    made.train()
    assert [name.endswith(f"-cycle-{cycle}") for cycle, name in enumerate(seen)] == [True] * 3
    assert len(set(seen)) == 3
    told = [(verb, name) for name in seen for verb in ("load", "unload")]
    assert server.told == told
    # At the end of training nothing is left there, nor here.
    assert server.adapters == {}
    assert list((tmp_path / "run" / "engine").iterdir()) == []
    # Every state of every cycle, and the first one once more, under the cycle's name.
    acted = [request["model"] for request in server.requests if "prompt" in request]
    states = sum(trunk.num_steps for trunk in made._trunks)
    assert acted == [name for name in seen for _ in range(states + 1)]

    made.train()
    assert len(set(seen)) == 6


@pytest.mark.slow
def test_another_run_finds_the_model_beside_the_adapter_of_a_stopped_one(server, trainer):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            raise KeyboardInterrupt

    made = trainer(engine=server.url, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert len(server.adapters) == 1
    inspect(engine(server), made._trunks[:1], max_new_tokens=2, eos_token_id=2)
    assert server.requests[-1]["model"] == "tiny"
    trainer(engine=server.url, cycles=1).train()
    assert len(server.adapters) == 1


@pytest.mark.slow
def test_a_run_resumed_within_a_cycle_publishes_at_the_next(server, trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    whole = trainer(engine=server.url, cycles=2, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    server.told.clear()
    resumed = trainer(engine=server.url, cycles=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert [(verb, name[-8:]) for verb, name in server.told] == [
        ("load", "-cycle-1"),
        ("unload", "-cycle-1"),
    ]
    assert torch.equal(adapter_of(resumed), adapter_of(whole))


@pytest.mark.slow
def test_an_adapter_of_another_name_is_found_too(server, trainer):
    model = get_peft_model(tiny_agent(), lora(), adapter_name="mine")
    made = trainer(Watched, model=model, peft_config=None, engine=server.url, cycles=2)
    made.train()
    for here, learnt_from in made.cycles:
        assert [tokens(comparison) for comparison in learnt_from] == here


# ------------------------------------------------------------------ failures


def lost(handler: Any) -> None:
    """The server does as it is told, and its answer does not arrive."""
    handler.server.adapt(handler.path, handler.server.requests[-1])
    drop(handler)


def test_a_lost_answer_to_a_load_is_no_failure(server, trainer):
    server.faults = [lost]
    trainer(engine=engine(server), cycles=1).train()
    assert [verb for verb, _ in server.told] == ["load", "load", "unload"]


def test_a_server_that_takes_no_adapters_is_told_how_to(server, trainer):
    server.takes_adapters = False
    with pytest.raises(
        EngineError,
        match=r"POST http://127\.0\.0\.1:\d+/v1/load_lora_adapter was answered with status 404: .*"
        r"`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank",
    ):
        trainer(engine=engine(server)).train()


def test_a_model_that_is_not_served_is_named(server, trainer):
    with pytest.raises(EngineError, match=r"/v1 serves \['tiny'\], and no 'huge'"):
        trainer(engine=engine(server, model="huge")).train()
    assert server.told == []


def test_a_server_of_a_model_of_other_shape_is_refused(trainer):
    message = r"load_lora_adapter failed 2 times.*size mismatch"
    with (
        ModelServer(tiny_agent(hidden_size=64)) as other,
        pytest.raises(EngineError, match=message),
    ):
        trainer(engine=engine(other)).train()


def test_a_server_of_another_model_of_the_same_shape_is_refused(trainer):
    message = r"acts as another policy: .* by \d[\d.]* nats"
    with ModelServer(tiny_agent(seed=1)) as other, pytest.raises(EngineError, match=message):
        trainer(engine=engine(other)).train()


def test_a_folder_that_the_server_does_not_see_is_named(server, trainer, monkeypatch):
    load = server.load
    monkeypatch.setattr(server, "load", lambda name, folder: load(name, "/another/machine"))
    with pytest.raises(
        EngineError, match=r"status 404.*where it can read the folder: .*run/engine"
    ):
        trainer(engine=engine(server)).train()


@pytest.mark.slow
def test_a_server_that_dies_in_between_is_named_and_checkpoints_stay(server, trainer, tmp_path):
    class Kill(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            server.shutdown()
            server.socket.close()

    made = trainer(engine=engine(server), save_strategy="epoch", callbacks=[Kill()])
    with (
        pytest.warns(RuntimeWarning, match="the engine may keep stepagent-.*-cycle-0"),
        pytest.raises(EngineError, match=rf"{server.url}/v1/models failed 2 times.*ConnectError"),
    ):
        made.train()
    with ModelServer(tiny_agent()) as other:
        resumed = trainer(engine=engine(other), save_strategy="epoch")
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


@pytest.mark.slow
def test_a_server_that_was_started_anew_is_gone_on_with(server, trainer):
    class Forget(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            if state.epoch == 1:
                server.adapters.clear()

    with pytest.warns(RuntimeWarning, match="the engine may keep .*-cycle-0.*status 404"):
        trainer(engine=engine(server), callbacks=[Forget()]).train()


def test_a_server_that_is_not_there_is_named(trainer):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"GET {url}/v1/models failed with ConnectError"):
            trainer(engine=CompletionsEngine(url, retries=0)).train()


def test_an_adapter_that_cannot_be_saved_is_an_error(server, trainer, tmp_path):
    made = trainer(engine=server.url)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "engine").touch()
    with pytest.raises(OSError, match="run/engine"):
        made.train()


def test_an_engine_without_adapters_is_named(trainer):
    class Fixed(Engine):
        def sample(self, states: Any, sampling: Any, progress: bool) -> Any:
            raise AssertionError

    with pytest.raises(EngineError, match="Fixed takes no adapters"):
        trainer(engine=Fixed()).train()


def two_adapters() -> Any:
    model = get_peft_model(tiny_agent(), lora())
    model.add_adapter("second", lora())
    return model


def frozen_half() -> Any:
    model = get_peft_model(tiny_agent(), lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad &= "lora_A" not in name
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_config": None}, "LlamaForCausalLM has none: give a peft_config.*Full weights"),
        ({"peft_config": lora(use_dora=True)}, "plain LoRA, without use_dora=True"),
        (
            {"peft_config": lora(target_modules=["q_proj"], alpha_pattern={"q_proj": 32})},
            r"without alpha_pattern=\{'q_proj': 32\}",
        ),
        ({"peft_config": lora(modules_to_save=["lm_head"])}, r"modules_to_save=\['lm_head'\]"),
        ({"peft_config": lora(init_lora_weights="pissa")}, "init_lora_weights='pissa'"),
        ({"peft_config": lora(bias="lora_only")}, "without bias='lora_only'"),
        ({"model": two_adapters, "peft_config": None}, r"there are 2: \['default', 'second'\]"),
        ({"model": frozen_half, "peft_config": None}, "lora_A.default.weight is frozen"),
        ({"method": "sft"}, "method='sft' at the expert's states never acts"),
        ({"engine": "localhost:8000"}, "url must start with http"),
    ],
)
def test_what_an_engine_cannot_act_as_is_refused_before_any_work(server, trainer, options, message):
    if "model" in options:
        options = options | {"model": options["model"]()}
    with pytest.raises(ValueError, match=message):
        trainer(**{"engine": server.url, **options})
    assert server.requests == []


def test_other_kinds_of_adapters_are_refused(server, trainer):
    from peft import IA3Config

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"but this one is of type .*IA3"):
        trainer(engine=server.url, peft_config=config)


def test_weights_that_lie_in_parts_elsewhere_are_refused(server):
    """DeepSpeed does not run everywhere: what decides is what accelerate says of the run."""
    said = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, is_fsdp2=False)
    said.num_processes = 2
    with pytest.raises(ValueError, match=r"of DDP and of FSDP2, but this run is .*DEEPSPEED"):
        Collector.act_on(SimpleNamespace(), server.url, said)


def test_the_folder_is_given_as_seen_from_anywhere(server, trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(engine=server.url, output_dir="here", cycles=1).train()
    loaded = next(request for request in server.requests if "lora_path" in request)
    assert Path(loaded["lora_path"]).parent == tmp_path / "here" / "engine"
