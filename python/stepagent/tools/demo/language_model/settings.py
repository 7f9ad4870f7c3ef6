"""What decides the outcome of a run on a language model, and the sizes that it comes in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Size: TypeAlias = Literal["small", "full"]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome; by default the size that is called full.

    Attributes:
        model: "smollm2", or the folder of a model with its tokenizer.
        rollout_max_steps: of the agent's episodes in training; the expert needs 4 on average.
        max_new_tokens: of an action. The longest of the expert's in 40 games has 13.
        first_evaluation_seed: of the held-out games.
    """

    seed: int = 0
    model: str = "smollm2"
    environment: str = "textworld:easy"
    demonstrations: int = 48
    lora_rank: int = 16
    learning_rate: float = 3e-4
    warmup_steps: int = 2
    batch_size: int = 4
    max_tokens: int = 1024
    sft_epochs: int = 1
    sft_long_epochs: int = 3
    cycles: int = 2
    rollout_max_steps: int = 6
    beta: float = 1.0
    inverse_samples: int = 4
    critic_epochs: int = 1
    max_new_tokens: int = 16
    max_steps: int = 10
    save_steps: int = 4
    first_evaluation_seed: int = 1_000_000
    evaluation_episodes: int = 40

    @property
    def demonstration_seeds(self) -> range:
        """Each seed of the demo has 10,000 training games of its own."""
        return range(10_000 * self.seed, 10_000 * self.seed + self.demonstrations)

    @property
    def first_rollout_seed(self) -> int:
        """The agent's own rollouts run on training games behind the demonstrations'."""
        return 10_000 * self.seed + 1_000

    @property
    def evaluation_seeds(self) -> range:
        """For reporting, and nothing else."""
        return range(
            self.first_evaluation_seed, self.first_evaluation_seed + self.evaluation_episodes
        )


SIZES: dict[Size, Settings] = {
    "small": replace(Settings(), demonstrations=16, cycles=1, evaluation_episodes=12),
    "full": Settings(),
}
"""``full`` takes 80 minutes on a core without the inverse arm, ``small`` half an hour."""
