"""What an engine is: prompts in, actions out, as token ids both ways; every answer is checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..data.branch import Branch
from ..data.draws import check_count, check_temperature, uniforms
from ..data.ends import given_ends
from ..data.trunk import Trunk
from ..errors import EngineError as EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray


_ROUNDING = 1e-3  # a log-prob above it is none: a logit, perhaps


@dataclass(frozen=True, eq=False)
class Prompt:
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
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: bool
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
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: bool = False
    ) -> list[list[Branch]]:
        """As `sample`, checked; EngineError where a branch breaks a rule of it."""
        if not prompts:
            return []
        sampled = self.sample(prompts, sampling, progress)
        return [
            _checked(prompt, branches, sampling)
            for prompt, branches in zip(prompts, sampled, strict=True)
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
        """As `stepagent.inspect`, whose options these are.

        Raises:
            ValueError: for an option out of range, or no ``eos_token_id``.
            EngineError: where the engine fails, or a branch breaks a rule of `sample`.
        """
        check_count("samples", samples)
        check_count("max_new_tokens", max_new_tokens)
        check_temperature(temperature)
        ends = tuple(given_ends(eos_token_id, "an engine"))
        # The greedy action is one, however many are asked for; engines refuse to repeat it.
        drawn = samples if temperature > 0 else 1
        sampling = Sampling(drawn, max_new_tokens, float(temperature), ends)
        prompts = [
            Prompt(
                f"trunks[{i}] at step {t}",
                trunk.state_ids(t),
                state_seed(seed, place, t),
            )
            for i, (trunk, place) in enumerate(zip(trunks, places, strict=True))
            for t in range(trunk.num_steps)
        ]
        sampled = iter(
            branches * (samples // drawn) for branches in self.draw(prompts, sampling, progress)
        )
        return [[next(sampled) for _ in range(trunk.num_steps)] for trunk in trunks]


def state_seed(seed: int, trunk: int, step: int) -> int:
    """One of 2⁵³ seeds, which every JSON reader keeps exactly."""
    return int(uniforms(seed, trunk, step) * 2**53)


def _checked(prompt: Prompt, branches: list[Branch], sampling: Sampling) -> list[Branch]:
    if len(branches) != sampling.samples:
        raise EngineError(f"{prompt.name}: {len(branches)} samples came for {sampling.samples}")
    for branch in branches:
        broken = _broken_rule(branch, sampling)
        if broken:
            raise EngineError(
                f"{prompt.name}: {broken}; the tokens are {branch.token_ids.tolist()}"
            )
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
