"""Policies whose model is elsewhere: behind an engine as token ids, behind a server as text.

All running episodes are asked for at once, and the server batches them. What a server refuses or
answers wrongly for one episode ends that episode; where it cannot be reached at all, the run ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..address import TokenLimit
from ..data.actions import call_text
from ..data.arguments import check_arguments, check_continues
from ..data.draws import check_count, check_temperature
from ..data.ends import given_ends
from ..engines.base import Engine, Prompt, Sampling, state_seed
from ..engines.server import Server, excerpt
from ..errors import ContextLimit, RequestRefused
from .answers import Answer, Decision, Stop
from .dialogues import Dialogues

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.branch import Branch
    from ..data.trajectory import Trajectory
    from ..envs.base import TextEnv


class EnginePolicy(Dialogues):
    """A language model behind an engine, token ids both ways, in the chat format of its tokenizer.

    Its episodes have the token ids as they were sampled, and the log-probs the engine reports.

    Args:
        eos_token_id: The tokens that end an action.
        name: In the records of its episodes.
        system: A first message to the model, such as what the actions are.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int],
        temperature: float = 0.0,
        seed: int = 0,
        name: str = "engine",
        chat_template_kwargs: dict[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        ends = given_ends(eos_token_id, "an engine")
        super().__init__(
            tokenizer,
            ends,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat_template_kwargs=chat_template_kwargs,
            system=system,
        )
        self.name, self._engine = name, engine
        self._sampling = Sampling(1, max_new_tokens, float(temperature), tuple(ends))

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[Decision]:
        """Read each observation, draw each action; EngineError where the engine fails."""
        prompts = []
        for dialogue, observation in zip(self._dialogues, observations, strict=True):
            self._observe(dialogue, observation)
            turn = len(dialogue.action_spans)
            seed = state_seed(self._seed, dialogue.seed, turn)
            ids = np.array(dialogue.visible_ids, dtype=np.int32)
            prompts.append(Prompt(f"{dialogue.name} at step {turn}", ids, seed))
        decisions: list[Decision] = []
        for dialogue, answer in zip(self._dialogues, self._draw(prompts), strict=True):
            if isinstance(answer, Stop):
                self._take_back(dialogue)
                decisions.append(answer)
                continue
            self._open(dialogue)
            dialogue.append(answer.token_ids.tolist())
            dialogue.logps[-1] = answer.logps.tolist()
            decisions.append(self._answer(dialogue))
        return decisions

    def _draw(self, prompts: Sequence[Prompt]) -> list[Branch | Stop]:
        """An action at each prompt. Where one is refused, the others are asked for again: their
        seeds are their own, so that they are what they would have been."""
        stops: dict[int, Stop] = {}
        while True:
            left = [place for place in range(len(prompts)) if place not in stops]
            try:
                drawn = self._engine.draw([prompts[place] for place in left], self._sampling)
            except RequestRefused as refusal:
                if refusal.place is None:
                    raise
                stops[left[refusal.place]] = _stop(refusal)
                continue
            branches = {place: branch for place, (branch,) in zip(left, drawn, strict=True)}
            return [stops.get(place) or branches[place] for place in range(len(prompts))]


def _stop(refusal: RequestRefused) -> Stop:
    return Stop(
        "context_limit" if isinstance(refusal, ContextLimit) else "failed",
        str(refusal),
    )


class ChatPolicy:
    """A model behind ``/v1/chat/completions``: any OpenAI-compatible server, text both ways.

    Its answer is the text without the white space around it; parts of text are joined, and tool
    calls are written after it as ``<tool_call>`` texts. Episodes have no token ids.

    Args:
        system: A first message to the model, such as what the actions are.
        name: In the records of its episodes.
        token_limit: The field of a request that has ``max_new_tokens``.
        chat_template_kwargs: For the server's chat template, sent under this name, which vLLM and
            SGLang know, and recorded with the episodes.
    """

    def __init__(
        self,
        server: Server,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        system: str | None = None,
        name: str = "server",
        token_limit: TokenLimit = "max_tokens",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        check_temperature(temperature)
        if token_limit not in get_args(TokenLimit):
            choices = " or ".join(get_args(TokenLimit))
            raise ValueError(f"token_limit must be {choices}, got {token_limit!r}")
        self.name, self._server, self._seed = name, server, seed
        self._max_new_tokens, self._temperature = max_new_tokens, float(temperature)
        self._token_limit, self.system = token_limit, system
        self.chat_template_kwargs = check_arguments(chat_template_kwargs or {})

    def begin(self, seeds: Sequence[int]) -> None:
        """Start one conversation per seed."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._seeds = list(seeds)
        self._messages: list[list[dict[str, Any]]] = [list(first) for _ in seeds]

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """The same, after the first ``steps[k]`` actions of ``trajectories[k]``."""
        self.begin(seeds)
        for messages, trajectory, step in zip(self._messages, trajectories, steps, strict=True):
            check_continues(trajectory, self.chat_template_kwargs)
            turns = [m for m in trajectory.messages if m["role"] != "system"]
            messages += turns[: 2 * step]

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[Decision]:
        """Send each conversation with its observation; EngineError where the server fails."""
        for messages, observation in zip(self._messages, observations, strict=True):
            messages.append({"role": "user", "content": observation})
        requests = [self._request(row) for row in range(len(self._seeds))]
        answers = self._server.post("/chat/completions", requests, self._read, self._refused)
        for messages, answer in zip(self._messages, answers, strict=True):
            if isinstance(answer, str):
                messages.append({"role": "assistant", "content": str.__str__(answer)})
        return answers

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the conversations that ended."""
        self._seeds = [self._seeds[row] for row in rows]
        self._messages = [self._messages[row] for row in rows]

    def _request(self, row: int) -> dict[str, Any]:
        messages = self._messages[row]
        request: dict[str, Any] = {
            "messages": messages,
            self._token_limit: self._max_new_tokens,
            "temperature": self._temperature,
        }
        if self.chat_template_kwargs:
            request["chat_template_kwargs"] = self.chat_template_kwargs
        # Not every server knows the word, and what is greedy needs none.
        seed = {"seed": state_seed(self._seed, self._seeds[row], len(messages))}
        return request | (seed if self._temperature > 0 else {})

    def _refused(self, row: int, refusal: RequestRefused) -> Decision:
        return _stop(refusal)

    def _read(self, row: int, answer: Any) -> Decision:
        """The text of an answer; a `Stop` where it is none of a chat."""
        try:
            choices = answer["choices"]
            if not choices:
                return Answer("", problem="no text")
            message = choices[0]["message"]
            said, calls = _content(message.get("content")), _calls(message)
            truncated = choices[0].get("finish_reason") == "length"
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            broken = f"{type(error).__name__}: {error}"
            return Stop("failed", f"{broken} in the answer {excerpt(answer)}")
        text = "\n".join(part for part in (said.strip(), *calls) if part)
        sound = text.encode(errors="replace").decode()
        problem = "no text" if not text else None if sound == text else "broken Unicode"
        return Answer(sound, truncated, problem)


def _content(content: Any) -> str:
    """The text of a message's content: a text, parts of which some are texts, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(
        part if isinstance(part, str) else part["text"]
        for part in content
        if isinstance(part, str) or part["type"] in ("text", "output_text")
    )


def _calls(message: dict[str, Any]) -> list[str]:
    """A message's tool calls, and the one call of older servers, as texts."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    functions += [message["function_call"]] if message.get("function_call") else []
    return [call_text(f["name"], _arguments(f.get("arguments"))) for f in functions]


def _arguments(arguments: Any) -> Any:
    """Servers send an object as JSON text; what is none stays as it came, and is read as none."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments
