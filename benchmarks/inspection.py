"""``stepagent.inspect`` against ``model.generate``, on the CPU in float32, greedy.

Measured: one action of a fixed number of tokens (no end token is ever produced) at each of the T
states of a trajectory, by one Llama with random weights:

* inspect: one prefill of the trajectory, then all states decoded in lock-step on its cache.
* state by state: ``model.generate`` on each state's prefix in turn, with its own cache.
* padded batch: ``model.generate`` on all T prefixes at once, padded on the left.

All three must give the same tokens, or nothing is reported; that first run is also the warm-up.
Then they are timed in turn in this process; the medians count. ``--sweep`` does so for other T.
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

    return {"inspect": inspect, "state by state": state_by_state, "padded batch": padded_batch}


def seconds(name: str, decode: Decode) -> float:
    start = time.perf_counter()
    decode()
    elapsed = time.perf_counter() - start
    common.say(f"{name}: {elapsed:.3f} s")
    return elapsed


def compare(model: Any, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Check that all ways give the same tokens at T = steps, then time them."""
    trunk, _ = common.trajectory(argparse.Namespace(**{**vars(options), "steps": steps}))
    decoders = ways(model, trunk, options.action_tokens)
    common.say(f"T = {steps}: checking that the tokens are the same …")
    tokens = {name: decode() for name, decode in decoders.items()}
    shape = (steps, options.action_tokens)
    for name, found in tokens.items():
        common.check(found.shape == shape, f"{name} gave tokens {found.shape}, not {shape}")
        different = int((found != tokens["inspect"]).any(axis=1).sum())
        common.check(different == 0, f"{name}: other tokens than inspect at {different} states")
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(options.repeats):
        for name, decode in decoders.items():
            times[name].append(seconds(name, decode))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "steps": steps,
        "tokens_identical": True,
        "seconds": median,
        "all_seconds": times,
        "speedup": {name: median[name] / median["inspect"] for name in median},
        "ms_per_step": {name: 1000 * median[name] / steps for name in median},
    }


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.add_argument("--sweep", type=int, nargs="*", metavar="T", help="5 10 20 40 if empty")
    options = parser.parse_args()
    where = common.environment()
    model = common.llama(options).eval()
    sweep = {options.steps, *(options.sweep or ([5, 10, 20, 40] if options.sweep == [] else []))}
    points = [compare(model, options, steps) for steps in sorted(sweep)]
    main_point = next(point for point in points if point["steps"] == options.steps)
    rows = [
        [
            point["steps"],
            *(f"{point['ms_per_step'][name]:.1f}" for name in point["ms_per_step"]),
            f"{point['speedup']['state by state']:.1f}×",
            f"{point['speedup']['padded batch']:.1f}×",
        ]
        for point in points
    ]
    header = ["T", *(f"{name}, ms/step" for name in main_point["seconds"])]
    text = common.table(
        [*header, "speed-up on state by state (target ≥ 8×)", "on padded batch"], rows
    )
    result = {"benchmark": "inspection", "shape": common.shape(options, model), "points": points}
    title = (
        f"Inspection: {options.action_tokens} tokens at each state, {options.observation_tokens}-"
        f"token observations, {common.parameters(model):,} parameters, float32, "
        f"{options.threads} threads"
    )
    common.report(title, __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
