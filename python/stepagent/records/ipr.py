"""What the agent did at an expert's steps, in the files of IPR (arXiv 2406.11176).

    TRAJ_PATH/*.json                   [{id, iteration, agent_step_output, agent_step_reward,
                                         agent_step_conversations, agent_conversations,
                                         agent_final_reward, game_file?}, …]
    SAMPLE_PATH/sampled_traj_N/*.json  the same, each gone on with by the frozen policy
    sft_data_TASK.json                 {"{id}_{step}": {gpt_reward, gpt_conversations,
                                         gpt_step_conversations, monte_carlo_step_reward}, …}

The step is called ``iteration`` there. Conversations of the agent begin with an example episode,
those of the expert with the instruction alone; both are left out here (`stepagent.records.eto`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .episodes import Episode
from .eto import (
    PREAMBLES,
    Messages,
    Seeds,
    Task,
    check_preamble,
    check_task,
    conversation,
    id_of,
    ids_of,
    messages_of,
    parse_file,
    reward_of,
    turns_of,
    without_preamble,
    write_json,
)

_INSTRUCTION = 2  # turns: what to do, and "OK"
_CONVERSATIONS = ("agent_step_conversations", "agent_conversations")
_KEYS = (
    "id",
    "iteration",
    "agent_step_output",
    "agent_step_reward",
    *_CONVERSATIONS,
    "agent_final_reward",
)
_EXPERT_KEYS = (
    "gpt_reward",
    "gpt_conversations",
    "gpt_step_conversations",
    "monte_carlo_step_reward",
)


@dataclass(frozen=True)
class Exploration:
    """What the agent did at one step of an expert's trajectory, and what came of it.

    Attributes:
        id: of the expert's trajectory.
        iteration: the step, from 0.
        agent_step_output: the agent's answer there.
        agent_step_reward: the environment's, right after it.
        agent_step_conversations: up to what the environment showed after it.
        agent_conversations: the whole episode, the last observation included.
        agent_final_reward: of the whole episode.
        game_file: ALFWorld's name of the task.
    """

    id: str
    iteration: int
    agent_step_output: str
    agent_step_reward: float
    agent_step_conversations: Messages
    agent_conversations: Messages
    agent_final_reward: float
    game_file: str | None = None

    @classmethod
    def of(
        cls, episode: Episode, step: int, *, seeds: Seeds, game_file: str | None = None
    ) -> Exploration:
        """Of an episode that took the expert's course up to ``step`` and the agent's from there.

        Args:
            seeds: The seed of each id, as in `stepagent.preferences.load_rollouts`.

        Raises:
            ValueError: for a step that it did not take, and for an episode that crashed.
        """
        if episode.crashed is not None:
            raise ValueError(f"episode {episode.id} must have an outcome, got a crash")
        if not 0 <= step < len(episode.actions):
            raise ValueError(
                f"step must be one of the {len(episode.actions)} of episode {episode.id}, got "
                f"{step}"
            )
        messages = conversation(episode)
        return cls(
            id_of(ids_of(seeds), episode),
            step,
            episode.actions[step],
            float(episode.rewards[step]),
            messages[: 2 * step + 3],
            messages,
            float(sum(episode.rewards)),
            game_file,
        )


@dataclass(frozen=True)
class ExpertStep:
    """A step of an expert's trajectory.

    Attributes:
        gpt_reward: of the whole trajectory.
        gpt_conversations: the whole trajectory, up to its last action.
        gpt_step_conversations: up to the action of this step.
        monte_carlo_step_reward: the mean final reward of episodes that go on from there.
    """

    gpt_reward: float
    gpt_conversations: Messages
    gpt_step_conversations: Messages
    monte_carlo_step_reward: float


def load_explorations(path: str | os.PathLike[str], *, task: Task) -> list[Exploration]:
    """The records of a file of IPR's, or of all ``*.json`` of a folder in the order of their names.

    Raises:
        FileNotFoundError: for a path without any.
        ValueError: naming the record and the rule.
    """
    check_task(task)
    paths = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
    if not paths:
        raise FileNotFoundError(f"{path} must hold records, *.json, got none")
    return [
        _exploration(f"{file}: item {place}", row, task)
        for file in paths
        for place, row in enumerate(_rows(file, list))
    ]


def save_explorations(
    path: str | os.PathLike[str],
    explorations: Sequence[Exploration],
    *,
    task: Task,
    preamble: Messages,
) -> None:
    """Write the records of one file, as IPR's scripts read them.

    Args:
        preamble: What the scripts leave out, as in `stepagent.preferences.save_rollouts`.

    Raises:
        ValueError: for an id that is no whole number, which the scripts make numbers of.
    """
    check_preamble(task, preamble)
    rows = []
    for one in explorations:
        row = vars(one) | {key: [*preamble, *getattr(one, key)] for key in _CONVERSATIONS}
        row["id"] = _number(one.id)
        if one.game_file is None:
            del row["game_file"]
        rows.append(row)
    write_json(path, rows)


def load_samples(folder: str | os.PathLike[str], *, task: Task) -> list[list[Exploration]]:
    """The records of ``sampled_traj_0``, ``sampled_traj_1``, …: one list for each of the N."""
    folders = sorted(Path(folder).glob("sampled_traj_*"), key=lambda path: _place(path.name))
    if not folders:
        raise FileNotFoundError(f"{folder} must hold folders sampled_traj_N, got none")
    return [load_explorations(one, task=task) for one in folders]


def save_samples(
    folder: str | os.PathLike[str],
    samples: Sequence[Sequence[Exploration]],
    *,
    task: Task,
    preamble: Messages,
) -> None:
    """Write what `load_samples` reads: ``sampled_traj_N/TASK_traj_0.json``."""
    for place, explorations in enumerate(samples):
        path = Path(folder, f"sampled_traj_{place}", f"{task}_traj_0.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_explorations(path, explorations, task=task, preamble=preamble)


def monte_carlo_rewards(
    explorations: Sequence[Exploration], samples: Sequence[Sequence[Exploration]]
) -> list[float]:
    """The step reward of each: the mean final reward of its samples; the environment's own reward
    where there are none, as after the last step.

    Raises:
        ValueError: for samples of one place with another ``agent_step_reward``.
    """
    returns: dict[tuple[str, int], list[float]] = {}
    own: dict[tuple[str, int], float] = {}
    for sample in (one for several in samples for one in several):
        key = (sample.id, sample.iteration)
        if own.setdefault(key, sample.agent_step_reward) != sample.agent_step_reward:
            raise ValueError(
                f"samples of id {sample.id!r}, step {sample.iteration}, must agree in "
                f"agent_step_reward, got {own[key]} and {sample.agent_step_reward}"
            )
        returns.setdefault(key, []).append(sample.agent_final_reward)
    return [
        float(np.mean(returns.get((one.id, one.iteration), [one.agent_step_reward])))
        for one in explorations
    ]


def load_expert_steps(path: str | os.PathLike[str]) -> dict[tuple[str, int], ExpertStep]:
    """The steps of ``sft_data_TASK.json``, by id and step.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: naming the key and the rule.
    """
    steps = {}
    for key, row in _rows(Path(path), dict).items():
        name = f"{path}: {key!r}"
        id, underscore, step = key.rpartition("_")
        if not underscore or not step.isdecimal():
            raise ValueError(f"{name} must be an id and a step, as '12_0'")
        _check_keys(name, row, _EXPERT_KEYS)
        whole, up_to = (
            without_preamble(name, messages_of(f"{name}: {part}", row[part]), _INSTRUCTION)
            for part in ("gpt_conversations", "gpt_step_conversations")
        )
        size = 2 * int(step) + 2
        if len(up_to) != size or up_to != whole[:size]:
            raise ValueError(f"{name} must have the {int(step) + 1} first actions as its step's")
        steps[id, int(step)] = ExpertStep(
            gpt_reward=_reward(name, row, "gpt_reward"),
            gpt_conversations=whole,
            gpt_step_conversations=up_to,
            monte_carlo_step_reward=_reward(name, row, "monte_carlo_step_reward"),
        )
    return steps


def save_expert_steps(
    path: str | os.PathLike[str],
    steps: Mapping[tuple[str, int], ExpertStep],
    *,
    instruction: Messages,
) -> None:
    """Write what `load_expert_steps` reads.

    Args:
        instruction: Two messages, what to do and the agent's "OK".
    """
    if [message["role"] for message in instruction] != ["user", "assistant"]:
        raise ValueError(f"instruction must be a user's and an agent's message, got {instruction}")
    rows = {
        f"{_number(id)}_{step}": {
            "gpt_reward": one.gpt_reward,
            "gpt_conversations": turns_of([*instruction, *one.gpt_conversations]),
            "gpt_step_conversations": turns_of([*instruction, *one.gpt_step_conversations]),
            "monte_carlo_step_reward": one.monte_carlo_step_reward,
        }
        for (id, step), one in steps.items()
    }
    write_json(path, rows)


def _exploration(name: str, row: Any, task: Task) -> Exploration:
    _check_keys(name, row, _KEYS)
    told = {key: messages_of(f"{name}: {key}", row[key]) for key in _CONVERSATIONS}
    told = {key: without_preamble(name, told[key], PREAMBLES[task]) for key in told}
    step = row["iteration"]
    if not isinstance(step, int) or not isinstance(row["agent_step_output"], str):
        raise ValueError(f"{name} must have a whole number as iteration and a text as output")
    return Exploration(
        str(row["id"]),
        step,
        row["agent_step_output"],
        _reward(name, row, "agent_step_reward"),
        told["agent_step_conversations"],
        told["agent_conversations"],
        _reward(name, row, "agent_final_reward"),
        row.get("game_file"),
    )


def _rows(path: Path, kind: type) -> Any:
    rows = parse_file(path)
    if not isinstance(rows, kind):
        raise ValueError(f"{path} must be a JSON {kind.__name__}, got a {type(rows).__name__}")
    return rows


def _check_keys(name: str, row: Any, keys: Sequence[str]) -> None:
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise ValueError(f"{name} must be an object with {', '.join(keys)}, got no {missing[0]!r}")


def _reward(name: str, row: Mapping[str, Any], key: str) -> float:
    """ALFWorld's step reward is None until the episode ends: nothing was won yet."""
    return reward_of(f"{name}: {key}", row[key]) or 0.0


def _number(id: str) -> int:
    """An id as the whole number that IPR's scripts need."""
    if not id.isdecimal() or str(int(id)) != id:
        raise ValueError(f"an id must be a whole number in IPR's files, got {id!r}")
    return int(id)


def _place(name: str) -> int:
    end = name.rpartition("_")[2]
    return int(end) if end.isdecimal() else -1
