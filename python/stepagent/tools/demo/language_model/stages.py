"""The stages as data: what each is, and what each trains with."""

from __future__ import annotations

from typing import Any

from .settings import Settings

UNTRAINED = "zero_shot"
ARMS = {
    "sft_continued": "SFT continued, for as many updates as the others",
    "dagger": "DAgger: SFT on the expert's answers at the agent's states",
    "stepagent": "StepAgent at the agent's own states",
    "rft": "RFT: SFT, and on the agent's own games that it won",
    "eto": "ETO: the expert's games preferred over the agent's worse ones",
    "inverse_expert_states": "StepAgent, inverse RL at the expert's states (the paper's form)",
}
"""Ways to go on from ``sft``."""
DEFAULT_ARMS = tuple(arm for arm in ARMS if arm not in ("rft", "eto"))
TITLES = {"sft": "SFT", "sft_long": "SFT, for longer", **ARMS}
AT_AGENT_STATES = ("dagger", "stepagent")


def stage_options(settings: Settings, stage: str) -> dict[str, Any]:
    """What a stage trains with, as options of `StepAgentConfig`; all arms update as often."""
    s = settings
    shared = {
        "per_device_train_batch_size": s.batch_size,
        "seed": s.seed,
        "max_tokens": s.max_tokens,
        "max_new_tokens": s.max_new_tokens,
        "learning_rate": s.learning_rate,
        "warmup_steps": s.warmup_steps,
        "logging_strategy": "no",
        "report_to": [],
        "include_num_input_tokens_seen": "all",
        # An epoch of a language model takes minutes: a run that is stopped loses a few updates.
        "save_strategy": "steps",
        "save_steps": s.save_steps,
    }
    sft = {"method": "sft", "lr_scheduler_type": "constant_with_warmup"}
    arm = {"lr_scheduler_type": "cosine"}
    cycles = {"cycles": s.cycles}
    acts = {"max_steps_per_episode": s.rollout_max_steps}
    at_agent = acts | {"states": "agent", "rollout_seed_start": s.first_rollout_seed}
    inverse = {
        "method": "inverse",
        "samples": s.inverse_samples,
        "baseline": "leave_one_out",
        "critic_epochs": s.critic_epochs,
        "discriminator_replay": 0,
    }
    eto = {"method": "eto", "beta": 0.5, "learning_rate": s.learning_rate / 3}
    by_stage: dict[str, dict[str, Any]] = {
        "sft": sft | {"num_train_epochs": s.sft_epochs},
        "sft_long": sft | {"num_train_epochs": s.sft_long_epochs},
        "sft_continued": arm | {"method": "sft", "num_train_epochs": s.cycles},
        "dagger": arm | cycles | at_agent | {"method": "sft"},
        "stepagent": arm | cycles | at_agent | {"method": "implicit", "beta": s.beta},
        "rft": arm | cycles | acts | {"method": "rft", "samples": 1, "temperature": 1.0},
        # A third of the rate, as was best for BabyAI (docs/claim.md): at more, pairs of whole
        # trajectories fall apart.
        "eto": arm | cycles | acts | eto,
        "inverse_expert_states": arm | cycles | inverse,
    }
    return shared | by_stage[stage]
