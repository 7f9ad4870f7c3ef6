"""Policies: who acts in an environment. The expert, chance, or a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .decoding import (
    SlotCache,
    check_count,
    check_temperature,
    sample_tokens,
    uniforms,
)
from .encoding import Trunk, encode
from .inspection import end_tokens
from .models import check_fits, check_tree_support, evaluation_mode, lm_head
from .ops import token_logprobs
from .trajectory import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .envs.base import TextEnv

_SENTINEL = "stepagentsentinelaction"


class Policy(Protocol):
    """Acts in a batch of episodes that run in lock-step; finished ones leave the batch."""

    name: str  # in the records of its episodes

    def begin(self, seeds: Sequence[int]) -> None:
        """Start one episode per seed, which all its random numbers depend on."""

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """The same, after the first ``steps[k]`` ≥ 1 actions of ``trajectories[k]`` were taken."""

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str]:
        """One action per running episode, given its newest observation."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these of the running episodes go on."""


class ExpertPolicy:
    """The environment's own expert."""

    name = "expert"

    def begin(self, seeds: Sequence[int]) -> None:
        """Nothing to remember."""

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """Nothing to remember."""

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str]:
        """The expert's action in each environment's present state."""
        return [env.expert_action() for env in envs]

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing to forget."""


class RandomPolicy:
    """Uniform over the environment's actions: the floor. The same seed gives the same actions."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def begin(self, seeds: Sequence[int]) -> None:
        """One generator per episode, so that an episode does not depend on its batch."""
        self._generators = [np.random.default_rng((self._seed, seed)) for seed in seeds]

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """Chance remembers nothing."""
        self.begin(seeds)

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str]:
        """A uniform draw from each environment's actions."""
        for env in envs:
            if not env.actions:
                raise ValueError(f"{env.name} has no finite set of actions to draw from")
        pairs = zip(self._generators, envs, strict=True)
        return [env.actions[int(rng.integers(len(env.actions)))] for rng, env in pairs]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the generators of the episodes that ended."""
        self._generators = [self._generators[row] for row in rows]


@dataclass
class _Dialogue:
    """One episode as the model sees it: its messages, and the token ids as they were decoded."""

    seed: int
    name: str  # in errors
    messages: list[dict[str, str]] = field(default_factory=list)
    prompt: str = ""  # what stands before its newest action
    token_ids: list[int] = field(default_factory=list)
    action_spans: list[tuple[int, int]] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)  # of the tokens of each action
    encoded: int = 0  # how many of token_ids are in the cache


class ModelPolicy:
    """A language model in the chat format of its tokenizer, all episodes in one KV cache.

    Token ids are kept as they were sampled and never re-tokenized, so that
    :meth:`record` holds exactly what the model saw and did. Its name is that of the model's folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        check_temperature(temperature)
        check_tree_support(model)
        self.name = str(model.name_or_path) or type(model).__name__
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._ends = end_tokens(model, eos_token_id)
        self._head = lm_head(model)

    def begin(self, seeds: Sequence[int]) -> None:
        """Start one dialogue per seed on an empty cache."""
        self._dialogues = [_Dialogue(seed, f"the episode of seed {seed}") for seed in seeds]
        self._cache = SlotCache(self._model, len(seeds))
        self._filled_BS = np.zeros((len(seeds), 0), dtype=bool)

    @torch.no_grad()
    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """Each trajectory is encoded once, however many dialogues go on from it."""
        distinct = list({id(trajectory): trajectory for trajectory in trajectories}.values())
        trunks = [self._encode(trajectory) for trajectory in distinct]
        place = {id(trajectory): i for i, trajectory in enumerate(distinct)}
        origin_B = np.array([place[id(trajectory)] for trajectory in trajectories])
        self._dialogues = [
            self._taken(seed, trajectory, trunks[i], step)
            for seed, trajectory, i, step in zip(seeds, trajectories, origin_B, steps, strict=True)
        ]
        lengths_B = np.array([dialogue.encoded for dialogue in self._dialogues])
        width = int(lengths_B.max())
        tokens_TQ = np.stack([np.resize(trunk.input_ids, width) for trunk in trunks])
        with evaluation_mode(self._model):
            self._cache = SlotCache(self._model, len(trunks))
            self._cache.prefill(self._on_device(tokens_TQ))
            self._cache.keep_rows(self._on_device(origin_B))
        # What follows in the row, of the trajectory or to fill it up, is never seen.
        self._filled_BS = np.arange(width) < lengths_B[:, None]

    def _encode(self, trajectory: Trajectory) -> Trunk:
        trunk = encode(trajectory, self._tokenizer)
        name = f"trajectory {trajectory.id!r}"
        check_fits(self._model, name, trunk.input_ids, len(trunk.input_ids))
        end = int(trunk.input_ids[trunk.action_spans[0, 1] - 1])
        if end not in self._ends:
            raise ValueError(
                f"{name}: the chat template ends a turn by token {end}, which does not end an "
                f"action of this policy: eos_token_id is {self._ends}"
            )
        return trunk

    def _taken(self, seed: int, trajectory: Trajectory, trunk: Trunk, step: int) -> _Dialogue:
        """The dialogue after this many actions of a trajectory."""
        messages = trajectory.messages[: 2 * step]
        spans = trunk.action_spans[:step].tolist()
        stop = spans[-1][1]
        return _Dialogue(
            seed,
            f"a continuation of trajectory {trajectory.id!r} after {step} actions",
            messages=list(messages),
            prompt=self._render(messages[:-1]),
            token_ids=trunk.input_ids[:stop].tolist(),
            action_spans=[(start, stop) for start, stop in spans],
            logps=[[] for _ in spans],
            encoded=stop,
        )

    def record(self, row: int) -> tuple[Trunk, list[NDArray[np.float32]]]:
        """The episode of a running row: its tokens with the spans of the agent's actions, and per
        action the log-probs of its tokens (fp32, at temperature 1; none where it was replayed)."""
        dialogue = self._dialogues[row]
        trunk = Trunk(np.array(dialogue.token_ids), np.array(dialogue.action_spans))
        return trunk, [np.array(logps, dtype=np.float32) for logps in dialogue.logps]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the cache rows of the episodes that ended."""
        self._dialogues = [self._dialogues[row] for row in rows]
        self._filled_BS = self._filled_BS[list(rows)]
        if rows:
            self._cache.keep_rows(self._on_device(np.array(rows)))

    @torch.no_grad()
    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str]:
        """Read each observation, decode each action, in lock-step."""
        with evaluation_mode(self._model):
            for dialogue, observation in zip(self._dialogues, observations, strict=True):
                self._observe(dialogue, observation)
            return self._decode()

    def _observe(self, dialogue: _Dialogue, observation: str) -> None:
        """Append the observation as the chat template writes it, up to the model's next turn."""
        dialogue.messages.append({"role": "user", "content": observation})
        if not dialogue.action_spans:
            dialogue.prompt = self._render(dialogue.messages)
            dialogue.token_ids += self._tokenize(dialogue.prompt)
            return
        *earlier, action, newest = dialogue.messages
        marked = [*earlier, {"role": "assistant", "content": _SENTINEL}, newest]
        before, _, after = self._render(marked).partition(_SENTINEL)
        # Some templates put a space after the prompt for generation, which the model then wrote.
        if before.rstrip() != dialogue.prompt.rstrip():
            raise ValueError(
                "the chat template rewrites earlier turns when a new one comes, so the dialogue "
                "cannot be continued token by token; "
                f"it turned {dialogue.prompt!r} into {before!r}"
            )
        dialogue.prompt = before + action["content"] + after
        dialogue.token_ids += self._glue(after, ended=dialogue.token_ids[-1] in self._ends)

    def _glue(self, text: str, ended: bool) -> list[int]:
        """The tokens between an action and the next, less the turn's end if the model wrote it."""
        tokens = self._tokenize(text)
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        if not ended or end is None or self._decode_text(tokens[:end]).strip():
            return tokens
        return tokens[end + 1 :]

    def _render(self, messages: list[dict[str, str]]) -> str:
        rendered: Any = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def _tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _decode_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _decode(self) -> list[str]:
        for dialogue in self._dialogues:
            start = len(dialogue.token_ids)
            positions = start + self._max_new_tokens
            check_fits(self._model, dialogue.name, dialogue.token_ids, positions)
            dialogue.action_spans.append((start, start))
            dialogue.logps.append([])
        active = np.arange(len(self._dialogues))
        for position in range(self._max_new_tokens):
            logits = self._head.logits(self._encode_new(active))
            seeds = [self._dialogues[row].seed for row in active]
            turns = [len(self._dialogues[row].action_spans) for row in active]
            draws = uniforms(self._seed, seeds, turns, position)
            drawn = sample_tokens(logits, self._temperature, draws)
            logps = token_logprobs(logits, drawn).float().tolist()
            tokens = drawn.cpu().numpy()
            for row, token, logp in zip(active, tokens, logps, strict=True):
                self._dialogues[row].token_ids.append(int(token))
                self._dialogues[row].logps[-1].append(logp)
            active = active[~np.isin(tokens, self._ends)]
            if not len(active):
                break
        return [self._close(dialogue) for dialogue in self._dialogues]

    def _close(self, dialogue: _Dialogue) -> str:
        start, stop = dialogue.action_spans[-1][0], len(dialogue.token_ids)
        dialogue.action_spans[-1] = (start, stop)
        ids = dialogue.token_ids[start:stop]
        action = self._decode_text(ids[:-1] if ids[-1] in self._ends else ids).strip()
        dialogue.messages.append({"role": "assistant", "content": action})
        return action

    def _encode_new(self, active: NDArray[np.int64]) -> Tensor:
        """Encode what the cache lacks of the active rows; the hidden row of the last token."""
        rows = len(self._dialogues)
        new = [len(self._dialogues[row].token_ids) - self._dialogues[row].encoded for row in active]
        width = max(new)
        tokens_BQ = np.zeros((rows, width), dtype=np.int64)
        depths_BQ = np.zeros((rows, width), dtype=np.int64)
        filled_BQ = np.zeros((rows, width), dtype=bool)
        for row, count in zip(active, new, strict=True):
            dialogue = self._dialogues[row]
            tokens_BQ[row, :count] = dialogue.token_ids[dialogue.encoded :]
            depths_BQ[row, :count] = np.arange(dialogue.encoded, dialogue.encoded + count)
            filled_BQ[row, :count] = True
            dialogue.encoded += count
        hidden_BQH = self._cache.extend(
            self._on_device(tokens_BQ), self._on_device(depths_BQ), self._visible(filled_BQ)
        )
        last = torch.from_numpy(np.array(new) - 1)
        return hidden_BQH[self._on_device(active), last.to(hidden_BQH.device)]

    def _visible(self, filled_BQ: NDArray[np.bool_]) -> Tensor:
        """All filled slots of the row, causal among the new; a filler token sees only itself."""
        width = filled_BQ.shape[1]
        causal = np.tri(width, dtype=bool) & filled_BQ[:, None, :]
        past = np.repeat(self._filled_BS[:, None, :], width, axis=1) & filled_BQ[:, :, None]
        self._filled_BS = np.concatenate([self._filled_BS, filled_BQ], axis=1)
        visible = np.concatenate([past, causal | np.eye(width, dtype=bool)], axis=2)
        return torch.from_numpy(visible).to(self._head.weight_VH.device)

    def _on_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._head.weight_VH.device)
