"""A hierarchical latent model of behaviour (after MOHBA, arXiv 2206.09046).

    q(z_ω | τ),  q(z_α^i | z_ω, τ^i);  p(z_ω) = N(0, 1),  p(z_α^i | z_ω);  π(a | o, z_α^i)
    max  E Σ_{i,t} log π(a_t^i | o_t^i, z_α^i)
         − β [KL(q(z_ω) ‖ p) + Σ_i KL(q(z_α^i) ‖ p(z_α^i | z_ω))]

Half of the likelihood is under z_α of the posterior, as above, and half under z_α of its prior
given z_ω, which is our own: so z_ω says what an episode's agents or parts have in common.

The decoder sees the observation, so what the latents need not say is what the task asks for; what
they say is what one does about it. Each dimension's KL below the free bits costs nothing, without
which the latents fall to their priors and say nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .describing import Standardised
from .tracks import Tracks

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LatentOptions:
    """The model's sizes and its training.

    joint, local: dimensions of z_ω and of z_α. free_bits: nats a dimension, averaged over
    episodes. hierarchical: False for the flat rival, whose z_α has the prior N(0, 1) and no z_ω.
    """

    joint: int = 4
    local: int = 4
    hidden: int = 64
    beta: float = 0.5
    free_bits: float = 0.1
    updates: int = 600
    batch: int = 64
    learning_rate: float = 3e-3
    hierarchical: bool = True

    def __post_init__(self) -> None:
        for name in ("joint", "local", "hidden", "updates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("beta", "free_bits"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")


class Gaussian(NamedTuple):
    """A diagonal normal distribution, by its mean and the log of its standard deviation."""

    mean: Tensor
    log_std: Tensor

    def draw(self) -> Tensor:
        """One reparameterised sample."""
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def kl(self, prior: Gaussian) -> Tensor:
        """KL(self ‖ prior) of each dimension."""
        ratio = (2 * (self.log_std - prior.log_std)).exp()
        shift = ((self.mean - prior.mean) / prior.log_std.exp()) ** 2
        return 0.5 * (ratio + shift - 1) + prior.log_std - self.log_std


class Latents(NamedTuple):
    """Posteriors and the local prior of a batch: (B, joint) and (B, I, local)."""

    joint: Gaussian
    local: Gaussian
    local_prior: Gaussian


class LatentModel(nn.Module):
    """See the module. Agents are exchangeable: z_ω does not know who is who."""

    def __init__(self, features: int, actions: int, options: LatentOptions) -> None:
        super().__init__()
        hidden, self._options, self._actions = options.hidden, options, actions
        self.inputs = Standardised(features)
        self.look = nn.Linear(features, hidden)
        self.step = _layers(hidden + 2 * actions, hidden, hidden)
        self.whole = _layers(hidden, hidden, 2 * options.joint)
        self.part = _layers(hidden + options.joint, hidden, 2 * options.local)
        self.prior = _layers(options.joint, hidden, 2 * options.local)
        self.see = nn.Linear(features, hidden)
        self.act = _layers(hidden + options.local, hidden, actions)

    def latents(self, tracks: Tracks, chosen: NDArray[np.int64], *, draw: bool) -> Latents:
        """The posteriors of the chosen episodes; means stand for samples unless ``draw``."""
        mask_BIT1 = torch.from_numpy(tracks.mask_EIT[chosen])[..., None]
        acted_BITA = F.one_hot(torch.from_numpy(tracks.actions_EIT[chosen]), self._actions).float()
        before_BITA = torch.roll(acted_BITA, 1, dims=2)
        before_BITA[:, :, 0] = 0
        seen_BITH = self._gathered(self.look, tracks, chosen)
        steps = self.step(torch.cat([seen_BITH, acted_BITA, before_BITA], dim=-1)) * mask_BIT1
        parts_BIH = steps.sum(2) / mask_BIT1.sum(2)
        joint = _gaussian(self.whole(parts_BIH.mean(1)))
        z_BJ = joint.draw() if draw else joint.mean
        if not self._options.hierarchical:
            z_BJ = torch.zeros_like(z_BJ)
        z_BIJ = z_BJ[:, None].expand(-1, parts_BIH.shape[1], -1)
        local = _gaussian(self.part(torch.cat([parts_BIH, z_BIJ], dim=-1)))
        prior = _gaussian(self.prior(z_BIJ))
        if not self._options.hierarchical:
            zeros = torch.zeros_like(prior.mean)
            prior = Gaussian(zeros, zeros)
        return Latents(joint, local, prior)

    def logps(self, tracks: Tracks, chosen: NDArray[np.int64], z_BIL: Tensor) -> Tensor:
        """log π(a | o, z_α) (B, I, T) of each action; 0 beyond the end."""
        seen_BITH = self._gathered(self.see, tracks, chosen)
        z_BITL = z_BIL[:, :, None].expand(-1, -1, seen_BITH.shape[2], -1)
        logits = self.act(torch.cat([seen_BITH, z_BITL], dim=-1)).log_softmax(-1)
        actions_BIT1 = torch.from_numpy(tracks.actions_EIT[chosen])[..., None]
        own: Tensor = logits.gather(-1, actions_BIT1).squeeze(-1)
        return own * torch.from_numpy(tracks.mask_EIT[chosen])

    def loss(self, tracks: Tracks, chosen: NDArray[np.int64]) -> Tensor:
        """−ELBO of the chosen episodes, per episode, with free bits."""
        options = self._options
        found = self.latents(tracks, chosen, draw=True)
        told = self.logps(tracks, chosen, found.local.draw()).sum((1, 2)).mean()
        if options.hierarchical:  # what the joint latent alone lets expect
            expected = self.logps(tracks, chosen, found.local_prior.draw()).sum((1, 2)).mean()
            told = (told + expected) / 2
        local_kl = found.local.kl(found.local_prior).mean((0, 1)).clamp(min=options.free_bits)
        kl = local_kl.sum() * found.local.mean.shape[1]
        if options.hierarchical:
            zeros = torch.zeros_like(found.joint.mean)
            joint_kl = found.joint.kl(Gaussian(zeros, zeros)).mean(0)
            kl = kl + joint_kl.clamp(min=options.free_bits).sum()
        return options.beta * kl - told

    def _gathered(self, layer: nn.Linear, tracks: Tracks, chosen: NDArray[np.int64]) -> Tensor:
        """The layer's rows (B, I, T, H); each different observation goes through it once."""
        texts, places = np.unique(tracks.texts_EIT[chosen], return_inverse=True)
        features_UD = self.inputs(torch.from_numpy(tracks.features_UD[texts]))
        rows_UH = F.relu(layer(features_UD))
        return rows_UH[torch.from_numpy(places.reshape(tracks.texts_EIT[chosen].shape))]


def train_latent_model(
    tracks: Tracks,
    known: NDArray[np.int64],
    actions: int,
    options: LatentOptions,
    *,
    seed: int = 0,
) -> LatentModel:
    """A model that has learnt from the known of the episodes.

    Args:
        known: places of episodes.
        actions: A, how many classes of actions there are.
        seed: of the weights, the batches and the samples.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentModel(tracks.features_UD.shape[1], actions, options)
        model.inputs.fit(tracks.features_UD)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
        for _ in range(options.updates):
            loss = model.loss(tracks, rng.permutation(known)[: options.batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
    return model


def _layers(size: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, out))


def _gaussian(made: Tensor) -> Gaussian:
    mean, log_std = made.chunk(2, dim=-1)
    return Gaussian(mean, log_std.clamp(-5, 2))
