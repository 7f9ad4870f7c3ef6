"""Real HTTP servers that speak vLLM's protocol: with recorded answers, or acting with a model."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stepagent.data.branch import Branch
from stepagent.data.encoding import Trunk

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
        self.paths: set[str] = set()
        self.base = "/v1"
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

    @property
    def cards(self) -> list[dict[str, Any]]:
        return [{"id": name} for name in self.models]

    def adapt(self, path: str, request: dict[str, Any]) -> tuple[int, str] | None:
        return None

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


class ModelServer(CompletionsServer):
    """Acts with a model, and with the LoRA adapters it is told to load, as vLLM answers and fails.

    ``told`` are the requests that adapters are loaded and unloaded with, in their order.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__([], [])
        self.takes_adapters = True
        self.adapters: dict[str, torch.nn.Module] = {}
        self.told: list[tuple[str, str]] = []
        self._base = model
        self._decoding = threading.Lock()

    @property
    def cards(self) -> list[dict[str, Any]]:
        adapters = [{"id": name, "parent": self.models[0]} for name in self.adapters]
        return [{"id": name, "parent": None} for name in self.models] + adapters

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        model = self.adapters.get(request["model"], self._base)
        choices = []
        for k in range(request["n"]):
            with torch.no_grad(), self._decoding:
                ids, logps = decode(model, request, request["seed"] + k)
            choices.append(
                {
                    "index": k,
                    "prompt_token_ids": request["prompt"],
                    "token_ids": ids,
                    "logprobs": {"token_logprobs": logps},
                }
            )
        return {"model": request["model"], "choices": choices}

    def load(self, name: str, folder: str) -> tuple[int, str]:
        from peft import PeftModel

        self.told.append(("load", name))
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        if not Path(folder, "adapter_config.json").exists():
            return 404, f"The lora adapter '{name}' was not found at {folder}."
        with self._decoding:
            try:
                loaded = PeftModel.from_pretrained(deepcopy(self._base), folder)
            except RuntimeError as error:
                return 500, str(error)
        self.adapters[name] = loaded
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, str]:
        self.told.append(("unload", name))
        if self.adapters.pop(name, None) is None:
            return 404, f"The lora adapter '{name}' cannot be found."
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def adapt(self, path: str, request: dict[str, Any]) -> tuple[int, str] | None:
        """What a request for a change of adapters is answered with; None for any other."""
        if not self.takes_adapters:
            return None
        if path == "/v1/load_lora_adapter":
            return self.load(request["lora_name"], request["lora_path"])
        if path == "/v1/unload_lora_adapter":
            return self.unload(request["lora_name"])
        return None


def decode(
    model: torch.nn.Module, request: dict[str, Any], seed: int
) -> tuple[list[int], list[float]]:
    """One action, a forward a token; its log-probs are those at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    logps: list[float] = []
    while len(ids) < request["max_tokens"] and not set(ids) & set(request["stop_token_ids"]):
        tokens = torch.tensor([request["prompt"] + ids])
        logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
        if request["temperature"]:
            shares = (logits / request["temperature"]).softmax(-1)
            token = int(torch.multinomial(shares, 1, generator=generator))
        else:
            token = int(logits.argmax())
        ids.append(token)
        logps.append(float(logits.log_softmax(-1)[token]))
    return ids, logps


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CompletionsServer

    def do_GET(self) -> None:
        assert self.endpoint == "/models"
        self.reply({"object": "list", "data": self.server.cards})

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.keys.add(self.headers["Authorization"])
            server.paths.add(self.path)
            fault = server.faults.pop(0) if server.faults else None
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            time.sleep(server.delay)
            if fault is not None:
                fault(self)
            elif self.endpoint == "/chat/completions":
                self.reply(server.change(server.answer_chat(request)))
            elif self.endpoint == "/completions":
                try:
                    self.reply(server.change(server.answer(request)))
                except OverflowError as error:
                    self.send(400, str(error).encode())
            else:
                status, text = server.adapt(self.path, request) or (404, '{"detail":"Not Found"}')
                self.send(status, text.encode())
        finally:
            with server.lock:
                server.under_way -= 1

    @property
    def endpoint(self) -> str:
        """Without the base path, which may be any, and the query."""
        path = self.path.partition("?")[0]
        return path.removeprefix(self.server.base)

    def reply(self, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode())

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: stderr is the tests'."""


def status(
    code: int, text: str = "the engine is tired", headers: dict[str, str] | None = None
) -> Fault:
    return lambda handler: handler.send(code, text.encode(), headers)


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
