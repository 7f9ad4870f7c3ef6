"""What options that are names can be: a type for people who program, a tuple for those who ask."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from ...data.actions import FormatName

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
