"""Asking an OpenAI-compatible server many things at once, with another try where that may help."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..address import Address
from ..data.draws import check_count
from ..errors import ContextLimit, EngineError, RequestRefused
from .retries import BUSY, PassingFailure, Retries, retry_after

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

T = TypeVar("T")

_EXCERPT = 300
# Of the request alone, and not of the server: what it holds is refused.
_REFUSED = (400, 413, 422)
# How servers say that a prompt is too long: OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic.
_TOO_LONG = re.compile(
    r"context.{0,3}(length|size|window|limit)|maximum (context|model|sequence) length|max_model_len"
    r"|(prompt|input|request)\b.{0,40}\b(is )?too (long|large)|longer than the (maximum )?model"
    r"|inputs?`? tokens \+ `?max_new_tokens|exceed_context",
    re.IGNORECASE | re.DOTALL,
)


class Server:
    """A running server.

    Args:
        url: As `stepagent.address.Address` reads it: with or without ``/v1``, with another base
            path, or with an endpoint; a query string goes with every request, a user and password
            as basic authentication.
        model: The name under which the model is served; None: the only one there is.
        api_key: Sent as a bearer token, where there is one.
        concurrency: Requests under way at once.
        timeout: Seconds to wait for a connection, and for an answer, before another try.
        retries: Further tries after a lost connection, a timeout, or status 408, 409, 425, 429 or
            5xx, the first after ``backoff`` seconds, each after twice the time of the one before it
            with a random part on top; or after the seconds, or at the date, of ``Retry-After``.
        budget: Seconds after which no further try of a request begins.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 0.5,
        budget: float = 3600.0,
    ) -> None:
        check_count("concurrency", concurrency)
        if not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
        self._address = Address.parse(url)
        self._model, self._api_key = model, api_key
        self._concurrency, self._timeout = concurrency, timeout
        self._retries = Retries(retries, backoff, budget)

    @property
    def name(self) -> str:
        """The address for records: without user, password and query."""
        return self._address.shown

    def post(
        self,
        path: str,
        requests: Sequence[dict[str, Any]],
        read: Callable[[int, Any], T],
        refused: Callable[[int, RequestRefused], T] | None = None,
    ) -> list[T]:
        """What ``read`` makes of each answer and its request's place; the first failure ends all.

        Args:
            refused: What comes of a request that the server refuses for what it holds, as one that
                is too long (status 400, 413, 422); None: it ends all too.

        Raises:
            EngineError: Where the server cannot be reached or refuses.
        """

        async def ask_all(client: AsyncClient) -> list[T]:
            if self._model is None:
                self._model = await self._only_model(client)
            free = asyncio.Semaphore(self._concurrency)

            async def ask(place: int, request: dict[str, Any]) -> T:
                json = {"model": self._model, **request}
                try:
                    async with free:
                        answer = await self._call(client, "POST", path, json)
                except RequestRefused as refusal:
                    if refused is None:
                        raise
                    return refused(place, refusal)
                return read(place, answer)

            return await _gather([ask(*numbered) for numbered in enumerate(requests)])

        return self._connected(ask_all)

    def tell(self, path: str, request: dict[str, Any]) -> None:
        """One request whose answer is its status alone; EngineError as `post`."""
        self._connected(lambda client: self._answered(client, "POST", path, request))

    def models(self) -> dict[str, str | None]:
        """What is served by which name, and of an adapter the name of the model under it."""
        return self._connected(self._models)

    def named(self, model: str) -> Server:
        """The same server, asked for what it serves as ``model``."""
        other = copy.copy(self)
        other._model = model
        return other

    def check_model(self) -> None:
        """EngineError unless the server can be reached and serves the model that was named."""
        served = self.models()
        if self._model is not None and self._model not in served:
            raise EngineError(f"{self.name} serves {list(served)}, and no {self._model!r}")

    def _connected(self, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
        from anyio.from_thread import start_blocking_portal
        from httpx2 import AsyncClient, Limits

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        client = AsyncClient(
            headers=headers,
            timeout=self._timeout,
            limits=Limits(max_connections=self._concurrency),
        )

        async def connect() -> T:
            async with client:
                return await work(client)

        # A loop in a thread of its own: it works beside a notebook's loop, and Ctrl-C here
        # cancels what is under way there, which tells the server to stop.
        with start_blocking_portal("asyncio") as portal:
            return portal.call(connect)

    async def _only_model(self, client: AsyncClient) -> str:
        # A run that was stopped may have left its adapter; each has its model as its parent.
        served = await self._models(client)
        names = [name for name, parent in served.items() if parent is None]
        if len(names) != 1:
            raise EngineError(f"{self.name} serves {len(names)} models, name one: {names}")
        return names[0]

    async def _models(self, client: AsyncClient) -> dict[str, str | None]:
        answer = await self._call(client, "GET", "/models")
        try:
            return {str(model["id"]): model.get("parent") for model in answer["data"]}
        except (AttributeError, KeyError, TypeError) as error:
            raise EngineError(f"{self.name}/models lists no models: {excerpt(answer)}") from error

    async def _call(self, client: AsyncClient, method: str, path: str, json: Any = None) -> Any:
        response = await self._answered(client, method, path, json)
        try:
            return response.json()
        except ValueError as error:
            what = f"what is not JSON: {excerpt(response.text)}"
            raise EngineError(f"{method} {self.name}{path} was answered with {what}") from error

    async def _answered(
        self, client: AsyncClient, method: str, path: str, json: Any = None
    ) -> Response:
        response = await self._response(client, method, path, json)
        status, text = response.status_code, response.text
        if status == 200:
            return response
        message = f"{method} {self.name}{path} was answered with status {status}: {excerpt(text)}"
        if status in _REFUSED:
            raise (ContextLimit if _TOO_LONG.search(text) else RequestRefused)(message)
        raise EngineError(message)

    async def _response(self, client: AsyncClient, method: str, path: str, json: Any) -> Response:
        """The first answer that is not a passing failure."""
        tries = 0
        try:
            async for attempt in self._retries.attempts():
                with attempt:
                    tries += 1
                    response = await self._try(client, method, path, json)
        except PassingFailure as failure:
            times = f"failed {tries} times, the last time with" if tries > 1 else "failed with"
            waited = (
                f", and asked to wait {failure.retry_after:.0f} s" if failure.retry_after else ""
            )
            raise EngineError(
                f"{method} {self.name}{path} {times} {failure.problem}{waited}"
            ) from failure.__cause__
        return response

    async def _try(self, client: AsyncClient, method: str, path: str, json: Any) -> Response:
        from httpx2 import RequestError

        try:
            response = await client.request(method, self._address.endpoint(path), json=json)
        except RequestError as error:
            raise PassingFailure(f"{type(error).__name__}: {error}") from error
        if response.status_code < 500 and response.status_code not in BUSY:
            return response
        problem = f"status {response.status_code}: {excerpt(response.text)}"
        raise PassingFailure(problem, retry_after(response))


async def _gather(coroutines: Sequence[Any]) -> list[Any]:
    """All results; the first failure cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


def excerpt(answer: Any) -> str:
    """The beginning of an answer, for an error."""
    return repr(answer)[:_EXCERPT]
