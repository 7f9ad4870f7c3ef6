"""One episode's trouble ends that episode, which says why; the others go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from completions_server import CompletionsServer, status
from hostile_envs import ANSWERS, LEVEL, Numeric, broken
from test_server_policies import ChattingServer
from tiny_models import END, babyai_tokenizer, tiny_agent

import stepagent as sa
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.acting.server_policies import ChatPolicy, EnginePolicy
from stepagent.cli import main
from stepagent.engines import CompletionsEngine, EngineError, Server
from stepagent.evaluation.metrics import summarize

SEEDS = [3, 1, 4]


@pytest.fixture
def server() -> Iterator[CompletionsServer]:
    with CompletionsServer([], []) as server:
        server.chat = lambda messages: "left"
        yield server


def chat(server: CompletionsServer, **options: Any) -> ChatPolicy:
    return ChatPolicy(Server(server.url, backoff=0.001), **{"max_new_tokens": 4, **options})


def once(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """One answer of all is changed."""
    left = [change]
    return lambda answer: left.pop()(answer) if left else answer


def message(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """The answer's message has these fields."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["message"] = {"role": "assistant", **fields}
        return answer

    return change


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


# ------------------------------------------------------------------ what a server answers


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (message(content=None), "no text"),
        (message(content=""), "no text"),
        (message(), "no text"),
        (message(content=[]), "no text"),
        (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "no text"),
        (lambda answer: answer | {"choices": []}, "no text"),
        (message(content=None, tool_calls=[call("forward", "{}")]), "tool call"),
        (message(content="I act.", tool_calls=[call("forward", "{}")]), "tool call"),
        (message(content=None, function_call={"name": "a", "arguments": "{"}), "tool call"),
        (message(content="\ud800"), "broken Unicode"),
    ],
)
def test_an_answer_that_is_no_action_is_an_invalid_step(server, change, kind):
    server.change = once(change)
    episodes = run_episodes(LEVEL, chat(server), SEEDS, max_steps=3)
    assert {e.crashed for e in episodes} == {None}
    kinds = sorted(kind for e in episodes for kind in e.invalid if kind)
    assert kinds == [kind]
    (hit,) = (e for e in episodes if any(e.invalid))
    assert (hit.taken, hit.valid) == ([None, "left", "left"], [False, True, True])
    assert hit.observations[1].startswith("Invalid format.")
    json.dumps(hit.trajectory().messages).encode()


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "left"}],
        [{"type": "text", "text": "le"}, {"type": "text", "text": "ft"}],
        [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": " left\n"}],
        ["left"],
    ],
)
def test_parts_of_text_are_a_text(server, content):
    server.change = message(content=content)
    (episode,) = run_episodes(LEVEL, chat(server), [3], max_steps=2)
    assert episode.actions == ["left", "left"]
    assert episode.valid == [True, True]


@pytest.mark.parametrize("arguments", ['{"action": "left"}', {"action": "left"}])
def test_a_tool_call_is_an_action_in_its_format(server, arguments):
    server.change = message(content=None, tool_calls=[call("act", arguments)])
    policy = chat(server)
    (episode,) = run_episodes(LEVEL, policy, [3], max_steps=2, action_format="tool_call")
    assert (episode.taken, episode.valid) == (["left", "left"], [True, True])
    written = '<tool_call>\n{"name": "act", "arguments": {"action": "left"}}\n</tool_call>'
    assert episode.actions == [written, written]
    assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": written}


def test_an_answer_cut_at_the_token_limit_is_marked(server):
    (episode,) = run_episodes(LEVEL, chat(server), [3], max_steps=2)
    assert episode.truncated == [True, True]  # the test's server says "length" of every answer

    def stopped(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["finish_reason"] = "stop"
        return answer

    server.change = stopped
    (episode,) = run_episodes(LEVEL, chat(server), [3], max_steps=2)
    assert episode.truncated == []


# ------------------------------------------------------------------ what a server refuses

TOO_LONG = {
    "vLLM": "This model's maximum context length is 64 tokens. However, you requested 80 tokens",
    "OpenAI": '{"error": {"message": "…", "code": "context_length_exceeded"}}',
    "SGLang": "The input (90 tokens) is longer than the model's context length (64 tokens).",
    "llama.cpp": "the request exceeds the available context size. try increasing it",
    "TGI": "`inputs` tokens + `max_new_tokens` must be <= 64",
    "Anthropic": "prompt is too long: 90 tokens > 64 maximum",
}


@pytest.mark.parametrize("text", TOO_LONG.values(), ids=TOO_LONG)
def test_a_context_that_overflows_at_a_server_ends_one_episode(server, text):
    def speak(messages: list[dict[str, str]]) -> str:
        if len(server.requests) == len(SEEDS) and not asked:
            asked.append(True)
            server.faults = [status(400, text)]  # of the first request of the second step
        return "left"

    asked: list[bool] = []
    server.chat = speak
    episodes = run_episodes(LEVEL, chat(server), SEEDS, max_steps=3)
    reasons = sorted(str(e.terminate_reason) for e in episodes)
    assert reasons == ["context_limit", "max_steps", "max_steps"]
    (hit,) = (e for e in episodes if e.terminate_reason == "context_limit")
    assert (len(hit.actions), hit.crashed) == (1, None)
    summary = summarize(episodes)
    assert (summary.episodes, summary.crashed) == (3, 0)
    assert summary.terminate_reasons == {"context_limit": 1, "max_steps": 2}


def test_another_refusal_of_one_request_ends_one_episode(server):
    server.faults = [status(400, "the content is filtered")]
    with pytest.warns(RuntimeWarning, match="1 of 3 episodes crashed"):
        episodes = run_episodes(LEVEL, chat(server), SEEDS, max_steps=2)
    (hit,) = (e for e in episodes if e.crashed)
    assert hit.crashed.startswith("the policy failed: POST http://127.0.0.1")
    assert "status 400: 'the content is filtered'" in hit.crashed


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_is_refused_to_all_ends_the_run(server, code):
    server.faults = [status(code)] * 3
    with pytest.raises(EngineError, match=f"status {code}"):
        run_episodes(LEVEL, chat(server), SEEDS)


def test_a_context_that_overflows_at_an_engine_ends_one_episode():
    with ChattingServer() as server:
        options = {"max_new_tokens": 3, "eos_token_id": END}
        engine = CompletionsEngine(server.url, backoff=0.001)

        def roll() -> Any:
            policy = EnginePolicy(engine, babyai_tokenizer(), **options)
            return run_episodes(LEVEL, policy, SEEDS, max_steps=4)

        free, honest = roll(), server.answer
        limit = min(int(e.trunk.action_spans[-1, 0]) for e in free)

        def limited(request: dict[str, Any]) -> Any:
            if len(request["prompt"]) > limit:
                raise OverflowError(TOO_LONG["vLLM"])
            return honest(request)

        server.answer = limited  # type: ignore[method-assign]
        episodes = roll()
    assert {e.terminate_reason for e in episodes} == {"context_limit", "max_steps"}
    for one, whole in zip(episodes, free, strict=True):
        fitting = int((whole.trunk.action_spans[:, 0] <= limit).sum())
        assert one.actions == whole.actions[:fitting]
        stop = whole.trunk.action_spans[fitting - 1, 1]
        assert one.trunk.input_ids.tolist() == whole.trunk.input_ids[:stop].tolist()


# ------------------------------------------------------------------ what an environment answers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ANSWERS)
def test_an_answer_that_is_none_of_an_environment_ends_its_episode(fault, workers):
    with pytest.warns(RuntimeWarning, match="1 of 3 episodes crashed.* seed 3: "):
        episodes = run_episodes(broken(fault), ExpertPolicy(), SEEDS, workers=workers)
    hit, *others = episodes
    call = "reset" if fault.startswith("reset") else "step"
    assert f"{call} must give " in hit.crashed
    assert hit.terminate_reason == "crashed"
    assert len(hit.actions) == (0 if call == "reset" else 1)
    same = run_episodes(LEVEL, ExpertPolicy(), SEEDS[1:])
    assert [e.actions for e in others] == [e.actions for e in same]


def test_numbers_of_other_libraries_are_numbers():
    numeric = run_episodes(Numeric, ExpertPolicy(), SEEDS)
    same = run_episodes(LEVEL, ExpertPolicy(), SEEDS)
    for one, other in zip(numeric, same, strict=True):
        assert one.rewards == pytest.approx(other.rewards)
    json.dumps([e.trajectory().meta for e in numeric])


# ------------------------------------------------------------------ training


def test_training_goes_on_where_a_rollout_overflows(tmp_path):
    agent = tiny_agent()
    options = {
        "tokenizer": babyai_tokenizer(),
        "seeds": range(4),
        "max_new_tokens": 3,
        "eos_token_id": END,
        "max_steps": 4,
    }
    trunks, _ = sa.rollout_and_query(agent, LEVEL, **options)
    limit = min(int(trunk.action_spans[-1, 0]) for trunk in trunks) + 3
    short = tiny_agent(max_position_embeddings=limit)
    again, answers = sa.rollout_and_query(short, LEVEL, **options)
    assert len(again) == len(answers)
    assert all(len(a) == t.num_steps for t, a in zip(again, answers, strict=True))
    assert sum(t.num_steps for t in again) < sum(t.num_steps for t in trunks)
    assert sa.pack_step_pairs(again, answers)


# ------------------------------------------------------------------ the command line


def test_the_command_counts_what_ended_and_goes_on(server, tmp_path):
    path = tmp_path / "episodes.jsonl"
    server.change = once(message(content=None))
    command = ["evaluate", "--env", LEVEL, "--policy", server.url, "--output", str(path)]
    options = ["--episodes", "3", "--max-steps", "2", "--json"]
    result = CliRunner().invoke(main, [*command, *options])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["episodes"] == 3
    assert report["invalid_actions"]["no text"] == 1
    assert report["terminate_reasons"] == {"max_steps": 3}
