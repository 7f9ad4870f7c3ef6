"""StepAgent's own training options: names, types, defaults, choices, and what each is for.

They stand apart from transformers' TrainingArguments, which `stepagent.StepAgentConfig`
adds, so that the command line can list and check them without importing transformers or torch.
`RunOptions` are of every method; each method of `learning/methods/` has a dataclass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from ..acting.named_askers import ASKS, Ask
from ..data.actions import FormatName

Method: TypeAlias = Literal[
    "sft",
    "dagger",
    "implicit",
    "inverse",
    "early_experience",
    "srl",
    "distillation",
    "eto",
    "rft",
    "ipr",
    "grpo",
    "gigpo",
    "istar",
    "ppo",
]
States: TypeAlias = Literal["expert", "agent", "mixed"]
Baseline: TypeAlias = Literal["value", "leave_one_out", "group"]
Aggregate: TypeAlias = Literal["pessimistic", "mean", "optimistic"]
Explores: TypeAlias = Literal["none", "optimistic"]
KLPlace: TypeAlias = Literal["loss", "reward"]
ModelDtype: TypeAlias = Literal["float32", "bfloat16", "float16", "checkpoint"]
DiscriminatorBody: TypeAlias = Literal["own", "adapter", "frozen"]
RewardForm: TypeAlias = Literal["agent", "expert", "difference"]
JudgedForm: TypeAlias = Literal["agent", "expert", "difference", "iq"]
Ratio: TypeAlias = Literal["step", "token"]
KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]
ScoredPart: TypeAlias = Literal["all", "action", "thought"]
Anchor: TypeAlias = Literal["observation", "history"]

METHODS: tuple[Method, ...] = get_args(Method)
STATES: tuple[States, ...] = get_args(States)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)
EXPLORERS: tuple[Explores, ...] = get_args(Explores)
KL_PLACES: tuple[KLPlace, ...] = get_args(KLPlace)
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
MODEL_DTYPES: tuple[ModelDtype, ...] = get_args(ModelDtype)
BODIES: tuple[DiscriminatorBody, ...] = get_args(DiscriminatorBody)
REWARD_FORMS: tuple[RewardForm, ...] = get_args(RewardForm)
JUDGED_FORMS: tuple[JudgedForm, ...] = get_args(JudgedForm)
RATIOS: tuple[Ratio, ...] = get_args(Ratio)
KL_ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)
SCORED_PARTS: tuple[ScoredPart, ...] = get_args(ScoredPart)
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)


@dataclass
class RunOptions:
    """Of every method."""

    method: Method | str = field(
        default="implicit",
        metadata={
            "help": "how the agent learns, one of these or a `Method` of your own as module:Class. "
            "implicit: StepAgent's implicit step rewards; inverse: a discriminator's verdict as "
            "the step reward, followed by PPO; sft: supervised; dagger: supervised on the "
            "expert's answers at the agent's states (needs --env); early_experience: supervised, "
            "and on what the agent's own actions lead to at the expert's states (needs --env); "
            "srl: PPO on the likeness of its action to the expert's; distillation: towards a "
            "teacher's (--ref-model) probabilities of the agent's own tokens; eto: the better of "
            "demonstration and rollout preferred as a whole (needs --env); rft: supervised, and on "
            "the rollouts that were good enough (needs --env); ipr: the better of what agent and "
            "expert make of each of the expert's states preferred, by the final and by the step "
            "reward (needs --env and --ref-model, the policy where training starts); grpo, gigpo, "
            "istar, ppo: online RL on what the environment pays (needs --env, no expert)",
            "choices": METHODS,
            "open": True,
        },
    )
    method_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "JSON object of the options of a method of your own"},
    )
    states: States = field(
        default=None,  # type: ignore[arg-type]  # the configuration fills it in
        metadata={
            "help": "whose states are compared: the expert's (the paper), the agent's own, "
            "answered by the environment's expert (needs --env), or both in each cycle (mixed); "
            "default: the expert's, of dagger the agent's",
            "choices": STATES,
        },
    )
    cycles: int = field(default=5, metadata={"help": "inspect → reflect cycles"})
    epochs_per_cycle: int = field(default=1, metadata={"help": "passes over one cycle's data"})
    model_dtype: ModelDtype = field(
        default="float32",
        metadata={
            "help": "of the weights of a model that is given by name; float32 is what small steps "
            "add up in, with bf16 or fp16 for products. What an adapter leaves frozen keeps the "
            "checkpoint's dtype there",
            "choices": MODEL_DTYPES,
        },
    )
    samples: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "actions sampled at each of the expert's states; of eto and rft rollouts of "
            "each demonstration's task; default: 1, of srl and rft 4"
        },
    )
    temperature: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "of the agent's sampled actions; default: 1, of eto and ipr 0"},
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "cut of a sampled action; default: the longest expert action"},
    )
    max_tokens: int = field(
        default=4096,
        metadata={"help": "token budget of one tree; shorter trajectories share a tree"},
    )
    inspect_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "tokens that are inspected together, the max_batch_tokens of inspect; default: "
            "8192 on the CPU, on CUDA up to 131072 as memory allows"
        },
    )
    action_format: FormatName = field(
        default="plain",
        metadata={
            "help": "how the agent writes an action: plain, react, json or tool_call; read in its "
            "rollouts, for the agreement, and wherever two actions are compared",
            "choices": FORMATS,
        },
    )
    scored_part: ScoredPart = field(
        default="all",
        metadata={
            "help": "which tokens of a step losses and step rewards cover: all, those of the "
            "action, or those of the thought; needs an action_format that has thoughts. What is "
            "left out stays context",
            "choices": SCORED_PARTS,
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON object of arguments for the chat template, such as "
            "'{\"enable_thinking\": false}'; used wherever the agent is prompted, and saved with "
            "its tokenizer"
        },
    )
    rollouts: int | None = field(
        default=None,
        metadata={
            "help": "agent rollouts per cycle, not with states=expert; default: one per trajectory"
        },
    )
    max_steps_per_episode: int | None = field(
        default=None, metadata={"help": "ends a rollout sooner than its environment would"}
    )
    rollout_seed_start: int = field(
        default=0, metadata={"help": "first environment seed of the rollouts"}
    )
    save_rollouts: bool = field(
        default=False,
        metadata={
            "help": "write the episodes that the agent acts in to rollouts.jsonl in output_dir, "
            "each with its cycle"
        },
    )
    teacher_share: float = field(
        default=0.0,
        metadata={
            "help": "probability with which a step of a rollout is the expert's answer, in the "
            "first cycle (DAgger's beta)"
        },
    )
    teacher_decay: float = field(
        default=1.0,
        metadata={"help": "factor of the teacher_share from each cycle to the next"},
    )
    ask: Ask = field(
        default="always",
        metadata={
            "help": "at which of the agent's states the expert is asked: all (always), or "
            "ask_share or ask_budget of them: where the agent's own action was least probable "
            "(unsure), where an answer is most likely to be another action, which is learnt from "
            "the answers so far (worth), or anywhere (random)",
            "choices": ASKS,
        },
    )
    ask_share: float = field(
        default=1.0, metadata={"help": "share of a cycle's states; not with ask=always"}
    )
    ask_budget: int | None = field(
        default=None,
        metadata={
            "help": "answers of the expert that the run may cost, spread evenly over its cycles; "
            "default: any number"
        },
    )
    ask_from: str | None = field(
        default=None,
        metadata={"help": "asker.safetensors of a run before, from which ask=worth goes on"},
    )
    verify: int | None = field(
        default=None,
        metadata={
            "help": "learn from an answer at the agent's states only where it turns a failed "
            "rollout into a success in most of this many episodes of the agent's after it (CSO); "
            "default: from all answers"
        },
    )
    alternatives: int | None = field(
        default=None,
        metadata={
            "help": "further actions of the agent's own at each of its states, taken for answers "
            "where they verify"
        },
    )
    eval_episodes: int | None = field(
        default=None,
        metadata={
            "help": "episodes of the greedy policy in the environment at each evaluation, for "
            "success_rate; default: none"
        },
    )
    eval_seed_start: int = field(
        default=0,
        metadata={"help": "first environment seed of eval_episodes; held out from training"},
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


@dataclass
class StepAgentOptions(
    RunOptions,
    ImplicitOptions,
    InverseOptions,
    EarlyExperienceOptions,
    ETOOptions,
    RFTOptions,
    IPROptions,
    GiGPOOptions,
):
    """The fields that `stepagent.StepAgentConfig` adds to TrainingArguments."""


# Of which method an option is.
OPTIONS_OF_METHODS: dict[str, type] = {
    "implicit": ImplicitOptions,
    "inverse": InverseOptions,
    "early_experience": EarlyExperienceOptions,
    "srl": SRLOptions,
    "distillation": DistillationOptions,
    "eto": ETOOptions,
    "rft": RFTOptions,
    "ipr": IPROptions,
    "grpo": GroupOptions,
    "gigpo": GiGPOOptions,
    "istar": IStarOptions,
    "ppo": OnlinePPOOptions,
}
