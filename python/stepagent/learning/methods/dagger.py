"""DAgger (Ross et al. 2011): supervised on the expert's answers at the agent's own states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..cycle import Comparison
from .sft import SFT

if TYPE_CHECKING:
    from ..config import StepAgentConfig


class DAgger(SFT):
    """The demonstrations, and the answers of all cycles so far."""

    acts = True
    defaults: ClassVar[Mapping[str, Any]] = {"states": "agent"}

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        if args.states == "mixed":
            raise ValueError(
                f"states='mixed' compares actions, and method={args.method!r} compares none: with "
                "states='agent' it learns from the demonstrations and the rollouts of all cycles"
            )
        if args.states != "agent":
            raise ValueError(
                f"method='dagger' asks the expert at the agent's states, got states={args.states!r}"
            )

    def reflect(
        self, fresh: Sequence[Comparison], earlier: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        return [*earlier, *fresh], {}
