"""Inspection through an OpenAI-compatible server that takes and gives token ids: ``vllm serve``.

One request a state, ``POST /v1/completions``, with the state's token ids as the prompt; the
server's prefix cache shares what the states of a trunk have in common.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..decoding import check_count
from ..inspection import Branch
from .base import Engine, EngineError, Sampling, State

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

# A model's generation_config.json may set these on the server; the policy is the whole softmax.
_WHOLE_SOFTMAX = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_BUSY = (408, 429)  # with 5xx: worth another try
_EXCERPT = 300


class CompletionsEngine(Engine):
    """A running server, such as ``vllm serve MODEL`` (0.10.2 or later) or TRL's ``trl vllm-serve``.

    :param url: of the server, with or without ``/v1``.
    :param model: the name under which the model is served; None: the only one there is.
    :param api_key: sent as a bearer token; None: the environment's ``VLLM_API_KEY``, if any.
    :param concurrency: requests under way at once.
    :param timeout: seconds to wait for a connection, and for an answer, before another try.
    :param retries: further tries after a lost connection, a timeout, or status 408, 429 or 5xx,
        the first after ``backoff`` seconds, each after twice the time of the one before it.
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
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {url!r}")
        check_count("concurrency", concurrency)
        if retries < 0:
            raise ValueError(f"retries must be >= 0, got {retries}")
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model
        self._api_key = api_key or os.environ.get("VLLM_API_KEY")
        self._concurrency, self._timeout = concurrency, timeout
        self._retries, self._backoff = retries, backoff

    def sample(
        self, states: Sequence[State], sampling: Sampling, progress: bool
    ) -> list[list[Branch]]:
        """As :meth:`Engine.sample`."""
        from anyio.from_thread import start_blocking_portal

        # A loop in a thread of its own: a notebook's loop is in the way of none, and Ctrl-C here
        # cancels what is under way there, which tells the server to stop.
        with start_blocking_portal("asyncio") as portal:
            return portal.call(self._sample, states, sampling, progress)

    async def _sample(
        self, states: Sequence[State], sampling: Sampling, progress: bool
    ) -> list[list[Branch]]:
        from httpx2 import AsyncClient, Limits

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        client = AsyncClient(
            headers=headers,
            timeout=self._timeout,
            limits=Limits(max_connections=self._concurrency),
        )
        bar = tqdm(total=len(states), desc="inspect", unit="state", disable=not progress)
        free = asyncio.Semaphore(self._concurrency)
        async with client:
            model = self._model or await self._only_model(client)

            async def ask(state: State) -> list[Branch]:
                async with free:
                    request = {"model": model, **_request(state, sampling)}
                    answer = await self._call(client, "POST", "/completions", request)
                bar.update()
                return _branches(state, answer)

            with bar:
                return await _gather([ask(state) for state in states])

    async def _only_model(self, client: AsyncClient) -> str:
        answer = await self._call(client, "GET", "/models")
        try:
            names = [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise EngineError(f"{self._url}/models lists no models: {_excerpt(answer)}") from error
        if len(names) != 1:
            raise EngineError(f"{self._url} serves {len(names)} models, name one: {names}")
        return names[0]

    async def _call(self, client: AsyncClient, method: str, path: str, json: Any = None) -> Any:
        response = await self._response(client, method, self._url + path, json)
        if response.status_code != 200:
            what = f"status {response.status_code}: {_excerpt(response.text)}"
            raise EngineError(f"{method} {response.url} was answered with {what}")
        try:
            return response.json()
        except ValueError as error:
            what = f"what is not JSON: {_excerpt(response.text)}"
            raise EngineError(f"{method} {response.url} was answered with {what}") from error

    async def _response(self, client: AsyncClient, method: str, url: str, json: Any) -> Response:
        """The first answer that is not a passing failure."""
        from httpx2 import RequestError

        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(self._backoff * 2 ** (attempt - 1))
            failure: RequestError | None = None
            try:
                response = await client.request(method, url, json=json)
            except RequestError as error:
                failure, problem = error, f"{type(error).__name__}: {error}"
                continue
            if response.status_code < 500 and response.status_code not in _BUSY:
                return response
            problem = f"status {response.status_code}: {_excerpt(response.text)}"
        tries = f"{method} {url} failed {self._retries + 1} times"
        raise EngineError(f"{tries}, the last time with {problem}") from failure


def _request(state: State, sampling: Sampling) -> dict[str, Any]:
    return {
        "prompt": state.token_ids.tolist(),
        "n": sampling.samples,  # vLLM seeds sample k with seed + k
        "seed": state.seed,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.end_tokens),
        "ignore_eos": True,  # the end tokens are the caller's to say
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # the server need not write them as text
        **_WHOLE_SOFTMAX,
    }


def _branches(state: State, answer: Any) -> list[Branch]:
    try:
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [_branch(state, choice) for choice in choices]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise EngineError(f"{state.name}: {problem} in the answer {_excerpt(answer)}") from error


def _branch(state: State, choice: dict[str, Any]) -> Branch:
    prompt, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    if prompt is None or ids is None:
        raise EngineError(f"{state.name}: no token ids came; vllm serve gives them since 0.10.2")
    if prompt != state.token_ids.tolist():
        raise EngineError(f"{state.name}: the server read other tokens than were sent: {prompt}")
    if not all(type(token) is int for token in ids):
        raise TypeError("token_ids must be whole numbers")
    logps = choice["logprobs"]["token_logprobs"]
    return Branch(np.array(ids, dtype=np.int32), np.array(logps, dtype=np.float32))


async def _gather(coroutines: Sequence[Any]) -> list[Any]:
    """All results; the first failure cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


def _excerpt(answer: Any) -> str:
    return repr(answer)[:_EXCERPT]
