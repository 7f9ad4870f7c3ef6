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
    """``dialect`` is "id" (as BabyAI's server), "env_idx" (as WebShop's), or "task" (as those of
    academia, movie, sheet, todo, weather and SearchQA, which want a task's ``id`` at /create).
    With ``named``, /create answers a dict in the latter two.

    A request for a path in ``faults`` meets that fault; one in ``answers`` gets that answer.
    """

    daemon_threads = True

    def __init__(self, dialect: str, level: str = "GoToLocalS6N2", named: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.named, self.pool = named, 0  # environments at most, then again from the first; 0: any
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.dialect, self.level, self.created = dialect, level, 0
        self.envs: dict[int, Any] = {}
        self.faults: dict[str, Fault] = {}
        self.answers: dict[str, Any] = {}
        self.keys: set[str | None] = set()
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
            if self.dialect == "task" and not isinstance(fields.get("id"), int):
                raise KeyError("id")
            number = self.created % self.pool if self.pool else self.created
            self.created += 1
            self.envs[number] = envs.make(f"babyai:{self.level}")
            if self.dialect == "id":
                return {"id": number}
            return {"env_idx": number} if self.named else number
        handle = "id" if self.dialect == "id" else "env_idx"
        env = self.envs[int(fields[handle])]
        if path == "/reset":
            task = {"id": "data_idx", "env_idx": "session_id", "task": "id"}[self.dialect]
            env.seen, _ = env.reset(fields[task])
            env.score = 0.0
            if self.dialect == "task":
                return env.seen
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
            if self.dialect == "task":
                return {"observation": env.seen, **paid}
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
        self.server.keys.add(self.headers["Authorization"])
        if path in self.server.faults:
            self.server.faults[path](self)
        elif path in self.server.answers:
            self.send_json(self.server.answers[path])
        else:
            try:
                self.send_json(self.server.answer(path, fields))
            except KeyError as missing:  # as FastAPI answers
                self.send_json({"detail": [{"type": "missing", "loc": [str(missing)]}]}, 422)

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
