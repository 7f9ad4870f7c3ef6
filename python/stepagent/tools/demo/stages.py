"""The stages as data: what each is, which belong to a method, and what each trains with."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from .settings import Settings

Method: TypeAlias = Literal["implicit", "inverse"]

METHODS: tuple[Method, ...] = get_args(Method)

TITLES = {
    "sft": "SFT, until validation success stops rising",
    "sft_continued": "SFT continued, for as many updates as StepAgent",
    "stepagent_expert_states": "StepAgent at the expert's states (the paper's form)",
    "stepagent": "StepAgent at the agent's own states",
    "dagger": "DAgger: SFT on the expert's answers at the agent's states",
    "inverse_expert_states": "StepAgent, inverse RL at the expert's states (the paper's form)",
    "inverse": "StepAgent, inverse RL at the agent's own states",
}
# The last of a method's stages is the one that the others are compared with.
METHOD_STAGES: dict[Method, tuple[str, ...]] = {
    "implicit": ("stepagent_expert_states", "dagger", "stepagent"),
    "inverse": ("inverse_expert_states", "inverse"),
}
MAIN_STAGES = {stages[-1] for stages in METHOD_STAGES.values()}


def stage_options(settings: Settings, stage: str) -> dict[str, Any]:
    """What a stage after SFT trains with, as options of `StepAgentConfig`; all update as often."""
    s = settings
    shared = {
        "per_device_train_batch_size": s.batch_size,
        "seed": s.seed,
        "max_tokens": 512,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": s.warmup_steps,
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
    }
    cycles = {"cycles": s.cycles, "epochs_per_cycle": s.epochs_per_cycle}
    at_agent = {
        "states": "agent",
        "rollouts": s.rollouts,
        "max_steps_per_episode": s.rollout_max_steps,
        "rollout_seed_start": s.first_rollout_seed,
    }
    implicit = {"method": "implicit", "beta": s.beta, "sft_weight": s.sft_weight, **cycles}
    inverse = {"method": "inverse", **cycles}
    several = {"samples": s.inverse_samples, "baseline": "leave_one_out"}
    by_stage: dict[str, dict[str, Any]] = {
        "sft_continued": {"method": "sft", "num_train_epochs": s.cycles * s.epochs_per_cycle},
        "stepagent_expert_states": implicit,
        "stepagent": implicit | at_agent,
        "dagger": {"method": "sft", **cycles, **at_agent},
        "inverse_expert_states": inverse | several,
        "inverse": inverse | at_agent | {"gamma": s.gamma},
    }
    return shared | by_stage[stage]
