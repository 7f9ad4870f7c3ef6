"""The steps of padded rows, which is how most trainers hold them.

B rows of T tokens; N tokens that the policy produced, in the order of rows; S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MaskedSteps:
    """A step is a run of True in its row's mask: an action between two observations.

    Attributes:
        mask_BT: (B, T) bool, True for tokens that the policy produced.
        step_offsets: (S + 1,) int64 into these tokens.
        row_offsets: (B + 1,) int64 into the steps.
    """

    mask_BT: Tensor
    step_offsets: Tensor
    row_offsets: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor) -> MaskedSteps:
        """The steps of a mask of booleans, or of 0 and 1.

        Raises:
            ValueError: for a mask that is not two-dimensional.
        """
        if mask_BT.dim() != 2:
            raise ValueError(f"mask_BT must be two-dimensional, got shape {tuple(mask_BT.shape)}")
        mask_BT = mask_BT.bool()
        starts_BT = mask_BT & ~F.pad(mask_BT, (1, 0))[:, :-1]
        starts_S = starts_BT[mask_BT].nonzero().squeeze(1)
        return cls(
            mask_BT,
            F.pad(starts_S, (0, 1), value=int(mask_BT.sum())),
            F.pad(starts_BT.sum(1).cumsum(0), (1, 0)),
        )

    @property
    def counts_B(self) -> list[int]:
        """How many steps each row has."""
        return [int(count) for count in self.row_offsets.diff()]

    def tokens(self, values_BT: Tensor) -> Tensor:
        """(N,) of (B, T): what belongs to the policy's tokens."""
        return values_BT[self.mask_BT]

    def spread(self, values_S: Tensor) -> Tensor:
        """(B, T) of (S,): at each token its step's value, 0 where the policy produced nothing."""
        values_N = values_S.repeat_interleave(self.step_offsets.diff())
        zeros_BT = values_S.new_zeros(self.mask_BT.shape)
        return zeros_BT.masked_scatter(self.mask_BT, values_N)

    def sums_until_next(self, values_BT: Tensor, name: str) -> Tensor:
        """(S,) of (B, T): summed from a step's first token up to the next step, or the row's end.

        So what an environment pays for an action may lie on its last token, or on what it answered.

        Raises:
            ValueError: for a value other than 0 before the first step of its row.
        """
        starts_BT = self.mask_BT & ~F.pad(self.mask_BT, (1, 0))[:, :-1]
        within_BT = starts_BT.cumsum(1)
        lost_BT = (within_BT == 0) & (values_BT != 0)
        if bool(lost_BT.any()):
            b, t = lost_BT.nonzero()[0].tolist()
            raise ValueError(f"{name}[{b}, {t}] must be 0 before the first step of its row")
        step_BT = within_BT + self.row_offsets[:-1, None] - 1
        sums_S = values_BT.new_zeros(len(self.step_offsets) - 1)
        inside_BT = within_BT > 0
        return sums_S.index_add_(0, step_BT[inside_BT], values_BT[inside_BT])

    def at_ends(self, values_S: Tensor) -> Tensor:
        """(B, T) of (S,): at the last token of each step its value, 0 elsewhere."""
        values_N = values_S.new_zeros(int(self.step_offsets[-1]))
        values_N[self.step_offsets[1:] - 1] = values_S
        return values_S.new_zeros(self.mask_BT.shape).masked_scatter(self.mask_BT, values_N)

    def join(self, values: Sequence[Sequence[float]], name: str) -> Tensor:
        """(S,) float32 of one list a row, one number a step.

        Raises:
            ValueError: naming the row whose list has another length than the row has steps.
        """
        if len(values) != len(self.counts_B):
            raise ValueError(f"{name} must have {len(self.counts_B)} rows, got {len(values)}")
        for b, (row, count) in enumerate(zip(values, self.counts_B, strict=True)):
            if len(row) != count:
                raise ValueError(
                    f"{name}[{b}] must have {count} numbers, one a step (a run of tokens that the "
                    f"policy produced), got {len(row)}"
                )
        flat = [float(value) for row in values for value in row]
        return torch.tensor(flat, dtype=torch.float32, device=self.mask_BT.device)
