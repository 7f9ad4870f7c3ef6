"""What a run asks of a way to learn from an expert.

A cycle goes so; a method answers what is in brackets:

    the agent acts            [acts: or are the demonstrations enough? collect: where, and how]
    its actions are scored    [scores: which log-probs of them are wanted?]
    reflect                   [what is learnt from now, made of the cycle's comparisons]
    per batch: forward, loss  [loss: of the log-probs of all actions of the batch]
    held-out trajectories     [measure: figures of the policy there]
    a checkpoint              [save, load: what the method itself has learnt]

The trainer does the rest: acting, scoring, trees, batches, processes, schedules, checkpoints.

S steps of a batch, N their tokens, P pairs of an expert's and an agent's step at one state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..averages import Counts
from ..cycle import TOKEN_SCORES, Comparison, StepTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...data.trajectory import Trajectory
    from ...data.trunk import Trunk
    from ...envs.pool import EnvFactory
    from ..collecting import Acting
    from ..config import StepAgentConfig
    from ..scoring import Scorer

REWARDS = ("expert_reward", "agent_reward", "reward_margin", "reward_accuracy")
SIDES = ("expert_logp", "agent_logp", "expert_length", "agent_length", "identical_pairs")


@dataclass
class NoOptions:
    """Of a method that has none of its own."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a method can build its own parts from, where training starts.

    Attributes:
        trajectories, trunks: The demonstrations, and their tokens.
        env: What the agent acts in; None where the run has none.
        discriminator: A model that the caller gave to judge with, or None.
        reference: The fixed reference, or None where each cycle has its own.
        scorer: Log-probs as training computes them.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trajectories: Sequence[Trajectory]
    trunks: Sequence[Trunk]
    env: str | EnvFactory | None = None
    discriminator: PreTrainedModel | None = None
    reference: PreTrainedModel | None = None
    scorer: Scorer | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch under the policy as it is now, on the device of the log-probs.

    Attributes:
        logps: (N,) log-probs of the tokens of all steps that count (``scored_part``), with a
            gradient in training.
        entropy: (N,) of the policy at each token; None unless the method's ``entropy`` is true.
        scores: (N,) ``ref_logps`` and ``old_logps`` as the method's ``scores`` ask, (S,)
            ``advantages`` as its ``reflect`` left them; empty where they were not.
        steps: Which tokens are a step's, whose it is, which are compared.
        total: What means are over: the counts of the whole optimiser's step. A batch's loss is its
            own sum divided by these.
    """

    logps: Tensor
    entropy: Tensor | None
    scores: Mapping[str, Tensor]
    steps: StepTable
    total: Counts

    @classmethod
    def of(
        cls,
        logps_N: Tensor,
        entropy_N: Tensor | None,
        scores: Mapping[str, Tensor],
        steps: StepTable,
        total: Counts,
    ) -> Batch:
        """From values of all scored tokens: those of the tokens that count."""
        kept = {
            name: steps.counting(values) if name in TOKEN_SCORES and len(values) else values
            for name, values in scores.items()
        }
        entropy_N = None if entropy_N is None else steps.counting(entropy_N)
        return cls(steps.counting(logps_N), entropy_N, kept, steps, total)

    def nll(self) -> Tensor:
        """The share of the mean −log π over the tokens of the expert's actions."""
        return self.steps.expert_nll(self.logps, self.total.expert_tokens)


class Method:
    """A way to learn from an expert: subclass it, and change what differs.

    Attributes:
        Options: A dataclass of what can be set; an instance is ``self.options``. Its fields are
            options of `StepAgentConfig` where they are of a method of this package, and keys of
            ``method_options`` elsewhere.
        acts: The agent acts in every cycle; without, ``num_train_epochs`` passes over the
            demonstrations.
        explores: It has the agent act in its own way, in `collect`, and not at the states that
            ``states`` names.
        whole_episodes: In `collect` it takes `Acting.episodes`, whatever ``states`` is: there is
            something for ``save_rollouts``.
        scores: Which log-probs of all actions are made where a cycle begins: ``"ref_logps"``, under
            the reference, and ``"old_logps"``, under the policy that acted. A method with any
            compares the policy with itself, so its noise (dropout) is turned off.
        defaults: Of options of `RunOptions` or of its own that are None unless given.
        figures: What `measure` returns at most.
        takes_discriminator: It is given a model that judges.
        needs_answers: It learns from the expert's answers at the agent's states.
        needs_env: It uses the run's environment, at whosever states.
        entropy: Its loss needs the entropies of the policy.
        target_kl: Where the figure ``kl`` exceeds this, the rest of the cycle is skipped.
    """

    Options: ClassVar[type] = NoOptions
    acts: ClassVar[bool] = True
    explores: ClassVar[bool] = False
    whole_episodes: ClassVar[bool] = False
    scores: ClassVar[tuple[str, ...]] = ("ref_logps",)
    defaults: ClassVar[Mapping[str, Any]] = {}
    figures: ClassVar[tuple[str, ...]] = ()
    takes_discriminator: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = True
    needs_env: ClassVar[bool] = False
    entropy: bool = False
    target_kl: float | None = None

    def __init__(self, args: StepAgentConfig) -> None:
        self.args = args
        self.options: Any = self.options_of(args)

    @classmethod
    def options_of(cls, args: StepAgentConfig) -> Any:
        """Its options, by the values of a configuration."""
        own: Mapping[str, Any] = args.method_options or {}  # type: ignore[assignment]
        known = [f.name for f in fields(cls.Options) if f.init]
        flat = {name: getattr(args, name) for name in known if hasattr(args, name)}
        strange = [name for name in own if name not in known or name in flat]
        if strange:
            free = [name for name in known if name not in flat]
            raise ValueError(
                f"method_options must be of {free} for method={args.method!r}, got {strange[0]!r}"
            )
        return cls.Options(**flat, **own)

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        """Refuse options that contradict each other, by a ValueError."""

    @classmethod
    def check_run(
        cls, args: StepAgentConfig, *, env: bool, reference: bool, discriminator: bool
    ) -> None:
        """Refuse to train without what the method needs, or with what it would not use.

        Args:
            env, reference, discriminator: which of them were given.
        """
        if cls.needs_env and not env:
            raise ValueError(
                f"method={args.method!r} must have env, an environment name or factory, got None"
            )
        if reference and not cls.scores:
            raise ValueError(f"ref_model is given, but method={args.method!r} has no reference")
        if discriminator and not cls.takes_discriminator:
            raise ValueError(f"discriminator is given, but method={args.method!r} has none")

    @classmethod
    def moving(cls, fixed_reference: bool) -> tuple[str, ...]:
        """Those of ``figures`` that cycles cannot be compared by, as their yardstick changes."""
        return ()

    @classmethod
    def items(cls, args: StepAgentConfig, demonstrations: int) -> int:
        """The comparisons that an epoch goes through, at most."""
        at_expert = 0 if args.states == "agent" else demonstrations
        return at_expert + args.rolls_out * (args.rollouts or demonstrations)

    @classmethod
    def pairs_held_out(cls) -> bool:
        """Whether an evaluation compares what the agent does at held-out states."""
        return bool(cls.scores) and not cls.explores

    def start(self, run: Run) -> None:
        """Build what the method has of its own. Training starts after it, or a checkpoint is
        loaded."""

    def collect(self, acting: Acting, cycle: int) -> tuple[list[Comparison], dict[str, float]]:
        """What is compared in a cycle, before it is scored, and figures to log.

        Called in every process, and has the same to return in each.
        """
        return acting.compared(), acting.collector.figures()

    def reflect(
        self, fresh: Sequence[Comparison], earlier: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        """What is learnt from until the next cycle, and figures to log.

        Called in every process; what the first one returns is what all learn from.

        Args:
            fresh: What the agent did in this cycle, with the ``scores`` asked for.
            earlier: What was learnt from before: at first the demonstrations.
        """
        return list(fresh), {}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the step's loss, and figures whose means the cycle logs."""
        raise NotImplementedError(f"{type(self).__name__} must have a loss")

    def measure(self, batch: Batch, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        """Figures of held-out trajectories, whose means an evaluation logs beside ``nll``."""
        return {}

    def save(self, folder: Path) -> None:
        """Write what the method itself has learnt into a checkpoint."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
