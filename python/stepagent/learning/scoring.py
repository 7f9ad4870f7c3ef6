"""Log-probs in training: of a batch, and of a cycle's comparisons under reference and policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models import evaluation_mode, score_trees
from ..ranks import over_ranks
from .cycle import Comparison, pack_comparisons, split_by_trunk
from .reference_policy import reference_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
    from transformers import PreTrainedModel

    from ..trees.tree import TokenTree
    from .config import StepAgentConfig


class Scorer:
    """Scores trees in the precision of training, head included; in another they would differ."""

    def __init__(
        self, args: StepAgentConfig, accelerator: Accelerator, ref_model: PreTrainedModel | None
    ) -> None:
        self._args, self._accelerator = args, accelerator
        self._ref_model = ref_model

    @property
    def distributed_type(self) -> DistributedType:
        """How the processes of the run share the model."""
        return self._accelerator.distributed_type

    def logps(
        self, model: nn.Module, trees: Sequence[TokenTree], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (N,) of the labels of all trees, and entropies (N,) where asked for."""
        with self._accelerator.autocast():
            if entropy:
                return score_trees(model, trees, return_entropy=True)
            return score_trees(model, trees), None

    @torch.no_grad()
    def with_scores(
        self,
        policy: PreTrainedModel,
        comparisons: Sequence[Comparison],
        wanted: Sequence[str],
        *,
        sharded: bool,
    ) -> list[Comparison]:
        """Score every comparison, under the policy as it is now and under the reference.

        Args:
            wanted: ``"ref_logps"``, under the fixed reference of the run or else the policy as it
                is now; ``"old_logps"``, under the policy.
        """
        found: dict[str, list[NDArray[np.float32]]] = {}
        if self._ref_model is None or "old_logps" in wanted:
            own = self.scored(policy, comparisons, alike=sharded)
            found = {"ref_logps": own, "old_logps": own}
        if self._ref_model is not None and "ref_logps" in wanted:
            with reference_of(self._ref_model, policy) as reference:
                alike = sharded and reference is policy
                found["ref_logps"] = self.scored(reference, comparisons, alike=alike)
        columns = zip(*(found[name] for name in wanted), strict=True)
        return [
            replace(c, **dict(zip(wanted, scores, strict=True)))
            for c, scores in zip(comparisons, columns, strict=True)
        ]

    @torch.no_grad()
    def scored(
        self, model: nn.Module, comparisons: Sequence[Comparison], *, alike: bool
    ) -> list[NDArray[np.float32]]:
        """Log-probs of each comparison's actions, in the order of its tree."""
        size = self._args.per_device_eval_batch_size

        def scores(places: list[int]) -> list[NDArray[np.float32]]:
            batches = [places[i : i + size] for i in range(0, len(places), size)]
            scored = []
            for batch in tqdm(batches, desc="score", disable=self._args.disable_tqdm):
                trees = pack_comparisons([comparisons[i] for i in batch], self._args.max_tokens)
                values = self.logps(model, trees)[0].float().cpu().numpy()
                check_finite(values, "log-probs at the start of the cycle")
                scored += split_by_trunk(values, trees)
            return scored

        with evaluation_mode(model):
            return over_ranks(scores, [c.tokens for c in comparisons], alike=alike)


def check_finite(values: Any, what: str) -> None:
    """Raise FloatingPointError where a value is not finite."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{what} must be finite, got NaN or infinity: lower the learning rate or look for a "
            "broken weight. Checkpoints written so far are kept"
        )
