"""BabyAI whose expert thinks before it acts, in K ways: ``phrasings:8``.

The bot's action is decided; how the thought before it is worded is drawn at random from K
phrasings, filled from what the expert sees. So an expert's step is about 20 tokens, of which many
are as good as others, and one word that matters: language-model agents, at the size of a toy.
"""

from __future__ import annotations

import random
from typing import Any

from stepagent.envs import register
from stepagent.envs.babyai import BabyAITextEnv, level_id

LEVEL = "GoToLocalS6N2"
PHRASINGS = (
    "to {mission} i now choose {action}",
    "i see {seen} so the next move is {action}",
    "plan : {mission} ; step : {action}",
    "because of {seen} i should take {action}",
    "{action} looks right for the mission {mission}",
    "my goal is {mission} and {seen} is near , hence {action}",
    "thinking about {mission} : {action} seems best",
    "nothing else helps , {seen} , so {action} it is",
)


def action_of(text: str) -> str | None:
    """The action of "Thought: … Action: …"; None where the text is not of that form."""
    thought, marker, action = text.strip().partition("Action:")
    return action.strip() if marker and thought.startswith("Thought:") else None


class ThinkingBabyAI:
    """`BabyAITextEnv` that takes thoughts with actions and has an expert that gives both."""

    actions = ()

    def __init__(self, phrasings: int) -> None:
        if not 1 <= phrasings <= len(PHRASINGS):
            raise ValueError(f"phrasings must be in 1 … {len(PHRASINGS)}, got {phrasings}")
        self._env = BabyAITextEnv(level_id(LEVEL))
        self._phrasings = PHRASINGS[:phrasings]
        self.name = f"phrasings:{phrasings}"

    @property
    def max_steps(self) -> int:
        """Those of the level."""
        return self._env.max_steps

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the episode of this seed."""
        observation, info = self._env.reset(seed)
        self._seed, self._step = seed, 0
        mission, _, self._view = observation.removeprefix("mission : ").partition(" . ")
        self._mission = mission
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act by the action in the text; a text of another form is an invalid step."""
        self._step += 1
        found = self._env.step(action_of(action) or "")
        self._view = found[0]
        return found

    def expert_action(self) -> str:
        """The bot's action behind a thought; the same phrasing each time it is asked."""
        action = self._env.expert_action()
        phrasing = random.Random(f"{self._seed} {self._step}").choice(self._phrasings)
        seen = self._view.split(" , ")[0]
        thought = phrasing.format(mission=self._mission, seen=seen, action=action)
        return f"Thought: {thought} Action: {action}"

    def close(self) -> None:
        """Close the level."""
        self._env.close()


register("phrasings", lambda count: ThinkingBabyAI(int(count)))
