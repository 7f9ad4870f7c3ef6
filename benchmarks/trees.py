"""Token trees: packing a trajectory and building its BlockMask, on the CPU.

* tree: one trajectory and one agent action per step, against TRL's TreeRow, which gets the same as
  2T whole sequences (each state with the expert's or the agent's action): add, then pack. stepagent
  packs it twice: pack_step_pairs from the trajectory, pack_sequences from TRL's own 2T tensors of
  int64, with masks of bool. Checked first: every scored token sees exactly its own sequence, in all
  three; pack_step_pairs and pack_sequences hold the same number of tokens; TRL holds one more for
  each further child of a token, as it forks one token early, and one for each sequence that ends
  where another goes on.
* block mask: TokenTree.block_mask against torch's create_block_mask on the same rule. Checked
  first: equal blocks, partial and full, and, at the smallest tree, flex_attention (compiled, so
  that it computes listed blocks only) equal to sdpa under the dense mask.
* growth: packing time per token for trajectories of 5 to 500 steps.

Times are CPU times of one thread, the least of several runs, of both sides in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import stepagent as sa

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its warning says what we know

TOLERANCE = 1e-5  # absolute, of attention outputs of unit size


class Case:
    """A trajectory, an agent action per step, and both as sequences."""

    def __init__(self, steps: int, observation_tokens: int, action_tokens: int) -> None:
        self.trunk, self.agent = common.trajectory(
            argparse.Namespace(
                steps=steps, observation_tokens=observation_tokens, action_tokens=action_tokens
            )
        )
        self.branches = [[[action] for action in self.agent]]
        self.sequences, self.masks = [], []
        ids = self.trunk.input_ids
        for (start, stop), action in zip(self.trunk.action_spans, self.agent, strict=True):
            for tried in (ids[start:stop], action):
                sequence = np.append(ids[:start], tried)
                self.sequences.append(torch.from_numpy(sequence).long())
                self.masks.append(np.arange(len(sequence)) >= start)

    def pack_step_pairs(self) -> sa.TokenTree:
        (tree,) = sa.pack_step_pairs([self.trunk], self.branches)
        return tree

    def pack_sequences(self) -> sa.TokenTree:
        (tree,) = sa.pack_sequences(self.sequences, self.masks)
        return tree

    def samples(self) -> list[dict[str, Any]]:
        """As TRL takes them."""
        return [
            {
                "input_ids": ids,
                "completion_mask": torch.from_numpy(mask).long(),
                "old_log_probs": torch.zeros(len(ids)),
                "advantage": 0.0,
                "group_id": 0,
            }
            for ids, mask in zip(self.sequences, self.masks, strict=True)
        ]


def trl_row(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from trl.experimental.async_grpo.packing import TreeRow

    row = TreeRow()
    for sample in samples:
        row.add(sample)
    return row.pack()


def check_tree(case: Case, tree: sa.TokenTree, what: str) -> None:
    """Every scored token, of every step in turn, is predicted by a row that sees its sequence."""
    keys = np.arange(len(tree.input_ids))
    rows = iter(zip(tree.labels, tree.label_rows, strict=True))
    for sequence, mask in zip(case.sequences, case.masks, strict=True):
        ids = sequence.numpy()
        for p in np.flatnonzero(mask):
            label, row = next(rows)
            seen = tree.input_ids[(keys <= row) & (row < tree.subtree_end)]
            common.check(label == ids[p], f"{what}: another label")
            common.check(np.array_equal(seen, ids[:p]), f"{what}: a token sees another sequence")
    common.check(next(rows, None) is None, f"{what}: more scored tokens than given")


def check_trl(case: Case, row: dict[str, torch.Tensor], tree: sa.TokenTree) -> None:
    """The same of TRL's row, by its paths, and where its further tokens come from."""
    ids, paths = row["input_ids"].numpy(), row["tree_kv_index"].numpy()
    cu_q, cu_k = (row[f"tree_cu_seqlens_{name}"].numpy() for name in "qk")
    terms = iter(row["token_index"].tolist())
    for sequence, mask in zip(case.sequences, case.masks, strict=True):
        for p in np.flatnonzero(mask):
            index = next(terms)
            segment = np.searchsorted(cu_q, index, side="right") - 1
            stop = cu_k[segment + 1] - (cu_q[segment + 1] - 1 - index)
            seen = ids[paths[cu_k[segment] : stop]]
            common.check(np.array_equal(seen, sequence[:p].numpy()), "TRL: another sequence")
    forked = len(sa.trl_row(tree)["input_ids"])  # one token more for each further child
    expert = case.sequences[::2]
    common.check(
        len(ids) == forked + len(expert) - 1,  # all of the expert's but the last go on
        f"TRL holds {len(ids)} tokens: not {forked} and {len(expert) - 1} ends inside others",
    )


def measure_tree(case: Case, repeats: int) -> dict[str, Any]:
    """Tokens, seconds and ratios of the three packers."""
    samples = case.samples()
    pairs, tree, row = case.pack_step_pairs(), case.pack_sequences(), trl_row(samples)
    check_tree(case, pairs, "pack_step_pairs")
    check_tree(case, tree, "pack_sequences")
    check_trl(case, row, tree)
    common.check(
        len(pairs.input_ids) == len(tree.input_ids), "pack_sequences: another number of tokens"
    )
    seconds = {
        "pack_step_pairs": common.cpu_seconds(case.pack_step_pairs, repeats),
        "pack_sequences": common.cpu_seconds(case.pack_sequences, repeats),
        "TRL": common.cpu_seconds(lambda: trl_row(samples), repeats),
    }
    return {
        "steps": len(case.agent),
        "tokens": {
            "given": sum(map(len, case.sequences)),
            "stepagent": len(tree.input_ids),
            "TRL": len(row["input_ids"]),
        },
        "seconds": seconds,
        "ratio": {name: seconds["TRL"] / value for name, value in seconds.items()},
    }


def torch_block_mask(tree: sa.TokenTree) -> Any:
    ends, length = torch.as_tensor(tree.subtree_end), len(tree.input_ids)

    def rule(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return (k <= q) & (q < ends[k])

    return create_block_mask(rule, 1, 1, length, length, device="cpu")


def check_blocks(mask: Any, expected: Any) -> None:
    for name in ("kv", "full_kv", "q", "full_q"):
        count, other = (getattr(m, f"{name}_num_blocks") for m in (mask, expected))
        common.check(torch.equal(count, other), f"block mask: other {name}_num_blocks")
        blocks, others = (getattr(m, f"{name}_indices") for m in (mask, expected))
        listed = torch.arange(blocks.shape[-1]) < count[..., None]
        common.check(torch.equal(blocks[listed], others[listed]), f"block mask: other {name}")


def check_attention(tree: sa.TokenTree) -> float:
    """The largest difference of flex_attention and sdpa; both see the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((3, 1, 2, len(tree.input_ids), 16), generator=generator)
    flex = torch.compile(flex_attention)(q, k, v, block_mask=tree.block_mask("cpu"))
    mask = tree.attention_mask(torch.bool)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    error = float((flex - dense).abs().max())
    common.check(error <= TOLERANCE, f"flex_attention differs from sdpa by {error:.2g}")
    return error


def measure_block_mask(tree: sa.TokenTree, repeats: int) -> dict[str, Any]:
    check_blocks(tree.block_mask("cpu"), torch_block_mask(tree))
    seconds = {
        "block_mask": common.cpu_seconds(lambda: tree.block_mask("cpu"), repeats),
        "create_block_mask": common.cpu_seconds(lambda: torch_block_mask(tree), repeats),
    }
    ratio = seconds["create_block_mask"] / seconds["block_mask"]
    return {"tokens": len(tree.input_ids), "seconds": seconds, "ratio": ratio}


def measure_growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    points = []
    for steps in options.growth:
        case = Case(steps, options.observation_tokens[0], options.action_tokens)
        tokens = len(case.pack_step_pairs().input_ids)
        given = sum(map(len, case.sequences))
        points.append(
            {
                "steps": steps,
                "tokens": {"given": given, "unique": tokens},
                "nanoseconds": {
                    "pack_step_pairs per unique token": 1e9
                    / tokens
                    * common.cpu_seconds(case.pack_step_pairs, options.repeats),
                    "pack_sequences per given token": 1e9
                    / given
                    * common.cpu_seconds(case.pack_sequences, options.repeats),
                },
            }
        )
        common.say(f"growth: T = {steps}")
    return points


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    steps = [point["steps"] for point in points]
    for name in points[0]["nanoseconds"]:
        axes.plot(steps, [point["nanoseconds"][name] for point in points], "o-", label=name)
    axes.set(xscale="log", ylim=(0, None), xlabel="steps of the trajectory", ylabel="ns per token")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)
    common.say(f"wrote {path}")


def tables(result: dict[str, Any]) -> str:
    def ms(value: float) -> str:
        return f"{value * 1e3:.3f}" if value < 0.01 else f"{value * 1e3:.0f}"

    trees = [
        [
            p["steps"],
            f"{p['tokens']['given']:,}",
            f"{p['tokens']['stepagent']:,}",
            f"{p['tokens']['TRL']:,}",
            ms(p["seconds"]["TRL"]),
            *(
                f"{ms(p['seconds'][name])} ({p['ratio'][name]:,.0f}×)"
                for name in ("pack_sequences", "pack_step_pairs")
            ),
        ]
        for p in result["trees"]
    ]
    masks = [
        [
            f"{p['tokens']:,}",
            ms(p["seconds"]["create_block_mask"]),
            f"{ms(p['seconds']['block_mask'])} ({p['ratio']:,.0f}×)",
        ]
        for p in result["block_masks"]
    ]
    growth = [
        [p["steps"], f"{p['tokens']['unique']:,}", f"{p['tokens']['given']:,}"]
        + [f"{value:.2f}" for value in p["nanoseconds"].values()]
        for p in result["growth"]
    ]
    header = ["T", "tokens given", "unique", "TRL's", "TRL ms", "pack_sequences ms"]
    return "\n\n".join(
        [
            common.table([*header, "pack_step_pairs ms"], trees),
            common.table(["tokens", "create_block_mask ms", "block_mask ms"], masks),
            common.table(["T", "unique", "given", "ns per unique token", "ns per given"], growth),
        ]
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 60])
    parser.add_argument(
        "--observation-tokens",
        type=int,
        nargs="+",
        default=[216, 229, 315],
        help="one per --steps; the first counts for --growth",
    )
    parser.add_argument("--action-tokens", type=int, default=15)
    parser.add_argument("--growth", type=int, nargs="+", default=[5, 10, 20, 50, 100, 200, 500])
    options = parser.parse_args()
    common.check(importlib.util.find_spec("trl") is not None, "no trl: pip install trl==1.16.0")
    where = common.environment("trl")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "trees", "trees": [], "block_masks": []}
    shapes = zip(options.steps, options.observation_tokens, strict=True)
    cases = [Case(steps, tokens, options.action_tokens) for steps, tokens in shapes]
    result["check"] = {"attention_error": check_attention(cases[0].pack_step_pairs())}
    for case in cases:
        result["trees"].append(measure_tree(case, options.repeats))
        result["block_masks"].append(measure_block_mask(case.pack_step_pairs(), options.repeats))
        common.say(f"trees and block masks: T = {len(case.agent)}")
    result["growth"] = measure_growth(options)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        plot(result["growth"], options.json.with_suffix(".png"))
    title = "Token trees: packing and block masks, one thread"
    common.report(title, __doc__ or "", tables(result), result, options.json, where)


if __name__ == "__main__":
    main()
