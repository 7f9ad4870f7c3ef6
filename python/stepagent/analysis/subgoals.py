"""Phases of a task from demonstrations, and a step reward from them (after arXiv 2406.01377).

Where the paper conditions a policy on the next sub-goal, here phases give a reward: the potential
of a phase is how far along demonstrations it stands, and a step is paid what it gains. One agent
only.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..files import atomic, write_text
from ..optional import require
from ..records.episodes import Episode
from .contrast import ContrastOptions, Encoder, train_encoder
from .describing import Describe, HashedWords, describe_once

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORMAT = 1
_NAME = 72  # characters of a phase's name


@dataclass(frozen=True, eq=False)
class Subgoals:
    """Phases in the order of their potential; made by `fit` or `load`.

    centres_KH: in the space of embeddings. potentials_K: in [0, 1], ascending: how far along
    demonstrations the states of a phase stand, on average. names: of each the observation nearest
    to its centre. shares: of the demonstrations' states. edges: (phase, next phase, how often) in
    demonstrations. losses: of each update of the embedding.
    """

    encoder: Encoder
    describe: Describe
    options: ContrastOptions
    centres_KH: NDArray[np.float32]
    potentials_K: NDArray[np.float64]
    names: tuple[str, ...]
    shares: tuple[float, ...]
    edges: tuple[tuple[int, int, int], ...]
    losses: tuple[float, ...] = ()

    @classmethod
    def fit(
        cls,
        demonstrations: Sequence[Episode],
        *,
        phases: int = 8,
        describe: Describe | None = None,
        options: ContrastOptions | None = None,
        seed: int = 0,
    ) -> Subgoals:
        """Learn from demonstrations of one task.

        Args:
            demonstrations: episodes that reached the goal.
            phases: K, how many.
            describe: observations as vectors; by default `HashedWords`.
            options: of the embedding.
            seed: of the embedding and of the clusters.

        Raises:
            ValueError: for K < 2, for less than two demonstrations with a step, one that failed or
                crashed, or less than K different observations.
            ImportError: without scikit-learn.
        """
        require("Subgoals", "analysis")
        _check_demonstrations(demonstrations, phases)
        describe, options = describe or HashedWords(), options or ContrastOptions()
        states = [_states(episode) for episode in demonstrations]
        texts = [text for own in states for text in own]
        if len(set(texts)) < phases:
            raise ValueError(
                f"phases must be at most the number of different observations, {len(set(texts))} "
                f"in {len(demonstrations)} demonstrations, got {phases}"
            )
        features = describe_once(describe, texts)
        encoder, losses = train_encoder(features, [len(own) for own in states], options, seed=seed)
        z_NH = _embedded(encoder, features)
        labels_N, centres_KH = _clusters(z_NH, phases, seed)
        places_N = np.concatenate([_places(episode) for episode in demonstrations])
        means_K = np.array([places_N[labels_N == k].mean() for k in range(phases)])
        order = np.argsort(means_K, kind="stable")
        labels_N = np.argsort(order)[labels_N]
        centres_KH = centres_KH[order]
        nearest = [int(np.argmin(((z_NH - c) ** 2).sum(1))) for c in centres_KH]
        counts = np.bincount(labels_N, minlength=phases)
        ends = np.cumsum([len(own) for own in states])[:-1]
        return cls(
            encoder=encoder,
            describe=describe,
            options=options,
            centres_KH=centres_KH,
            potentials_K=means_K[order],
            names=tuple(_name(texts[n]) for n in nearest),
            shares=tuple((counts / len(labels_N)).tolist()),
            edges=_edges(np.split(labels_N, ends)),
            losses=tuple(losses),
        )

    def assign(self, observations: Sequence[str]) -> NDArray[np.int64]:
        """The phase (N,) of each of N observations, by its own text alone."""
        if not observations:
            return np.zeros(0, np.int64)
        z_NH = _embedded(self.encoder, describe_once(self.describe, observations))
        distances_NK = ((z_NH[:, None] - self.centres_KH) ** 2).sum(-1)
        return np.asarray(np.argmin(distances_NK, axis=1))

    def phases(self, episode: Episode) -> NDArray[np.int64]:
        """The phase of each state: (T + 1,), or (T,) of one whose last observation is not known."""
        return self.assign(_states(episode))

    def path(self, episode: Episode) -> list[int]:
        """The phases in turn, each run of the same one once: an episode on the graph."""
        phases = self.phases(episode).tolist()
        return [p for t, p in enumerate(phases) if t == 0 or p != phases[t - 1]]

    def reward(
        self, episode: Episode, *, discount: float = 1.0, shaping: bool = False
    ) -> NDArray[np.float64]:
        """What each of the T steps gains: γ Φ(s_t+1) − Φ(s_t).

        As it is, it sums to Φ(s_T) − Φ(s_0) at γ = 1: progress without a verifier. With
        ``shaping`` it may be added to an environment's reward, and the best policy stays the best
        (Ng et al. 1999): the end of the episode then has Φ = 0, without which an end in a late
        phase would be worth more than one elsewhere (Grześ 2017).

        Args:
            discount: γ in (0, 1], the learner's own.

        Raises:
            ValueError: for another discount; and without ``shaping`` for an episode whose last
                observation is not known.
        """
        if not 0 < discount <= 1:
            raise ValueError(f"discount must lie in (0, 1], got {discount}")
        potentials = self.potentials_K[self.phases(episode)]
        steps = len(episode.actions)
        if shaping:
            potentials = np.append(potentials[:steps], 0.0)
        elif len(potentials) == steps:
            raise ValueError(
                f"episode {episode.id} must hold its last observation for the reward of its last "
                "step, got none"
            )
        return discount * potentials[1:] - potentials[:-1]

    # ------------------------------------------------------------------ files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``subgoals.safetensors`` and ``subgoals.json`` into a folder, made if missing."""
        from safetensors.torch import save

        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {f"encoder.{name}": t for name, t in self.encoder.state_dict().items()}
        tensors["centres"] = torch.from_numpy(self.centres_KH)
        tensors["potentials"] = torch.from_numpy(self.potentials_K)
        with atomic(Path(folder, "subgoals.safetensors")) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        told = {
            "format": _FORMAT,
            "describe": self.describe.kind,
            "options": asdict(self.options),
            **self.as_dict(),
        }
        write_text(Path(folder, "subgoals.json"), json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, describe: Describe | None = None) -> Subgoals:
        """What `save` wrote.

        Args:
            describe: needed where it was not `HashedWords`; of the same ``kind``.

        Raises:
            ValueError: for files that `save` did not write, and another ``describe``.
        """
        from safetensors.torch import load_file

        told = read_told(folder)
        if describe is None and told["describe"].get("kind") != "words":
            raise ValueError(
                f"describe must be given to load {folder}, of {told['describe']}, got none"
            )
        describe = describe or HashedWords(told["describe"]["size"])
        if describe.size != told["describe"]["size"]:
            raise ValueError(
                f"describe must have size {told['describe']['size']}, as {told['describe']} that "
                f"{folder} was made with, got {describe.kind}"
            )
        tensors = load_file(Path(folder, "subgoals.safetensors"))
        options = ContrastOptions(**told["options"])
        encoder = Encoder(describe.size, options)
        own = {
            k.removeprefix("encoder."): t for k, t in tensors.items() if k.startswith("encoder.")
        }
        encoder.load_state_dict(own)
        return cls(
            encoder=encoder,
            describe=describe,
            options=options,
            centres_KH=tensors["centres"].numpy(),
            potentials_K=tensors["potentials"].numpy(),
            names=tuple(phase["name"] for phase in told["phases"]),
            shares=tuple(phase["share"] for phase in told["phases"]),
            edges=tuple((a, b, n) for a, b, n in told["edges"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """The phases and the graph, as JSON can hold them."""
        rows = zip(self.names, self.potentials_K.tolist(), self.shares, strict=True)
        return {
            "phases": [{"name": n, "potential": p, "share": s} for n, p, s in rows],
            "edges": [list(edge) for edge in self.edges],
        }


def read_told(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``subgoals.json`` of a folder; ValueError where it is not what `Subgoals.save` wrote."""
    path = Path(folder, "subgoals.json")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} must be a folder of Subgoals.save, with subgoals.json, got none"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(told, dict) or told.get("format") != _FORMAT:
        found = told.get("format") if isinstance(told, dict) else type(told).__name__
        raise ValueError(f"{path} must be of format {_FORMAT}, got {found!r}")
    return told


def _check_demonstrations(demonstrations: Sequence[Episode], phases: int) -> None:
    if phases < 2:
        raise ValueError(f"phases must be at least 2, got {phases}")
    for episode in demonstrations:
        if episode.crashed is not None or not episode.success:
            ended = "failed" if episode.crashed is None else "crashed"
            raise ValueError(
                f"a demonstration must have succeeded, got {episode.id}, which {ended}"
            )


def _states(episode: Episode) -> list[str]:
    last = episode.last_observation
    return episode.observations + ([] if last is None else [last])


def _places(episode: Episode) -> NDArray[np.float64]:
    """t / T of each state: only to rank clusters, never seen by the embedding."""
    return np.arange(len(_states(episode))) / max(len(episode.actions), 1)


@torch.no_grad()
def _embedded(encoder: Encoder, features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    z_NH: NDArray[np.float32] = encoder(torch.from_numpy(features_ND)).numpy()
    return z_NH


def _clusters(
    z_NH: NDArray[np.float32], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cluster (N,) of each state and the centres (K, H), by k-means.

    Raises:
        ValueError: where so many states are alike that there are less clusters.
    """
    from sklearn.cluster import KMeans

    if (different := len(np.unique(z_NH.round(5), axis=0))) < count:
        raise ValueError(
            f"phases must be at most the number of states that the embedding tells apart, "
            f"{different}, got {count}"
        )
    found = KMeans(count, n_init=10, random_state=seed).fit(z_NH)
    return found.labels_.astype(np.int64), found.cluster_centers_.astype(np.float32)


def _edges(paths: Sequence[NDArray[np.int64]]) -> tuple[tuple[int, int, int], ...]:
    counted = Counter((int(a), int(b)) for path in paths for a, b in pairwise(path) if a != b)
    return tuple((a, b, n) for (a, b), n in sorted(counted.items()))


def _name(observation: str) -> str:
    line = " ".join(observation.split())
    return line if len(line) <= _NAME else f"{line[: _NAME - 2]} …"
