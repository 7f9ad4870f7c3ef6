"""IPR (arXiv 2406.11176): what agent and expert make of each of the expert's states, compared.

    u o₁ a₁ o₂ a₂ o₃ a₃          the expert's trajectory
         │    └─ â₂ ô₃ â₃        the agent from its second state on: R, the final reward
         └─ â₁ ô₂ â₂             and r, the mean final reward of N continuations of â₂ by the
                                 frozen reference, beside that of a₂

The side that is better by both rewards is preferred from there on (`ipr_preference`). Over pairs,

    L = mean of −log σ(r_chosen − r_rejected) − w log π(chosen),  r = β Σ (log π − log π_ref)

with sums over the tokens of all actions from the step on, and π_ref the policy of the run's start.
One trajectory and all that the agent made of its states are one tree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from safetensors.numpy import load_file, save_file
from torch import Tensor

from ...acting.exploring import explore, up_to
from ...acting.rollout import continue_rollouts, env_seed
from ...ops import step_sums
from ...ranks import over_ranks
from ..cycle import CHOSEN, REJECTED, Comparison
from ..options.methods import IPROptions
from ..preferences import Judged, Thresholds, ipr_preference
from ..reference_policy import reference_of
from ..trajectory_pairs import Rival, compared_with
from .eto import preference_loss
from .method import Batch, Run
from .tasks import TaskMethod, gold, outcome

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...acting.policies import Policy
    from ...data.trunk import Trunk
    from ...records.episodes import Episode
    from ..collecting import Acting
    from ..config import StepAgentConfig

_VALUES = "ipr_expert_values.safetensors"  # of a checkpoint


class IPR(TaskMethod):
    """DPO on whole trajectories and on what follows a step, with the log-prob of what is chosen."""

    Options = IPROptions
    options: IPROptions
    whole_episodes = False  # it begins where the expert stood
    defaults: ClassVar[Mapping[str, Any]] = {"beta": 0.1, "temperature": 0.0}
    _expert_values: list[NDArray[np.float64]] | None  # (T,) each, of the first cycle

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        if args.samples != 1:
            raise ValueError(
                f"method='ipr' explores once from each state, got samples={args.samples}; "
                "continuations is the number of the reference's episodes"
            )
        super().check(args)

    @classmethod
    def check_run(
        cls, args: StepAgentConfig, *, env: bool, reference: bool, discriminator: bool
    ) -> None:
        super().check_run(args, env=env, reference=reference, discriminator=discriminator)
        if not reference:
            raise ValueError(
                "method='ipr' must have ref_model, the policy before training, by which step "
                "rewards are found and which stays the reference, got None"
            )

    def start(self, run: Run) -> None:
        """As `TaskMethod.start`; the demonstrations must be such as can be replayed."""
        super().start(run)
        for i, trajectory in enumerate(run.trajectories):
            env_seed(i, trajectory)
        self._expert_values = None

    def collect(self, acting: Acting, cycle: int) -> tuple[list[Comparison], dict[str, float]]:
        """Explore from the expert's states, find the step rewards, and pair."""
        assert self._run.reference is not None  # check_run
        explored = self._explored(acting)
        with reference_of(self._run.reference, acting.policy) as frozen:
            policy, alike = acting.another(
                frozen, temperature=1.0, seed=self.args.seed, system=self._system
            )
            if self._expert_values is None:
                self._expert_values = self._values_of_expert(policy, alike)
            values = self._values_of(policy, explored, alike)
        found = [self._rivals(i, explored[i], values) for i in range(len(explored))]
        kept = [self._fitting(i, rivals) for i, rivals in enumerate(found)]
        figures = self._figures(explored, found, kept)
        _warn(cycle, figures, self.args.max_tokens)
        pairs = [(i, rivals) for i, rivals in enumerate(kept) if rivals]
        return [compared_with(self._run.trunks[i], rivals) for i, rivals in pairs], figures

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over pairs of the preference, and ``nll_weight`` times −log π of the chosen."""
        loss, figures = preference_loss(batch, self.options.beta)
        if self.options.nll_weight and figures:
            logps_S = step_sums(batch.logps, batch.steps.offsets)
            nll_K = -batch.steps.side_sums(logps_S, CHOSEN, CHOSEN | REJECTED)
            loss = loss + self.options.nll_weight * nll_K.sum() / batch.total.pairs
            figures["chosen_nll"] = nll_K.detach()
        return loss, figures

    def save(self, folder: Path) -> None:
        if self._expert_values is not None:
            save_file({"values": np.concatenate(self._expert_values)}, folder / _VALUES)

    def load(self, folder: Path) -> None:
        """Without the file, as of a checkpoint before the first cycle, they are found again."""
        if (folder / _VALUES).exists():
            ends = np.cumsum([one.num_steps for one in self._run.trajectories])[:-1]
            self._expert_values = np.split(load_file(folder / _VALUES)["values"], ends)

    def _limits(self) -> dict[str, Any]:
        return {
            "max_steps": self.args.max_steps_per_episode,
            "action_format": self.args.action_format,
            "progress": not self.args.disable_tqdm,
        }

    def _explored(self, acting: Acting) -> list[list[Episode]]:
        """``[i][t]``, the agent from state t of demonstration i."""
        env, trajectories = self._run.env, self._run.trajectories
        assert env is not None  # needs_env
        agent, alike = acting.agent(self._system)

        def some(places: list[int]) -> list[list[Episode]]:
            own = [trajectories[i] for i in places]
            return explore(agent, env, own, places=places, **self._limits())

        found = over_ranks(some, [one.num_steps for one in trajectories], alike=alike)
        for i, (whole, *_) in enumerate(found):
            if whole.trunk is not None:
                self._check_begins(i, whole.trunk)
        return found

    def _values_of_expert(self, policy: Policy, alike: bool) -> list[NDArray[np.float64]]:
        lengths = [one.num_steps for one in self._run.trajectories]
        places = [(i, t) for i, T in enumerate(lengths) for t in range(1, T)]
        found = self._continued(policy, [(i, t, None) for i, t in places], alike)
        values = [np.full(T, np.nan) for T in lengths]  # the first step's is never asked for
        for (i, t), value in zip(places, found, strict=True):
            values[i][t] = value
        return values

    def _values_of(
        self, policy: Policy, explored: Sequence[Sequence[Episode]], alike: bool
    ) -> dict[tuple[int, int], float]:
        """By demonstration and step; of an action that is the expert's own, the expert's value."""
        assert self._expert_values is not None
        values, asked = {}, []
        for i, steps in enumerate(explored):
            for t, episode in enumerate(steps[1:], 1):
                told = acted(episode, t)
                if told is None:
                    continue
                if self._run.trunks[i].shared_steps(told[0]) > t:
                    values[i, t] = float(self._expert_values[i][t])
                else:
                    asked.append((i, t, episode))
        found = self._continued(policy, asked, alike)
        return values | {(i, t): r for (i, t, _), r in zip(asked, found, strict=True)}

    def _continued(
        self, policy: Policy, asked: Sequence[tuple[int, int, Episode | None]], alike: bool
    ) -> list[float]:
        """The mean reward of continuations after step t of an episode, or of demonstration i."""
        env, samples = self._run.env, self.options.continuations
        assert env is not None

        def some(chosen: list[int]) -> list[float]:
            picked = [asked[k] for k in chosen]
            demonstrations = self._run.trajectories
            found = continue_rollouts(
                policy,
                env,
                [demonstrations[i] if e is None else up_to(e, t) for i, t, e in picked],
                samples=samples,
                steps=[[t] for _, t, _ in picked],
                places=[i for i, *_ in picked],
                **self._limits(),
            )
            return [float(one.values[0]) for one in found]

        return over_ranks(some, np.ones(len(asked)), alike=alike)

    def _rivals(
        self, i: int, steps: Sequence[Episode], values: Mapping[tuple[int, int], float]
    ) -> list[Rival]:
        """What the agent made of the states of a demonstration, where one side is preferred."""
        assert self._expert_values is not None
        options, expert = self.options, self._run.trajectories[i]
        limits = Thresholds(
            options.trajectory_threshold, options.step_threshold, options.shorter_wins
        )
        rivals = []
        for t, episode in enumerate(steps):
            told = acted(episode, t)
            if told is None:
                continue
            trunk, reward = told
            side = ipr_preference(
                t,
                Judged(reward, values.get((i, t), math.nan), trunk.num_steps - t),
                Judged(gold(expert), float(self._expert_values[i][t]), expert.num_steps - t),
                limits,
            )
            if side is not None:
                rivals.append(Rival(trunk, preferred=side == "agent", first=t))
        return rivals

    def _fitting(self, i: int, rivals: Sequence[Rival]) -> list[Rival]:
        """As many as fit into one tree, without the longest."""
        kept = list(rivals)
        while kept and compared_with(self._run.trunks[i], kept).tokens > self.args.max_tokens:
            kept.remove(max(kept, key=lambda rival: len(rival.trunk.input_ids)))
        return kept

    def _figures(
        self,
        explored: Sequence[Sequence[Episode]],
        found: Sequence[Sequence[Rival]],
        kept: Sequence[Sequence[Rival]],
    ) -> dict[str, float]:
        by_step = [[acted(episode, t) for t, episode in enumerate(steps)] for steps in explored]
        told = [one for steps in by_step for one in steps if one is not None]
        whole = [steps[0][1] for steps in by_step if steps[0] is not None]
        pairs = [rival for rivals in kept for rival in rivals]
        paired = sum(map(len, found))
        return {
            "explorations": len(told),
            "explorations_without_reward": sum(map(len, explored)) - len(told),
            "rollout_reward": float(np.mean(whole)) if whole else math.nan,
            "pairs": len(pairs),
            "pairs_of_steps": sum(rival.first > 0 for rival in pairs),
            "pairs_agent_chosen": sum(rival.preferred for rival in pairs),
            "pairs_tied": len(told) - paired,
            "pairs_too_long": paired - len(pairs),
        }


def acted(episode: Episode, step: int) -> tuple[Trunk, float] | None:
    """As `outcome`; None too where the agent never came to act, as at a limit of steps."""
    told = outcome(episode)
    return told if told is not None and told[0].num_steps > step else None


def _warn(cycle: int, figures: Mapping[str, float], max_tokens: int) -> None:
    if figures["pairs_too_long"]:
        warnings.warn(
            f"cycle {cycle} leaves out {figures['pairs_too_long']} pairs: with them the tree of a "
            f"demonstration would have more than max_tokens={max_tokens}",
            RuntimeWarning,
            stacklevel=3,
        )
    if not figures["pairs"]:
        warnings.warn(
            f"cycle {cycle} has no pair to learn from, so nothing is learnt in it: of "
            f"{figures['explorations']} explorations {figures['pairs_tied']} were ties",
            RuntimeWarning,
            stacklevel=3,
        )
