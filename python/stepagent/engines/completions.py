"""Inspection through an OpenAI-compatible server that takes and gives token ids: ``vllm serve``.

One request a state, ``POST /v1/completions``, with the state's token ids as the prompt; the
server's prefix cache shares what the states of a trunk have in common.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm.auto import tqdm

from ..data.branch import Branch
from ..errors import EngineError, RequestRefused
from .base import Engine, Prompt, Sampling
from .server import Server, excerpt

# A model's generation_config.json may set these on the server; the policy is the whole softmax.
_WHOLE_SOFTMAX = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

_TAKES_ADAPTERS = (
    "A server takes adapters that was started as "
    "`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank RANK`, "
    "with the base model and at least the rank of the adapter, where it can read the folder"
)


class CompletionsEngine(Engine):
    """A running server, such as ``vllm serve MODEL`` (0.10.2 or later) or TRL's ``trl vllm-serve``.

    The options are those of `stepagent.engines.Server`.

    Args:
        api_key: None: the environment's ``VLLM_API_KEY``, if any.
    """

    shared: ClassVar[bool] = True

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
        self._server = Server(
            url,
            model=model,
            api_key=api_key or os.environ.get("VLLM_API_KEY"),
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            budget=budget,
        )

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: bool
    ) -> list[list[Branch]]:
        """As `Engine.sample`."""
        requests = [_request(prompt, sampling) for prompt in prompts]
        with tqdm(total=len(prompts), desc="inspect", unit="state", disable=not progress) as bar:

            def read(place: int, answer: Any) -> list[Branch]:
                bar.update()
                return _branches(prompts[place], answer)

            def refused(place: int, refusal: RequestRefused) -> list[Branch]:
                refusal.place = place
                raise refusal

            return self._server.post("/completions", requests, read, refused)

    def load_adapter(self, name: str, folder: Path) -> None:
        """As `Engine.load_adapter`; ``folder`` is read by the server, where that runs."""
        self._server.check_model()
        request = {"lora_name": name, "lora_path": str(folder)}
        try:
            self._server.tell("/load_lora_adapter", request)
        except EngineError as error:
            # Another try of a request whose answer was lost is refused: it is loaded already.
            if name not in self._server.models():
                raise EngineError(f"{error}. {_TAKES_ADAPTERS}: {folder}") from error

    def unload_adapter(self, name: str) -> None:
        """As `Engine.unload_adapter`."""
        self._server.tell("/unload_lora_adapter", {"lora_name": name})

    def with_adapter(self, name: str) -> CompletionsEngine:
        """As `Engine.with_adapter`: requests name it as their model."""
        other = copy.copy(self)
        other._server = self._server.named(name)
        return other


def _request(prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    return {
        "prompt": prompt.token_ids.tolist(),
        "n": sampling.samples,  # vLLM seeds sample k with seed + k
        "seed": prompt.seed,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.end_tokens),
        "ignore_eos": True,  # the end tokens are the caller's to say
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # the server need not write them as text
        **_WHOLE_SOFTMAX,
    }


def _branches(prompt: Prompt, answer: Any) -> list[Branch]:
    try:
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [_branch(prompt, choice) for choice in choices]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise EngineError(f"{prompt.name}: {problem} in the answer {excerpt(answer)}") from error


def _branch(prompt: Prompt, choice: dict[str, Any]) -> Branch:
    read, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    if read is None or ids is None:
        raise EngineError(f"{prompt.name}: no token ids came; vllm serve gives them since 0.10.2")
    if read != prompt.token_ids.tolist():
        raise EngineError(f"{prompt.name}: the server read other tokens than were sent: {read}")
    if not all(type(token) is int for token in ids):
        raise TypeError("token_ids must be whole numbers")
    logps = choice["logprobs"]["token_logprobs"]
    return Branch(np.array(ids, dtype=np.int32), np.array(logps, dtype=np.float32))
