"""The masks of token trees: their memory up to 64k tokens, and what a dense one costs in an update.

* memory: bytes of all tensors of the mask of one tree (step pairs of one trajectory), and the time
  to build it, one thread. block: what FlexAttention takes, as on CUDA, its lists for the backward
  included. additive: what sdpa takes, bfloat16, in memory once for all layers; above
  --largest-dense tokens it is not built, its bytes are 2 L². A boolean mask is half of that, and
  torch makes an additive one of it in each layer. blocks: of 128 × 128 pairs that are computed, and
  those of them that are seen whole, in a tree's own order and as it is laid out for a block mask.
* update: zero_grad, score_trees, the implicit step loss, backward and an AdamW step on the CPU in
  float32 (step_pair_update.py's), with the additive mask and with the boolean one that was used
  before, in turn in this process. The losses must agree within 1e-5 relative.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import step_pair_update
import torch

import stepagent as sa
from stepagent.models import forward
from stepagent.models.attention import heaviest_first

TOLERANCE = 1e-5


def tree_of(tokens: int, options: argparse.Namespace) -> sa.TokenTree:
    """The step pairs of one trajectory, in about so many tokens."""
    per_step = options.observation_tokens + 2 * options.action_tokens
    steps = max(1, tokens // per_step)
    trunk, agent = common.trajectory(argparse.Namespace(**{**vars(options), "steps": steps}))
    (tree,) = sa.pack_step_pairs([trunk], [[[action] for action in agent]])
    return tree


def size(mask: Any) -> int:
    """Bytes of a mask's tensors, those that a block mask's rule reads included."""
    if isinstance(mask, torch.Tensor):
        return mask.untyped_storage().nbytes()
    held = [*mask.as_tuple(), *(cell.cell_contents for cell in mask.mask_mod.__closure__)]
    storages = [value.untyped_storage() for value in held if isinstance(value, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def blocks(mask: Any) -> list[int]:
    """How many are computed, and how many of them are seen whole."""
    whole = int(mask.full_kv_num_blocks.sum())
    return [int(mask.kv_num_blocks.sum()) + whole, whole]


def measure_memory(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    tree = tree_of(tokens, options)
    length = len(tree.input_ids)
    makers: dict[str, Callable[[], Any]] = {"block": tree.block_mask}
    if length <= options.largest_dense:
        makers["additive"] = lambda: tree.attention_mask(torch.bfloat16)
    masks = {name: make() for name, make in makers.items()}
    if "additive" in masks:
        seen, entries = masks["additive"][0, 0] == 0, torch.arange(length)
        rule = masks["block"].mask_mod(0, 0, entries[:, None], entries)
        common.check(torch.equal(seen, rule), f"{length} tokens: the masks differ")
    moved, _ = heaviest_first(tree)
    point = {
        "tokens": length,
        "blocks": {"own order": blocks(masks["block"]), "laid out": blocks(moved.block_mask())},
        "bytes": {"additive": 2 * length**2, **{name: size(mask) for name, mask in masks.items()}},
        "seconds": {n: common.cpu_seconds(make, options.repeats) for n, make in makers.items()},
    }
    common.say(f"memory: {length} tokens")
    return point


def boolean_inputs(model: Any, rows: Any) -> dict[str, Any]:
    masks = [row.attention_mask(torch.bool) for row in rows]
    return {**INPUTS["additive"](model, rows), "attention_mask": torch.cat(masks)}


INPUTS = {"additive": forward.tree_inputs, "boolean": boolean_inputs}


def tree_loss(update: step_pair_update.Update, mask: str) -> torch.Tensor:
    forward.tree_inputs = INPUTS[mask]
    try:
        return step_pair_update.tree_loss(update)
    finally:
        forward.tree_inputs = INPUTS["additive"]


def measure_update(options: argparse.Namespace) -> dict[str, Any]:
    update = step_pair_update.Update(options)
    step_pair_update.warm_up(update)
    losses = {mask: tree_loss(update, mask).item() for mask in INPUTS}
    error = abs(losses["additive"] / losses["boolean"] - 1)
    common.check(error <= TOLERANCE, f"the losses are {losses}")
    times: dict[str, list[tuple[float, float]]] = {mask: [] for mask in INPUTS}
    for repeat in range(options.repeats + 1):
        for mask in sorted(INPUTS, reverse=repeat % 2 == 1):
            start = time.perf_counter(), time.process_time()
            update.run(lambda update, mask=mask: tree_loss(update, mask))
            taken = time.perf_counter() - start[0], time.process_time() - start[1]
            if repeat:  # the first warms up
                times[mask].append(taken)
            common.say(f"update: {mask}: {taken[0]:.2f} s")
    wall, cpu = (
        {mask: statistics.median(taken[clock] for taken in times[mask]) for mask in INPUTS}
        for clock in (0, 1)
    )
    return {
        "loss_relative_error": error,
        "seconds": {**wall, "ratio": wall["additive"] / wall["boolean"]},
        "cpu_seconds": {**cpu, "ratio": cpu["additive"] / cpu["boolean"]},
        "all": times,
    }


def tables(result: dict[str, Any]) -> str:
    def mib(value: int) -> str:
        return f"{value / 2**20:,.2f}"

    memory = [
        [
            f"{p['tokens']:,}",
            mib(p["bytes"]["block"]),
            mib(p["bytes"]["additive"]) + ("" if "additive" in p["seconds"] else " (computed)"),
            f"{p['bytes']['block'] / p['tokens']:.0f}",
            *(
                f"{p['seconds'][kind] * 1e3:.1f}" if kind in p["seconds"] else ""
                for kind in ("block", "additive")
            ),
            *(f"{n:,}, {whole:,}" for n, whole in p["blocks"].values()),
        ]
        for p in result["memory"]
    ]
    header = ["tokens", "block MiB", "additive MiB", "block, bytes a token"]
    update = [
        [name, *(f"{result['update'][clock][kind]:.2f}" for kind in (*INPUTS, "ratio"))]
        for name, clock in (("update, s", "seconds"), ("update, CPU s", "cpu_seconds"))
    ]
    header += ["block ms", "additive ms", "blocks, whole", "as laid out"]
    return "\n\n".join(
        [
            common.table(header, memory),
            common.table(["", *INPUTS, "ratio"], update),
        ]
    )


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--largest-dense", type=int, default=17_000)
    options = parser.parse_args()
    where = common.environment()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "masks"}
    result["memory"] = [measure_memory(tokens, options) for tokens in options.tokens]
    result["update"] = measure_update(options)
    title = f"Masks of token trees: memory, and an update of T = {options.steps} on the CPU"
    common.report(title, __doc__ or "", tables(result), result, options.json, where)


if __name__ == "__main__":
    main()
