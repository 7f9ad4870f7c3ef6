"""What a run asks its expert: at which of the agent's states, and how many answers are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..acting.askers import Asker, asker_of, load_asker, save_asker
from ..acting.asking import ask_where_worth, own_steps
from ..records.episodes import Episode

if TYPE_CHECKING:
    from .config import StepAgentConfig

ASKER_FILE = "asker.safetensors"  # in a checkpoint


class Questions:
    """The asker of a run and its count of answers.

    Attributes:
        afterwards: The states are chosen once the rollouts are over; else the expert is asked at
            each as it comes.
    """

    def __init__(self, args: StepAgentConfig, asker: Asker | None = None) -> None:
        self._args = args
        self.asker = asker_of(args.ask, args.seed) if asker is None else asker
        if args.ask_from is not None:
            load_asker(self.asker, args.ask_from)
        self._unlearnt = self.asker.state()
        self.afterwards = args.ask != "always" or args.ask_budget is not None
        self._answers = 0  # of the run, where they are chosen afterwards

    def choose(
        self,
        episodes: Sequence[Episode],
        cycle: int,
        ask: Callable[[Sequence[list[int]]], list[Episode]],
    ) -> list[Episode]:
        """The rollouts of a cycle with the answers that are worth most.

        Args:
            ask: the rollouts with the expert's answers at these steps of each.
        """
        count = self._count(episodes, cycle)
        asked, answers = ask_where_worth(self.asker, episodes, count, ask)
        self._answers += answers
        return asked

    def figures(self) -> dict[str, float]:
        """What a cycle logs of the budget."""
        budget = self._args.ask_budget
        return {} if budget is None else {"ask_budget_left": budget - self._answers}

    def restart(self) -> None:
        """Forget what this run's answers taught, and that they were given."""
        self.asker.restore(self._unlearnt)
        self._answers = 0

    def save(self, folder: Path) -> None:
        """Write what the asker has learnt and how many answers that cost."""
        if self.afterwards:
            save_asker(self.asker, folder / ASKER_FILE, answers=self._answers)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; before the file, nothing was learnt and nothing counted."""
        must_know = bool(self._unlearnt) or self._args.ask_budget is not None
        if self.afterwards and (must_know or (folder / ASKER_FILE).exists()):
            self._answers = load_asker(self.asker, folder / ASKER_FILE)["answers"]

    def _count(self, episodes: Sequence[Episode], cycle: int) -> int:
        """At how many states of a cycle the expert is asked: a share of all, but at least one, and
        of a budget what is left, spread evenly over the cycles to come."""
        states = sum(len(own_steps(episode)) for episode in episodes)
        count = max(1, round(self._args.ask_share * states))
        if self._args.ask_budget is None:
            return count
        left, cycles = self._args.ask_budget - self._answers, self._args.cycles - cycle
        return min(count, -(-left // cycles))
