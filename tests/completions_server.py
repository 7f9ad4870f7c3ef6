"""A real HTTP server that speaks vLLM's completions protocol, with recorded answers, and chats."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from stepagent.encoding import Trunk
from stepagent.inspection import Branch

# What a server does with a request before it behaves: nothing (None), or this with its handler.
Fault = Callable[["Handler"], None]


class CompletionsServer(ThreadingHTTPServer):
    """Answers a state's token ids with the branches recorded there.

    ``faults`` befall the first requests for completions, one each; ``change`` rewrites answers.
    ``chat`` gives the text that follows messages.
    """

    daemon_threads = True

    def __init__(
        self, trunks: Sequence[Trunk], branches: Sequence[Sequence[Sequence[Branch]]]
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.recorded = {
            tuple(trunk.input_ids[:start].tolist()): tried
            for trunk, steps in zip(trunks, branches, strict=True)
            for start, tried in zip(trunk.action_spans[:, 0], steps, strict=True)
        }
        self.models = ["tiny"]
        self.faults: list[Fault] = []
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.chat: Callable[[list[dict[str, str]]], str | None] = lambda messages: None
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.under_way = self.most_under_way = 0
        self.delay = 0.0
        self.lock = threading.Lock()

    def __enter__(self) -> CompletionsServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, as those that cancel do, is no error here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        tried = self.recorded[tuple(request["prompt"])][: request["n"]]
        choices = [
            {
                "index": k,
                "text": "",
                "finish_reason": "stop",
                "prompt_token_ids": request["prompt"],
                "token_ids": branch.token_ids.tolist(),
                "logprobs": {"token_logprobs": branch.logps.tolist()},
            }
            for k, branch in enumerate(tried)
        ]
        return {"object": "text_completion", "model": request["model"], "choices": choices}

    def answer_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.chat(request["messages"])}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        return {"object": "chat.completion", "model": request["model"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CompletionsServer

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.reply({"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.keys.add(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else None
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            time.sleep(server.delay)
            if fault is not None:
                fault(self)
            elif self.path == "/v1/completions":
                self.reply(server.change(server.answer(request)))
            elif self.path == "/v1/chat/completions":
                self.reply(server.change(server.answer_chat(request)))
            else:
                self.send(404, b"no such path")
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode())

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: stderr is the tests'."""


def status(code: int) -> Fault:
    return lambda handler: handler.send(code, b"the engine is tired")


def hang(handler: Handler) -> None:
    """No answer; the client goes away."""
    handler.rfile.read(1)
    handler.close_connection = True


def drop(handler: Handler) -> None:
    """The connection ends in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
