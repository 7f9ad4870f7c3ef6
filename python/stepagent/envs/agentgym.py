"""A client of AgentGym's environment servers: ``agentgym:http://host:port``.

The servers speak one of two dialects, known by the answer to ``POST /create``:

* ``{"id": 0}`` (BabyAI, ScienceWorld, ALFWorld, TextCraft, …): ``POST /reset`` and ``/step`` name
  the environment by ``id`` and answer ``{"observation", "reward", "score", "done", …}``;
* ``0`` or ``{"env_idx": 0}`` (WebShop, SQLGym, and academia, movie, sheet, todo, weather, SearchQA,
  whose ``/create`` and ``/reset`` want a task as ``id``): they name it by ``env_idx``, ``/step``
  answers ``{"state" or "observation", "reward", "done"}``, and the first observation is asked for
  by ``GET /observation``.

Some servers hand out the same environment again once their pool is full; two episodes would then
act in one. So each is held by one client: see `_hold`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

from httpx2 import Client, HTTPError, Response, TimeoutException

from stepagent.envs.base import ExpertUnavailable

# How observations begin that refuse an action, of the servers that say so in words.
_REFUSALS = ("No known action matches that input.", "Nothing happen")


class AgentGymError(ConnectionError):
    """A server did not answer, or not as AgentGym's servers do."""


class AgentGymTextEnv:
    """An environment on an AgentGym server as a `stepagent.envs.TextEnv`.

    Seed s is the server's task s. A request is sent once: a step that was sent again might be taken
    twice. The rewards of an episode sum to its last score; servers without a ``score`` pay rewards.
    The task is done where the episode ends with the score 1. Servers have no expert, and few say
    that a text was no action: ``valid`` is False where the observation is a refusal known to us.

    Args:
        address: ``http://host:port``; ``?scale=100`` for a server whose full score is 100. A user
            and password in it are sent, and are no part of the name.
        timeout: Seconds to wait for an answer.

    Raises:
        ValueError: For another address.
        AgentGymError: Where the server cannot be reached or fails, or gives an environment that
            another client on this machine holds; so do the methods.
    """

    actions: tuple[str, ...] = ()  # servers do not list them
    max_steps = 100

    def __init__(self, address: str, timeout: float = 60.0) -> None:
        url, self._scale = parse_address(address)
        self.name = f"agentgym:{without_user(address)}"
        self._url = without_user(url)
        self._over = True
        self._client = Client(base_url=url, timeout=timeout)
        try:
            # Those that take a body want a task here already; the others read none.
            self._handle = self._handle_of(self._ask("POST", "/create", {"id": 0}))
            self._held = self._hold()
        except BaseException:
            self._client.close()
            raise

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the server's task of this number."""
        # A server reads the field it knows and leaves the others.
        fields: dict[str, Any] = {
            "data_idx": seed,
            "session_id": seed,
            "item_id": seed,
            "game": seed,
        }
        if "id" not in self._handle:
            fields["id"] = seed
        answer = self._ask("POST", "/reset", {**fields, **self._handle, "world_type": "Text"})
        if "id" in self._handle:
            told = self._text(answer, "observation")
            task = answer.get("task_description")
            observation = f"{task}\n{told}" if task else told
        else:
            observation = self._ask("GET", "/observation", self._handle)
            if not isinstance(observation, str):
                raise self._error(f"GET /observation answered {observation!r}, which is no text")
        self._over, self._steps, self._score, self._progress = False, 0, 0.0, 0.0
        return observation, self._info(valid=True, success=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Send any text."""
        self._require_running("step")
        answer = self._ask("POST", "/step", {**self._handle, "action": action})
        named = isinstance(answer, dict) and "state" in answer and "id" not in self._handle
        observation = self._text(answer, "state" if named else "observation")
        score, done = self._new_score(answer), answer.get("done")
        if not isinstance(done, bool):
            raise self._error(f"/step answered done = {done!r}; it must be true or false")
        reward, self._score = score - self._score, score
        self._steps += 1
        success = done and score >= 1.0
        self._progress = max(self._progress, score)
        truncated = not done and self._steps >= self.max_steps
        self._over = done or truncated
        info = self._info(valid=not observation.startswith(_REFUSALS), success=success)
        return observation, reward, done, truncated, info

    def expert_action(self) -> str:
        """`ExpertUnavailable`: the protocol has no expert."""
        self._require_running("expert_action")
        raise ExpertUnavailable(f"{self.name}: AgentGym servers have no expert to ask")

    def close(self) -> None:
        """Give the environment back, where the server knows how to take it."""
        self._over = True
        if not self._client.is_closed:
            self._held.close()  # first: once it is given back, another may be handed it
            try:
                self._client.post("/close", json=self._handle)
            except HTTPError:
                pass  # the server is gone, and the environment with it
            finally:
                self._client.close()

    def _ask(self, method: str, path: str, fields: dict[str, Any] | None = None) -> Any:
        """The server's answer, as JSON."""
        given = {"params": fields} if method == "GET" else {"json": fields or {}}
        try:
            response = self._client.request(method, path, **given)
        except TimeoutException as error:
            seconds = self._client.timeout.read
            raise self._error(f"{path} was not answered within {seconds:g} s") from error
        except HTTPError as error:
            raise self._error(f"{path} failed: {str(error) or type(error).__name__}") from error
        return self._checked(path, response)

    def _checked(self, path: str, response: Response) -> Any:
        if response.status_code != 200:
            excerpt = response.text[:200]
            raise self._error(f"{path} answered with status {response.status_code}: {excerpt}")
        try:
            answer = response.json()
        except ValueError as error:
            raise self._error(f"{path} answered no JSON: {response.text[:200]!r}") from error
        if isinstance(answer, dict) and answer.get("error"):
            raise self._error(f"{path} answered with an error: {answer['error']}")
        return answer

    def _handle_of(self, answer: Any) -> dict[str, int]:
        """The field that names our environment in requests."""
        field, number = "env_idx", answer
        if isinstance(answer, dict):
            field = "id" if "id" in answer else "env_idx"
            number = answer.get(field)
        if not isinstance(number, int) or isinstance(number, bool):
            raise self._error(
                f"/create answered {answer!r}; it must be a number, or one as id or env_idx"
            )
        return {field: number}

    def _hold(self) -> BinaryIO:
        """The environment for this client alone, until the file that is returned is closed.

        The file is locked, so that the workers of a run and other runs on this machine see it too.
        """
        (number,) = self._handle.values()
        place = hashlib.sha256(f"{self._url} {number}".encode()).hexdigest()[:32]
        folder = Path(tempfile.gettempdir(), f"stepagent-agentgym-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        file = Path(folder, place).open("wb")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise self._error(
                f"/create gave environment {number}, which another episode holds: the server's "
                "pool is smaller than the number of episodes side by side; lower --batch-size "
                "(batch_size), or start the server with more environments"
            ) from error
        return file

    def _text(self, answer: Any, field: str) -> str:
        text = answer.get(field) if isinstance(answer, dict) else None
        if not isinstance(text, str):
            raise self._error(f"the answer {str(answer)[:200]} has no text {field!r}")
        return text

    def _new_score(self, answer: dict[str, Any]) -> float:
        """The episode's score so far, 1 for all."""
        field = "score" if "score" in answer else "reward"
        number = answer.get(field)
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise self._error(f"/step answered {field} = {number!r}; it must be a number")
        score = number / self._scale + (0.0 if field == "score" else self._score)
        if score > 1.0 + 1e-6:
            raise self._error(
                f"the score {number} is above {self._scale:g}; a server with another full score "
                f"is named with it, as {self._url}?scale=100"
            )
        return score

    def _info(self, *, valid: bool, success: bool) -> dict[str, Any]:
        progress = 1.0 if success else self._progress
        info = {"valid": valid, "success": success, "progress": progress}
        return info if valid else {**info, "invalid": "refused action"}

    def _error(self, what: str) -> AgentGymError:
        return AgentGymError(f"AgentGym server {self._url}: {what}")

    def _require_running(self, call: str) -> None:
        if self._over:
            raise RuntimeError(f"{call} needs a running episode of {self.name}: call reset(seed)")


def parse_address(address: str) -> tuple[str, float]:
    """The server's URL and its full score, of ``http://host:port/path?scale=100``."""
    parts = urlsplit(address)
    query = parse_qs(parts.query, keep_blank_values=True)
    try:
        scale = float(query.pop("scale", ["1"])[-1])
    except ValueError:
        scale = 0.0
    if parts.scheme not in ("http", "https") or not parts.hostname or query or not scale > 0:
        raise ValueError(
            f"address must be http://host:port, with ?scale=100 where its full score is 100, got "
            f"{without_user(address)!r}"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", scale


def without_user(address: str) -> str:
    """The address without a user and password in it."""
    return re.sub(r"(^|//)[^/?]*@", r"\1", address)
