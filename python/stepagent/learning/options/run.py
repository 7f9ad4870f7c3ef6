"""The options of every method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...acting.named_askers import ASKS, Ask
from ...data.actions import FormatName
from .choices import (
    FORMATS,
    METHODS,
    MODEL_DTYPES,
    SCORED_PARTS,
    STATES,
    Method,
    ModelDtype,
    ScoredPart,
    States,
)


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
