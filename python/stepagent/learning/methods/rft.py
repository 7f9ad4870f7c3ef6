"""RFT, rejection-sampling fine-tuning (arXiv 2308.01825): act, keep what was good enough, imitate.

Each cycle the agent acts in the demonstrations' tasks. Rollouts that earned enough are learnt as
the demonstrations are, together with them; one that is known already is not learnt twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..cycle import Comparison
from ..options.methods import RFTOptions
from .method import Batch
from .tasks import ROUNDING, TaskMethod, gold

if TYPE_CHECKING:
    from ...data.trunk import Trunk
    from ..collecting import Acting


class RFT(TaskMethod):
    """Mean −log π over the demonstrations and the kept rollouts of all cycles so far."""

    Options = RFTOptions
    options: RFTOptions
    scores = ()
    figures = ("loss",)
    defaults: ClassVar[Mapping[str, Any]] = {"samples": 4}

    @classmethod
    def items(cls, args: Any, demonstrations: int) -> int:
        return demonstrations * (1 + int(args.samples))

    def collect(self, acting: Acting, cycle: int) -> tuple[list[Comparison], dict[str, float]]:
        """Act in the demonstrations' tasks, and keep what earned enough and fits."""
        rollouts, figures = self.rollouts(acting)
        good = [
            trunk
            for i, of_task in enumerate(rollouts)
            for trunk, reward in of_task
            if reward >= self._enough(i) - ROUNDING
        ]
        kept = [trunk for trunk in good if len(trunk.input_ids) <= self.args.max_tokens]
        if len(kept) < len(good):
            warnings.warn(
                f"cycle {cycle} leaves out {len(good) - len(kept)} rollouts of more than "
                f"max_tokens={self.args.max_tokens}",
                RuntimeWarning,
                stacklevel=2,
            )
        if not kept:
            warnings.warn(
                f"cycle {cycle} keeps none of {int(figures['rollouts'])} rollouts, so it learns "
                "from the demonstrations and from those of earlier cycles alone",
                RuntimeWarning,
                stacklevel=2,
            )
        return [Comparison.demonstration(trunk) for trunk in kept], figures | {"kept": len(kept)}

    def reflect(
        self, fresh: Sequence[Comparison], earlier: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        """All that is learnt so far, and what is new; each trajectory once."""
        known = {_tokens(c.trunk) for c in earlier}
        new = {_tokens(c.trunk): c for c in reversed(fresh) if _tokens(c.trunk) not in known}
        made = [*earlier, *reversed(new.values())]
        return made, {"kept_new": len(new), "trajectories": len(made)}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean −log π over the tokens of the actions."""
        return batch.nll(), {}

    def measure(self, batch: Batch, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        return {"loss": batch.nll().reshape(1)}

    def _enough(self, i: int) -> float:
        least = self.options.keep_reward
        return gold(self._run.trajectories[i]) if least is None else least


def _tokens(trunk: Trunk) -> tuple[bytes, bytes]:
    return trunk.input_ids.tobytes(), trunk.action_spans.tobytes()
