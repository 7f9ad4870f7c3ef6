"""What the rivals of `rivals.py` are trained with: environments, and arms."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from stepagent.envs import make


@dataclass(frozen=True)
class Setting:
    """An environment and what is trained there.

    Attributes:
        splits: to train on, to choose on, to report; None where the environment has none.
        episodes: of each of these splits; None: any seed is one.
        measured: dev and test episodes.
        steps: of an episode in evaluation and in training, at most.
        vocabulary: of byte pairs learnt from the demonstrations, for a model from scratch; None:
            their words, which are all that there are.
        rft_keeps: rollouts that earn as much; None: as the demonstration.
    """

    splits: tuple[str | None, str | None, str | None] = (None, None, None)
    episodes: tuple[int | None, int | None, int | None] = (None, None, None)
    measured: tuple[int, int] = (200, 200)
    steps: tuple[int, int] = (20, 10)
    max_new_tokens: int = 3
    max_tokens: int = 1024
    hidden_size: int = 128
    layers: int = 2
    batch_size: int = 16
    sft_epochs: int = 40
    sft_learning_rate: float = 1e-3
    learning_rate: float = 3e-4
    cycles: int = 4
    epochs_per_cycle: int = 4
    vocabulary: int | None = None
    rft_keeps: float | None = None

    @property
    def first_seeds(self) -> tuple[int, int]:
        """Of the dev and the test episodes."""
        return (500_000, 1_000_000) if self.episodes[1] is None else (0, 0)


def setting_of(name: str) -> Setting:
    """Of an environment by name; ValueError for one that has none here."""
    prefix = name.partition(":")[0]
    if prefix == "babyai":
        return Setting(rft_keeps=0.01)  # any that arrives: slower ones are paid less
    if prefix == "textworld":
        return Setting(
            measured=(100, 100), steps=(12, 12), max_new_tokens=16, cycles=2, vocabulary=1500
        )
    if prefix != "scienceworld":
        raise ValueError(f"environment must be babyai, textworld or scienceworld, got {name!r}")
    sizes = [_episodes(name, split) for split in ("train", "dev", "test")]
    return Setting(
        splits=("train", "dev", "test"),
        episodes=tuple(sizes),
        measured=(min(sizes[1], 40), min(sizes[2], 40)),
        steps=(25, 25),
        max_new_tokens=16,
        max_tokens=4096,
        vocabulary=1500,
        batch_size=8,
        cycles=2,
    )


def _episodes(name: str, split: str) -> int:
    """How many a split has: the first seed that it refuses."""
    with closing(make(name, split)) as env, suppress(ValueError):
        for seed in count():
            env.check_seed(seed)
    return seed


# Of a language model, in the place of a small one from scratch.
LANGUAGE_MODEL = {
    "batch_size": 4,
    "sft_epochs": 3,
    "sft_learning_rate": 2e-4,
    "learning_rate": 1e-4,
    "cycles": 2,
    "epochs_per_cycle": 1,
    "max_tokens": 4096,
}
_AT_AGENT = {"states": "agent"}
STEPAGENT = "implicit, agent's states"
_ETO = {
    **{"method": "eto", "learning_rate": 1e-4},
    **{"samples": 4, "temperature": 1.0, "epochs_per_cycle": 3},
}
_ISTAR = {"method": "istar", "group_size": 8, "critic_epochs": 2}
ARMS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "SFT continued": {"method": "sft"},
    "DAgger": {"method": "dagger"},
    STEPAGENT: {"method": "implicit", "sft_weight": 1.0, **_AT_AGENT},
    "implicit, expert's states": {"method": "implicit"},
    "inverse": {"method": "inverse", "gamma": 0.0, **_AT_AGENT},
    "RFT": {"method": "rft", "samples": 1, "temperature": 1.0, "epochs_per_cycle": 3},
    "ETO": _ETO | {"beta": 0.5},  # the better of those in TUNED
    "ETO, beta 0.1": _ETO | {"beta": 0.1},
    "IPR": {"method": "ipr", "beta": 0.1},
    "GRPO": {"method": "grpo", "group_size": 8},
    "GiGPO": {"method": "gigpo", "group_size": 8},
    "iStar": _ISTAR | {"omega": 0.1},  # the better of those in TUNED
    "iStar, omega 1": _ISTAR,
    "PPO": {"method": "ppo", "critic_learning_rate": 1e-3},
}
RIVALS = ("SFT", "SFT continued", STEPAGENT)
# StepAgent's best form with one thing changed. ``fixed_reference``: the SFT model's, in all cycles.
ABLATIONS: dict[str, dict[str, Any]] = {
    f"{STEPAGENT}, {words}": ARMS[STEPAGENT] | changed
    for words, changed in {
        "beta 0.1": {"beta": 0.1},
        "beta 0.3": {"beta": 0.3},
        "one cycle": {"cycles": 1, "epochs_per_cycle": 16},
        "eight cycles": {"cycles": 8, "epochs_per_cycle": 2},
        "fixed reference": {"fixed_reference": True},
        "greedy rollouts": {"temperature": 0.0},
        "no NLL": {"sft_weight": 0.0},
    }.items()
}
OF_OWN_EPISODES = ("dagger", "grpo", "gigpo", "istar", "ppo")
# Choices that were looked at on dev runs alone (--dev); those in ARMS are the ones taken.
_OF_ONE = {"samples": 1, "temperature": 0.0, "epochs_per_cycle": 6}  # as in the paper
TUNED: dict[str, dict[str, Any]] = {
    f"{name}, lr {rate:g}, beta {beta:g}": ARMS["ETO"]
    | rollouts
    | {"learning_rate": rate, "beta": beta}
    for name, rollouts in (("ETO", {}), ("ETO of one rollout", _OF_ONE))
    for rate in (3e-4, 1e-4, 3e-5)
    for beta in (0.1, 0.5)
} | {
    f"iStar, {words}": _ISTAR | changed
    for words, changed in {
        "omega 0.1": {"omega": 0.1},
        "lr 0.0001": {"learning_rate": 1e-4},
        "reward model's lr 3e-05": {"critic_learning_rate": 3e-5},
        "omega 0.1, lr 0.0001": {"omega": 0.1, "learning_rate": 1e-4},
    }.items()
}
