"""Policies: who acts in an environment. The expert, chance, or a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.draws import uniforms
from ..data.ends import model_ends
from ..data.trajectory import Trajectory
from ..data.trunk import Trunk
from ..envs.pool import expert_actions
from ..models import (
    check_fits,
    check_tree_support,
    evaluation_mode,
    lm_head,
    position_limit,
)
from ..ops import token_logprobs
from .answers import Decision, Stop
from .decoding import SlotCache, check_finite, finite_rows, sample_tokens
from .dialogues import Dialogue, Dialogues

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..envs.base import TextEnv


class Policy(Protocol):
    """Acts in a batch of episodes that run in lock-step; finished ones leave the batch."""

    name: str  # in the records of its episodes

    def begin(self, seeds: Sequence[int]) -> None:
        """Start one episode per seed, which all its random numbers depend on."""

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """The same, after the first ``steps[k]`` ≥ 1 actions of ``trajectories[k]`` were taken."""

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> Sequence[Decision]:
        """One answer per running episode, given its newest observation; None gives it up.

        It is the text in which the run's action format finds the action, or a `Stop`. A policy that
        has ``exact = True`` answers actions themselves. One that has a ``system`` begins each
        episode with this message.

        Where an environment that is asked meanwhile crashes, `EnvCrash` passes through and the call
        is made again for the others: until then nothing may have been drawn or remembered.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Only these of the running episodes continue."""


class ExpertPolicy:
    """The environment's own expert."""

    name = "expert"
    exact = True

    def begin(self, seeds: Sequence[int]) -> None:
        """Nothing to remember."""

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """Nothing to remember."""

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str | None]:
        """The expert's action in each environment's present state; None where it has none."""
        return expert_actions(envs)

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing to forget."""


class RandomPolicy:
    """Uniform over the environment's actions: the floor. The same seed gives the same actions."""

    name = "random"
    exact = True

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def begin(self, seeds: Sequence[int]) -> None:
        """One generator per episode, so that an episode does not depend on its batch."""
        self._generators = [np.random.default_rng((self._seed, seed)) for seed in seeds]

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """As `begin`: random actions do not depend on what came before."""
        self.begin(seeds)

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str | None]:
        """A uniform draw from each environment's actions."""
        # All asked before any draw: where one crashes, the others are asked again.
        choices = [_choices(env) for env in envs]
        pairs = zip(self._generators, choices, strict=True)
        return [actions[int(rng.integers(len(actions)))] for rng, actions in pairs]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the generators of the episodes that ended."""
        self._generators = [self._generators[row] for row in rows]


def _choices(env: TextEnv) -> tuple[str, ...]:
    actions = env.actions  # once: it may be in another process
    if not actions:
        raise ValueError(f"{env.name} must have a finite set of actions to draw from, got none")
    return actions


class ModelPolicy(Dialogues):
    """A language model in the chat format of its tokenizer, all episodes in one KV cache.

    Token ids are kept as they were sampled and never re-tokenized, so that
    `record` holds exactly what the model saw and did. Its name is that of the model's folder.
    An episode whose next answer might not fit the model's positions ends, and the others continue.

    Args:
        system: A first message to the model, such as what the actions are.
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
        chat_template_kwargs: dict[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        check_tree_support(model)
        super().__init__(
            tokenizer,
            model_ends(model, eos_token_id),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat_template_kwargs=chat_template_kwargs,
            system=system,
        )
        self.name = str(model.name_or_path) or type(model).__name__
        self._model = model
        self._head = lm_head(model)
        self._limit = position_limit(model)

    def begin(self, seeds: Sequence[int]) -> None:
        """Start one dialogue per seed on an empty cache."""
        super().begin(seeds)
        self._cache = SlotCache(self._model, len(seeds))
        self._filled_BS = np.zeros((len(seeds), 0), dtype=bool)

    @torch.no_grad()
    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """Each trajectory is encoded once, however many dialogues continue it."""
        trunks, origin_B = self._resume(seeds, trajectories, steps)
        width = 1 + max(dialogue.slots[-1] for dialogue in self._dialogues)
        with evaluation_mode(self._model):
            self._cache = SlotCache(self._model, len(trunks))
            self._cache.read_trunks(trunks, width)
            self._cache.keep_rows(self._on_device(origin_B))
        # What follows in the row, of the trajectory or to fill it up, is never seen.
        self._filled_BS = np.zeros((len(self._dialogues), width), dtype=bool)
        for row in range(len(self._dialogues)):
            self._show_line(row)

    def _show_line(self, row: int) -> None:
        """Let the next tokens see those of their line and no others."""
        self._filled_BS[row] = False
        self._filled_BS[row, self._dialogues[row].slots] = True

    def overrule(self, row: int, text: str, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """As `Dialogues.overrule`: the cache keeps what is no longer seen."""
        own = super().overrule(row, text, ids)
        self._show_line(row)
        return own

    def _encode(self, trajectory: Trajectory) -> Trunk:
        trunk = super()._encode(trajectory)
        name = f"trajectory {trajectory.id!r}"
        check_fits(self._model, name, trunk.input_ids, len(trunk.input_ids))
        return trunk

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the cache rows of the episodes that ended."""
        super().keep(rows)
        self._filled_BS = self._filled_BS[list(rows)]
        if rows:
            self._cache.keep_rows(self._on_device(np.array(rows)))

    @torch.no_grad()
    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[Decision]:
        """Read each observation, decode each action, in lock-step."""
        with evaluation_mode(self._model):
            for row, observation in enumerate(observations):
                dialogue = self._dialogues[row]
                rewinds = len(dialogue.rewinds)
                self._observe(dialogue, observation)
                if len(dialogue.rewinds) > rewinds:
                    self._show_line(row)
            return self._decode()

    def _decode(self) -> list[Decision]:
        stops = [self._overflow(dialogue) for dialogue in self._dialogues]
        fitting = np.flatnonzero([stop is None for stop in stops])
        for row in fitting:
            dialogue = self._dialogues[row]
            check_fits(self._model, dialogue.name, dialogue.token_ids, len(dialogue.line))
            self._open(dialogue)
        if len(fitting):
            self._decode_rows(fitting)
        return [stop or self._answer(d) for stop, d in zip(stops, self._dialogues, strict=True)]

    def _overflow(self, dialogue: Dialogue) -> Stop | None:
        """Where its next answer might not fit: then the dialogue ends after its newest answer."""
        needed = len(dialogue.line) + self._max_new_tokens
        if self._limit is None or needed <= self._limit:
            return None
        self._take_back(dialogue)
        return Stop(
            "context_limit",
            f"{dialogue.name} needs {needed} positions, the model has {self._limit}",
        )

    def _decode_rows(self, active: NDArray[np.int64]) -> None:
        for position in range(self._max_new_tokens):
            logits = self._head.logits(self._encode_new(active))
            check_finite(bool(finite_rows(logits).all()))
            seeds = [self._dialogues[row].seed for row in active]
            turns = [len(self._dialogues[row].action_spans) for row in active]
            draws = uniforms(self._seed, seeds, turns, position)
            draws_R = torch.from_numpy(draws).to(logits.device)
            drawn = sample_tokens(logits, self._temperature, draws_R)
            logps = token_logprobs(logits, drawn).float().tolist()
            tokens = drawn.cpu().numpy()
            for row, token, logp in zip(active, tokens, logps, strict=True):
                self._dialogues[row].append([int(token)])
                self._dialogues[row].logps[-1].append(logp)
            active = active[~np.isin(tokens, self._ends)]
            if not len(active):
                break

    def _encode_new(self, active: NDArray[np.int64]) -> Tensor:
        """Encode what the cache lacks of the active rows; the hidden row of the last token."""
        rows = len(self._dialogues)
        new = [len(self._dialogues[row].line) - len(self._dialogues[row].slots) for row in active]
        width = max(new)
        tokens_BQ = np.zeros((rows, width), dtype=np.int64)
        depths_BQ = np.zeros((rows, width), dtype=np.int64)
        filled_BQ = np.zeros((rows, width), dtype=bool)
        for row, count in zip(active, new, strict=True):
            dialogue = self._dialogues[row]
            done, slot = len(dialogue.slots), self._cache.slots
            tokens_BQ[row, :count] = [dialogue.token_ids[place] for place in dialogue.line[done:]]
            depths_BQ[row, :count] = np.arange(done, done + count)
            filled_BQ[row, :count] = True
            dialogue.slots += range(slot, slot + count)
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
        return torch.from_numpy(visible).to(self._head.device)

    def _on_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._head.device)
