"""Supervised training: −log π of the expert's actions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..cycle import Comparison
from .method import Batch, Method


class SFT(Method):
    """Behavioural cloning. The agent never acts."""

    acts = False
    scores = ()
    figures = ("loss",)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the expert's tokens of −log π."""
        return batch.nll(), {}

    def measure(self, batch: Batch, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        return {"loss": batch.nll().reshape(1)}
