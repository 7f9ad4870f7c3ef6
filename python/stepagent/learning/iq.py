"""The IQ form of the discriminator (InversePRM, arXiv 2502.10325): consequences are judged.

Whole trajectories are told apart, the demonstrations and the agent's rollouts. The head is a value
of actions, Q, and what a step adds to it is how it differs from the next step's on its trajectory:

    logit of P(expert | s_t, a_t) = Q(s_t, a_t) − γ Q(s_{t+1}, a_{t+1}),    Q = 0 after the last

Read as a reward r_t, its discounted sum from t on is Q(s_t, a_t) again: Q already holds what
follows. So the step reward of the policy is Q(s, a), and each action is a trajectory of its own: to
discount rewards Q along a rollout would count what follows twice. With γ = 0 the reward is the
``difference`` form's, of a head alone: the known log π is of one action, and not of what follows.

What the expert answers at the agent's states has no successor there, and is not learnt from.

S steps, E discriminators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .advantages import standardised
from .critic import StepReading
from .cycle import Comparison, StepTable, pack_with_steps
from .inverse import InverseReflection
from .judging import accuracy, calibration_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.trunk import Trunk
    from .config import StepAgentConfig


def logits_along(q_ES: Tensor, trunk_S: Tensor, gamma: float) -> Tensor:
    """(E, S) logits of D = P(agent | s, a) of trajectories one after the other: γ Q' − Q.

    Args:
        q_ES: Q of the steps, in the order of their trajectories.
        trunk_S: the trajectory of each step.
    """
    followed_S = F.pad(trunk_S[1:] == trunk_S[:-1], (0, 1))
    return gamma * F.pad(q_ES[:, 1:], (0, 1)) * followed_S - q_ES


class IQReflection(InverseReflection):
    """As `InverseReflection`, with Q in the place of the logits of single actions."""

    def __init__(
        self,
        policy: PreTrainedModel,
        args: StepAgentConfig,
        body: PreTrainedModel | None = None,
        *,
        demonstrations: Sequence[Trunk],
    ) -> None:
        super().__init__(policy, args, body)
        self._demonstrations = [Comparison.demonstration(trunk) for trunk in demonstrations]

    def _check_sides(self, steps: StepTable, cycle: int) -> None:
        """There are demonstrations and rollouts; no state needs both."""

    def _logps(self, comparisons: Sequence[Comparison], steps: StepTable) -> Tensor:
        return torch.zeros(len(steps.trunk_S))  # not a part of Q, and demonstrations have none

    def _verdicts(self, reading: StepReading, logp_S: Tensor) -> Tensor:
        """(E, S) Q, the heads alone."""
        return self.critic.heads(reading)

    def _rewards(self, logits_EA: Tensor) -> Tensor:
        return logits_EA

    def _advantages(
        self, steps: StepTable, agent_A: Tensor, rewards_A: Tensor, values_A: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Q less the state's value, which is fitted on Q; Q with mean 0 and deviation 1."""
        returns_A = standardised(rewards_A)
        return returns_A - values_A, returns_A

    def _figures(self, unseen_ES: Tensor, logits_ES: Tensor, steps: StepTable) -> dict[str, float]:
        """How well demonstrations and rollouts are told apart, after this cycle's fit."""
        agent_A = torch.nonzero(~steps.expert_S).squeeze(1)
        _, own = pack_with_steps(self._demonstrations, self._args.max_tokens)
        shown_ES = self._judge(self._demonstrations, own)[0]
        sides = (
            (shown_ES, own.trunk_S),
            (logits_ES[:, agent_A], steps.trunk_S[agent_A]),
        )
        gamma = self._args.gamma
        logits_EK = torch.cat([logits_along(q_ES, trunk_S, gamma) for q_ES, trunk_S in sides], 1)
        places = torch.arange(logits_EK.shape[1])
        shown = len(own.trunk_S)
        both = replace(own, expert_P=places[:shown], agent_P=places[shown:])
        return {
            "discriminator_accuracy": accuracy(logits_EK, both),
            "discriminator_calibration_error": calibration_error(logits_EK, both),
        }

    def _fit_discriminators(self, comparisons: Sequence[Comparison], cycle: int) -> float:
        """Passes over demonstrations and rollouts; the mean loss of the last.

        Each side has half of the weight, however many steps it has: over all trajectories the loss
        is that of `discriminator_loss`.
        """
        rollouts = [Comparison(c.trunk, [[] for _ in c.branches], False) for c in comparisons]
        both = [*self._demonstrations, *rollouts]
        shown, acted = (
            sum(c.trunk.num_steps for c in part) for part in (self._demonstrations, rollouts)
        )
        smoothing = self._args.discriminator_smoothing

        def loss(batch: list[int]) -> tuple[Tensor, int]:
            chosen = [both[i] for i in batch]
            trees, steps = pack_with_steps(chosen, self._args.max_tokens)
            reading = self.critic.read(trees)
            rows_SH = self._followed(reading)
            q_ES, trunk_S = self.critic.heads(reading), steps.trunk_S.to(rows_SH.device)
            logits_ES = logits_along(q_ES, trunk_S, self._args.gamma)
            expert_S = torch.tensor([c.expert_trunk for c in chosen]).to(trunk_S.device)[trunk_S]
            agent_S = torch.where(expert_S, smoothing, 1 - smoothing).to(q_ES)
            weight_S = torch.where(expert_S, (shown + acted) / shown, (shown + acted) / acted)
            mean = F.binary_cross_entropy_with_logits(
                logits_ES, agent_S.expand_as(logits_ES), weight_S.to(q_ES)
            )
            return mean + self._slope(q_ES, rows_SH), len(expert_S)

        return self._minimise(len(both), loss, (cycle, 0), "discriminator")
