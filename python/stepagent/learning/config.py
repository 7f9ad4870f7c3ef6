"""The options of a training run: transformers' TrainingArguments and what StepAgent adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from ..data.actions import FORMATS
from ..data.draws import check_count
from .critic import BODIES
from .losses import KL_ESTIMATORS, RATIOS, REWARD_FORMS

METHODS = ("sft", "implicit", "inverse")
STATES = ("expert", "agent")
BASELINES = ("value", "leave_one_out", "group")
AGGREGATES = ("pessimistic", "mean", "optimistic")
KL_PLACES = ("loss", "reward")
_COUNTS = (
    "cycles",
    "epochs_per_cycle",
    "samples",
    "max_tokens",
    "max_new_tokens",
    "inspect_batch_tokens",
    "rollouts",
    "max_steps_per_episode",
    "discriminators",
    "critic_epochs",
)
_POSITIVE = ("finite and > 0", lambda x: x > 0)
_NOT_NEGATIVE = ("finite and >= 0", lambda x: x >= 0)
_FRACTION = ("in [0, 1]", lambda x: 0 <= x <= 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": _POSITIVE,
    "sft_weight": _NOT_NEGATIVE,
    "temperature": _NOT_NEGATIVE,
    "critic_learning_rate": _POSITIVE,
    "discriminator_smoothing": ("in [0, 0.5)", lambda x: 0 <= x < 0.5),
    "discriminator_penalty": _NOT_NEGATIVE,
    "discriminator_replay": ("a whole number >= 0", lambda x: x >= 0 and x == int(x)),
    "gamma": _FRACTION,
    "gae_lambda": _FRACTION,
    "clip": _POSITIVE,
    "kl_coef": _NOT_NEGATIVE,
    "target_kl": _POSITIVE,
    "entropy_coef": _NOT_NEGATIVE,
}


@dataclass
class StepAgentConfig(TrainingArguments):
    """Options of :class:`stepagent.StepAgentTrainer`.

    One *cycle* is inspect → reflect: the agent acts at every state, then learns from the comparison
    for ``epochs_per_cycle`` passes. Total passes are ``cycles × epochs_per_cycle``; with cycles,
    ``num_train_epochs`` is set to that product and must not be set by hand. A batch is
    ``per_device_train_batch_size`` trajectories.

    ``method="sft"`` at the expert's states needs no cycles: it runs ``num_train_epochs`` passes.
    ``method="sft", states="agent"`` is DAgger (Ross et al. 2011): supervised on the expert's
    answers at the states of all cycles so far, together with the expert's own trajectories.
    """

    method: str = field(
        default="implicit",
        metadata={
            "help": "implicit: StepAgent's implicit step rewards; inverse: a discriminator's "
            "verdict as the step reward, followed by PPO; sft: supervised",
            "choices": METHODS,
        },
    )
    states: str = field(
        default="expert",
        metadata={
            "help": "whose states are compared: the expert's (the paper), or the agent's own, "
            "answered by the environment's expert (needs --env)",
            "choices": STATES,
        },
    )
    cycles: int = field(default=5, metadata={"help": "inspect → reflect cycles"})
    epochs_per_cycle: int = field(default=1, metadata={"help": "passes over one cycle's data"})
    beta: float = field(
        default=1.0,
        metadata={
            "help": "step reward = beta · log(policy / reference). Fully optimised cycles converge "
            "to the expert only for beta > 0.5, at once for beta = 1"
        },
    )
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "adds this times the mean NLL of the expert's tokens to the loss"},
    )
    samples: int = field(
        default=1, metadata={"help": "actions sampled at each of the expert's states"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of the agent's sampled actions"})
    action_format: str = field(
        default="plain",
        metadata={
            "help": "how the agent writes an action: plain, react, json or tool_call; read in its "
            "rollouts, and for the agreement",
            "choices": tuple(FORMATS),
        },
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
    rollouts: int | None = field(
        default=None,
        metadata={
            "help": "agent rollouts per cycle with states=agent; default: one per trajectory"
        },
    )
    max_steps_per_episode: int | None = field(
        default=None, metadata={"help": "ends a rollout sooner than its environment would"}
    )
    rollout_seed_start: int = field(
        default=0, metadata={"help": "first environment seed of the rollouts with states=agent"}
    )

    # -- of method="inverse" alone ---------------------------------------------------------------

    discriminator_body: str = field(
        default="own",
        metadata={
            "help": "what the discriminator reads with: a copy of the policy, all of it trained "
            "(own), with a LoRA adapter (adapter), or with its heads alone (frozen)",
            "choices": BODIES,
        },
    )
    discriminators: int = field(default=1, metadata={"help": "heads, each a discriminator"})
    reward_aggregate: str = field(
        default="pessimistic",
        metadata={
            "help": "of several discriminators' rewards the least (pessimistic), the mean, or the "
            "largest (optimistic)",
            "choices": AGGREGATES,
        },
    )
    reward_form: str = field(
        default="agent",
        metadata={
            "help": "agent: -log D, the paper's; expert: log(1 - D); difference: their sum",
            "choices": REWARD_FORMS,
        },
    )
    critic_learning_rate: float = field(
        default=3e-4, metadata={"help": "of discriminator and value function, constant"}
    )
    critic_epochs: int = field(
        default=10, metadata={"help": "passes over a cycle's data, for either of them"}
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
    baseline: str = field(
        default="value",
        metadata={
            "help": "what an action is compared with: the state's value (generalised advantage "
            "estimation), or the other samples at its state (leave_one_out, group; needs samples)",
            "choices": BASELINES,
        },
    )
    gamma: float = field(default=0.95, metadata={"help": "discount per step, states=agent"})
    gae_lambda: float = field(default=0.95, metadata={"help": "of the advantages, states=agent"})
    clip: float = field(default=0.2, metadata={"help": "PPO's bound on the change of a ratio"})
    ratio: str = field(
        default="step", metadata={"help": "one ratio per action or per token", "choices": RATIOS}
    )
    kl_coef: float = field(default=0.0, metadata={"help": "weight of the KL to the reference"})
    kl_estimator: str = field(default="k3", metadata={"help": "of KL", "choices": KL_ESTIMATORS})
    kl_in: str = field(
        default="loss",
        metadata={
            "help": "add the KL to the loss, or take it from the rewards (needs a ref_model)",
            "choices": KL_PLACES,
        },
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "skip the rest of a cycle once a batch has moved this far (nats a step)"},
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "takes this times the mean entropy of a token from the loss"}
    )

    def __post_init__(self) -> None:
        self._check()
        if self.has_cycles:
            self._set_epochs(float(self.cycles * self.epochs_per_cycle))
        # The batches are trees, not columns of a dataset.
        self.remove_unused_columns = False
        super().__post_init__()  # type: ignore[no-untyped-call]

    @property
    def has_cycles(self) -> bool:
        """Whether the training data is made anew by the agent every cycle."""
        return self.method != "sft" or self.states == "agent"

    def _set_epochs(self, epochs: float) -> None:
        if self.num_train_epochs not in (epochs, TrainingArguments.num_train_epochs):
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} cannot be set with cycles: it is "
                f"cycles × epochs_per_cycle = {self.cycles} × {self.epochs_per_cycle}"
            )
        self.num_train_epochs = epochs

    def _check(self) -> None:
        for own in fields(self):
            choices = own.metadata.get("choices")
            if own.name in _OWN and choices and getattr(self, own.name) not in choices:
                raise ValueError(
                    f"{own.name} must be one of {choices}, got {getattr(self, own.name)!r}"
                )
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
        for name, (rule, holds) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name} must be {rule}, got {value}")
        if self.states == "agent" and self.samples != 1:
            raise ValueError(f"states='agent' has one action per state, got samples={self.samples}")
        if self.states == "expert" and self.rollouts is not None:
            raise ValueError(f"rollouts={self.rollouts} needs states='agent'")
        if self.has_cycles and self.max_steps > 0:
            raise ValueError(
                f"max_steps={self.max_steps} cannot be combined with cycles: "
                "set cycles and epochs_per_cycle"
            )
        if self.dataloader_num_workers:
            raise ValueError(
                f"dataloader_num_workers must be 0, got {self.dataloader_num_workers}: "
                "batches are packed in C++ from data that changes each cycle"
            )
        if self.method == "inverse":
            self._check_inverse()

    def _check_inverse(self) -> None:
        if self.baseline != "value" and self.samples < 2:
            raise ValueError(
                f"baseline={self.baseline!r} compares the samples of a state with each other, got "
                f"samples={self.samples}: raise it, or take baseline='value'"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator='k1' has a gradient of mean 0 in the loss: use k2 or k3, or "
                "kl_in='reward'"
            )


_OWN = {own.name for own in fields(StepAgentConfig)} - {
    own.name for own in fields(TrainingArguments)
}
