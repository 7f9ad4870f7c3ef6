"""What belongs together in two sequences: tokens of one text, and steps of two trajectories.

A text tokenized again seldom gives the tokens that were sampled. `align_tokens` pairs the
tokens on which two tokenizations agree and reports the seams where they do not; nothing is guessed.
`align_steps` pairs the steps of an agent's trajectory with those of an expert's, by
Needleman–Wunsch, LCS or dynamic time warping. The algorithms are in csrc/, without the GIL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..checks import as_numpy

Step: TypeAlias = Any  # a str, token ids, or whatever `cost` compares
AlignmentMethod: TypeAlias = Literal["nw", "lcs", "dtw"]
Cost: TypeAlias = Callable[[Step, Step], float]
INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """Where two tokenizations of one text agree, and where not.

    Attributes:
        pairs: (K, 2) int32, ascending: recorded token, retokenized token.
        seams: (M, 4) int32, ``[a0, a1)`` of the recorded tokens against ``[b0, b1)`` of the
            retokenized ones: all that lies between two pairs, before the first or after the last.
            Either side of a seam may be empty.
    """

    pairs: NDArray[np.int32]
    seams: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StepAlignment:
    """Which expert step belongs to which agent step.

    Attributes:
        pairs: (K, 2) int32, ascending: expert step, agent step. A step that stands alone is in no
            pair; a warping path (``dtw``) has every step in at least one. None where the distance
            exceeds the cutoff.
        first_divergence: the first step t where the two sequences, side by side, differ: the cost
            of ``expert[t], agent[t]`` is not 0, or only one has a step t; None if there is none.
        distance: the alignment's cost; infinite where it exceeds the cutoff.
    """

    pairs: NDArray[np.int32] | None
    first_divergence: int | None
    distance: float


# ------------------------------------------------------------------ tokens of one text


def align_tokens(
    recorded_offsets: ArrayLike,
    retokenized_offsets: ArrayLike,
    *,
    recorded_ids: ArrayLike | None = None,
    retokenized_ids: ArrayLike | None = None,
) -> TokenAlignment:
    """Pair the tokens of two tokenizations of one text; report all others as seams. Linear.

    Tokens agree if they have the same start and end and, where ids are given, the same id; the
    common prefix of the ids is paired whatever its offsets.

    A token without characters, start = end, as special tokens have it, stands where the token
    before it ends: its own offsets are not read, since many tokenizers give (0, 0) anywhere.
    Tokens that share characters (several tokens for the bytes of one emoji), or that lack
    characters at the same place, agree only if the whole run is the same on both sides.

    Args:
        recorded_offsets: (n, 2) int32 or int64, the characters ``[start, end)`` of each token, as
            fast tokenizers give them.
        retokenized_offsets: (m, 2), those of the other tokenization.
        recorded_ids: (n,) token ids; given for both sides or for none.
        retokenized_ids: (m,).

    Returns:
        The pairs of tokens that agree, and the seams between them.

    Raises:
        ValueError: for offsets that are negative, end before they start, or descend; for another
            shape, and for ids of one side only.
        TypeError: for other dtypes.
    """
    recorded = _spans("recorded_offsets", recorded_offsets)
    retokenized = _spans("retokenized_offsets", retokenized_offsets)
    if (recorded_ids is None) != (retokenized_ids is None):
        raise ValueError("recorded_ids and retokenized_ids must be given together, or neither")
    pairs, seams = _core.align_tokens(
        recorded,
        retokenized,
        _ids_of("recorded", recorded_ids, len(recorded)),
        _ids_of("retokenized", retokenized_ids, len(retokenized)),
    )
    return TokenAlignment(pairs.reshape(-1, 2), seams.reshape(-1, 4))


def token_spans(char_spans: ArrayLike, offsets: ArrayLike) -> NDArray[np.int32]:
    """The tokens ``[first, end)`` that make up each span of characters.

    The tokens are those with a character in the span, and none at its borders that have no
    characters. A span may begin or end between tokens, in characters that belong to none; one
    without any token comes out empty.

    Args:
        char_spans: (S, 2), half-open, in any order.
        offsets: (n, 2), as for `align_tokens`.

    Returns:
        (S, 2) int32.

    Raises:
        ValueError: where a span begins or ends inside a token, naming both: as in ``encode``, it
            is never guessed to which side such a token belongs; and for bad spans or offsets.
    """
    spans = _core.token_spans(_spans("char_spans", char_spans), _spans("offsets", offsets))
    return spans.reshape(-1, 2)


def char_spans(token_spans: ArrayLike, offsets: ArrayLike) -> NDArray[np.int64]:
    """The characters ``[start, end)`` that each span of tokens covers: `token_spans` reversed.

    A span without characters comes out empty, where it stands.

    Args:
        token_spans: (S, 2), half-open, in any order.
        offsets: (n, 2), as for `align_tokens`.

    Returns:
        (S, 2) int64.

    Raises:
        ValueError: where a token inside and one outside share a character, and for bad spans or
            offsets.
    """
    spans = _core.char_spans(_spans("token_spans", token_spans), _spans("offsets", offsets))
    return spans.reshape(-1, 2)


# ------------------------------------------------------------------ sequences of tokens


def edit_distance(a: ArrayLike | str, b: ArrayLike | str, *, cutoff: int | None = None) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions from a to b.

    O(n + d²) for a small distance d (Ukkonen, 1985), else O(mn / 64) (Myers, 1999; Hyyrö, 2003).

    Args:
        a: token ids (m,) that fit int32, or a string, compared by code point. int32 arrays are not
            copied.
        b: the same, (n,).
        cutoff: at least 0. A larger distance comes out as cutoff + 1, sooner.

    Raises:
        ValueError: for ids beyond int32, other shapes, or a negative cutoff.
        TypeError: for ids or a cutoff that are no integers, and for a string against ids.
    """
    if isinstance(a, str) != isinstance(b, str):
        raise TypeError("a and b must both be strings, or both token ids, got one of each")
    limit = 2**62 if cutoff is None else min(_integer("cutoff", cutoff), 2**62)
    return _core.edit_distance(_ids("a", a), _ids("b", b), limit)


# ------------------------------------------------------------------ steps of two trajectories


def align_steps(
    expert: Sequence[Step],
    agent: Sequence[Step],
    *,
    method: AlignmentMethod = "nw",
    cost: Cost | ArrayLike | None = None,
    band: int | None = None,
    cutoff: float | None = None,
) -> StepAlignment:
    """Pair the M steps of an expert with the N steps of an agent, in order, at the least cost.

    * ``nw``, Needleman–Wunsch: a pair (i, j) costs cost(i, j), a step left alone 1. distance: their
      sum. A pair of cost 2 or more is never better than two steps alone.
    * ``lcs``, longest common subsequence: only steps at cost 0 are paired. distance: the steps left
      alone, M + N − 2K.
    * ``dtw``, dynamic time warping: every step is paired, along a path from (0, 0) to
      (M − 1, N − 1) that advances on one side or both; distance: the sum of its costs.

    Among alignments of equal cost, decided from the end backwards: a pair (``dtw``: an advance on
    both sides) before the expert's step alone, and that before the agent's.

    Args:
        expert: its M steps: strings, token ids, or whatever ``cost`` compares.
        agent: its N steps.
        method: one of the three above.
        cost: None compares strings or token ids (int32 or int64, numpy, torch or lists): their edit
            distance, over code points for strings, divided by the length of the longer one; 0 to 1,
            and 0 for two empty steps. Or a function of an expert and an agent step, called within
            the band only; or an (M, N) matrix. Costs must be finite and ≥ 0; for ``nw``, measure
            them against the 1 of a step alone.
        band: only steps with |i − j| ≤ band are paired (Sakoe and Chiba, 1978).
        cutoff: a distance larger than this comes out infinite, without pairs, sooner.

    Raises:
        ValueError: for costs that are negative or not finite, a matrix of another shape, a negative
            band or one narrower than |M − N|, a negative cutoff or NaN, an unknown method, and
            ``dtw`` where one side alone is empty.
        TypeError: for steps that are neither all strings nor all token ids where cost is None.
    """
    if method not in _core.StepMethod.__members__:
        raise ValueError(f"method must be 'nw', 'lcs' or 'dtw', got {method!r}")
    for name, steps in (("expert", expert), ("agent", agent)):
        if isinstance(steps, str):
            raise TypeError(f"{name} must be a list of steps, got a str")
    m, n = len(expert), len(agent)
    if method == "dtw" and (m == 0) != (n == 0):
        raise ValueError(f"a warping path must have steps on both sides, got {m} and {n}")
    width, limit = _band(band, m, n), _cutoff(cutoff)
    costs = _costs(expert, agent, cost, width)
    pairs, distance = _core.align_steps(costs, _core.StepMethod[method], width, limit)
    return StepAlignment(
        pairs=None if math.isinf(distance) else pairs.reshape(-1, 2),
        first_divergence=_first_divergence(costs),
        distance=distance,
    )


def _first_divergence(costs: NDArray[np.float64]) -> int | None:
    differing = np.flatnonzero(costs.diagonal())
    if differing.size:
        return int(differing[0])
    m, n = costs.shape
    return min(m, n) if m != n else None


def _band(band: int | None, m: int, n: int) -> int:
    if band is None:
        return max(m, n)
    width = _integer("band", band)
    if width < abs(m - n):
        raise ValueError(
            f"band must be at least {abs(m - n)} for {m} and {n} steps, or no alignment lies "
            f"inside, got {width}"
        )
    return min(width, max(m, n))


def _cutoff(cutoff: float | None) -> float:
    limit = math.inf if cutoff is None else float(cutoff)
    if not limit >= 0:
        raise ValueError(f"cutoff must be at least 0, got {cutoff}")
    return limit


def _costs(
    expert: Sequence[Step], agent: Sequence[Step], cost: Cost | ArrayLike | None, band: int
) -> NDArray[np.float64]:
    m, n = len(expert), len(agent)
    if cost is None:
        kinds = {isinstance(step, str) for steps in (expert, agent) for step in steps}
        if len(kinds) == 2:
            raise TypeError("steps must be all strings, or all token ids")
        built_in = _core.step_costs(*_join("expert", expert), *_join("agent", agent), band)
        return built_in.reshape(m, n)
    if callable(cost):
        costs = np.zeros((m, n))
        for i in range(m):
            for j in range(max(0, i - band), min(n, i + band + 1)):
                costs[i, j] = cost(expert[i], agent[j])
    else:
        matrix = _array("cost", cost)
        if matrix.shape != (m, n):
            raise ValueError(f"cost must have shape ({m}, {n}), as the steps, got {matrix.shape}")
        if matrix.dtype.kind not in "fiu":
            raise TypeError(f"cost must hold numbers, got dtype {matrix.dtype}")
        costs = np.ascontiguousarray(matrix, np.float64)
    wrong = np.argwhere(~((costs >= 0) & np.isfinite(costs)))
    for i, j in wrong[:1]:
        raise ValueError(f"cost[{i}, {j}] must be finite and at least 0, got {costs[i, j]}")
    return costs


def _join(name: str, steps: Sequence[Step]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The steps' ids end to end, and where each begins: the core's Ragged."""
    ids = [_ids(f"{name}[{i}]", step) for i, step in enumerate(steps)]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return np.concatenate([np.empty(0, np.int32), *ids]), offsets


# ------------------------------------------------------------------ arguments


def _array(name: str, values: object) -> NDArray[Any]:
    try:
        return as_numpy(values)
    except TypeError as error:
        raise TypeError(f"{name} must be an array of numbers: {error.__cause__}") from error


def _ids(name: str, values: object) -> NDArray[np.int32]:
    """Token ids, or a string's code points, as a contiguous int32 array."""
    if isinstance(values, str):
        values = np.frombuffer(values.encode("utf-32-le", "surrogatepass"), "<i4")
    array = _array(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.dtype != np.int32 and array.size:
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
        for place in np.flatnonzero((array < INT32.min) | (array > INT32.max))[:1]:
            raise ValueError(f"{name}[{place}] must fit int32, got {array[place]}")
    return np.ascontiguousarray(array, np.int32)


def _ids_of(side: str, values: ArrayLike | None, length: int) -> NDArray[np.int32]:
    if values is None:
        return np.empty(0, np.int32)
    ids = _ids(f"{side}_ids", values)
    if len(ids) != length:
        raise ValueError(f"{side}_ids must be as long as {side}_offsets, {length}, got {len(ids)}")
    return ids


def _spans(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """(n, 2) int32 or int64, as a contiguous int64 array."""
    array = _array(name, values)
    if array.size == 0:
        array = np.empty((0, 2), np.int64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{name} must have shape (n, 2), got {array.shape}")
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} must be int32 or int64, got dtype {array.dtype}")
    return np.ascontiguousarray(array, np.int64)


def _integer(name: str, value: int) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer or None, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    return number
