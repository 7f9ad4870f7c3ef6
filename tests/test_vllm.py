"""The real vLLM, in this process and as a server, against `inspect` with the same weights.

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
from tiny_models import END, random_trunks, separate_logprobs, tiny_model
from transformers import PreTrainedModel

from stepagent import Branch, Trunk, inspect
from stepagent.engines import CompletionsEngine, Engine, VLLMEngine

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
def in_process(folder: Path) -> Iterator[VLLMEngine]:
    import vllm

    yield VLLMEngine(vllm.LLM(model=str(folder), **LLM, **LIMITS))


@contextmanager
def served(folder: Path) -> Iterator[CompletionsEngine]:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    options = [f"--{name.replace('_', '-')}" for name, value in LLM.items() if value is True]
    options += ["--dtype", "float32", "--port", str(port)]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
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
