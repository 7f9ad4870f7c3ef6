"""Inspection by vLLM in this process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.branch import Branch
from ..errors import ContextLimit
from .base import Engine, EngineError, Prompt, Sampling


class VLLMEngine(Engine):
    """A ``vllm.LLM`` as it was built: parallelism, precision and memory are its options.

    Raises:
        ValueError: unless its log-probs are those of the raw logits, vLLM's default: the others
            follow the temperature of sampling.
    """

    def __init__(self, llm: Any) -> None:
        mode = llm.llm_engine.model_config.logprobs_mode
        if mode != "raw_logprobs":
            raise ValueError(f"logprobs_mode must be 'raw_logprobs', got {mode!r}")
        self._llm = llm
        self._adapters: dict[str, Any] = {}  # by name, as requests are given them
        self._adapter: Any = None
        self._ids = itertools.count(1)

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: bool
    ) -> list[list[Branch]]:
        """As `Engine.sample`.

        Raises:
            ContextLimit: for the first prompt that leaves no room for an action of
                ``max_new_tokens``, as a server of vLLM refuses it: it would be cut sooner.
        """
        self._check_room(prompts, sampling.max_new_tokens)
        from vllm import SamplingParams, TokensPrompt

        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt.token_ids.tolist()) for prompt in prompts],
            [
                SamplingParams(
                    n=sampling.samples,  # vLLM seeds sample k with seed + k
                    seed=prompt.seed,
                    temperature=sampling.temperature,
                    max_tokens=sampling.max_new_tokens,
                    stop_token_ids=list(sampling.end_tokens),
                    ignore_eos=True,  # the end tokens are the caller's to say
                    logprobs=0,  # of the sampled token alone
                    detokenize=False,
                )
                for prompt in prompts
            ],
            use_tqdm=progress,
            lora_request=self._adapter,
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            if list(output.prompt_token_ids) != prompt.token_ids.tolist():
                raise EngineError(f"{prompt.name}: vLLM read other tokens than were given")
        return [[_branch(choice) for choice in output.outputs] for output in outputs]

    def _check_room(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        limit = int(self._llm.llm_engine.model_config.max_model_len)
        for place, prompt in enumerate(prompts):
            needed = len(prompt.token_ids) + max_new_tokens
            if needed > limit:
                refusal = ContextLimit(
                    f"{prompt.name} needs {needed} tokens with max_new_tokens={max_new_tokens}, "
                    f"but max_model_len of the llm is {limit}"
                )
                refusal.place = place
                raise refusal

    def load_adapter(self, name: str, folder: Path) -> None:
        """As `Engine.load_adapter`; the llm needs ``enable_lora=True``."""
        from vllm.lora.request import LoRARequest

        if self._llm.llm_engine.vllm_config.lora_config is None:
            raise EngineError("an llm takes adapters that was built with enable_lora=True")
        adapter = LoRARequest(name, next(self._ids), str(folder))
        try:
            self._llm.llm_engine.add_lora(adapter)
        except Exception as error:  # vLLM's own are of many types
            raise EngineError(f"vLLM does not load the adapter in {folder}: {error}") from error
        self._adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """As `Engine.unload_adapter`."""
        adapter = self._adapters.pop(name, None)
        if adapter is None or not self._llm.llm_engine.remove_lora(adapter.lora_int_id):
            raise EngineError(f"vLLM has no adapter {name!r}")

    def with_adapter(self, name: str) -> VLLMEngine:
        """As `Engine.with_adapter`."""
        if name not in self._adapters:
            raise EngineError(f"vLLM has no adapter {name!r}")
        other = copy.copy(self)
        other._adapter = self._adapters[name]
        return other


def _branch(choice: Any) -> Branch:
    ids = list(choice.token_ids)
    logps = [table[token].logprob for token, table in zip(ids, choice.logprobs, strict=True)]
    return Branch(np.array(ids, dtype=np.int32), np.array(logps, dtype=np.float32))
