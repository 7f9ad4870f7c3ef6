"""A real HTTP server that speaks both dialects of AgentGym's servers and drives BabyAI levels."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stepagent import envs

# What the server does with a request instead of answering it.
Fault = Callable[["Handler"], None]


class AgentGymServer(ThreadingHTTPServer):
    """``dialect`` is "id" (as BabyAI's server) or "env_idx" (as WebShop's).

    A request for a path in ``faults`` meets that fault; one in ``answers`` gets that answer.
    """

    daemon_threads = True

    def __init__(self, dialect: str, level: str = "GoToLocalS6N2") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.dialect, self.level = dialect, level
        self.envs: dict[int, Any] = {}
        self.faults: dict[str, Fault] = {}
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def __enter__(self) -> AgentGymServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def answer(self, path: str, fields: dict[str, Any]) -> Any:
        """What AgentGym's server answers."""
        if path == "/create":
            number = len(self.envs)
            self.envs[number] = envs.make(f"babyai:{self.level}")
            return {"id": number} if self.dialect == "id" else number
        env = self.envs[int(fields[self.dialect])]
        if path == "/reset":
            env.seen, _ = env.reset(fields["data_idx" if self.dialect == "id" else "session_id"])
            env.score = 0.0
            if self.dialect == "env_idx":
                return [env.seen, None]
            return {"observation": env.seen, "reward": 0, "score": 0, "done": False}
        if path == "/observation":
            return env.seen
        if path == "/step":
            env.seen, reward, terminated, truncated, _ = env.step(fields["action"])
            env.score = 1.0 if reward > 0 else env.score
            paid = {"reward": env.score, "done": terminated or truncated}
            if self.dialect == "env_idx":
                return {"state": env.seen, "info": None, **paid}
            return {"observation": env.seen, "score": env.score, **paid}
        if path == "/close":
            env.close()
            return {"closed": True}
        raise ValueError(path)


class Handler(BaseHTTPRequestHandler):
    server: AgentGymServer

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self._serve(self.path, json.loads(self.rfile.read(length)))

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        self._serve(parts.path, {name: values[0] for name, values in query.items()})

    def _serve(self, path: str, fields: dict[str, Any]) -> None:
        self.server.requests.append((path, fields))
        if path in self.server.faults:
            self.server.faults[path](self)
        elif path in self.server.answers:
            self.send_json(self.server.answers[path])
        else:
            self.send_json(self.server.answer(path, fields))

    def send_json(self, answer: Any, status: int = 200) -> None:
        self.send_text(json.dumps(answer), status)

    def send_text(self, text: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent."""
