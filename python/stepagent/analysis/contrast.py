"""Embeddings in which what is near in time is near: InfoNCE (van den Oord et al. 2018).

A state's positive is one of the next steps of its own episode; its negatives are steps far away in
its own, and steps of other episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_logprobs
from .describing import Standardised

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ContrastOptions:
    """How embeddings are learnt.

    size: H, of an embedding. hidden: of the layer before. near: a positive is 1 to so many steps
    ahead. far_steps, others: negatives of an anchor, of its own episode beyond ``near`` and of
    other episodes. Where each episode has its own layout, others tell layouts apart, not phases.
    episodes: in a batch.
    """

    size: int = 32
    hidden: int = 128
    near: int = 1
    far_steps: int = 16
    others: int = 4
    temperature: float = 0.1
    episodes: int = 16
    updates: int = 200
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("size", "hidden", "near", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.episodes < 2:
            raise ValueError(f"episodes must be at least 2, got {self.episodes}")
        if min(self.far_steps, self.others) < 0 or self.far_steps + self.others < 1:
            raise ValueError(
                "far_steps and others must be at least 0, and one of them more, got "
                f"{self.far_steps} and {self.others}"
            )
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


def info_nce(
    anchors_BH: Tensor,
    keys_VH: Tensor,
    positives_B: Tensor,
    *,
    temperature: float,
    candidates_BK: Tensor | None = None,
) -> Tensor:
    """−mean log softmax of each anchor's positive among its candidates.

        L = −1/B Σ_i log exp(z_i · z_p(i) / τ) / Σ_j exp(z_i · z_j / τ)

    A linear cross-entropy whose weight are the keys: `stepagent.linear_logprobs` computes it.

    Args:
        anchors_BH: (B, H), any float dtype.
        keys_VH: (V, H), the same.
        positives_B: (B,) int64 in [0, V): each anchor's positive among the keys.
        temperature: τ > 0.
        candidates_BK: (B, K) int64 in [0, V), -1 for none: over which j runs, the positive among
            them. None: over all keys.

    Returns:
        The loss, a scalar in fp32, with gradients for anchors and keys.

    Raises:
        ValueError: as `stepagent.linear_logprobs`.
    """
    logps_B = linear_logprobs(
        anchors_BH, keys_VH, positives_B, temperature=temperature, kept_NK=candidates_BK
    )
    return -logps_B.mean()


class Encoder(nn.Module):
    """z = f(x): two layers on standardised features, and length 1."""

    def __init__(self, features: int, options: ContrastOptions) -> None:
        super().__init__()
        self.inputs = Standardised(features)
        self.inner = nn.Linear(features, options.hidden)
        self.outer = nn.Linear(options.hidden, options.size)

    def forward(self, features_ND: Tensor) -> Tensor:
        """(N, D) to (N, H)."""
        return F.normalize(self.outer(F.relu(self.inner(self.inputs(features_ND)))), dim=-1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """anchors_B, positives_B: places among the V states. candidates_BK: the positive, then its
    negatives; -1 where there are fewer."""

    anchors_B: NDArray[np.int64]
    positives_B: NDArray[np.int64]
    candidates_BK: NDArray[np.int64]


def draw_pairs(
    episodes_V: NDArray[np.int64], options: ContrastOptions, rng: np.random.Generator
) -> Pairs:
    """An anchor at every state that has a next one, with its positive and its negatives.

    Args:
        episodes_V: the episode of each state; its states stand together, in their order.
    """
    starts = np.searchsorted(episodes_V, episodes_V)
    stops = np.searchsorted(episodes_V, episodes_V, side="right")
    anchors = np.flatnonzero(np.arange(len(episodes_V)) + 1 < stops)
    positives, rows = [], []
    for anchor in anchors:
        start, stop = starts[anchor], stops[anchor]
        positive = int(rng.integers(anchor + 1, min(anchor + options.near + 1, stop)))
        own = np.arange(start, stop)
        own = own[np.abs(own - anchor) > options.near]
        others = np.concatenate([np.arange(start), np.arange(stop, len(episodes_V))])
        drawn = [
            rng.permutation(own)[: options.far_steps],
            rng.permutation(others)[: options.others],
        ]
        positives.append(positive)
        rows.append(np.concatenate([[positive], *drawn]))
    width = max(map(len, rows))
    filled = [np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]
    return Pairs(anchors, np.array(positives), np.stack(filled))


def train_encoder(
    features_ND: NDArray[np.float32],
    lengths: Sequence[int],
    options: ContrastOptions,
    *,
    seed: int = 0,
) -> tuple[Encoder, list[float]]:
    """An encoder that has learnt from episodes, and the loss of each update.

    Args:
        features_ND: of all states, episode after episode.
        lengths: states of each episode; they sum to N.
        seed: of the weights and of the pairs.

    Raises:
        ValueError: where less than two episodes have two states, so that there is no negative.
    """
    if sum(length > 1 for length in lengths) < 2:
        raise ValueError(
            f"at least 2 episodes with a step must be there to contrast, got {len(lengths)} "
            f"episodes with {[max(length - 1, 0) for length in lengths]} steps"
        )
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(features_ND.shape[1], options)
    encoder.inputs.fit(features_ND)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=options.learning_rate)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    moving = np.flatnonzero(np.array(lengths) > 1)
    losses: list[float] = []
    for _ in range(options.updates):
        chosen = rng.permutation(moving)[: options.episodes]
        places = np.concatenate([np.arange(bounds[e], bounds[e + 1]) for e in chosen])
        pairs = draw_pairs(
            np.repeat(np.arange(len(chosen)), np.take(lengths, chosen)), options, rng
        )
        z_VH = encoder(torch.from_numpy(features_ND[places]))
        loss = info_nce(
            z_VH[pairs.anchors_B],
            z_VH,
            torch.from_numpy(pairs.positives_B),
            temperature=options.temperature,
            candidates_BK=torch.from_numpy(pairs.candidates_BK),
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return encoder, losses
