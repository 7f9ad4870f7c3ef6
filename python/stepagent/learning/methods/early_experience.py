"""Early Experience (arXiv 2510.08558): beside the expert's actions, what the agent's own lead to.

At each of the expert's states the agent's alternatives are tried in the environment, and the model
learns to predict what it shows next: implicit world modelling. No expert is asked, no reward is
used. The paper's other half, reflections on why the expert's action is better, needs a model that
can write them and is not here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ...acting.alternatives import Outcome, executed, texts_of, world_model_trunks
from ...acting.rollout import env_seed
from ...models.support import position_limit
from ...ranks import over_ranks
from ..cycle import Comparison
from ..options.methods import EarlyExperienceOptions
from .method import Batch, Method, Run

if TYPE_CHECKING:
    from ..config import StepAgentConfig


class EarlyExperience(Method):
    """Mean −log π of the expert's tokens + ``world_weight`` · mean −log π of the observations'."""

    Options = EarlyExperienceOptions
    options: EarlyExperienceOptions
    scores = ()
    needs_env = True
    _run: Run

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        if args.states != "expert":
            raise ValueError(
                "method='early_experience' tries alternatives at the expert's states, got "
                f"states={args.states!r}"
            )
        if args.scored_part != "all":
            raise ValueError(
                "scored_part must be 'all' with method='early_experience', whose observations have "
                f"no parts, got {args.scored_part!r}"
            )

    def start(self, run: Run) -> None:
        """What would fail in the first cycle fails here: seeds, and what the template writes."""
        for i, trajectory in enumerate(run.trajectories):
            env_seed(i, trajectory)
        first, steps = run.trajectories[0], run.trunks[0].num_steps
        probe = [[Outcome("an answer", "an observation", True, False)], *[[]] * (steps - 1)]
        world_model_trunks([first], run.trunks[:1], [probe], run.tokenizer)
        self._run = run

    def reflect(
        self, fresh: Sequence[Comparison], earlier: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        """Try what the agent would have done, and encode what came of it."""
        outcomes = self._outcomes(fresh)
        made = [self._fitting(i, steps) for i, steps in enumerate(outcomes)]
        told = [outcome for steps in outcomes for step in steps for outcome in step]
        kept = sum(int(one.observed.sum()) for one in made)
        valid = float(np.mean([o.valid for o in told])) if told else float("nan")
        return made, {
            "alternatives": len(told),
            "alternatives_valid": valid,
            "observations": kept,
        }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        observed_N = (~batch.steps.expert_S).repeat_interleave(batch.steps.offsets.diff())
        nll_N = -batch.logps[observed_N]
        world = nll_N.sum() / (
            batch.total.agent_tokens or 1
        )  # the tokens that are not the expert's
        return batch.nll() + self.options.world_weight * world, {"world_nll": nll_N.detach()}

    def _outcomes(self, fresh: Sequence[Comparison]) -> list[list[list[Outcome]]]:
        """Of the alternatives at each state; the processes of a run share the trajectories."""
        run, args = self._run, self.args
        env = run.env
        assert env is not None  # needs_env
        branches = [comparison.branches for comparison in fresh]
        answers = texts_of([c.trunk for c in fresh], branches, run.tokenizer)

        def tried(places: list[int]) -> list[list[list[Outcome]]]:
            return executed(
                env,
                [run.trajectories[i] for i in places],
                [answers[i] for i in places],
                progress=not args.disable_tqdm,
                action_format=args.action_format,
            )

        return over_ranks(tried, [c.trunk.num_steps**2 for c in fresh])

    def _fitting(self, i: int, steps: Sequence[Sequence[Outcome]]) -> Comparison:
        """A trajectory with as many alternatives at each state as there is room for; without any
        it fits, as the trainer has seen."""
        run, limit = self._run, position_limit(self._run.policy)
        given = max(map(len, steps))
        for most in range(given, -1, -1):
            kept = [step[:most] for step in steps]
            ((trunk, observed),) = world_model_trunks(
                run.trajectories[i : i + 1], run.trunks[i : i + 1], [kept], run.tokenizer
            )
            deepest = int(trunk.position_ids.max()) + 1
            if len(trunk.input_ids) <= self.args.max_tokens and deepest <= (limit or deepest):
                break
        if most < given:
            warnings.warn(
                f"train_dataset[{i}] keeps {most} of up to {given} alternatives at each state: "
                f"more would exceed max_tokens={self.args.max_tokens} or the model's positions",
                RuntimeWarning,
                stacklevel=2,
            )
        return replace(Comparison.demonstration(trunk), observed=observed)
