"""Clusters of latents: a mixture of normal distributions, each of a shape of its own.

A latent's axes have no scale that means anything, and behaviours differ in how much their episodes
vary. So distances to centres, as in k-means, would count what is noise like what is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STARTS = 10
_LEAST_VARIANCE = 1e-3  # of a cluster in any direction, where that of all points is 1


@dataclass(frozen=True, eq=False)
class Clusters:
    """Numbered from 0, the largest first.

    mixture: a scikit-learn pipeline. number_K: of each of its components the number here.
    """

    mixture: Any
    number_K: NDArray[np.int64]

    @classmethod
    def fit(cls, points_ND: NDArray[np.float64], count: int, seed: int) -> Clusters:
        """K = count clusters.

        Raises:
            ValueError: where less than K points differ.
        """
        from sklearn.mixture import GaussianMixture
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if (different := len(np.unique(points_ND.round(6), axis=0))) < count:
            raise ValueError(
                f"count must be at most the number of latents, {different}, got {count}"
            )
        mixture = make_pipeline(
            StandardScaler(),
            GaussianMixture(
                count, n_init=_STARTS, reg_covar=_LEAST_VARIANCE, max_iter=500, random_state=seed
            ),
        ).fit(points_ND)
        sizes = np.bincount(mixture.predict(points_ND), minlength=count)
        return cls(mixture, np.argsort(np.argsort(-sizes, kind="stable"), kind="stable"))

    def __len__(self) -> int:
        return len(self.number_K)

    def assign(self, points: NDArray[np.float64]) -> NDArray[np.int64]:
        """(..., D) to (...), the cluster that most probably made each point."""
        component_N: NDArray[np.int64] = self.mixture.predict(points.reshape(-1, points.shape[-1]))
        return self.number_K[component_N].reshape(points.shape[:-1])

    def density(self, points_ND: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) the log of it: how typical each point is."""
        found: NDArray[np.float64] = self.mixture.score_samples(points_ND)
        return found
