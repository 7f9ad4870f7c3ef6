"""The value of the agent's states, for advantages of outcomes: a head on rows of a fixed decoder.

The decoder is the policy as it was when training began, and learns nothing; the head is fitted once
a cycle, before the policy learns, by least squares on the returns. The rows are read in shares over
the processes; the head is small, and each of them fits it in the same way.

S steps, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..ranks import over_ranks
from .critic import StepCritic, critic_body
from .cycle import Comparison, pack_comparisons

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import StepAgentConfig

VALUE_FILE, OPTIMIZER_FILE = "value.safetensors", "value_optimizer.pt"


class ValueFunction:
    """V(s), 0 at first, and its optimiser."""

    def __init__(self, policy: PreTrainedModel, args: StepAgentConfig) -> None:
        self._args = args
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            critic = StepCritic(critic_body(policy, "frozen"), discriminators=0)
        self._critic = critic.to(args.device)
        self._optimizer = torch.optim.AdamW(
            self._critic.value.parameters(), lr=args.critic_learning_rate, weight_decay=0.0
        )

    @torch.no_grad()
    def rows(self, comparisons: Sequence[Comparison]) -> Tensor:
        """(S, H) of the states of all steps; every process has to call this."""
        size = self._args.per_device_eval_batch_size

        def read(places: list[int]) -> list[Tensor]:
            found: list[Tensor] = []
            for batch in (places[i : i + size] for i in range(0, len(places), size)):
                chosen = [comparisons[i] for i in batch]
                trees = pack_comparisons(chosen, self._args.max_tokens)
                steps = [c.trunk.num_steps for c in chosen]
                found += torch.split(self._critic.read(trees).state_SH.cpu(), steps)
            return found

        parts = over_ranks(read, [c.tokens for c in comparisons])
        return torch.cat(parts).to(self._args.device)

    @torch.no_grad()
    def values(self, state_SH: Tensor) -> Tensor:
        """(S,) float64 on the CPU, as the head is now."""
        values_S = self._critic.values(state_SH).double().cpu()
        if not bool(values_S.isfinite().all()):
            raise FloatingPointError(
                "the values must be finite, got NaN or infinity: lower critic_learning_rate. "
                "Checkpoints written so far are kept"
            )
        return values_S

    def fit(self, state_SH: Tensor, returns_S: Tensor, cycle: int) -> None:
        """``critic_epochs`` passes of least squares on the returns."""
        returns_S = returns_S.to(state_SH)
        size = self._args.per_device_train_batch_size
        for epoch in range(self._args.critic_epochs):
            order = np.random.default_rng((self._args.seed, cycle, epoch)).permutation(
                len(returns_S)
            )
            for first in range(0, len(order), size):
                batch = order[first : first + size].tolist()
                loss = F.mse_loss(self._critic.values(state_SH[batch]), returns_S[batch])
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()

    def save(self, folder: Path) -> None:
        """Write the head and its optimiser's moments."""
        state = self._critic.value.state_dict()
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / VALUE_FILE)
        torch.save(self._optimizer.state_dict(), folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; FileNotFoundError names a file that is missing."""
        for path in (folder / VALUE_FILE, folder / OPTIMIZER_FILE):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, so the run cannot be resumed from it")
        self._critic.value.load_state_dict(load_file(folder / VALUE_FILE))
        moments = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        moments["param_groups"] = self._optimizer.state_dict()["param_groups"]  # of the arguments
        self._optimizer.load_state_dict(moments)


def explained(values_S: Tensor, returns_S: Tensor) -> float:
    """1 − Var(return − value) / Var(return); 0 where the returns are all equal."""
    total = returns_S.var(correction=0)
    return float(1 - (returns_S - values_S).var(correction=0) / total) if total > 0 else 0.0
