"""Policies behind a server: a real one, which decodes with the model that acts here too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from completions_server import CompletionsServer, ModelServer, drop, hang, status
from hostile_envs import LEVEL, Steered
from tiny_models import END, babyai_tokenizer, tiny_agent

import stepagent as sa
from stepagent import load_trajectories
from stepagent.acting.policies import ExpertPolicy, ModelPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.acting.server_policies import ChatPolicy, EnginePolicy
from stepagent.cli import main
from stepagent.engines import CompletionsEngine, EngineError, Server
from stepagent.records.episodes import Episode, load_episodes

SEEDS = [3, 1, 4]
NEW = 3


class ChattingServer(ModelServer):
    """Acts with a tiny model, from token ids or greedily from messages."""

    def __init__(self) -> None:
        super().__init__(tiny_agent())
        self.tokenizer = babyai_tokenizer()
        self.chat = self.speak

    def speak(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        request = {"prompt": self.tokenizer(text).input_ids, "max_tokens": NEW, "n": 1, "seed": 0}
        greedy = {"model": "tiny", "temperature": 0.0, "stop_token_ids": [END]}
        (choice,) = self.answer(request | greedy)["choices"]
        ids = choice["token_ids"]
        return f" {self.tokenizer.decode(ids[:-1] if ids[-1] == END else ids)}\n"


@pytest.fixture
def server() -> Iterator[ChattingServer]:
    with ChattingServer() as server:
        yield server


@pytest.fixture(scope="module")
def here() -> list[Episode]:
    """The same episodes with the model in this process."""
    policy = ModelPolicy(tiny_agent(), babyai_tokenizer(), max_new_tokens=NEW, eos_token_id=END)
    return run_episodes(Steered, policy, SEEDS, max_steps=6)


def chat(server: CompletionsServer, **options: Any) -> ChatPolicy:
    asked = {k: options.pop(k) for k in ("timeout", "retries", "api_key") if k in options}
    return ChatPolicy(
        Server(server.url, backoff=0.001, **asked), **{"max_new_tokens": NEW, **options}
    )


def engine(server: CompletionsServer, **options: Any) -> EnginePolicy:
    return EnginePolicy(
        CompletionsEngine(server.url, backoff=0.001),
        babyai_tokenizer(),
        **{"max_new_tokens": NEW, "eos_token_id": END, **options},
    )


def roll(policy: Any, seeds: list[int] = SEEDS, **options: Any) -> list[Episode]:
    return run_episodes(Steered, policy, seeds, **{"max_steps": 6, **options})


# ------------------------------------------------------------------ the same episodes


@pytest.mark.parametrize("batch_size", [64, 2])
def test_an_engine_with_the_same_model_gives_the_same_episodes(server, here, batch_size):
    there = roll(engine(server), batch_size=batch_size)
    assert {len(episode.actions) for episode in there} != {6}
    for one, other in zip(there, here, strict=True):
        assert one.actions == other.actions
        assert one.trunk.input_ids.tolist() == other.trunk.input_ids.tolist()
        assert one.trunk.action_spans.tolist() == other.trunk.action_spans.tolist()
        for logps, others in zip(one.logps, other.logps, strict=True):
            assert logps.dtype == np.float32
            np.testing.assert_allclose(logps, others, rtol=1e-4, atol=1e-5)


def test_a_chat_with_the_same_model_gives_the_same_actions(server, here):
    there = roll(chat(server, name="http://me"))
    assert [e.actions for e in there] == [e.actions for e in here]
    assert [e.observations for e in there] == [e.observations for e in here]
    assert {(e.policy, e.trunk) for e in there} == {("http://me", None)}


def test_continuations_go_on_from_the_trajectory(server):
    (demonstration,) = run_episodes(LEVEL, ExpertPolicy(), [3])
    trajectory = demonstration.trajectory()
    local = ModelPolicy(tiny_agent(), babyai_tokenizer(), max_new_tokens=NEW, eos_token_id=END)
    expected, *others = (
        sa.continue_rollouts(policy, Steered, [trajectory], samples=1)[0]
        for policy in (local, engine(server), chat(server))
    )
    actions = [[e.actions for e in step] for step in expected.episodes]
    assert all([[e.actions for e in step] for step in one.episodes] == actions for one in others)


# ------------------------------------------------------------------ what is asked


def test_a_chat_is_asked_for_every_running_episode_at_once(server):
    server.delay = 0.1
    roll(chat(server, system="Say left."), max_steps=2)
    assert server.most_under_way == len(SEEDS)
    first, later = server.requests[: len(SEEDS)], server.requests[len(SEEDS) :]
    for request in first:
        assert request.keys() == {"model", "messages", "max_tokens", "temperature"}
        assert (request["model"], request["max_tokens"], request["temperature"]) == ("tiny", NEW, 0)
        system, user = request["messages"]
        assert system == {"role": "system", "content": "Say left."}
        assert user["content"].startswith("mission : ")
    for request in later:
        roles = [message["role"] for message in request["messages"]]
        assert roles == ["system", "user", "assistant", "user"]


def test_what_is_sampled_has_a_seed_of_its_own(server):
    def asked(policy: Any, seeds: list[int]) -> set[int]:
        server.requests.clear()
        roll(policy, seeds, max_steps=2)
        return {request["seed"] for request in server.requests}

    for make in (chat, engine):
        seeds = asked(make(server, temperature=0.5), SEEDS)
        assert len(seeds) > len(SEEDS)
        assert asked(make(server, temperature=0.5), SEEDS[1:]) < seeds
        assert not asked(make(server, temperature=0.5, seed=1), SEEDS) & seeds


# ------------------------------------------------------------------ failures


def test_what_passes_is_tried_again(server, here):
    server.faults = [status(503), drop, status(429)]
    assert [e.actions for e in roll(chat(server))] == [e.actions for e in here]


def test_a_server_that_hangs_is_named(server):
    server.faults = [hang] * 20
    with pytest.raises(EngineError, match=r"/v1/chat/completions failed 2 times, .*Timeout"):
        roll(chat(server, timeout=0.2, retries=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"error": "no"}, "KeyError: 'choices' in the answer"),
        (lambda a: [1], "TypeError"),
        (lambda a: a | {"choices": [{}]}, "KeyError: 'message'"),
        (lambda a: a | {"choices": "x"}, "TypeError"),
    ],
)
def test_an_episode_whose_answer_is_broken_ends_and_says_why(server, change, message):
    server.change = change
    with pytest.warns(RuntimeWarning, match="1 of 1 episodes crashed"):
        (episode,) = roll(chat(server), [3])
    assert episode.crashed.startswith("the policy failed: ")
    assert message in episode.crashed
    assert episode.terminate_reason == "crashed"


def test_options_are_checked(server):
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number >= 1, got 0"):
        chat(server, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must be finite and >= 0, got -1"):
        engine(server, temperature=-1)
    with pytest.raises(ValueError, match="an engine needs eos_token_id"):
        engine(server, eos_token_id=[])


# ------------------------------------------------------------------ the command line


def evaluate(*options: object) -> Result:
    common = ("evaluate", "--env", LEVEL, "--episodes", 3, "--max-steps", 2)
    rest = ("--max-new-tokens", NEW, "--json")
    return CliRunner().invoke(main, [str(a) for a in (*common, *options, *rest)])


def test_a_server_is_evaluated_by_its_url(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    path = tmp_path / "episodes.jsonl"
    command = ("--policy", server.url, "--output", path, "--system", "Say left.")
    result = evaluate(*command)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["policy"], report["episodes"]) == (server.url, 3)
    assert server.keys == {"Bearer mine"}
    assert all(episode.trunk is None for episode in load_episodes(path))
    whole, asked = path.read_bytes(), len(server.requests)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert evaluate(*command).exit_code == 0
    assert path.read_bytes() == whole
    assert len(server.requests) == asked + 2  # one episode of two steps
    assert "system 'Say left.', not 'Say right.'" in evaluate(*command[:-1], "Say right.").stderr


def test_a_server_is_asked_in_token_ids_where_the_tokenizer_is_at_hand(server, tmp_path):
    folder, path = tmp_path / "tokenizer", tmp_path / "episodes.jsonl"
    babyai_tokenizer().save_pretrained(folder)
    result = evaluate("--policy", server.url, "--output", path, "--tokenizer", folder)
    assert result.exit_code == 0, result.stderr
    assert all("prompt" in request for request in server.requests)
    policy = ModelPolicy(tiny_agent(), babyai_tokenizer(), max_new_tokens=NEW, eos_token_id=END)
    here = run_episodes(LEVEL, policy, range(3), max_steps=2)
    there = [t.meta["token_ids"] for t in load_trajectories(path)]
    assert there == [episode.trunk.input_ids.tolist() for episode in here]


def test_a_server_that_fails_is_one_line(server):
    server.models = ["base", "adapter"]
    result = evaluate("--policy", server.url)
    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert "serves 2 models, name one: ['base', 'adapter']" in result.stderr
    assert evaluate("--policy", server.url, "--served-model", "base").exit_code == 0
    assert {request["model"] for request in server.requests} == {"base"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "expert", "--served-model", "x"), "--served-model is of no use with"),
        (("--policy", "random", "--system", "x"), "--system is of no use with --policy random"),
        (("--policy", "ftp://x"), "'ftp://x' is neither 'expert' nor 'random' nor a model's"),
    ],
)
def test_an_option_of_no_use_is_named(options, message):
    result = evaluate(*options)
    assert result.exit_code == 2
    assert message in result.stderr
