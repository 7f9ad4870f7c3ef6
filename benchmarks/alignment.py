"""Edit distance of token ids against rapidfuzz, and the alignment of two tokenizations.

Edit distance: two sequences of ids below 32,000, random, or one and the same after N/100 random
edits (a substitution, an insertion and a deletion in turn), without a cutoff and with 64. Ours
takes int32 numpy arrays, rapidfuzz the faster for it of lists and array('q').

Tokens: two tokenizations of one text, which cut it at random places, nine of ten in common. The
rival finds the same pairs in numpy, by intersecting (start, end) keys; it knows no seams, no tokens
that share characters and none without any.

Checked first: equal distances, and equal pairs. Measured: seconds of CPU a call (all are on one
thread; on a shared machine the wall clock counts the others' work too), the median over rounds that
take every way in turn. The ratio is the rival's time over ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from typing import Any

import common
import numpy as np

import stepagent as sa

CUTOFFS = (None, 64)
ROUND_SECONDS = 2e-3  # a call is repeated until it takes so long: clocks are coarse

Calls = dict[str, Callable[[], Any]]


def sequences(kind: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(length)
    a = random.integers(0, 32000, length, np.int32)
    if kind == "random":
        return a, random.integers(0, 32000, length, np.int32)
    b = a.copy()
    for edit in range(max(1, length // 100)):
        place = random.integers(len(b))
        if edit % 3 == 0:
            b[place] = random.integers(32000)
        else:
            b = np.insert(b, place, 7) if edit % 3 == 1 else np.delete(b, place)
    return a, b


def distance_calls(kind: str, length: int, cutoff: int | None) -> Calls:
    from rapidfuzz.distance import Levenshtein

    a, b = sequences(kind, length)
    lists = a.tolist(), b.tolist()
    arrays = array("q", lists[0]), array("q", lists[1])
    return {
        "stepagent": lambda: sa.edit_distance(a, b, cutoff=cutoff),
        "rapidfuzz, lists": lambda: Levenshtein.distance(*lists, score_cutoff=cutoff),
        "rapidfuzz, array('q')": lambda: Levenshtein.distance(*arrays, score_cutoff=cutoff),
    }


def tokenizations(segments: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    ends = np.cumsum(random.integers(2, 9, segments))
    kept = random.random((2, segments)) < 0.95
    return tuple(np.stack([np.r_[0, cuts[:-1]], cuts], 1) for cuts in (ends[k] for k in kept))


def pairs_in_numpy(recorded: np.ndarray, retokenized: np.ndarray) -> np.ndarray:
    keys = [offsets[:, 0] << 32 | offsets[:, 1] for offsets in (recorded, retokenized)]
    _, a, b = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    return np.stack([a, b], 1)


def seconds(calls: Calls, rounds: int) -> dict[str, float]:
    """The median time of each call; rounds take them in turn, so that all meet the same load."""
    repeats = {}
    for name, call in calls.items():
        started = time.process_time()
        call()
        repeats[name] = 1 + int(ROUND_SECONDS / (time.process_time() - started))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.process_time() - started) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def point(calls: Calls, rounds: int) -> dict[str, Any]:
    measured = seconds(calls, rounds)
    ours = measured["stepagent"]
    rival = min(value for name, value in measured.items() if name != "stepagent")
    return {"seconds": measured, "ratio": rival / ours}


def compare_distances(kind: str, length: int, cutoff: int | None, rounds: int) -> dict[str, Any]:
    calls = distance_calls(kind, length, cutoff)
    found = {name: call() for name, call in calls.items()}
    common.check(
        len(set(found.values())) == 1,
        f"{kind}, {length} ids, cutoff {cutoff}: the distances differ: {found}",
    )
    return {
        "inputs": kind,
        "length": length,
        "cutoff": cutoff,
        "distance": found["stepagent"],
        **point(calls, rounds),
    }


def compare_tokens(segments: int, rounds: int) -> dict[str, Any]:
    recorded, retokenized = tokenizations(segments)
    aligned = sa.align_tokens(recorded, retokenized)
    common.check(
        np.array_equal(aligned.pairs, pairs_in_numpy(recorded, retokenized)),
        "align_tokens and numpy find other pairs",
    )
    calls: Calls = {
        "stepagent": lambda: sa.align_tokens(recorded, retokenized),
        "numpy": lambda: pairs_in_numpy(recorded, retokenized),
    }
    sizes = {"tokens": [len(recorded), len(retokenized)], "pairs": len(aligned.pairs)}
    return {**sizes, "seams": len(aligned.seams), **point(calls, rounds)}


def microseconds(value: float) -> str:
    return f"{value * 1e6:,.1f}"


def table(distances: list[dict[str, Any]], tokens: dict[str, Any]) -> str:
    rows = []
    for result in distances:
        ours, lists, arrays = result["seconds"].values()
        what = f"edit distance, {result['length']:,} ids, {result['inputs']}"
        rows.append([what, result["cutoff"] or "none", result["distance"]])
        rows[-1] += [microseconds(ours), microseconds(min(lists, arrays))]
        rows[-1].append(f"{result['ratio']:.1f}×")
    ours, rival = tokens["seconds"].values()
    what = f"align_tokens, {tokens['tokens'][0]:,} tokens, against numpy"
    rows.append([what, "", "", microseconds(ours), microseconds(rival), f"{tokens['ratio']:.1f}×"])
    return common.table(["", "cutoff", "distance", "stepagent, µs", "rival, µs", "ratio"], rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 8000], help="ids")
    parser.add_argument("--segments", type=int, default=11_000, help="pieces of the text")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    where = common.environment()
    where["versions"]["rapidfuzz"] = version("rapidfuzz")
    distances = []
    for length, kind, cutoff in product(options.lengths, ("random", "similar"), CUTOFFS):
        distances.append(compare_distances(kind, length, cutoff, options.repeats))
        common.say(f"{kind}, {length} ids, cutoff {cutoff}: {distances[-1]['ratio']:.1f}×")
    tokens = compare_tokens(options.segments, options.repeats)
    result = {
        "benchmark": "alignment",
        "repeats": options.repeats,
        "edit_distance": distances,
        "align_tokens": tokens,
    }
    text = table(distances, tokens)
    common.report("Alignment", __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
