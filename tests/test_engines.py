"""Engines: what they are asked, that they give what `inspect` gives, and how they fail."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from completions_server import CompletionsServer, drop, hang, status
from tiny_models import END, random_trunks, tiny_model

from stepagent import Branch, Trunk, inspect, pack_step_pairs
from stepagent.engines import CompletionsEngine, EngineError

ENDS = [END, *range(10, 26)]
NEW = 8
SAMPLES = 3
OPTIONS = {"samples": SAMPLES, "max_new_tokens": NEW, "eos_token_id": ENDS, "temperature": 0.7}

Inspected = list[list[list[Branch]]]


@pytest.fixture(scope="module")
def trunks() -> list[Trunk]:
    return random_trunks(np.random.default_rng(3), count=4)[0]


@pytest.fixture(scope="module")
def recorded(trunks: list[Trunk]) -> Inspected:
    return inspect(tiny_model("llama"), trunks, **OPTIONS)


@pytest.fixture
def server(trunks: list[Trunk], recorded: Inspected) -> Iterator[CompletionsServer]:
    with CompletionsServer(trunks, recorded) as server:
        yield server


def engine(server: CompletionsServer, **options: Any) -> CompletionsEngine:
    return CompletionsEngine(server.url, **{"backoff": 0.001, **options})


def plain(branches: Inspected) -> list[list[list[tuple[list[int], list[float]]]]]:
    return [
        [[(b.token_ids.tolist(), b.logps.tolist()) for b in tried] for tried in steps]
        for steps in branches
    ]


# ------------------------------------------------------------------ what is asked, what is given


def test_an_engine_gives_what_inspect_gives(server, trunks, recorded):
    branches = inspect(engine(server), trunks, **OPTIONS)
    assert plain(branches) == plain(recorded)
    first = branches[0][0][0]
    assert (first.token_ids.dtype, first.logps.dtype) == (np.int32, np.float32)
    assert len(pack_step_pairs(trunks, branches)) == len(pack_step_pairs(trunks, recorded))


def test_a_state_is_asked_as_token_ids_under_a_seed_of_its_own(server, trunks):
    inspect(engine(server), trunks, **OPTIONS, seed=5)
    prompts = [t.input_ids[:start].tolist() for t in trunks for start in t.action_spans[:, 0]]
    assert sorted(request["prompt"] for request in server.requests) == sorted(prompts)
    seeds = {tuple(request["prompt"]): request["seed"] for request in server.requests}
    assert len(set(seeds.values())) == len(prompts)
    assert all(type(seed) is int and 0 <= seed < 2**53 for seed in seeds.values())
    for request in server.requests:
        del request["prompt"], request["seed"]
        assert request == {
            "model": "tiny",
            "n": SAMPLES,
            "temperature": 0.7,
            "max_tokens": NEW,
            "stop_token_ids": ENDS,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            # A model's generation_config.json must not change the distribution.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def asked(trunks: list[Trunk], **options: Any) -> dict[tuple[int, ...], int]:
        server.requests.clear()
        inspect(engine(server), trunks, **OPTIONS, **options)
        return {tuple(request["prompt"]): request["seed"] for request in server.requests}

    assert asked(trunks, seed=5) == seeds
    assert asked(trunks[2:], seed=5, first_trunk=2).items() <= seeds.items()
    assert asked([trunks[2], trunks[0]], seed=5, places=[2, 0]).items() <= seeds.items()
    assert not set(asked(trunks, seed=6).values()) & set(seeds.values())
    assert not set(asked(trunks[2:], seed=5).values()) & set(
        asked(trunks[2:], seed=5, first_trunk=2).values()
    )


def test_the_greedy_action_is_asked_once_and_given_as_often_as_wanted(server, trunks, recorded):
    branches = inspect(engine(server), trunks, **{**OPTIONS, "temperature": 0})
    assert {(request["n"], request["temperature"]) for request in server.requests} == {(1, 0.0)}
    first = [[tried[:1] * SAMPLES for tried in steps] for steps in recorded]
    assert plain(branches) == plain(first)


def test_no_trunks_ask_nothing(server):
    assert inspect(engine(server), [], **OPTIONS) == []
    assert server.requests == []


def test_no_more_requests_are_under_way_than_allowed(server, trunks, recorded):
    server.delay = 0.1  # long enough for three to meet on a busy machine
    assert plain(inspect(engine(server, concurrency=3), trunks, **OPTIONS)) == plain(recorded)
    assert server.most_under_way == 3


def test_a_notebooks_loop_is_in_the_way_of_none(server, trunks, recorded):
    async def cell() -> Inspected:
        return inspect(engine(server), trunks, **OPTIONS)

    assert plain(asyncio.run(cell())) == plain(recorded)


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_the_url_may_end_as_one_likes(server, trunks, suffix):
    inspect(CompletionsEngine(server.url + suffix), trunks[:1], **OPTIONS)


def test_the_key_is_sent(server, trunks, monkeypatch):
    inspect(engine(server), trunks[:1], **OPTIONS)
    inspect(engine(server, api_key="mine"), trunks[:1], **OPTIONS)
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    inspect(engine(server), trunks[:1], **OPTIONS)
    assert server.keys == {None, "Bearer mine", "Bearer theirs"}


def test_one_of_several_models_is_named(server, trunks):
    server.models = ["base", "adapter"]
    with pytest.raises(EngineError, match=r"serves 2 models, name one: \['base', 'adapter'\]"):
        inspect(engine(server), trunks, **OPTIONS)
    inspect(engine(server, model="adapter"), trunks, **OPTIONS)
    assert {request["model"] for request in server.requests} == {"adapter"}


# ------------------------------------------------------------------ failures that pass


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), drop])
def test_a_passing_failure_is_tried_again(server, trunks, recorded, fault):
    server.faults = [fault] * 3
    assert plain(inspect(engine(server), trunks, **OPTIONS)) == plain(recorded)
    states = sum(trunk.num_steps for trunk in trunks)
    assert len(server.requests) == states + 3


def test_a_server_that_does_not_answer_is_asked_again(server, trunks, recorded):
    server.faults = [hang]
    branches = inspect(engine(server, timeout=0.5), trunks[:1], **OPTIONS)
    assert plain(branches) == plain(recorded[:1])


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (status(503), "status 503: 'the engine is tired'"),
        (drop, "RemoteProtocolError"),
        (hang, "ReadTimeout"),
    ],
)
def test_a_failure_that_stays_is_named(server, trunks, fault, problem):
    server.faults = [fault] * 100
    with pytest.raises(EngineError) as failure:
        inspect(engine(server, retries=2, timeout=0.2, concurrency=1), trunks, **OPTIONS)
    message = str(failure.value)
    tries = f"POST {server.url}/v1/completions failed 3 times, the last time with "
    assert message.startswith(tries + problem)
    assert len(server.requests) == 3  # the first failure cancels the rest


def test_a_server_that_is_not_there_is_named(trunks):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"GET {url}/v1/models failed 2 times.*ConnectError"):
            inspect(CompletionsEngine(url, retries=1, backoff=0.001), trunks, **OPTIONS)


# ------------------------------------------------------------------ failures that stay


def test_a_refusal_is_not_tried_again(server, trunks):
    server.faults = [status(400)]
    with pytest.raises(EngineError, match=r"/v1/completions was answered with status 400: 'the e"):
        inspect(engine(server, concurrency=1), trunks, **OPTIONS)
    assert len(server.requests) == 1


def edited(edit: Callable[[list[dict[str, Any]]], object]) -> Callable[[Any], Any]:
    """A change of an answer's choices, by its second one."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        edit(answer["choices"])
        return answer

    return change


def set_tokens(ids: list[Any], logps: list[Any] | None = None) -> Callable[[Any], Any]:
    logps = [-1.0] * len(ids) if logps is None else logps
    new = {"token_ids": ids, "logprobs": {"token_logprobs": logps}}
    return edited(lambda choices: choices[1].update(new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: {"object": "error"}, "KeyError: 'choices' in the answer"),
        (lambda answer: None, "TypeError: .* in the answer None"),
        (edited(lambda choices: choices.pop()), "2 samples came for 3"),
        (edited(lambda choices: choices.append(choices[0])), "4 samples came for 3"),
        (edited(lambda choices: choices[0].pop("token_ids")), r"no token ids came; .*0\.10\.2"),
        (edited(lambda choices: choices[0].pop("index")), "KeyError: 'index'"),
        (edited(lambda choices: choices[1].pop("logprobs")), "KeyError: 'logprobs'"),
        (edited(lambda choices: choices[1].update(logprobs=None)), "TypeError"),
        (
            edited(lambda choices: choices[0].update(prompt_token_ids=[1, 2])),
            r"the server read other tokens than were sent: \[1, 2\]",
        ),
        (set_tokens([]), "0 tokens came for 1 to 8"),
        (set_tokens([3] * 9), "9 tokens came for 1 to 8"),
        (set_tokens([3] * 7), "stops after 7 of 8 tokens without an end token"),
        (set_tokens([3, END, 3, END]), "tokens come after one that ends an action"),
        (set_tokens([-3, END]), "a token id is negative"),
        (set_tokens([2**40, END]), "OverflowError"),
        (set_tokens([3.0, END]), "token_ids must be whole numbers"),
        (set_tokens(["a", END]), "token_ids must be whole numbers"),
        (set_tokens([3, END], [-1.0]), "1 log-probs came for 2 tokens"),
        (set_tokens([3, END], [-1.0, None]), "log-probs must be finite"),
        (set_tokens([3, END], [-1.0, "x"]), "ValueError"),
        (set_tokens([3, END], [-1.0, float("nan")]), "log-probs must be finite"),
        (set_tokens([3, END], [-1.0, 2.5]), r"finite and at most 0, got \[-1\.0, 2\.5\]"),
    ],
)
def test_an_answer_that_breaks_a_rule_is_named(server, trunks, change, message):
    server.change = change
    with pytest.raises(EngineError, match=rf"trunks\[0\] at step 0: .*{message}"):
        inspect(engine(server, concurrency=1), trunks[:1], **OPTIONS)


def test_an_answer_that_is_not_json_is_named(server, trunks):
    server.faults = [lambda handler: handler.send(200, b"<html>a proxy</html>")]
    with pytest.raises(
        EngineError, match="/v1/completions was answered with what is not JSON: '<h"
    ):
        inspect(engine(server), trunks, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"eos_token_id": None}, "an engine needs eos_token_id"),
        ({"eos_token_id": []}, "an engine needs eos_token_id"),
    ],
)
def test_an_option_out_of_range_is_named(server, trunks, options, message):
    with pytest.raises(ValueError, match=message):
        inspect(engine(server), trunks, **{**OPTIONS, **options})
    assert server.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"url": "localhost:8000"},
            "url must start with http:// or https://, got 'localhost:8000'",
        ),
        ({"concurrency": 0}, "concurrency must be"),
        ({"retries": -1}, "retries must be >= 0, got -1"),
    ],
)
def test_a_wrong_setting_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CompletionsEngine(**{"url": "http://localhost", **options})


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_truncation_is_refused(server, trunks, option):
    with pytest.raises(ValueError, match="an engine samples from all tokens"):
        inspect(engine(server), trunks, **{**OPTIONS, **option})
    assert server.requests == []


def test_a_vllm_in_this_process_ends_the_episodes_whose_prompts_do_not_fit():
    """The check comes before vLLM itself, so that it needs none; test_vllm.py has the real one."""
    from types import SimpleNamespace

    from hostile_envs import LEVEL
    from tiny_models import babyai_tokenizer

    from stepagent.acting.rollout import run_episodes
    from stepagent.acting.server_policies import EnginePolicy
    from stepagent.engines import VLLMEngine
    from stepagent.engines.base import Prompt, Sampling
    from stepagent.errors import ContextLimit

    config = SimpleNamespace(logprobs_mode="raw_logprobs", max_model_len=20)
    engine = VLLMEngine(SimpleNamespace(llm_engine=SimpleNamespace(model_config=config)))
    policy = EnginePolicy(engine, babyai_tokenizer(), max_new_tokens=4, eos_token_id=END)
    episodes = run_episodes(LEVEL, policy, [0, 1])
    assert [e.terminate_reason for e in episodes] == ["context_limit"] * 2
    assert [e.actions for e in episodes] == [[], []]
    prompts = [Prompt(f"p{n}", np.zeros(n, np.int32), 0) for n in (17, 16, 18)]
    for asked, place in ((prompts, 0), (prompts[1:], 1)):
        with pytest.raises(ContextLimit, match="tokens with max_new_tokens=4, but max_mod") as told:
            engine.draw(asked, Sampling(1, 4, 0.0, (END,)))
        assert told.value.place == place
