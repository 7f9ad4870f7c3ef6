"""What decides a run's outcome."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome. Chosen on the validation episodes alone."""

    seed: int = 0
    environment: str = "babyai:GoToLocalS6N2"
    demonstrations: int = 200
    hidden_size: int = 128
    layers: int = 2
    batch_size: int = 16
    sft_learning_rate: float = 1e-3
    sft_max_epochs: int = 60
    sft_patience: int = 6  # validations, 4 epochs apart, without a new best
    cycles: int = 4
    epochs_per_cycle: int = 4
    rollouts: int = 200
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    beta: float = 1.0
    sft_weight: float = 1.0
    max_steps: int = 20  # of an evaluation episode; the expert needs 8 at most
    rollout_max_steps: int = 10
    inverse_samples: int = 4  # at the expert's states, compared with each other
    gamma: float = 0.0
    first_validation_seed: int = 500_000
    validation_episodes: int = 200
    first_evaluation_seed: int = 1_000_000
    evaluation_episodes: int = 200

    @property
    def demonstration_seeds(self) -> range:
        """Each seed of the demo has 10,000 training levels of its own."""
        return range(10_000 * self.seed, 10_000 * self.seed + self.demonstrations)

    @property
    def first_rollout_seed(self) -> int:
        """The agent's own rollouts run on training levels behind the demonstrations'."""
        return 10_000 * self.seed + 1_000

    @property
    def validation_seeds(self) -> range:
        """For choosing: when to stop, and the settings themselves."""
        return range(
            self.first_validation_seed, self.first_validation_seed + self.validation_episodes
        )

    @property
    def evaluation_seeds(self) -> range:
        """For reporting, and nothing else."""
        return range(
            self.first_evaluation_seed, self.first_evaluation_seed + self.evaluation_episodes
        )
