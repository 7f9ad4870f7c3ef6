"""Policies whose model is elsewhere: behind an engine as token ids, behind a server as text.

All running episodes are asked for at once, and the server batches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.draws import check_count, check_temperature
from ..data.ends import given_ends
from ..engines.base import Engine, EngineError, Prompt, Sampling, state_seed
from ..engines.server import Server, excerpt
from .dialogues import Dialogues

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.trajectory import Trajectory
    from ..envs.base import TextEnv


class EnginePolicy(Dialogues):
    """A language model behind an engine, token ids both ways, in the chat format of its tokenizer.

    Its episodes have the token ids as they were sampled, and the log-probs the engine reports.

    :param eos_token_id: the tokens that end an action.
    :param name: in the records of its episodes.
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
    ) -> None:
        ends = given_ends(eos_token_id, "an engine")
        super().__init__(
            tokenizer,
            ends,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat_template_kwargs=chat_template_kwargs,
        )
        self.name, self._engine = name, engine
        self._sampling = Sampling(1, max_new_tokens, float(temperature), tuple(ends))

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str | None]:
        """Read each observation, draw each action; EngineError where the engine fails."""
        prompts = []
        for dialogue, observation in zip(self._dialogues, observations, strict=True):
            self._observe(dialogue, observation)
            turn = len(dialogue.action_spans)
            seed = state_seed(self._seed, dialogue.seed, turn)
            ids = np.array(dialogue.visible_ids, dtype=np.int32)
            prompts.append(Prompt(f"{dialogue.name} at step {turn}", ids, seed))
        drawn = self._engine.draw(prompts, self._sampling)
        for dialogue, (branch,) in zip(self._dialogues, drawn, strict=True):
            self._open(dialogue)
            dialogue.append(branch.token_ids.tolist())
            dialogue.logps[-1] = branch.logps.tolist()
        return [self._close(dialogue) for dialogue in self._dialogues]


class ChatPolicy:
    """A model behind ``/v1/chat/completions``: any OpenAI-compatible server, text both ways.

    An action is the whole answer, without the white space around it. Episodes have no token ids.

    :param system: a first message to the model, such as what the actions are.
    :param name: in the records of its episodes.
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
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        check_temperature(temperature)
        self.name, self._server, self._seed = name, server, seed
        self._max_new_tokens, self._temperature = max_new_tokens, float(temperature)
        self._first = [] if system is None else [{"role": "system", "content": system}]

    def begin(self, seeds: Sequence[int]) -> None:
        """Start one conversation per seed."""
        self._seeds = list(seeds)
        self._messages: list[list[dict[str, Any]]] = [list(self._first) for _ in seeds]

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """The same, after the first ``steps[k]`` actions of ``trajectories[k]``."""
        self.begin(seeds)
        for messages, trajectory, step in zip(self._messages, trajectories, steps, strict=True):
            messages += trajectory.messages[: 2 * step]

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str | None]:
        """Send each conversation with its observation; EngineError where the server fails."""
        for messages, observation in zip(self._messages, observations, strict=True):
            messages.append({"role": "user", "content": observation})
        requests = [self._request(row) for row in range(len(self._seeds))]
        actions = self._server.post("/chat/completions", requests, self._action)
        for messages, action in zip(self._messages, actions, strict=True):
            messages.append({"role": "assistant", "content": action})
        return list(actions)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the conversations that ended."""
        self._seeds = [self._seeds[row] for row in rows]
        self._messages = [self._messages[row] for row in rows]

    def _request(self, row: int) -> dict[str, Any]:
        messages = self._messages[row]
        request = {
            "messages": messages,
            "max_tokens": self._max_new_tokens,
            "temperature": self._temperature,
        }
        # Not every server knows the word, and what is greedy needs none.
        seed = {"seed": state_seed(self._seed, self._seeds[row], len(messages))}
        return request | (seed if self._temperature > 0 else {})

    def _action(self, row: int, answer: Any) -> str:
        name = f"the episode of seed {self._seeds[row]}"
        try:
            (choice,) = answer["choices"]
            content = choice["message"]["content"]
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise EngineError(f"{name}: {problem} in the answer {excerpt(answer)}") from error
        if not isinstance(content, str):
            why = f"finish_reason {choice.get('finish_reason')!r}"
            raise EngineError(f"{name}: no text came ({why}) in the answer {excerpt(answer)}")
        return content.strip()
