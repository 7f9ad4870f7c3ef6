"""Kinds of behaviour in offline episodes: clusters of a hierarchical latent model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..optional import require
from .clusters import Clusters
from .describing import Describe, HashedWords
from .latent import LatentModel, LatentOptions, train_latent_model
from .tracks import Actions, Joint, Tracks, agents_of, done_by, make_tracks

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST = 10  # episodes
_MOST_ACTIONS = 32
_WORDS = 512  # features of an observation
_HELD_OUT = 5  # each fifth episode says whether the latents tell anything
_GAIN = 0.02  # nats an action


@dataclass(frozen=True, eq=False)
class Behaviours:
    """Made by `fit`. Behaviours are numbered from 0, the most frequent first.

    joint, local: the clusters of z_ω, and of what z_α has beyond its prior's mean.
    gain: nats an action that an episode's own latents give, beyond those of other episodes, on
    episodes that were held out of the training. names: of each behaviour its most typical actions.
    """

    model: LatentModel
    describe: Describe
    actions: Actions
    parts: int
    joint: Clusters
    local: Clusters
    gain: float
    names: tuple[str, ...]

    @classmethod
    def fit(
        cls,
        episodes: Sequence[Joint],
        *,
        count: int = 5,
        local_count: int | None = None,
        parts: int = 2,
        describe: Describe | None = None,
        options: LatentOptions | None = None,
        seed: int = 0,
    ) -> Behaviours:
        """Learn from episodes of one task, of whatever policies; no policy is needed.

        Args:
            episodes: of one agent each, or for each joint episode those of all its agents.
            count: K, how many behaviours.
            local_count: of the local ones, of agents or parts; as ``count`` by default.
            parts: of an episode of one agent, each with a local latent.
            describe: observations as vectors; by default `HashedWords`.
            options: of the model.
            seed: of the model and of the clusters.

        Raises:
            ValueError: for less than 10 episodes or 2 K of them, and where the latents tell nothing
                that observations do not: then there is one behaviour only.
            ImportError: without scikit-learn.
        """
        require("Behaviours", "analysis")
        _check(episodes, count, parts)
        describe, options = describe or HashedWords(_WORDS), options or LatentOptions()
        actions = Actions.of(
            [action for joint in episodes for e in agents_of(joint) for action in done_by(e)],
            _MOST_ACTIONS,
        )
        tracks = make_tracks(episodes, actions, describe, parts)
        held_out = np.random.default_rng(seed).permutation(len(tracks))[::_HELD_OUT]
        known = np.setdiff1d(np.arange(len(tracks)), held_out)
        model = train_latent_model(tracks, known, len(actions.names), options, seed=seed)
        gain = _told(model, tracks, held_out)
        if gain < _GAIN:
            raise ValueError(
                "episodes must differ in what is done at like observations, got "
                f"{gain:.3f} nats an action that a latent tells of {len(held_out)} episodes held "
                f"out, less than {_GAIN}: they show one behaviour only"
            )
        joint_EJ, local_EIL = _means(model, tracks)
        joint = Clusters.fit(joint_EJ, count, seed)
        local = Clusters.fit(local_EIL.reshape(-1, local_EIL.shape[-1]), local_count or count, seed)
        labels = joint.assign(joint_EJ)
        names = tuple(_name(episodes, labels == k, actions) for k in range(count))
        return cls(model, describe, actions, parts, joint, local, gain, names)

    def assign(self, episodes: Sequence[Joint]) -> NDArray[np.int64]:
        """The behaviour (E,) of each episode."""
        return self.joint.assign(self.latents(episodes)[0])

    def assign_local(self, episodes: Sequence[Joint]) -> NDArray[np.int64]:
        """The local behaviour (E, I) of each agent or part: what it adds to the joint one."""
        return self.local.assign(self.latents(episodes)[1])

    def latents(self, episodes: Sequence[Joint]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """z_ω (E, J), and (E, I, L) what each z_α has beyond the mean that z_ω makes expected."""
        if not episodes:
            raise ValueError("episodes must hold at least one, got none")
        tracks = make_tracks(episodes, self.actions, self.describe, self.parts)
        return _means(self.model, tracks)

    def exemplars(self, episodes: Sequence[Joint], count: int = 3) -> list[list[int]]:
        """Of each behaviour the places of its most typical episodes, the densest first."""
        latents_EJ = self.latents(episodes)[0]
        labels = self.joint.assign(latents_EJ)
        order = np.argsort(-self.joint.density(latents_EJ), kind="stable")
        return [[int(e) for e in order if labels[e] == k][:count] for k in range(len(self.joint))]


def _check(episodes: Sequence[Joint], count: int, parts: int) -> None:
    for name, value, least in (("count", count, 2), ("parts", parts, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if len(episodes) < max(_LEAST, 2 * count):
        raise ValueError(
            f"episodes must be at least {max(_LEAST, 2 * count)} for {count} behaviours, got "
            f"{len(episodes)}"
        )


@torch.no_grad()
def _means(model: LatentModel, tracks: Tracks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found = model.latents(tracks, np.arange(len(tracks)), draw=False)
    joint, local = found.joint.mean, found.local.mean - found.local_prior.mean
    return joint.double().numpy(), local.double().numpy()


@torch.no_grad()
def _told(model: LatentModel, tracks: Tracks, held_out: NDArray[np.int64]) -> float:
    """Nats an action that episodes' own latents give, less what those of the next ones do."""
    z_BIL = model.latents(tracks, held_out, draw=False).local.mean
    own = model.logps(tracks, held_out, z_BIL).sum()
    count = int(tracks.mask_EIT[held_out].sum())
    shifts = range(1, min(6, len(held_out)))
    others = [model.logps(tracks, held_out, z_BIL.roll(shift, 0)).sum() for shift in shifts]
    return float((own - torch.stack(others).mean()) / count)


def _name(episodes: Sequence[Joint], chosen: NDArray[np.bool_], actions: Actions) -> str:
    """The two most frequent actions, with their shares of the behaviour's."""
    own = [
        episode
        for joint, c in zip(episodes, chosen, strict=True)
        if c
        for episode in agents_of(joint)
    ]
    done = actions.index([action for episode in own for action in done_by(episode)])
    if not len(done):
        return "no episodes"
    counts = np.bincount(done, minlength=len(actions.names))
    top = [k for k in np.argsort(-counts, kind="stable")[:2] if counts[k]]
    return ", ".join(f"{actions.names[k]} {counts[k] / len(done):.0%}" for k in top)
