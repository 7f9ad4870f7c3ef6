"""A cycle's reflection in the inverse form: what a discriminator makes of the agent's steps.

Once a cycle, before the policy learns: discriminators are fitted to distinguish the agent's actions
from the expert's at the same states; their verdict is the reward of each of the agent's steps;
rewards become advantages, which the policy's update (PPO) then follows. All of it happens here,
between two updates of the policy, with an optimiser of its own.

StepAgent: arXiv 2411.03817. Several discriminators with a pessimistic or an optimistic aggregate:
after OPARL, arXiv 2312.15965, which does so with critics.

S steps of a cycle, A of them the agent's, P pairs of both at one state, E discriminators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..ops import step_sums
from ..ranks import over_ranks
from .advantages import group_relative, leave_one_out, standardised, step_gae
from .critic import StepCritic, StepReading, critic_body
from .cycle import (
    Comparison,
    StepTable,
    load_comparisons,
    pack_comparisons,
    pack_with_steps,
    save_comparisons,
)
from .judging import accuracy, calibration_error, collapsed
from .losses import discriminator_loss, inverse_step_reward, kl_terms
from .parts import StepParts
from .passes import BatchLoss, minimise
from .values import explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trees.tree import TokenTree
    from .config import StepAgentConfig
    from .options.choices import RewardForm

CRITIC_FILE, REPLAY_FILE = "critic.safetensors", "replay.safetensors"
OPTIMIZER_FILE = "critic_optimizer.pt"
_AGGREGATES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pessimistic": torch.amin,
    "mean": torch.mean,
    "optimistic": torch.amax,
}


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the discriminators make of a cycle.

    Attributes:
        steps: Of the cycle.
        agent_A: The agent's among them.
        logits_EA: Of D, as each discriminator judges the agent's steps.
        values_S: Of the states, by the body that the values were fitted on.
        before_SH, after_SH: The states' rows, of that body and of the one that they are fitted on
            next.
        kl_A: What the KL to the reference costs.
    """

    steps: StepTable
    agent_A: Tensor
    logits_EA: Tensor
    values_S: Tensor
    before_SH: Tensor
    after_SH: Tensor
    kl_A: Tensor | float


class InverseReflection:
    """The discriminators, the value function, their optimiser, and the cycles they remember."""

    actors: ClassVar[int] = 1  # who learn from the verdict, each with a value function of its own

    def __init__(
        self,
        policy: PreTrainedModel,
        args: StepAgentConfig,
        body: PreTrainedModel | None = None,
        parts: StepParts | None = None,
    ) -> None:
        """``body`` judges; None: what ``args.discriminator_body`` says.

        ``parts``: where its format has thoughts, actions are judged without them.
        """
        self._args = args
        self._parts = None if parts is None or parts.plain else parts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            self.critic = StepCritic(
                critic_body(policy, args.discriminator_body) if body is None else body,
                args.discriminators,
                args.discriminator_diversity,
                self.actors,
            ).to(args.device)  # where the policy is not yet, with FSDP
        self._optimizer = torch.optim.AdamW(
            self.critic.trained().values(), lr=args.critic_learning_rate, weight_decay=0.0
        )
        self._replay: list[Comparison] = []
        self._replayed: list[int] = []  # how many of them each remembered cycle left

    def prepare(
        self, comparisons: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        """The comparisons with the advantage of each of the agent's steps; and figures to log.

        Where every action equals the expert's, nothing is left to correct: all advantages are 0.

        Raises:
            ValueError: where no step has an action of both sides.
            FloatingPointError: where logits or values are not finite.
        """
        verdict, figures = self.judge(comparisons, cycle)
        rewards_A = self._aggregated(self._rewards(verdict.logits_EA))
        advantages_S, learnt = self.credit(verdict, rewards_A, cycle)
        self._remember(comparisons)
        return with_advantages(comparisons, advantages_S, verdict.steps), figures | learnt

    def judge(
        self, comparisons: Sequence[Comparison], cycle: int
    ) -> tuple[Verdict, dict[str, float]]:
        """Fit the discriminators; what they make of the cycle, and figures to log."""
        _, steps = pack_with_steps(comparisons, self._args.max_tokens)
        self._check_sides(steps, cycle)
        # The values are those of the body that they were fitted on: before it changes again.
        unseen_ES, values_S, before_SH = self._judge(comparisons, steps)
        loss = self._fit_discriminators([*comparisons, *self._replay], cycle)
        logits_ES, _, after_SH = self._judge(comparisons, steps)
        agent_A = torch.nonzero(~steps.expert_S).squeeze(1)
        rewards_EA = self._rewards(logits_ES[:, agent_A])
        rewards_A = self._aggregated(rewards_EA)
        figures = {
            "discriminator_loss": loss,
            **self._figures(unseen_ES, logits_ES, steps),
            "step_reward": float(rewards_A.mean()),
            "step_reward_std": float(rewards_A.std(correction=0)),
        }
        if len(rewards_EA) > 1:
            figures["discriminator_spread"] = float(rewards_EA.std(0, correction=0).mean())
        figures["discriminator_collapsed"] = collapsed(figures, cycle)
        kl_A = self._kl_penalty(comparisons, steps, agent_A)
        parts = agent_A, logits_ES[:, agent_A], values_S, before_SH, after_SH, kl_A
        return Verdict(steps, *parts), figures

    def credit(
        self, verdict: Verdict, rewards_A: Tensor, cycle: int, actor: int = 0
    ) -> tuple[Tensor, dict[str, float]]:
        """(S,) advantages for an actor that earns these rewards, and figures to log; its value
        function is then fitted to its returns."""
        steps, agent_A, values_S = verdict.steps, verdict.agent_A, verdict.values_S
        if actor:
            with torch.no_grad():
                values_S = self.critic.values(verdict.before_SH, actor).double().cpu()
        values_A = values_S[agent_A]
        advantages_A, returns_A = self._advantages(
            steps, agent_A, rewards_A - verdict.kl_A, values_A
        )
        if len(steps.same_P) and bool(steps.same_P.all()):
            advantages_A = torch.zeros_like(advantages_A)
        figures = {}
        if self._args.baseline == "value":
            figures["value_explained"] = explained(values_A, returns_A)
            self._fit_values(verdict.after_SH[agent_A], returns_A, cycle, actor)
        advantages_S = torch.zeros_like(values_S).index_copy(0, agent_A, advantages_A)
        return advantages_S.float(), figures

    def _check_sides(self, steps: StepTable, cycle: int) -> None:
        if not len(steps.expert_P):
            raise ValueError(
                f"cycle {cycle} has no step with an action of the expert and one of the agent: a "
                "discriminator cannot learn from one side alone"
            )

    def _figures(self, unseen_ES: Tensor, logits_ES: Tensor, steps: StepTable) -> dict[str, float]:
        """How well the discriminators judge, before and after this cycle's fit."""
        return {
            "discriminator_accuracy": accuracy(logits_ES, steps),
            "discriminator_accuracy_unseen": accuracy(unseen_ES, steps),
            "discriminator_calibration_error": calibration_error(logits_ES, steps),
        }

    def _remember(self, comparisons: Sequence[Comparison]) -> None:
        """Keep the latest cycles for the discriminators, the present one included."""
        if not self._args.discriminator_replay:
            return
        self._replay += comparisons
        self._replayed.append(len(comparisons))
        while len(self._replayed) > self._args.discriminator_replay:
            self._replay = self._replay[self._replayed.pop(0) :]

    # -- rewards and advantages ------------------------------------------------------------------

    def _rewards(self, logits_EA: Tensor) -> Tensor:
        """(E, A), the verdict of each discriminator."""
        form = cast("RewardForm", self._args.reward_form)
        return torch.stack([inverse_step_reward(logits_A, form=form) for logits_A in logits_EA])

    def _aggregated(self, rewards_EA: Tensor) -> Tensor:
        """Their verdict together: the least, the mean or the largest reward."""
        aggregate = _AGGREGATES[self._args.reward_aggregate]
        return aggregate(rewards_EA, 0)

    def rewards(self, comparisons: Sequence[Comparison], steps: StepTable) -> Tensor:
        """(S,) float64, of all actions as they are judged now, the expert's too; not scaled."""
        return self._aggregated(self._rewards(self._judge(comparisons, steps)[0]))

    def _kl_penalty(
        self, comparisons: Sequence[Comparison], steps: StepTable, agent_A: Tensor
    ) -> Tensor | float:
        """What the KL to the reference costs each of the agent's steps, where rewards pay it."""
        if self._args.kl_in != "reward" or not self._args.kl_coef:
            return 0.0
        old_N, ref_N = (_joined(comparisons, name) for name in ("old_logps", "ref_logps"))
        kl_N = steps.counting(kl_terms(old_N, ref_N, self._args.kl_estimator))
        kl_S = step_sums(kl_N, steps.offsets)
        return self._args.kl_coef * kl_S[agent_A]

    def _advantages(
        self, steps: StepTable, agent_A: Tensor, rewards_A: Tensor, values_A: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns of the agent's steps, from rewards of mean 0 and deviation 1.

        On a trajectory of the agent's a step's return is what follows; where its action was tried
        and not taken, what it leads to is not known, and it is a trajectory of its own.
        """
        raw_A, rewards_A = rewards_A, standardised(rewards_A)
        state_A = steps.state_S[agent_A]
        if self._args.baseline == "leave_one_out":
            return leave_one_out(rewards_A, state_A), rewards_A
        if self._args.baseline == "group":
            # Of the raw ones, whose size says which deviations are rounding.
            return group_relative(raw_A, state_A), rewards_A
        order_A, offsets = steps.agent_runs()
        advantages, returns = step_gae(
            rewards_A[order_A],
            values_A[order_A],
            offsets,
            gamma=self._args.gamma,
            lam=self._args.gae_lambda,
        )
        back_A = torch.argsort(order_A)
        return advantages[back_A], returns[back_A]

    # -- the critic ------------------------------------------------------------------------------

    @torch.no_grad()
    def _judge(
        self, comparisons: Sequence[Comparison], steps: StepTable
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (E, S) and values (S,) of all steps, float64 on the CPU; rows (S, H) of states."""
        size = self._args.per_device_eval_batch_size
        sizes = torch.bincount(steps.trunk_S, minlength=len(comparisons)).tolist()
        logps = torch.split(self._logps(comparisons, steps), sizes)
        seen = self._seen(comparisons)

        def judged(places: list[int]) -> list[tuple[Tensor, ...]]:
            found: list[tuple[Tensor, ...]] = []
            for batch in (places[i : i + size] for i in range(0, len(places), size)):
                reading = self._read([seen[i] for i in batch])
                logits_ES = self._verdicts(reading, torch.cat([logps[i] for i in batch]))
                values_S = self.critic.values(reading.state_SH)
                parts = [part.cpu() for part in (logits_ES.T, values_S, reading.state_SH)]
                rows = [sizes[i] for i in batch]
                found += zip(*(torch.split(part, rows) for part in parts), strict=True)
            return found

        columns = zip(*over_ranks(judged, [c.tokens for c in seen]), strict=True)
        logits_SE, values_S, state_SH = (torch.cat(parts) for parts in columns)
        logits_ES, values_S = logits_SE.T.double(), values_S.double()
        if not bool(logits_ES.isfinite().all() and values_S.isfinite().all()):
            raise FloatingPointError(
                "the logits and values of the critic must be finite, got NaN or infinity; lower "
                "critic_learning_rate. Checkpoints written so far are kept"
            )
        return logits_ES, values_S, state_SH.to(self._args.device)

    def _seen(self, comparisons: Sequence[Comparison]) -> Sequence[Comparison]:
        """What discriminators read: the comparisons, or their actions alone without thoughts."""
        return comparisons if self._parts is None else self._parts.alone(comparisons)

    def _read(
        self, seen: Sequence[Comparison], trees: Sequence[TokenTree] | None = None
    ) -> StepReading:
        """The critic's reading of each step of what it sees.

        Args:
            trees: of the same comparisons, with their thoughts, where they are packed already.
        """
        if self._parts is None:
            return self.critic.read(trees or pack_comparisons(seen, self._args.max_tokens))
        # The trunk's own actions come once more, alone, beside its line: so much more room.
        room = max(self._args.max_tokens, *(c.tokens for c in seen))
        trees = pack_comparisons(seen, room)
        branch_S = torch.cat([torch.from_numpy(tree.step_branch) for tree in trees])
        return self.critic.read(trees).at(torch.nonzero(branch_S > 0).squeeze(1))

    def _logps(self, comparisons: Sequence[Comparison], steps: StepTable) -> Tensor:
        """(S,) log π of each action, under the policy that acted."""
        return step_sums(steps.counting(_joined(comparisons, "old_logps")), steps.offsets)

    def _verdicts(self, reading: StepReading, logp_S: Tensor) -> Tensor:
        """(E, S) of what rewards are made.

        How likely an action is whatever the thought is not known, so heads learn all there.
        """
        return self.critic.logits(reading, logp_S if self._parts is None else None)

    def _fit_discriminators(self, comparisons: Sequence[Comparison], cycle: int) -> float:
        """Passes over the comparisons; the mean loss of the last."""
        seen, weight_KE = self._seen(comparisons), self._bootstrap(len(comparisons), cycle)

        def loss(batch: list[int]) -> tuple[Tensor | None, int]:
            chosen = [comparisons[i] for i in batch]
            trees, steps = pack_with_steps(chosen, self._args.max_tokens)
            if not len(steps.expert_P):
                return None, 0  # the expert had no answer at any of these states
            pairs_K = torch.cat([steps.expert_P, steps.agent_P])
            logp_K = self._logps(chosen, steps)[pairs_K]
            reading = self._read([seen[i] for i in batch], trees).at(pairs_K)
            weight_PE = weight_KE[batch][steps.trunk_S[steps.expert_P]]
            return self._discriminator_loss(reading, logp_K, weight_PE), len(steps.expert_P)

        return self._minimise(len(comparisons), loss, (cycle, 0), "discriminator")

    def _bootstrap(self, count: int, cycle: int) -> Tensor:
        """(count, E) how often each discriminator learns from each trajectory, this cycle's first
        and then the remembered ones', which keep theirs: once, or by a Poisson law of mean 1 where
        they are to be diverse, the bootstrap that needs no sample of the whole."""
        heads = self._args.discriminators
        if not self._args.discriminator_diversity:
            return torch.ones(count, heads, dtype=torch.long)
        before = cycle - len(self._replayed)
        sizes = [count - sum(self._replayed), *self._replayed]
        draws = [
            np.random.default_rng((self._args.seed, of, 2)).poisson(1.0, (size, heads))
            for of, size in zip([cycle, *range(before, cycle)], sizes, strict=True)
        ]
        return torch.from_numpy(np.concatenate(draws))

    def _discriminator_loss(
        self, reading: StepReading, logp_K: Tensor, weight_PE: Tensor
    ) -> Tensor:
        """The mean over discriminators, and a penalty λ/2 E‖∂ logit / ∂ row‖² (R1, 1801.04406).

        Args:
            reading: of the expert's actions of all pairs, then of the agent's.
            weight_PE: how often each discriminator learns from each pair.
        """
        smoothing, rows_KH = self._args.discriminator_smoothing, self._followed(reading)
        logits_EK = self._verdicts(reading, logp_K.to(rows_KH.device))
        expert_EP, agent_EP = logits_EK.chunk(2, dim=1)
        losses = []
        for expert_P, agent_P, weight_P in zip(expert_EP, agent_EP, weight_PE.T, strict=True):
            own = torch.arange(len(weight_P)).repeat_interleave(weight_P).to(expert_P.device)
            if len(own):
                loss = discriminator_loss(expert_P[own], agent_P[own], smoothing=smoothing)
                losses.append(loss * (len(own) / len(weight_P)))
        if not losses:  # no discriminator has drawn any of these
            losses.append(0.0 * logits_EK.sum())
        return torch.stack(losses).sum() / len(expert_EP) + self._slope(logits_EK, rows_KH)

    def _followed(self, reading: StepReading) -> Tensor:
        """The rows of the actions, which `_slope` can differentiate by where there is a penalty."""
        rows_KH = reading.action_SH
        if self._args.discriminator_penalty and not rows_KH.requires_grad:
            rows_KH.requires_grad_(True)
        return rows_KH

    def _slope(self, verdicts_EK: Tensor, rows_KH: Tensor) -> Tensor | float:
        """The penalty, λ/2 times the mean of the verdicts' squared gradient by the rows."""
        penalty = self._args.discriminator_penalty
        if not penalty:
            return 0.0
        (slope_KH,) = torch.autograd.grad(verdicts_EK.sum(), rows_KH, create_graph=True)
        return penalty / 2 * (slope_KH**2).sum(-1).mean()

    def _fit_values(self, state_AH: Tensor, returns_A: Tensor, cycle: int, actor: int) -> None:
        """Least squares of the states' values on the returns; the rows are constants."""
        returns_A = returns_A.to(state_AH)

        def loss(batch: list[int]) -> tuple[Tensor, int]:
            values_A = self.critic.values(state_AH[batch], actor)
            return F.mse_loss(values_A, returns_A[batch]), len(batch)

        self._minimise(len(state_AH), loss, (cycle, 1), "value")

    def _minimise(self, count: int, loss: BatchLoss, seed: tuple[int, int], label: str) -> float:
        """``critic_epochs`` passes of the critic's optimiser; the mean loss of the last."""
        trained = self.critic.trained().values()
        return minimise(self._optimizer, trained, count, loss, self._args, seed, label)

    # -- through a checkpoint --------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what is trained, the optimiser's moments and the remembered cycles."""
        trained = self.critic.trained().items()
        fixed = json.dumps(self.critic.fixed_sums())
        save_file(
            {f"critic.{name}": p.detach().contiguous().cpu() for name, p in trained},
            folder / CRITIC_FILE,
            metadata={"fixed_sums": fixed, "replayed": json.dumps(self._replayed)},
        )
        torch.save(self._optimizer.state_dict(), folder / OPTIMIZER_FILE)
        if self._replay:
            save_comparisons(folder / REPLAY_FILE, self._replay, {})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: where the weights that are not trained are not those of the run, or others
                are trained.
        """
        for path in (folder / CRITIC_FILE, folder / OPTIMIZER_FILE):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, so the run cannot be resumed from it")
        with safe_open(folder / CRITIC_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if json.loads(metadata["fixed_sums"]) != self.critic.fixed_sums():
            raise ValueError(
                f"{folder} was written with another model to begin with: the discriminator's fixed "
                "weights are those of the model given, so resume with the same one"
            )
        trained = self.critic.trained()
        shapes = {f"critic.{name}": p.shape for name, p in trained.items()}
        if {name: value.shape for name, value in tensors.items()} != shapes:
            raise ValueError(
                f"{folder / CRITIC_FILE} must hold the weights that discriminator_body="
                f"{self._args.discriminator_body!r} trains; resume with the options of that run"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[f"critic.{name}"])
        moments = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        moments["param_groups"] = self._optimizer.state_dict()["param_groups"]  # of the arguments
        self._optimizer.load_state_dict(moments)
        self._replayed = json.loads(metadata["replayed"])
        self._replay = load_comparisons(folder / REPLAY_FILE)[0] if self._replayed else []


def with_advantages(
    comparisons: Sequence[Comparison], advantages_S: Tensor, steps: StepTable
) -> list[Comparison]:
    """The comparisons, each with those of its steps."""
    sizes = torch.bincount(steps.trunk_S, minlength=len(comparisons)).tolist()
    return [
        replace(c, advantages=part.numpy())
        for c, part in zip(comparisons, torch.split(advantages_S, sizes), strict=True)
    ]


def _joined(comparisons: Sequence[Comparison], name: str) -> Tensor:
    """(N,) float64, the scores of all comparisons' tokens."""
    return torch.from_numpy(np.concatenate([getattr(c, name) for c in comparisons])).double()
