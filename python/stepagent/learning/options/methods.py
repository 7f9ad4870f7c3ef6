"""The options of each method: a dataclass each, of what it shares with others and of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from .choices import (
    AGGREGATES,
    ANCHORS,
    BASELINES,
    BODIES,
    EXPLORERS,
    JUDGED_FORMS,
    KL_ESTIMATORS,
    KL_PLACES,
    RATIOS,
    Aggregate,
    Anchor,
    Baseline,
    DiscriminatorBody,
    Explores,
    JudgedForm,
    KLEstimator,
    KLPlace,
    Ratio,
)


@dataclass
class PairOptions:
    """Of methods that compare the agent's actions with the expert's."""

    sft_weight: float = field(
        default=0.0,
        metadata={"help": "adds this times the mean NLL of the expert's tokens to the loss"},
    )


@dataclass
class ImplicitOptions(PairOptions):
    """Of ``method="implicit"``."""

    beta: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "step reward = beta · log(policy / reference). Fully optimised cycles converge "
            "to the expert only for beta > 0.5, at once for beta = 1; default: 1, of eto and ipr "
            "0.1, of istar 0.05"
        },
    )


@dataclass
class DistillationOptions(PairOptions):
    """Of ``method="distillation"``, and of all that stay near the policy that acted."""

    clip: float = field(default=0.2, metadata={"help": "PPO's bound on the change of a ratio"})
    target_kl: float | None = field(
        default=None,
        metadata={"help": "skip the rest of a cycle once a batch has moved this far (nats a step)"},
    )


@dataclass
class PPOOptions(DistillationOptions):
    """Of methods whose step rewards PPO follows."""

    ratio: Ratio = field(
        default="step", metadata={"help": "one ratio per action or per token", "choices": RATIOS}
    )
    kl_coef: float = field(default=0.0, metadata={"help": "weight of the KL to the reference"})
    kl_estimator: KLEstimator = field(
        default="k3", metadata={"help": "of KL", "choices": KL_ESTIMATORS}
    )
    kl_in: KLPlace = field(
        default="loss",
        metadata={
            "help": "add the KL to the loss, or take it from the rewards (needs a ref_model)",
            "choices": KL_PLACES,
        },
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "takes this times the mean entropy of a token from the loss"}
    )


@dataclass
class SRLOptions(PPOOptions):
    """Of ``method="srl"``, and of all that can compare the samples of a state."""

    baseline: Baseline = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "what an action is compared with: the state's value (generalised advantage "
            "estimation; not of srl), or the other samples at its state (leave_one_out, group; "
            "needs samples); default: value, of srl group",
            "choices": BASELINES,
        },
    )


@dataclass
class DiscountOptions:
    """Of methods that follow what comes after a step."""

    gamma: float = field(default=0.95, metadata={"help": "discount per step of a rollout"})


@dataclass
class CriticOptions:
    """Of methods with a model that judges and learns as the policy does."""

    critic_learning_rate: float = field(
        default=3e-4,
        metadata={"help": "of discriminator, value function and process reward model, constant"},
    )
    critic_epochs: int = field(
        default=10, metadata={"help": "passes over a cycle's data, for each of them"}
    )


@dataclass
class ValueOptions(DiscountOptions, CriticOptions):
    """Of methods with a value function."""

    gae_lambda: float = field(default=0.95, metadata={"help": "of the advantages in rollouts"})


@dataclass
class InverseOptions(SRLOptions, ValueOptions):
    """Of ``method="inverse"``."""

    discriminator_body: DiscriminatorBody = field(
        default="own",
        metadata={
            "help": "what the discriminator reads with: a copy of the policy, all of it trained "
            "(own), with a LoRA adapter (adapter), or with its heads alone (frozen)",
            "choices": BODIES,
        },
    )
    discriminators: int = field(default=1, metadata={"help": "heads, each a discriminator"})
    discriminator_diversity: float = field(
        default=0.0,
        metadata={
            "help": "of several discriminators: the scale in nats of a fixed random function in "
            "each, which then also learns from a bootstrap of the trajectories of its own"
        },
    )
    reward_aggregate: Aggregate = field(
        default="pessimistic",
        metadata={
            "help": "of several discriminators' rewards the least (pessimistic), the mean, or the "
            "largest (optimistic)",
            "choices": AGGREGATES,
        },
    )
    reward_form: JudgedForm = field(
        default="agent",
        metadata={
            "help": "agent: -log D, the paper's; expert: log(1 - D); difference: their sum; iq: "
            "Q(s, a), where D judges Q less gamma times the next step's (needs states=agent)",
            "choices": JUDGED_FORMS,
        },
    )
    discriminator_smoothing: float = field(
        default=0.05, metadata={"help": "share of the other label, in [0, 0.5)"}
    )
    discriminator_penalty: float = field(
        default=0.0, metadata={"help": "weight of the squared gradient of the logits by the rows"}
    )
    discriminator_replay: int = field(
        default=1, metadata={"help": "earlier cycles that the discriminator still learns from"}
    )
    explorer: Explores = field(
        default="none",
        metadata={
            "help": "a second adapter that acts in every other rollout, follows the largest of the "
            "discriminators' rewards (optimistic) and is not saved with the model (needs "
            "states=agent, an adapter, diverse discriminators); or none",
            "choices": EXPLORERS,
        },
    )
    explorer_reset: int = field(
        default=2, metadata={"help": "cycles after which the explorer is set to the learner again"}
    )


@dataclass
class GroupOptions(PPOOptions):
    """Of ``method="grpo"``, and of all that compare the episodes of a task."""

    group_size: int = field(default=8, metadata={"help": "episodes of each task in a cycle"})
    scale_advantages: bool | None = field(
        default=None,
        metadata={
            "help": "divide by the deviation in a group, which weighs tasks that nearly all "
            "episodes solve, or fail, like others; default: of grpo and istar true, of gigpo false"
        },
    )


@dataclass
class StepShareOptions:
    """Of methods whose steps have an advantage of their own, beside the outcome's."""

    omega: float = field(
        default=1.0,
        metadata={"help": "weight of the steps' own advantage, beside that of the outcome"},
    )


@dataclass
class GiGPOOptions(GroupOptions, DiscountOptions, StepShareOptions):
    """Of ``method="gigpo"``."""

    anchor: Anchor = field(
        default="observation",
        metadata={
            "help": "which steps of a task are at one state: those with the same observation, or "
            "with the same history too",
            "choices": ANCHORS,
        },
    )


@dataclass
class IStarOptions(GroupOptions, CriticOptions, StepShareOptions):
    """Of ``method="istar"``."""

    beta: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "as of implicit, of the process reward model"},
    )


@dataclass
class OnlinePPOOptions(PPOOptions, ValueOptions):
    """Of ``method="ppo"``."""


@dataclass
class EarlyExperienceOptions:
    """Of ``method="early_experience"``."""

    world_weight: float = field(
        default=1.0,
        metadata={"help": "adds this times the mean NLL of the observations' tokens to the loss"},
    )


@dataclass
class ETOOptions:
    """Of ``method="eto"``."""

    beta: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "as of implicit, of whole trajectories"},
    )
    cut_rollouts: bool = field(
        default=True,
        metadata={
            "help": "cut a rejected rollout ten messages beyond the length of the demonstration "
            "(ETO does not in ALFWorld)"
        },
    )


@dataclass
class RFTOptions:
    """Of ``method="rft"``."""

    keep_reward: float | None = field(
        default=None,
        metadata={
            "help": "a rollout is kept that earned at least this; default: the reward of the "
            "demonstration, or 1 where it has none"
        },
    )


@dataclass
class IPROptions:
    """Of ``method="ipr"``."""

    beta: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "as of implicit, of what follows a step"},
    )
    continuations: int = field(
        default=5,
        metadata={"help": "of each action by the reference, whose mean reward is the step reward"},
    )
    trajectory_threshold: float = field(
        default=0.01,
        metadata={"help": "a side is preferred whose final reward is larger by more than this"},
    )
    step_threshold: float = field(
        default=0.01,
        metadata={"help": "and, after the first step, whose step reward is larger by more"},
    )
    shorter_wins: bool = field(
        default=False,
        metadata={
            "help": "an agent that has fewer steps left than the expert needs no larger final "
            "reward (IPR in ALFWorld)"
        },
    )
    nll_weight: float = field(
        default=1.0,
        metadata={"help": "adds this times the -log of the chosen side's probability to a pair"},
    )
