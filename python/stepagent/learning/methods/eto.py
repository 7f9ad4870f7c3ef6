"""ETO (arXiv 2403.02502): explore, compare with the demonstrations, prefer the better trajectory.

Each cycle the agent acts in the demonstrations' tasks, and what it did there is paired with what
the expert did. With r = β Σ (log π − log π_ref) over the assistant's tokens of a trajectory,

    L = mean over pairs of −log σ(r_chosen − r_rejected)

and π_ref the policy where the cycle began. What both sides begin with cancels, and is encoded once.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ...ops import step_rewards
from ..cycle import CHOSEN, REJECTED, Comparison
from ..figures import trajectory_figures
from ..losses import implicit_step_loss
from ..options.methods import ETOOptions
from ..trajectory_pairs import trajectory_pair
from .method import Batch
from .tasks import ROUNDING, TaskMethod, gold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.trunk import Trunk
    from ..collecting import Acting

MESSAGES_BEYOND = 10  # of a rejected rollout, more than the demonstration has


@dataclass(frozen=True)
class Preference:
    """Which side is chosen, and how many steps of the rollout are compared."""

    chosen: Literal["expert", "agent"]
    rollout_steps: int


def preference(
    expert_reward: float,
    agent_reward: float,
    *,
    expert_messages: int,
    agent_steps: int,
    cut: bool = True,
) -> Preference | None:
    """ETO's rule for a demonstration and a rollout of its task; None for a tie.

    A rejected rollout is cut to ten messages more than the demonstration has. As a message of the
    environment that comes last then falls away, each side ends with the assistant's.

    Args:
        expert_messages: those of the demonstration, without a system message.
        agent_steps: those of the rollout, each a message to the agent and its answer.
        cut: whether to cut at all: ETO does not in ALFWorld.
    """
    if math.isclose(agent_reward, expert_reward, rel_tol=0, abs_tol=ROUNDING):
        return None
    if agent_reward > expert_reward:
        return Preference("agent", agent_steps)
    most = (expert_messages + MESSAGES_BEYOND) // 2 if cut else agent_steps
    return Preference("expert", min(agent_steps, most))


class ETO(TaskMethod):
    """DPO on pairs of whole trajectories: the demonstration's and the agent's own."""

    Options = ETOOptions
    options: ETOOptions
    defaults: ClassVar[Mapping[str, Any]] = {"beta": 0.1, "temperature": 0.0}

    def collect(self, acting: Acting, cycle: int) -> tuple[list[Comparison], dict[str, float]]:
        """Act in the demonstrations' tasks, and pair what was done with what the expert did."""
        rollouts, figures = self.rollouts(acting)
        pairs, ties, too_long, swapped = [], 0, 0, 0
        for i, of_task in enumerate(rollouts):
            for trunk, reward in of_task:
                preferred = self._preference(i, trunk, reward)
                if preferred is None:
                    ties += 1
                    continue
                pair = self._pair(i, trunk, preferred)
                if pair.tokens > self.args.max_tokens:
                    too_long += 1
                    continue
                swapped += preferred.chosen == "agent"
                pairs.append(pair)
        _warn(cycle, len(pairs), ties, too_long, self.args.max_tokens)
        return pairs, figures | {
            "pairs": len(pairs),
            "pairs_agent_chosen": swapped,
            "pairs_tied": ties,
            "pairs_too_long": too_long,
        }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over pairs of −log σ of the difference of their rewards."""
        return preference_loss(batch, self.options.beta)

    @classmethod
    def items(cls, args: Any, demonstrations: int) -> int:
        return demonstrations * int(args.samples)

    def _preference(self, i: int, trunk: Trunk, reward: float) -> Preference | None:
        demonstration = self._run.trajectories[i]
        return preference(
            gold(demonstration),
            reward,
            expert_messages=sum(m["role"] != "system" for m in demonstration.messages),
            agent_steps=trunk.num_steps,
            cut=self.options.cut_rollouts,
        )

    def _pair(self, i: int, trunk: Trunk, preferred: Preference) -> Comparison:
        expert, agent = self._run.trunks[i], trunk.first_steps(preferred.rollout_steps)
        if preferred.chosen == "expert":
            return trajectory_pair(expert, agent)
        return trajectory_pair(agent, expert)


def preference_loss(batch: Batch, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's share of −log σ(r_chosen − r_rejected) over pairs of trajectories; figures."""
    steps = batch.steps
    if not steps.trajectory_pairs:
        return batch.logps.sum() * 0.0, {}  # nothing was compared: a zero, still connected
    rewards_S = step_rewards(batch.logps, batch.scores["ref_logps"], steps.offsets, beta=beta)
    chosen_K, rejected_K = (steps.side_sums(rewards_S, side) for side in (CHOSEN, REJECTED))
    loss = implicit_step_loss(chosen_K, rejected_K).sum() / batch.total.pairs
    return loss, trajectory_figures(rewards_S.detach(), batch.logps.detach(), steps)


def _warn(cycle: int, pairs: int, ties: int, too_long: int, max_tokens: int) -> None:
    if too_long:
        warnings.warn(
            f"cycle {cycle} leaves out {too_long} pairs of more than max_tokens={max_tokens}",
            RuntimeWarning,
            stacklevel=3,
        )
    if not pairs:
        warnings.warn(
            f"cycle {cycle} has no pair to learn from, so nothing is learnt in it: {ties} rollouts "
            "earned what the demonstration did, the others have no reward or are too long",
            RuntimeWarning,
            stacklevel=3,
        )
