"""The real vLLM, in this process and as a server: it acts as `inspect` with the same weights, and
as the adapter that is trained.

VLLM_CPU_KVCACHE_SPACE=1 python -m pytest tests/test_vllm.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_training import LEVEL, TOKENIZER, Watched
from test_engine_training import tokens as tokens_of
from tiny_models import END, random_trunks, separate_logprobs, tiny_agent, tiny_model
from transformers import PreTrainedModel

from stepagent import Branch, StepAgentConfig, Trunk, inspect
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.engines import CompletionsEngine, Engine, EngineError, VLLMEngine
from stepagent.engines.base import Prompt, Sampling
from stepagent.errors import ContextLimit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
    pytest.mark.timeout(900),
]

ENDS = [END, *range(10, 26)]
OTHERS = range(26, 60)  # of the model's own end tokens
NEW = 8
GREEDY = {"samples": 2, "max_new_tokens": NEW, "eos_token_id": ENDS, "temperature": 0.0}
SAMPLED = {**GREEDY, "samples": 3, "temperature": 0.7}
# As small as vLLM's attention on CPUs takes a head.
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
LLM = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
LIMITS = {"max_model_len": 128, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def trunks() -> list[Trunk]:
    return random_trunks(np.random.default_rng(3), count=4)[0]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", **SHAPE)


@pytest.fixture(scope="module", params=["in this process", "server"])
def engine(
    request: pytest.FixtureRequest, model: PreTrainedModel, tmp_path_factory: Any
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("vllm")
    # What a model ships must change neither the distribution nor the end of an action.
    model.generation_config.update(top_k=2, do_sample=True, eos_token_id=[END, *OTHERS])
    model.save_pretrained(folder)
    with served(folder) if request.param == "server" else in_process(folder) as engine:
        yield engine


@contextmanager
def in_process(folder: Path, **options: Any) -> Iterator[VLLMEngine]:
    import vllm

    yield VLLMEngine(vllm.LLM(model=str(folder), **{**LLM, **LIMITS, **options}))


@contextmanager
def served(folder: Path, **more: Any) -> Iterator[CompletionsEngine]:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    options = ["--port", str(port)]
    for name, value in {**LLM, **LIMITS, **more}.items():
        flag = f"--{name.replace('_', '-')}"
        options.append(flag if value is True else f"{flag}={value}")
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options],
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if more else {}),
        },
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url):
            assert server.poll() is None, "the server ended"
            time.sleep(1)
        yield CompletionsEngine(url)
    finally:
        server.terminate()
        server.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def tokens(branches: list[list[list[Branch]]]) -> list[list[list[list[int]]]]:
    return [[[b.token_ids.tolist() for b in tried] for tried in steps] for steps in branches]


def test_vllm_acts_as_the_same_weights_do_here(engine, model, trunks):
    branches = inspect(engine, trunks, **GREEDY)
    assert tokens(branches) == tokens(inspect(model, trunks, **GREEDY))
    lengths = {len(ids) for steps in tokens(branches) for tried in steps for ids in tried}
    assert {1, NEW} <= lengths


def test_vllms_samples_depend_on_seed_and_place(engine, trunks):
    first = tokens(inspect(engine, trunks, **SAMPLED))
    assert tokens(inspect(engine, trunks, **SAMPLED)) == first
    part = inspect(engine, trunks[2:], **{**SAMPLED, "samples": 2}, first_trunk=2)
    assert tokens(part) == [[tried[:2] for tried in steps] for steps in first[2:]]
    assert tokens(inspect(engine, trunks, **SAMPLED, seed=1)) != first
    drawn = {tuple(ids) for steps in first for tried in steps for ids in tried}
    assert len(drawn) > len([tried for steps in first for tried in steps])  # siblings differ
    assert any(set(OTHERS) & set(ids[:-1]) for ids in drawn)  # which end no action here


def test_vllms_logps_are_the_policys_at_temperature_1(engine, model, trunks):
    branches = inspect(engine, trunks, **SAMPLED)
    with torch.no_grad():
        scored = separate_logprobs(model, trunks, tokens(branches)).numpy()
    trunks_own = [
        (np.full(stop - start, np.nan, np.float32), tried)
        for trunk, steps in zip(trunks, branches, strict=True)
        for (start, stop), tried in zip(trunk.action_spans, steps, strict=True)
    ]
    logps = np.concatenate(
        [x for own, tried in trunks_own for x in [own, *(b.logps for b in tried)]]
    )
    sampled = ~np.isnan(logps)
    np.testing.assert_allclose(logps[sampled], scored[sampled], rtol=0, atol=1e-3)


def test_a_vllm_that_takes_no_adapters_says_how_it_would(engine, tmp_path):
    with pytest.raises(EngineError, match=r"enable_lora=True|status 404.*--enable-lora"):
        engine.load_adapter("mine", tmp_path)


def test_a_prompt_that_is_too_long_is_refused_by_its_place(engine):
    ends = tuple(ENDS)
    short, long = (
        Prompt(str(count), np.full(count, 30, np.int32), seed=1)
        for count in (LIMITS["max_model_len"] - NEW, LIMITS["max_model_len"] - NEW + 1)
    )
    sampling = Sampling(1, NEW, 0.0, ends)
    assert len(engine.draw([short], sampling)) == 1
    with pytest.raises(ContextLimit) as refusal:
        engine.draw([short, long], sampling)
    assert refusal.value.place == 1


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("where", [in_process, served])
def test_what_was_learnt_in_a_cycle_acts_in_the_next(where, tmp_path):
    from peft import LoraConfig

    model = tiny_agent(**SHAPE)
    model.save_pretrained(tmp_path / "model")
    episodes = run_episodes(LEVEL, ExpertPolicy(), range(4))
    args = StepAgentConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        learning_rate=1e-2,
        temperature=0.0,
        max_new_tokens=5,
        cycles=3,
    )
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 512}
    with where(tmp_path / "model", **options) as engine:
        made = Watched(
            model,
            args,
            [episode.trajectory() for episode in episodes],
            TOKENIZER,
            peft_config=adapter,
            engine=engine,
        )
        made.train()
        with pytest.raises(EngineError, match=r"No adapter found for|does not load"):
            engine.load_adapter("mine", tmp_path / "nowhere")
    acted = [here for here, _ in made.cycles]
    assert acted[0] != acted[1] != acted[2]
    for here, learnt_from in made.cycles:
        assert [tokens_of(comparison) for comparison in learnt_from] == here
    figures = [entry for entry in made.state.log_history if "cycle" in entry]
    assert all(entry["engine_gap"] < 1e-4 for entry in figures)
