"""Observations as vectors, each by its own text alone.

What came before an observation, and at which step it stood, is in none of them: an embedding of a
whole history would learn to count steps, and phases would be clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..models import check_fits, evaluation_mode
from ..optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Describe(Protocol):
    """Turns texts into vectors: the same vector for the same text, whatever stands beside it."""

    @property
    def size(self) -> int:
        """D, the size of a vector."""
        ...

    @property
    def kind(self) -> dict[str, Any]:
        """What it is, as JSON can hold it: two that are equal here give equal vectors."""
        ...

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts as (N, D)."""
        ...


class HashedWords:
    """Words and pairs of neighbouring words, hashed: needs no model and knows every language.

    Args:
        size: D. Two words fall together with probability 1 / D.
    """

    def __init__(self, size: int = 2048) -> None:
        require("words as vectors", "analysis")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        from sklearn.feature_extraction.text import HashingVectorizer

        self.size = size
        self._vectorizer = HashingVectorizer(
            n_features=size, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]"
        )

    @property
    def kind(self) -> dict[str, Any]:
        """``{"kind": "words", "size": D}``."""
        return {"kind": "words", "size": self.size}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts as (N, D), each of length 1, or 0 where it has no words."""
        made: NDArray[np.float32] = self._vectorizer.transform(list(texts)).toarray()
        return made.astype(np.float32)


class ModelRows:
    """The mean of a language model's last hidden rows over a text that it reads alone.

    Args:
        model: a causal language model; it is not trained.
        tokenizer: its own.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.size = int(model.config.get_text_config().hidden_size)

    @property
    def kind(self) -> dict[str, Any]:
        """``{"kind": "model", "name": …, "size": H}``."""
        return {"kind": "model", "name": str(self._model.name_or_path), "size": self.size}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts as (N, H), each of length 1.

        Raises:
            ValueError: for a text that is longer than the model's positions.
        """
        with evaluation_mode(self._model):
            rows = [self._mean_row(text) for text in texts]
        made = np.stack(rows) if rows else np.zeros((0, self.size), np.float32)
        return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), dtype=np.float32)

    def _mean_row(self, text: str) -> NDArray[np.float32]:
        encoded: Any = self._tokenizer(text or " ", return_tensors="pt")
        ids = encoded["input_ids"]
        check_fits(self._model, "an observation", ids[0].numpy(), ids.shape[1])
        made = self._model(ids.to(self._model.device), output_hidden_states=True, logits_to_keep=1)
        mean: NDArray[np.float32] = made.hidden_states[-1][0].float().mean(0).cpu().numpy()
        return mean


class Standardised(nn.Module):
    """Features without what all of them share, at the size that a linear layer starts from.

    Hashed words are a few small numbers among many zeros: a new layer would hardly see them.
    """

    mean_D: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(size))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, features_ND: NDArray[np.float32]) -> None:
        """Take the mean from these, and the scale at which their root mean square is 1."""
        mean_D = features_ND.mean(0)
        size = float(np.sqrt(((features_ND - mean_D) ** 2).mean()))
        self.mean_D.copy_(torch.from_numpy(mean_D))
        self.scale.fill_(1 / size if size > 0 else 1.0)

    def forward(self, features_ND: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return (features_ND - self.mean_D) * self.scale


def describe_once(describe: Describe, texts: Sequence[str]) -> NDArray[np.float32]:
    """(N, D) of N texts, of which each different one is read once.

    Raises:
        ValueError: for vectors of another shape, or that are not finite.
    """
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    found = np.asarray(describe(list(places)), dtype=np.float32)
    if found.shape != (len(places), describe.size) or not np.isfinite(found).all():
        raise ValueError(
            f"describe must give finite vectors of shape {(len(places), describe.size)}, got "
            f"{found.shape}"
        )
    return found[[places[text] for text in texts]]
