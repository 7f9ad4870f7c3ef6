"""The client of servers: addresses in the ways people write them, and when it tries again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from completions_server import CompletionsServer, hang, status

from stepagent.address import Address, scheme_hint, without_secrets
from stepagent.engines import EngineError, Server


@pytest.fixture
def server() -> Iterator[CompletionsServer]:
    with CompletionsServer([], []) as server:
        server.chat = lambda messages: "left"
        yield server


def ask(url: str, requests: int = 1, **options: Any) -> list[Any]:
    client = Server(url, **{"model": "tiny", "backoff": 0.001, **options})
    asked = [{"messages": []} for _ in range(requests)]
    return client.post("/chat/completions", asked, lambda place, answer: place)


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://a:8000", "http://a:8000/v1/chat/completions"),
        ("http://a:8000/", "http://a:8000/v1/chat/completions"),
        ("HTTP://a:8000", "http://a:8000/v1/chat/completions"),
        ("http://a/v1", "http://a/v1/chat/completions"),
        ("http://a/v1/", "http://a/v1/chat/completions"),
        ("https://a/gateway", "https://a/gateway/v1/chat/completions"),
        ("https://a/api/paas/v4", "https://a/api/paas/v4/chat/completions"),
        ("https://a/v1beta/openai/", "https://a/v1beta/openai/chat/completions"),
        ("https://a/v1/chat/completions", "https://a/v1/chat/completions"),
        ("https://a/chat/completions", "https://a/chat/completions"),
        ("https://a/v1/completions", "https://a/v1/chat/completions"),
        (
            "https://a/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
            "https://a/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
        ),
        ("https://a?key=1&b=2", "https://a/v1/chat/completions?key=1&b=2"),
        ("http://[::1]:8000", "http://[::1]:8000/v1/chat/completions"),
        ("http://me:secret@a:8000", "http://me:secret@a:8000/v1/chat/completions"),
    ],
)
def test_an_address_is_a_host_a_base_path_or_an_endpoint(url: str, endpoint: str) -> None:
    assert Address.parse(url).endpoint("/chat/completions") == endpoint


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:secret@a:8000/v1", "http://a:8000/v1"),
        ("http://secret@a", "http://a/v1"),
        ("http://me:p@ss:w?rd@a".replace("?", "%3F"), "http://a/v1"),
        ("https://a/v1?api_key=secret", "https://a/v1"),
    ],
)
def test_what_is_shown_of_an_address_holds_no_secret(url: str, shown: str) -> None:
    assert Address.parse(url).shown == shown
    assert Server(url).name == shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "http:// or https://, got 'localhost:8000'; did you mean http://local"),
        ("10.0.0.1:8000/v1", "did you mean http://10.0.0.1:8000/v1?"),
        ("ftp://me:secret@a", "must start with http:// or https://, got 'ftp://a'"),
        ("me:secret@a:8000", "got 'a:8000'; did you mean http://a:8000?"),
        ("http://", "must have a host and no fragment, got 'http://'"),
        ("http://a#b", "must have a host and no fragment"),
        ("http://a:port", "must be a server's address, got 'http://a:port': "),
        ("http://me:secret@a:port", "must be a server's address, got 'http://a:port': "),
    ],
)
def test_what_is_no_address_is_refused_without_its_secret(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Server(url)
    assert "secret" not in str(raised.value)


def test_only_an_address_is_given_a_hint() -> None:
    assert scheme_hint("expert") == scheme_hint("runs/mine") == scheme_hint("babyai:GoTo") == ""
    assert without_secrets("runs/mine") == "runs/mine"


def test_a_base_path_and_a_query_go_with_every_request(server: CompletionsServer) -> None:
    server.base = "/api/paas/v4"
    assert ask(f"{server.url}/api/paas/v4?api-version=1&x=%20", model=None) == [0]
    assert server.paths == {"/api/paas/v4/chat/completions?api-version=1&x=%20"}


def test_a_user_and_password_are_sent_and_named_nowhere(server: CompletionsServer) -> None:
    url = server.url.replace("http://", "http://me:secret@")
    ask(url)
    assert server.keys == {"Basic bWU6c2VjcmV0"}
    server.faults = [status(403)]
    with pytest.raises(EngineError) as refused:
        ask(url)
    server.faults = [status(503)] * 9
    with pytest.raises(EngineError) as failed:
        ask(url, retries=1)
    for raised in (refused, failed):
        assert server.url in str(raised.value)
        assert "secret" not in str(raised.value)


# ------------------------------------------------------------------ another try


@pytest.mark.parametrize("form", ["seconds", "fraction", "date"])
def test_a_server_that_says_when_is_asked_again_then(server: CompletionsServer, form: str) -> None:
    later = {"seconds": "1", "fraction": "1.2", "date": formatdate(time.time() + 2, usegmt=True)}
    server.faults = [status(429, headers={"Retry-After": later[form]})]
    start = time.monotonic()
    assert ask(server.url) == [0]
    assert 0.9 < time.monotonic() - start < 4.0
    assert len(server.requests) == 2


@pytest.mark.parametrize("nonsense", ["soon", "", "-3", "inf", "nan", "Thu, 99 Foo 2026"])
def test_nonsense_in_retry_after_is_passed_over(server: CompletionsServer, nonsense: str) -> None:
    server.faults = [status(503, headers={"Retry-After": nonsense})]
    start = time.monotonic()
    assert ask(server.url) == [0]
    assert time.monotonic() - start < 2.0


def test_a_wait_beyond_the_budget_is_named_at_once(server: CompletionsServer) -> None:
    server.faults = [status(429, headers={"Retry-After": "3600"})]
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"failed with status 429.*asked to wait 3600 s"):
        ask(server.url, budget=60.0)
    assert time.monotonic() - start < 5.0


def test_the_budget_ends_the_tries(server: CompletionsServer) -> None:
    server.faults = [hang] * 100
    start = time.monotonic()
    with pytest.raises(EngineError, match="ReadTimeout"):
        ask(server.url, timeout=0.2, retries=90, budget=1.0)
    assert time.monotonic() - start < 4.0
    assert 2 < len(server.requests) < 9


def test_requests_that_fail_together_come_back_apart(server: CompletionsServer) -> None:
    times: list[float] = []
    server.faults = [status(503)] * 16
    server.chat = lambda messages: times.append(time.monotonic()) or "left"  # type: ignore[func-returns-value]
    ask(server.url, requests=16, backoff=0.5)
    assert max(times) - min(times) > 0.15  # the waits are 0.5 s and up to 0.5 s by chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries must be >= 0, got -1"),
        ({"backoff": -1.0}, "backoff must be >= 0 seconds, got -1.0"),
        ({"backoff": float("nan")}, "backoff must be >= 0 seconds, got nan"),
        ({"budget": 0.0}, "budget must be > 0 seconds, got 0.0"),
        ({"timeout": 0.0}, "timeout must be > 0 seconds, got 0.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Server("http://a", **options)
