"""AgentBoard's result folders (arXiv 2401.13178), read and written.

    all_results.txt      a JSON object a line: the means of a task
    {task}.txt           a line an example: success, progress, grounding, changes of the score
    logs/{task}.jsonl    an example with its steps: JSON objects one after another, on many lines

Of a step it has the action and what followed. What was seen before the first action is not in the
log, which has the goal. Grounding and progress are of the whole example.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from ..records.episodes import Episode
from .metrics import grounding_accuracy, progress_curve, progress_rate
from .subskills import SUFFIX, TASKS, board_task

RESULTS = "all_results.txt"
_MEANS = ("success_rate", "progress_rate", "grounding_acc")
_NEEDED = ("id", "is_done", "progress_rate", "grounding_acc", "score_change_record", "trajectory")
_LINE = re.compile(
    r"\[EXP\] (?P<id>\d+): \[success_rate\]: (?P<is_done>.*), \[progress_rate\]: "
    r"(?P<progress_rate>.*), \[grounding_acc\]: (?P<grounding_acc>.*), \[score_state\]: "
    r"(?P<score_change_record>.*)"
)
_TURN = re.compile(r"Interaction Turn (\d+)")
_CLOSE = 1e-6

# ------------------------------------------------------------------ reading


def is_agentboard(folder: Path) -> bool:
    """Whether a folder looks like one of AgentBoard's results."""
    return folder.is_dir() and ((folder / RESULTS).is_file() or bool(_tasks_of(folder)))


def load_agentboard(folder: Path) -> list[Episode]:
    """The examples of a result folder, task by task.

    Their environment is ``babyai (AgentBoard)`` and their seed its id. Progress and grounding are
    as AgentBoard wrote them: what it logs of steps does not give them. An example that is only in
    ``{task}.txt`` has no steps.

    Raises:
        ValueError: for a folder without a log, and for a record that AgentBoard does not write,
            naming file, record and what is wrong with it.
    """
    tasks = _tasks_of(folder)
    means = dict(_means(folder / RESULTS))
    if lacking := [task for task in means if task not in tasks]:
        raise ValueError(
            f"{folder} must have {lacking[0]}.txt or logs/{lacking[0]}.jsonl, the log of a task "
            f"that {RESULTS} has, got neither"
        )
    if not tasks:
        raise ValueError(f"{folder} must have the logs of AgentBoard, logs/TASK.jsonl, got none")
    found = {task: _task_episodes(folder, task) for task in tasks}
    for task, told in means.items():
        _compare(folder, task, told, found[task])
    return [episode for task in tasks for episode in found[task]]


def _tasks_of(folder: Path) -> list[str]:
    return [
        task
        for task in TASKS
        if (folder / "logs" / f"{task}.jsonl").is_file() or (folder / f"{task}.txt").is_file()
    ]


def _task_episodes(folder: Path, task: str) -> list[Episode]:
    log, overview = folder / "logs" / f"{task}.jsonl", folder / f"{task}.txt"
    detailed = {e.seed: e for e in _read(log, task, _objects)} if log.is_file() else {}
    listed = {e.seed: e for e in _read(overview, task, _lines)} if overview.is_file() else {}
    for seed, episode in listed.items():
        other = detailed.get(seed, episode)
        if (other.success, other.measured) != (episode.success, episode.measured):
            raise ValueError(
                f"{overview} must say the same of example {seed} as {log.name}, got success "
                f"{episode.success}, {episode.measured}, and there {other.success}, "
                f"{other.measured}"
            )
    episodes = listed | detailed
    if not episodes:
        raise ValueError(f"{folder} must have an example of {task} in its log, got none")
    return [episodes[seed] for seed in sorted(episodes)]


def _read(path: Path, task: str, records: Any) -> Iterator[Episode]:
    seen: set[int] = set()
    for number, record in enumerate(records(path), start=1):
        where = f"{path}, example {number}"
        try:
            episode = _episode(task, record)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where} is not of AgentBoard: {reason}") from error
        if episode.seed in seen:
            raise ValueError(f"{where} must have an id of its own, got {episode.seed} again")
        seen.add(episode.seed)
        yield episode


def _objects(path: Path) -> Iterator[Any]:
    """JSON objects one after another, whatever the space between them."""
    text, place, decoder = path.read_text(encoding="utf-8"), 0, json.JSONDecoder()
    while rest := text[place:].lstrip():
        start = len(text) - len(rest)
        try:
            record, place = decoder.raw_decode(text, start)
        except ValueError as error:
            line = text.count("\n", 0, start) + 1
            raise ValueError(f"{path}: no JSON after line {line}: {error}") from error
        yield record


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ValueError(
                f"{path}:{number} must be a line '[EXP] 0: …' as AgentBoard's, got {line[:80]!r}"
            )
        try:
            told = {name: ast.literal_eval(text) for name, text in found.groupdict().items()}
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path}:{number} must hold numbers, got {line[:80]!r}") from error
        yield {**told, "trajectory": {}}


def _means(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of the tasks; those of several tasks, ``all_summary``, are passed over."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            task = told["task_name"]
            means = {name: float(told[name]) for name in _MEANS}
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}:{number} is not of AgentBoard: {what}") from error
        if not task.endswith("_summary"):
            yield task, means


def _compare(folder: Path, task: str, told: dict[str, float], episodes: list[Episode]) -> None:
    """Warn where the means are not those of the examples: a log of another run, or incomplete."""
    for name, value in _summary(episodes).items():
        if name in _MEANS and abs(told[name] - value) > _CLOSE:
            warnings.warn(
                f"{folder / RESULTS} says {name} {told[name]:.4g} of {task}, the examples in the "
                f"log have {value:.4g}, which is what counts here",
                RuntimeWarning,
                stacklevel=4,
            )


def _episode(task: str, record: Any) -> Episode:
    if not isinstance(record, dict):
        raise TypeError(f"an example must be an object, got {str(record)[:80]}")
    for name in _NEEDED:
        if name not in record:
            raise ValueError(f"it must have {', '.join(_NEEDED)}, got no {name!r}")
    turns = _turns(record["trajectory"])
    seen = [str(record.get("goal") or ""), *(str(turn["Observation"]) for turn in turns)]
    episode = Episode(
        f"{task}{SUFFIX}",
        int(record["id"]),
        task=record.get("task_name"),
        difficulty=record.get("difficulty"),
        success=_flag(record["is_done"]),
        actions=[str(turn["Action"]) for turn in turns],
        observations=seen[:-1],
        last_observation=seen[-1] if turns else None,
        measured={
            "progress_rate": _share("progress_rate", record["progress_rate"]),
            "grounding_accuracy": _share("grounding_acc", record["grounding_acc"]),
        },
    )
    episode.progress = _filled(record["score_change_record"], len(turns))
    return episode


def _turns(trajectory: Any) -> list[dict[str, Any]]:
    """Those of an action and what followed; a last action that was not taken has no observation."""
    if not isinstance(trajectory, dict):
        raise TypeError(
            f"trajectory must be an object of interaction turns, got {trajectory!r:.80}"
        )
    turns: dict[int, dict[str, Any]] = {}
    for name, turn in trajectory.items():
        found = _TURN.fullmatch(name)
        if found is None or not isinstance(turn, dict):
            raise ValueError(f"trajectory must hold 'Interaction Turn 0' and so on, got {name!r}")
        turns[int(found[1])] = turn
    ordered = [turns[number] for number in sorted(turns)]
    return [turn for turn in ordered if "Action" in turn and "Observation" in turn]


def _filled(changes: Any, steps: int) -> list[float]:
    """The score after each step, which is the last change's; up to the last where T is unknown."""
    scores = {int(step): _share("a score", score) for step, score in changes}
    length = steps or max(scores, default=0) + 1
    if any(not 0 <= step < length for step in scores):
        raise ValueError(f"score_change_record must lie within {length} steps, got {changes}")
    filled, current = [], 0.0
    for step in range(length):
        current = scores.get(step, current)
        filled.append(current)
    return filled


def _flag(value: Any) -> bool:
    if value not in (True, False):  # 0 and 1 as well
        raise ValueError(f"is_done must be true or false, got {value!r}")
    return bool(value)


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)


# ------------------------------------------------------------------ writing


def save_agentboard(folder: Path, episodes: Sequence[Episode]) -> list[str]:
    """Write episodes as a result folder of AgentBoard, which its own scripts read.

    Args:
        folder: made where it is missing; its files of these tasks are written anew.
        episodes: of environments that AgentBoard has. Those that crashed are left out. An example's
            id is its seed, its goal the first observation, which states the task.

    Returns:
        The tasks that were written.

    Raises:
        ValueError: for an environment that AgentBoard has not, an episode without progress or
            grounding, two of the same task and seed, and where none is left.
    """
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        task = board_task(episode.environment)
        if task is None:
            raise ValueError(
                f"environment must be one of AgentBoard's, {', '.join(TASKS)}, got "
                f"{episode.environment!r}"
            )
        if episode.crashed is None:
            groups.setdefault(task, []).append(episode)
    if not groups:
        raise ValueError(f"an episode must have ended, got none of {len(episodes)}")
    written = {task: [_example(e) for e in own] for task, own in groups.items()}
    for task, own in groups.items():
        if twice := [id for id, times in Counter(e.seed for e in own).items() if times > 1]:
            raise ValueError(
                f"{task} must have each seed once, got {twice[0]} again; write its levels, splits "
                "or policies to folders of their own"
            )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for task, examples in written.items():
        # As AgentBoard: an object on many lines, whatever the name of the file promises.
        log = "".join(json.dumps(one, indent=2) + "\n" for one in examples)
        write_text(folder / "logs" / f"{task}.jsonl", log)
        write_text(folder / f"{task}.txt", "".join(map(_line, examples)))
    means = [{"task_name": task, **_summary(own)} for task, own in groups.items()]
    write_text(folder / RESULTS, "".join(json.dumps(one) + "\n" for one in means))
    return list(groups)


def _example(episode: Episode) -> dict[str, Any]:
    progress, grounding = progress_rate(episode), grounding_accuracy(episode)
    if progress is None or grounding is None or episode.seed < 0:
        raise ValueError(
            f"episode {episode.id} must have a seed >= 0, progress and valid actions to become an "
            "example of AgentBoard"
        )
    curve = progress_curve(episode).tolist()
    changes = [[step, b] for step, (a, b) in enumerate(pairwise(curve)) if b > a]
    after = [*episode.observations[1:], episode.last_observation or ""]
    steps = zip(episode.actions, after, curve[1:], strict=False)
    turns: dict[str, dict[str, Any]] = {
        f"Interaction Turn {step}": {"Action": action, "Observation": seen, "Progress Rate": rate}
        for step, (action, seen, rate) in enumerate(steps)
    }
    goal = episode.observations[0] if episode.observations else ""
    if turns:
        turns["Interaction Turn 0"] = {"Goal": goal, **turns["Interaction Turn 0"]}
    return {
        "id": episode.seed,
        "task_name": episode.task,
        "goal": goal,
        "difficulty": episode.difficulty,
        "is_done": episode.success,
        "progress_rate": progress,
        "grounding_acc": grounding,
        "score_change_record": changes,
        "trajectory": turns,
    }


def _line(example: dict[str, Any]) -> str:
    changes = [tuple(change) for change in example["score_change_record"]]
    return (
        f"[EXP] {example['id']}: [success_rate]: {example['is_done']}, [progress_rate]: "
        f"{example['progress_rate']}, [grounding_acc]: {example['grounding_acc']}, "
        f"[score_state]: {changes} \n"
    )


def _summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """The means of a task; of a difficulty that it has no example of 0, as AgentBoard writes."""

    def mean(metric: Any, difficulty: str | None = None) -> float:
        own = [e for e in episodes if difficulty in (None, e.difficulty)]
        return float(np.mean([metric(e) for e in own])) if own else 0.0

    def success(episode: Episode) -> float:
        return float(episode.success)

    return {
        "success_rate": mean(success),
        "progress_rate": mean(progress_rate),
        "grounding_acc": mean(grounding_accuracy),
        "success_rate_hard": mean(success, "hard"),
        "success_rate_easy": mean(success, "easy"),
        "progress_rate_hard": mean(progress_rate, "hard"),
        "progress_rate_easy": mean(progress_rate, "easy"),
    }
