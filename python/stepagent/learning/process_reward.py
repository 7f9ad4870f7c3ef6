"""iStar's process reward model: a policy π_φ that learns which of a task's episodes earned more.

    q_B = Σ over an episode's steps of r,   r_S = β Σ over a step's tokens of (log π_φ − log π_old)
    loss = mean over pairs of −log σ(q_better − q_worse)

Its pairs are all those of episodes of one task that earned differently, as TRL's and ETO's are of
trajectories; what they learn to explain as a whole, r gives to single steps. π_φ begins as the
policy and learns on from cycle to cycle; π_old is the policy that acted in the cycle.

B episodes, S their steps, N tokens.
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
from tqdm.auto import tqdm

from ..models import score_trees
from ..ops import step_rewards, step_sums
from ..ranks import over_ranks, shares, sum_gradients
from .critic import critic_body
from .cycle import Comparison, pack_with_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import StepAgentConfig

MODEL_FILE, OPTIMIZER_FILE = "process_reward.safetensors", "process_reward_optimizer.pt"


class ProcessReward:
    """π_φ and its optimiser. Where the policy is an adapter, π_φ is another on the same base."""

    def __init__(self, policy: PreTrainedModel, args: StepAgentConfig, beta: float) -> None:
        self._args, self._beta = args, beta
        # Without dropout, as the log-probs of the policy that acted.
        self._model = critic_body(policy, "own").to(args.device).eval()
        self._optimizer = torch.optim.AdamW(
            self._trained().values(), lr=args.critic_learning_rate, weight_decay=0.0
        )

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def rewards(self, comparisons: Sequence[Comparison]) -> list[Tensor]:
        """(S,) float64 of each episode, as π_φ is now; every process has to call this.

        Raises:
            FloatingPointError: where one is not finite.
        """
        size = self._args.per_device_eval_batch_size

        def work(places: list[int]) -> list[Tensor]:
            found: list[Tensor] = []
            for batch in (places[i : i + size] for i in range(0, len(places), size)):
                chosen = [comparisons[i] for i in batch]
                rewards_S = self._of(chosen)[0].double().cpu()
                found += torch.split(rewards_S, [c.trunk.num_steps for c in chosen])
            return found

        found = over_ranks(work, [c.tokens for c in comparisons])
        if not all(bool(rewards_S.isfinite().all()) for rewards_S in found):
            raise FloatingPointError(
                "the process rewards must be finite, got NaN or infinity: lower "
                "critic_learning_rate. Checkpoints written so far are kept"
            )
        return found

    def _of(self, chosen: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
        """The step rewards (S,) of some episodes, and their sums (B,), with a gradient."""
        trees, steps = pack_with_steps(chosen, self._args.max_tokens)
        with self._autocast():
            logps_N = score_trees(self._model, trees)
        old_N = torch.from_numpy(np.concatenate([c.old_logps for c in chosen])).to(logps_N)
        rewards_S = step_rewards(
            *(steps.counting(logps_N), steps.counting(old_N), steps.offsets.to(logps_N.device)),
            beta=self._beta,
        )
        ends = torch.tensor([0, *(c.trunk.num_steps for c in chosen)]).cumsum(0)
        return rewards_S, step_sums(rewards_S, ends.to(logps_N.device))

    def _autocast(self) -> torch.autocast:
        """As the policy's log-probs were made: in another precision r would begin as its noise."""
        return torch.autocast(self._args.device.type, torch.bfloat16, enabled=self._args.bf16)

    # -- learning --------------------------------------------------------------------------------

    def fit(
        self, comparisons: Sequence[Comparison], returns_B: Tensor, groups_B: Tensor, cycle: int
    ) -> dict[str, float]:
        """``critic_epochs`` passes over the tasks whose episodes earned differently.

        Args:
            comparisons: episodes, one trajectory of the agent's each.
            returns_B: what they earned. groups_B: their tasks.

        Returns:
            Figures to log: the last pass's loss, and how often the better of two episodes had the
            larger q before this fit, which had not seen them (½ each where both are equal).
        """
        tasks = set(groups_B.tolist())
        groups = [torch.nonzero(groups_B == g).squeeze(1).tolist() for g in sorted(tasks)]
        groups = [group for group in groups if len(set(returns_B[group].tolist())) > 1]
        if not groups:
            return {}
        unseen_B = torch.stack([rewards_S.sum() for rewards_S in self.rewards(comparisons)])
        size = max(1, self._args.per_device_train_batch_size // max(map(len, groups)))
        size *= self._args.world_size
        losses: list[float] = []
        bar = range(self._args.critic_epochs)
        for epoch in tqdm(bar, desc="process reward", disable=self._args.disable_tqdm, leave=False):
            order = np.random.default_rng((self._args.seed, cycle, epoch)).permutation(len(groups))
            batches = [order[i : i + size] for i in range(0, len(order), size)]
            losses = [
                self._step(comparisons, returns_B, [groups[g] for g in batch]) for batch in batches
            ]
        margins_P = torch.cat([_margins(unseen_B[g], returns_B[g]) for g in groups])
        return {
            "process_reward_loss": float(np.mean(losses)),
            "process_reward_accuracy_unseen": float((margins_P.sign() / 2 + 0.5).mean()),
        }

    def _step(
        self, comparisons: Sequence[Comparison], returns_B: Tensor, groups: list[list[int]]
    ) -> float:
        """One update, on all pairs of some tasks.

        A pair's episodes are in one loss but not in one forward: ∂ loss / ∂ q is known from the
        values of q alone, and then q is differentiated, a few episodes at a time.
        """
        episodes = [i for group in groups for i in group]
        sums_B = torch.stack([r.sum() for r in self.rewards([comparisons[i] for i in episodes])])
        sums_B.requires_grad_(True)
        parts = torch.split(sums_B, [len(group) for group in groups])
        margins_P = torch.cat(
            [_margins(q_B, returns_B[g]) for q_B, g in zip(parts, groups, strict=True)]
        )
        loss = -F.logsigmoid(margins_P).mean()
        (slope_B,) = torch.autograd.grad(loss, sums_B)
        self._optimizer.zero_grad(set_to_none=True)
        mine = shares([comparisons[i].tokens for i in episodes], self._args.world_size)
        places, size = mine[self._args.process_index], self._args.per_device_train_batch_size
        for batch in (places[i : i + size] for i in range(0, len(places), size)):
            q_B = self._of([comparisons[episodes[place]] for place in batch])[1]
            (slope_B[batch].to(q_B) * q_B).sum().backward()  # type: ignore[no-untyped-call]
        sum_gradients(self._trained().values())
        self._optimizer.step()
        return float(loss.detach())

    # -- through a checkpoint --------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what is trained, and the optimiser's moments."""
        state = {name: p.detach().contiguous().cpu() for name, p in self._trained().items()}
        save_file(state, folder / MODEL_FILE)
        torch.save(self._optimizer.state_dict(), folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: where other weights were trained in that run.
        """
        for path in (folder / MODEL_FILE, folder / OPTIMIZER_FILE):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, so the run cannot be resumed from it")
        found, trained = load_file(folder / MODEL_FILE), self._trained()
        if {n: p.shape for n, p in found.items()} != {n: p.shape for n, p in trained.items()}:
            raise ValueError(
                f"{folder / MODEL_FILE} must hold the weights that the policy trains; resume with "
                "the model and the adapter of that run"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(found[name])
        moments = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        moments["param_groups"] = self._optimizer.state_dict()["param_groups"]  # of the arguments
        self._optimizer.load_state_dict(moments)


def _margins(q_B: Tensor, returns_B: Tensor) -> Tensor:
    """q of the better episode less that of the worse, of each pair that earned differently."""
    better, worse = torch.nonzero(returns_B[:, None] > returns_B[None], as_tuple=True)
    return q_B[better] - q_B[worse]
