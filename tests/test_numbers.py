"""docs/numbers.md explains every figure that a cycle logs, of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import babyai_tokenizer, tiny_agent

import stepagent as sa

pytest.importorskip("minigrid")

PAGE = (Path(__file__).parents[1] / "docs" / "numbers.md").read_text()
LEVEL = "babyai:GoToLocalS6N2"
OPTIONS: dict[str, dict[str, Any]] = {
    "implicit": {},
    "inverse": {"critic_epochs": 1, "entropy_coef": 0.1, "target_kl": 1e-9},
    "srl": {},
    "distillation": {},
    "early_experience": {"samples": 2},
    "eto": {"max_steps_per_episode": 3},
    "rft": {"max_steps_per_episode": 3, "keep_reward": 0.0},
    "ipr": {"max_steps_per_episode": 3, "continuations": 1, "max_new_tokens": 2},
    "gigpo": {"rollouts": 4, "group_size": 2, "max_steps_per_episode": 3},
    "istar": {"rollouts": 16, "group_size": 8, "max_steps_per_episode": 3, "critic_epochs": 1},
    "ppo": {"rollouts": 2, "max_steps_per_episode": 3},
}
ACTS_IN_ENV = ("early_experience", "eto", "rft", "ipr", "gigpo", "istar", "ppo")


@pytest.mark.parametrize("method", OPTIONS)
def test_every_logged_figure_is_explained(method: str, tmp_path: Path) -> None:
    episodes = sa.rollout.run_episodes(LEVEL, sa.policies.ExpertPolicy(), range(2), max_steps=3)
    args = sa.StepAgentConfig(
        str(tmp_path),
        method=method,
        cycles=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **OPTIONS[method],
    )
    trainer = sa.StepAgentTrainer(
        tiny_agent(),
        args,
        [episode.trajectory() for episode in episodes],
        babyai_tokenizer(),
        tiny_agent(seed=1) if method in ("distillation", "ipr") else None,
        env=LEVEL if method in ACTS_IN_ENV else None,
    )
    trainer.train()
    (cycle,) = [entry for entry in trainer.state.log_history if "cycle" in entry]
    figures = cycle.keys() - {"epoch", "step"}
    assert len(figures) > 8
    assert [name for name in sorted(figures) if f"`{name}`" not in PAGE and name != "cycle"] == []
