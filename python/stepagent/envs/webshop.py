"""WebShop, shopping in text, where its own repository and data are installed.

Written from WebShop's published code, whose data could not be had here: it has not been run. On a
server of AgentGym it is ``agentgym:http://…``.
"""

from __future__ import annotations

import re
from typing import Any

from stepagent.envs.base import ExpertUnavailable

# The goals of each split, by their numbers in WebShop's shuffled list.
SPLITS = {"train": slice(1500, None), "dev": slice(500, 1500), "test": slice(0, 500)}


def invalid_kind(action: str, available: dict[str, Any]) -> str | None:
    """Why WebShop would do nothing, or None.

    Args:
        available: Its ``get_available_actions()``: ``has_search_bar`` and ``clickables``.
    """
    match = re.fullmatch(r"(search|click)\[(.+)\]", action, re.DOTALL)
    if match is None:
        return "unknown action"
    name, argument = match.groups()
    if name == "search":
        return None if available["has_search_bar"] else "no search bar"
    # Its "search" is a button that does nothing: searching is an action.
    clickables = [text for text in available["clickables"] if text != "search"]
    return None if argument.lower() in clickables else "nothing to click"


class WebShopTextEnv:
    """WebShop as a `stepagent.envs.TextEnv`; seed s is the split's goal s.

    The reward is WebShop's, in [0, 1], paid for what is bought; 1 is success. It has no expert
    here: ETO's expert file holds its trajectories.
    """

    actions: tuple[str, ...] = ()
    max_steps = 10  # ETO's
    name = "webshop"
    instructions = (
        "You shop on a web site and have to buy what the instruction asks for.\n"
        "The actions are: search[WORDS] where there is a search bar, and click[TEXT] of a button "
        "or a link on the page."
    )

    def __init__(self, task: str = "", split: str = "train") -> None:
        if task:
            raise ValueError(f"task of webshop must be empty, got {task!r}")
        try:
            from web_agent_site.envs.web_agent_text_env import WebAgentTextEnv
        except ImportError as error:
            raise ImportError(
                f"WebShop needs its own package and data ({error}): install its repository, with "
                "its setup.sh, and put it on PYTHONPATH; no package index has it"
            ) from error
        self._shop: Any = WebAgentTextEnv(observation_mode="text")
        self._goals = range(len(self._shop.server.goals))[SPLITS[split]]
        self._over = True

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start with the split's goal of this number: the instruction, and the search page."""
        self.check_seed(seed)
        observation, _ = self._shop.reset(session=self._goals[seed])
        self._over, self._steps, self._reward = False, 0, 0.0
        return str(observation), self._info(None)

    def check_seed(self, seed: int) -> None:
        """ValueError for a seed beyond the split."""
        if not 0 <= seed < len(self._goals):
            raise ValueError(f"seed of webshop must lie in [0, {len(self._goals)}), got {seed}")

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act by ``search[words]`` or ``click[what is on the page]``."""
        self._require_running("step")
        invalid = invalid_kind(action, self._shop.get_available_actions())
        observation, reward, done = self._shop.observation, 0.0, False
        if invalid is None:
            observation, reward, done, _ = self._shop.step(action)
        self._steps += 1
        self._reward += reward
        truncated = not done and self._steps >= self.max_steps
        self._over = done or truncated
        return str(observation), float(reward), bool(done), truncated, self._info(invalid)

    def expert_action(self) -> str:
        """`ExpertUnavailable`."""
        self._require_running("expert_action")
        raise ExpertUnavailable("webshop has no expert to ask")

    def close(self) -> None:
        """End the episode."""
        self._over = True

    def _info(self, invalid: str | None) -> dict[str, Any]:
        info = {
            "valid": invalid is None,
            "success": self._reward >= 1.0,
            "progress": float(self._reward),
        }
        return info if invalid is None else {**info, "invalid": invalid}

    def _require_running(self, call: str) -> None:
        if self._over:
            raise RuntimeError(f"{call} needs a running episode of webshop: call reset(seed)")
