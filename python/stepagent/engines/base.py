"""What an engine is: states in, actions out, token ids both ways, nothing taken on trust."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..data.branch import Branch
from ..data.draws import check_count, check_temperature, uniforms
from ..data.encoding import Trunk

if TYPE_CHECKING:
    from numpy.typing import NDArray


_ROUNDING = 1e-3  # a log-prob above it is none: a logit, perhaps


class EngineError(RuntimeError):
    """An engine cannot be reached, refuses, or answers what was not asked for."""


class RequestRefused(EngineError):
    """A server refused one request for what it holds; others may pass.

    ``place`` is that of its state among those asked for; None where no states are.
    """

    place: int | None = None


class ContextLimit(RequestRefused):
    """The request is too long for the model."""


@dataclass(frozen=True, eq=False)
class State:
    """Where an action is asked for: all tokens before it, int32, and the seed of its samples."""

    name: str
    token_ids: NDArray[np.int32]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How actions are drawn: ``samples`` of them at a state, from the whole vocabulary."""

    samples: int
    max_new_tokens: int
    temperature: float
    end_tokens: tuple[int, ...]


class Engine(ABC):
    """Decodes actions with weights of its own. Prefix caching is how it shares a trunk.

    Log-probs are those the engine reports, in its precision; ``score_trees`` gives the exact ones.
    """

    # Whether all processes of a run ask one and the same, so that what one loads all can name.
    shared: ClassVar[bool] = False

    @abstractmethod
    def sample(
        self, states: Sequence[State], sampling: Sampling, progress: bool
    ) -> list[list[Branch]]:
        """``sampling.samples`` branches for each state, those of one state drawn independently.

        An action ends with one of ``end_tokens``, which its tokens include, and with nothing else,
        or is cut at ``max_new_tokens``.
        """

    def load_adapter(self, name: str, folder: Path) -> None:
        """Take up the LoRA adapter that PEFT saved in ``folder``; EngineError where it cannot."""
        raise EngineError(f"{type(self).__name__} takes no adapters")

    def unload_adapter(self, name: str) -> None:
        """Forget it; EngineError where it is not there."""
        raise EngineError(f"{type(self).__name__} takes no adapters")

    def with_adapter(self, name: str) -> Engine:
        """The same engine, acting with an adapter that it has taken up."""
        raise EngineError(f"{type(self).__name__} takes no adapters")

    def draw(
        self, states: Sequence[State], sampling: Sampling, progress: bool = False
    ) -> list[list[Branch]]:
        """As :meth:`sample`, checked; EngineError where a branch breaks a rule of it."""
        sampled = self.sample(states, sampling, progress)
        return [
            _checked(state, branches, sampling)
            for state, branches in zip(states, sampled, strict=True)
        ]

    def inspect(
        self,
        trunks: Sequence[Trunk],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int | Sequence[int] | None,
        seed: int,
        places: Sequence[int],
        progress: bool,
    ) -> list[list[list[Branch]]]:
        """As :func:`stepagent.inspect`, whose options these are.

        :raises ValueError: for an option out of range, or no ``eos_token_id``.
        :raises EngineError: where the engine fails, or a branch breaks a rule of :meth:`sample`.
        """
        check_count("samples", samples)
        check_count("max_new_tokens", max_new_tokens)
        check_temperature(temperature)
        ends = () if eos_token_id is None else tuple(map(int, np.atleast_1d(eos_token_id)))
        if not ends:
            raise ValueError("an engine needs eos_token_id: the ids of the tokens that end a turn")
        # The greedy action is one, however many are asked for; engines refuse to repeat it.
        drawn = samples if temperature > 0 else 1
        sampling = Sampling(drawn, max_new_tokens, float(temperature), ends)
        states = [
            State(
                f"trunks[{i}] at step {t}",
                trunk.input_ids[:start],
                state_seed(seed, place, t),
            )
            for i, (trunk, place) in enumerate(zip(trunks, places, strict=True))
            for t, start in enumerate(trunk.action_spans[:, 0].tolist())
        ]
        sampled = iter(
            branches * (samples // drawn) for branches in self.draw(states, sampling, progress)
        )
        return [[next(sampled) for _ in range(trunk.num_steps)] for trunk in trunks]


def state_seed(seed: int, trunk: int, step: int) -> int:
    """One of 2⁵³ seeds, which every JSON reader keeps exactly."""
    return int(uniforms(seed, trunk, step) * 2**53)


def _checked(state: State, branches: list[Branch], sampling: Sampling) -> list[Branch]:
    if len(branches) != sampling.samples:
        raise EngineError(f"{state.name}: {len(branches)} samples came for {sampling.samples}")
    for branch in branches:
        broken = _broken_rule(branch, sampling)
        if broken:
            raise EngineError(f"{state.name}: {broken}; the tokens are {branch.token_ids.tolist()}")
    return branches


def _broken_rule(branch: Branch, sampling: Sampling) -> str | None:
    length, limit = len(branch.token_ids), sampling.max_new_tokens
    ended = np.isin(branch.token_ids, sampling.end_tokens)
    if not 1 <= length <= limit:
        return f"{length} tokens came for 1 to {limit}"
    if (branch.token_ids < 0).any():
        return "a token id is negative"
    if ended[:-1].any():
        return "tokens come after one that ends an action"
    if not ended[-1] and length < limit:
        return f"the action stops after {length} of {limit} tokens without an end token"
    if len(branch.logps) != length:
        return f"{len(branch.logps)} log-probs came for {length} tokens"
    if not (np.isfinite(branch.logps) & (branch.logps < _ROUNDING)).all():
        return f"log-probs must be finite and at most 0, got {branch.logps.tolist()}"
    return None
