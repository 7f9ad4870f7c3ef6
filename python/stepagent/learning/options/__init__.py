"""StepAgent's own training options: names, types, defaults, choices, and what each is for.

They stand apart from transformers' TrainingArguments, which `stepagent.StepAgentConfig`
adds, so that the command line can list and check them without importing transformers or torch.
`RunOptions` are of every method; each method of `learning/methods/` has a dataclass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from .methods import (
    DistillationOptions,
    EarlyExperienceOptions,
    ETOOptions,
    GiGPOOptions,
    GroupOptions,
    ImplicitOptions,
    InverseOptions,
    IPROptions,
    IStarOptions,
    OnlinePPOOptions,
    RFTOptions,
    SRLOptions,
)
from .run import RunOptions


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
