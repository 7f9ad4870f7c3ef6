"""Packing and balancing against TRL's and verl's, which are Python.

* balance: Karmarkar–Karp over n costs and k parts, against verl's get_seqlen_balanced_partitions
  on the same costs (verl's own workload, 24576 L + L², of log-normal lengths L). verl is taken from
  the environment or from --verl, a folder or wheel that holds verl/utils/seqlen_balancing.py; only
  its partitioning is run, so that none of its dependencies is needed. Checked first, for every
  seed: all items once, the spread (largest − smallest sum) no larger.
* bins: best-fit decreasing, against TRL's, the function behind pack_dataset(strategy="bfd"). TRL's
  also gathers the packed rows, here of one byte a token. Checked first: all items once, no bin
  above the budget, no more bins.

Times are CPU times of one thread, the least of several runs, of both sides in one process.
"""

from __future__ import annotations

import argparse
import ast
import heapq
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray

import stepagent as sa

VERL_FILE = "verl/utils/seqlen_balancing.py"
VERL_FUNCTIONS = ("karmarkar_karp", "get_seqlen_balanced_partitions")
Balancer = Callable[[list[int], int, bool], list[list[int]]]


def verl_source(path: Path | None) -> str | None:
    if path is not None and path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(VERL_FILE).decode()
    if path is None:
        spec = importlib.util.find_spec("verl")
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent.parent
    return (path / VERL_FILE).read_text()


def verl_balancer(path: Path | None) -> Balancer | None:
    """verl's two functions, out of their module; None without verl."""
    source = verl_source(path)
    if source is None:
        return None
    module = ast.parse(source)
    module.body = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name in VERL_FUNCTIONS
    ]
    names: dict[str, Any] = {"heapq": heapq}
    exec(compile(module, VERL_FILE, "exec"), names)
    balancer: Balancer = names[VERL_FUNCTIONS[1]]
    return balancer


def lengths(count: int, longest: int, seed: int) -> NDArray[np.int64]:
    """Log-normal, as of generated answers: a median of a twelfth of the longest."""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 12), 1.0, count)
    return drawn.astype(np.int64).clip(1, longest)


def check_items(groups: list[list[int]], count: int, what: str) -> None:
    items = sorted(item for group in groups for item in group)
    common.check(items == list(range(count)), f"{what}: not every item once")


def spread(costs: NDArray[np.int64], groups: list[list[int]]) -> int:
    sums = [int(costs[group].sum()) for group in groups]
    return max(sums) - min(sums)


def measure_balance(options: argparse.Namespace, equal_size: bool) -> dict[str, Any]:
    verl, parts = verl_balancer(options.verl), options.parts
    spreads = []
    for seed in range(options.seeds):
        tokens = lengths(options.items, options.capacity, seed)
        costs = 24576 * tokens + tokens**2
        groups = sa.balance(costs, parts, equal_size=equal_size)
        check_items(groups, len(costs), "balance")
        sides = {"stepagent": spread(costs, groups)}
        if verl is not None:
            sides["verl"] = spread(costs, verl(costs.tolist(), parts, equal_size))
            common.check(
                sides["stepagent"] <= sides["verl"], f"balance, seed {seed}: spreads {sides}"
            )
        spreads.append(sides)
    listed = costs.tolist()  # what verl takes; both sides get it
    seconds = {
        "stepagent": common.cpu_seconds(
            lambda: sa.balance(listed, parts, equal_size=equal_size), options.repeats
        )
    }
    if verl is not None:
        seconds["verl"] = common.cpu_seconds(
            lambda: verl(listed, parts, equal_size), options.repeats
        )
    return {
        "items": options.items,
        "parts": parts,
        "equal_size": equal_size,
        "spreads": spreads,
        "mean_cost_of_a_part": float(costs.sum() / parts),
        "seconds": seconds,
        "ratio": seconds["verl"] / seconds["stepagent"] if verl is not None else None,
    }


def measure_bins(options: argparse.Namespace) -> dict[str, Any]:
    import pyarrow
    from trl.data_utils import _pack_bfd

    pyarrow.set_cpu_count(1)
    tokens, capacity = lengths(options.sequences, options.capacity, 0), options.capacity
    offsets = np.concatenate([[0], tokens.cumsum()]).astype(np.int32)
    rows = pyarrow.ListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int8))
    table = pyarrow.table({"tokens": rows})
    listed = tokens.tolist()
    bins = sa.pack_bins(listed, capacity)
    check_items(bins, len(tokens), "bins")
    fullest = max(sum(listed[i] for i in items) for items in bins)
    common.check(fullest <= capacity, f"a bin holds {fullest} tokens of {capacity}")
    theirs = len(_pack_bfd(table, capacity))
    common.check(len(bins) <= theirs, f"{len(bins)} bins, TRL has {theirs}")
    seconds = {
        "stepagent": common.cpu_seconds(lambda: sa.pack_bins(listed, capacity), options.repeats),
        "TRL": common.cpu_seconds(lambda: _pack_bfd(table, capacity), options.repeats),
    }
    return {
        "sequences": options.sequences,
        "capacity": capacity,
        "bins": {"stepagent": len(bins), "TRL": theirs},
        "least_possible": int(-(-tokens.sum() // capacity)),
        "seconds": seconds,
        "ratio": seconds["TRL"] / seconds["stepagent"],
    }


def table(result: dict[str, Any]) -> str:
    def ms(value: float | None) -> str:
        return "not found" if value is None else f"{value * 1e3:,.2f}"

    rows = []
    for p in result["balance"]:
        mean = p["mean_cost_of_a_part"]
        worst = {side: max(s[side] for s in p["spreads"]) / mean for side in p["spreads"][0]}
        sizes = ", equal sizes" if p["equal_size"] else ""
        rows.append(
            [
                f"balance: {p['items']:,} items, {p['parts']} parts{sizes}",
                "verl",
                ms(p["seconds"].get("verl")),
                ms(p["seconds"]["stepagent"]),
                "-" if p["ratio"] is None else f"{p['ratio']:,.0f}×",
                "spread / part, largest of all seeds: "
                + ", ".join(f"{side} {value:.1e}" for side, value in worst.items()),
            ]
        )
    p = result["bins"]
    rows.append(
        [
            f"pack_bins: {p['sequences']:,} sequences into {p['capacity']:,}",
            "TRL",
            ms(p["seconds"]["TRL"]),
            ms(p["seconds"]["stepagent"]),
            f"{p['ratio']:,.0f}×",
            ", ".join(f"{side} {count:,} bins" for side, count in p["bins"].items())
            + f", {p['least_possible']:,} the least possible",
        ]
    )
    return common.table(["", "rival", "rival ms", "stepagent ms", "ratio", "result"], rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--parts", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--capacity", type=int, default=8192, help="tokens of the longest, and bin")
    parser.add_argument("--seeds", type=int, default=5, help="inputs on which spreads are compared")
    parser.add_argument("--verl", type=Path, help="a folder or wheel that holds " + VERL_FILE)
    options = parser.parse_args()
    common.check(importlib.util.find_spec("trl") is not None, "no trl: pip install trl==1.16.0")
    where = common.environment("trl")
    result = {
        "benchmark": "packing",
        "balance": [measure_balance(options, equal_size) for equal_size in (False, True)],
        "bins": measure_bins(options),
    }
    title = "Packing and balancing"
    common.report(title, __doc__ or "", table(result), result, options.json, where)


if __name__ == "__main__":
    main()
