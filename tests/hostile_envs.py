"""Environments that misbehave, at the top of a module that worker processes import quickly."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from stepagent import envs
from stepagent.envs import ExpertUnavailable
from stepagent.envs.babyai import BabyAITextEnv, level_id

LEVEL = "babyai:GoToLocalS6N2"


class Hostile(BabyAITextEnv):
    """A BabyAI level that does something bad at step ``at`` of the episodes of these seeds."""

    def __init__(self, deed: str, seeds: tuple[int, ...], at: int = 2) -> None:
        self._deed, self._seeds, self._at = deed, seeds, at
        super().__init__(level_id("GoToLocalS6N2"))

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self._bad, self._taken = seed in self._seeds, 0
        self._maybe()
        return super().reset(seed)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._taken += 1
        self._maybe()
        return super().step(action)

    def expert_action(self) -> str:
        if self._deed == "dies when asked" and self._bad and self._taken == self._at:
            os._exit(3)
        if self._deed == "does not know" and self._bad:
            raise ExpertUnavailable("no idea")
        return super().expert_action()

    def _maybe(self) -> None:
        if not self._bad or self._taken != self._at:
            return
        if self._deed == "exits":
            os._exit(3)
        if self._deed == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._deed == "hangs":
            time.sleep(3600)
        if self._deed == "raises":
            raise KeyError("lost my map")


class Loud(BabyAITextEnv):
    """Writes to stdout whichever way it can."""

    def __init__(self, task: str = "") -> None:
        super().__init__(level_id("GoToLocalS6N2"))

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        print("loud by print", flush=True)
        os.write(1, b"loud by descriptor\n")
        subprocess.run(["echo", "loud by program"], check=True)
        return super().step(action)


class Steered(BabyAITextEnv):
    """A level in which the expert's action is taken, whatever the policy says."""

    def __init__(self) -> None:
        super().__init__(level_id("GoToLocalS6N2"))

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return super().step(self.expert_action())


class Restless(BabyAITextEnv):
    """Its first observation differs every time; the episode of seed 8 dies at its third step."""

    def __init__(self) -> None:
        super().__init__(level_id("GoToLocalS6N2"))

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self._seed, self._taken = seed, 0
        observation, info = super().reset(seed)
        return f"{observation} {time.monotonic_ns()}", info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._taken += 1
        if self._seed == 8 and self._taken == 3:
            os._exit(3)
        return super().step(action)


class Unmakeable(BabyAITextEnv):
    def __init__(self) -> None:
        raise FileNotFoundError("no map here")


class Traced(BabyAITextEnv):
    """Leaves the id of its process in a folder, and a second file when it is closed."""

    def __init__(self, folder: Path) -> None:
        self._trace = folder / str(os.getpid())
        self._trace.touch()
        super().__init__(level_id("GoToLocalS6N2"))

    def close(self) -> None:
        self._trace.with_suffix(".closed").touch()
        super().close()


class Sleepy(Traced):
    """Hangs in its first step."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._trace.with_suffix(".asleep").touch()
        time.sleep(3600)
        raise AssertionError("unreachable")


class Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Odd(BabyAITextEnv):
    """Its expert fails with an exception that cannot be sent."""

    def __init__(self) -> None:
        super().__init__(level_id("GoToLocalS6N2"))

    def expert_action(self) -> str:
        raise Unpicklable("this", "that")


def hostile(deed: str, *seeds: int, at: int = 2) -> Any:
    """What makes them, as it can be sent to a worker."""
    return partial(Hostile, deed, seeds, at)


def plain() -> Any:
    return envs.make(LEVEL)


class Labelled(BabyAITextEnv):
    """Says which task an episode is, how difficult, and what is wrong with an action."""

    def __init__(self) -> None:
        super().__init__(level_id("GoToLocalS6N2"))

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        observation, info = super().reset(seed)
        labels = {"task": f"task {seed}", "difficulty": "hard" if seed > 3 else "easy"}
        return observation, info | labels

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        *answer, info = super().step(action)
        kind = {} if info["valid"] else {"invalid": "unknown action"}
        return *answer, info | kind  # type: ignore[return-value]


class Mortal(BabyAITextEnv):
    """Dies with its process after one to ten steps, by chance, for which no seed speaks."""

    def __init__(self) -> None:
        super().__init__(level_id("GoToLocalS6N2"))
        self._left = 1 + os.urandom(1)[0] % 10

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        answer = super().step(action)
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


class Broken(BabyAITextEnv):
    """Answers its second step of the episodes of seed 3 with what no environment does."""

    def __init__(self, fault: str, call: str = "step") -> None:
        super().__init__(level_id("GoToLocalS6N2"))
        self._fault, self._call = fault, call

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self._broken, self._taken = seed == 3, 0
        observation, info = super().reset(seed)
        if self._broken and self._call == "reset":
            return ANSWERS[self._fault](observation, 0.0, False, False, info)  # type: ignore[no-any-return]
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._taken += 1
        answer = super().step(action)
        if self._broken and self._taken == 2 and self._call == "step":
            return ANSWERS[self._fault](*answer)  # type: ignore[no-any-return]
        return answer


def _without(info: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in info.items() if k != key}


# What `Broken` makes of a good answer.
ANSWERS: dict[str, Any] = {
    "reward nan": lambda o, r, e, t, i: (o, float("nan"), e, t, i),
    "reward inf": lambda o, r, e, t, i: (o, float("inf"), e, t, i),
    "reward None": lambda o, r, e, t, i: (o, None, e, t, i),
    "reward text": lambda o, r, e, t, i: (o, "1", e, t, i),
    "no valid": lambda o, r, e, t, i: (o, r, e, t, _without(i, "valid")),
    "no progress": lambda o, r, e, t, i: (o, r, e, t, _without(i, "progress")),
    "no success": lambda o, r, e, t, i: (o, r, e, t, _without(i, "success")),
    "progress 2": lambda o, r, e, t, i: (o, r, e, t, i | {"progress": 2.0}),
    "progress nan": lambda o, r, e, t, i: (o, r, e, t, i | {"progress": float("nan")}),
    "info None": lambda o, r, e, t, i: (o, r, e, t, None),
    "invalid 3": lambda o, r, e, t, i: (o, r, e, t, i | {"invalid": 3}),
    "observation None": lambda o, r, e, t, i: (None, r, e, t, i),
    "observation dict": lambda o, r, e, t, i: ({"text": o}, r, e, t, i),
    "observation surrogate": lambda o, r, e, t, i: ("\ud800", r, e, t, i),
    "four values": lambda o, r, e, t, i: (o, r, e, i),
    "one value": lambda o, r, e, t, i: o,
    "None": lambda o, r, e, t, i: None,
    "terminated text": lambda o, r, e, t, i: (o, r, "no", t, i),
    "reset None": lambda o, r, e, t, i: (None, i),
    "reset text": lambda o, r, e, t, i: o,
    "reset info": lambda o, r, e, t, i: (o, None),
    "reset task": lambda o, r, e, t, i: (o, i | {"task": 3}),
}


def broken(fault: str) -> Any:
    """What makes them, as it can be sent to a worker."""
    return partial(Broken, fault, "reset" if fault.startswith("reset") else "step")


class Numeric(BabyAITextEnv):
    """Answers in numpy's and torch's types, as environments do that compute with them."""

    def __init__(self) -> None:
        super().__init__(level_id("GoToLocalS6N2"))

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        import numpy as np
        import torch

        observation, reward, terminated, truncated, info = super().step(action)
        numbers = {"valid": np.bool_(info["valid"]), "progress": np.float32(info["progress"])}
        return (  # type: ignore[return-value]
            observation,
            torch.tensor(reward),
            np.bool_(terminated),
            np.array(truncated),
            info | numbers,
        )
