"""``stepagent.inspect`` against ``model.generate``, on the CPU in float32, greedy.

Measured: one action of a fixed number of tokens (no end token is ever produced) at each of the T
states of a trajectory, by one Llama with random weights:

* inspect: one prefill of the trajectory, then all states decoded in lock-step on its cache.
* state by state: ``model.generate`` on each state's prefix in turn, with its own cache.
* padded batch: ``model.generate`` on all T prefixes at once, padded on the left.

All three must give the same tokens, or nothing is reported; that first run is also the warm-up.
Then they are timed in turn in this process, on the wall and in CPU time, which says more where
other work shares the cores; the medians count. ``--sweep`` adds other T, without the padded batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

import stepagent as sa

NO_END = common.VOCABULARY  # no such token exists, so no action ends early
WAYS = ("inspect", "state by state", "padded batch")
Decode = Callable[[], np.ndarray]


def ways(model: Any, trunk: sa.Trunk, new_tokens: int) -> dict[str, Decode]:
    """The three ways to decode; each returns the tokens, (T, new_tokens)."""
    prefixes = [torch.tensor(trunk.input_ids[:start].tolist()) for start, _ in trunk.action_spans]

    def generate(input_ids: Tensor, mask: Tensor) -> np.ndarray:
        out = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            do_sample=False,
            use_cache=True,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, input_ids.shape[1] :].numpy()

    def inspect() -> np.ndarray:
        branches = sa.inspect(
            model, [trunk], max_new_tokens=new_tokens, temperature=0, eos_token_id=NO_END
        )
        return np.stack([step[0].token_ids for step in branches[0]])

    def state_by_state() -> np.ndarray:
        return np.concatenate([generate(p[None], torch.ones_like(p)[None]) for p in prefixes])

    def padded_batch() -> np.ndarray:
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad(prefixes, batch_first=True, padding_side="left")
        masks = [torch.ones_like(prefix) for prefix in prefixes]
        return generate(tokens, pad(masks, batch_first=True, padding_side="left"))

    return dict(zip(WAYS, (inspect, state_by_state, padded_batch), strict=True))


def seconds(name: str, decode: Decode) -> tuple[float, float]:
    """Of one run: on the wall, and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    decode()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    common.say(f"{name}: {wall:.3f} s, CPU {cpu:.3f} s")
    return wall, cpu


def compare(model: Any, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Check that all ways give the same tokens at T = steps, then time them."""
    trunk, _ = common.trajectory(argparse.Namespace(**{**vars(options), "steps": steps}))
    decoders = ways(model, trunk, options.action_tokens)
    if steps != options.steps:
        del decoders["padded batch"]
    common.say(f"T = {steps}: checking that the tokens are the same …")
    tokens = {name: decode() for name, decode in decoders.items()}
    shape = (steps, options.action_tokens)
    for name, found in tokens.items():
        common.check(found.shape == shape, f"{name} gave tokens {found.shape}, not {shape}")
        different = int((found != tokens["inspect"]).any(axis=1).sum())
        common.check(different == 0, f"{name}: other tokens than inspect at {different} states")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(options.repeats):
        for name, decode in decoders.items():
            times[name].append(seconds(name, decode))
    point: dict[str, Any] = {"steps": steps, "tokens_identical": True, "all_seconds": times}
    for clock, name in enumerate(("wall", "cpu")):
        median = {way: statistics.median(run[clock] for run in times[way]) for way in times}
        point[name] = {
            "seconds": median,
            "ms_per_step": {way: 1000 * median[way] / steps for way in median},
            "speedup": {way: median[way] / median["inspect"] for way in median},
        }
    return point


def cell(figures: dict[str, float], way: str, unit: str = "") -> str:
    return f"{figures[way]:.1f}{unit}" if way in figures else "–"


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.add_argument("--sweep", type=int, nargs="*", metavar="T", help="5 10 20 40 if empty")
    options = parser.parse_args()
    where = common.environment()
    model = common.llama(options).eval()
    sweep = {options.steps, *(options.sweep or ([5, 10, 20, 40] if options.sweep == [] else []))}
    points = [compare(model, options, steps) for steps in sorted(sweep)]
    rows = [
        [
            point["steps"],
            clock,
            *(cell(point[clock]["ms_per_step"], way) for way in WAYS),
            *(cell(point[clock]["speedup"], way, "×") for way in WAYS[1:]),
        ]
        for point in points
        for clock in ("wall", "cpu")
    ]
    header = ["T", "clock", *(f"{way}, ms/step" for way in WAYS)]
    text = common.table([*header, "on state by state (target ≥ 8×)", "on padded batch"], rows)
    result = {"benchmark": "inspection", "shape": common.shape(options, model), "points": points}
    title = f"Inspection: {common.described(options, model)}"
    common.report(title, __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
