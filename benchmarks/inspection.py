"""``stepagent.inspect`` against ``model.generate``, on the CPU in float32.

Measured: one greedy action of a fixed number of tokens (no end token is ever produced) at each of
the T states of a trajectory, by one Llama with random weights:

* inspect: one prefill of the trajectory, then all states decoded in lock-step on its cache.
* state by state: ``model.generate`` on each state's prefix in turn, with its own cache.
* padded batch: ``model.generate`` on all T prefixes at once, padded on the left.
* one forward: the model once over the trajectory, and no decoding: what inspect cannot go below.

All must give the same tokens (one forward has none), or nothing is reported; that first run is also
the warm-up. Then they are timed in turn in this process, on the wall and in CPU time, which says
more where other work shares the cores; the medians count. ``--sweep`` adds other T, for inspect and
one forward, and up to ``--slow-steps`` for state by state.

In the first table the agent, untrained, never does what the expert does. The second has
trajectories whose action is the agent's own at a share of the states, as for an agent that has
learnt: inspect follows the trajectory there and needs no forward but the first. The third draws k
actions per state at temperature 1, all in one call.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

import stepagent as sa

NO_END = common.VOCABULARY  # no such token exists, so no action ends early
WAYS = ("inspect", "one forward", "state by state", "padded batch")
RIVALS = WAYS[2:]
CLOCKS = ("wall", "cpu")
SWEEP = [5, 10, 20, 40, 80]
SAMPLES = [1, 2, 4, 8]
AGREEMENT = [0.5, 0.9, 1.0]
Decode = Callable[[], np.ndarray]


def ways(model: Any, trunk: sa.Trunk, new_tokens: int) -> dict[str, Decode]:
    """The ways to decode; each returns the tokens, (T, new_tokens), one forward none, (T, 0)."""
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

    def one_forward() -> np.ndarray:
        with torch.no_grad():
            model(torch.from_numpy(trunk.input_ids.astype(np.int64))[None], logits_to_keep=1)
        return np.zeros((trunk.num_steps, 0), dtype=np.int64)

    def state_by_state() -> np.ndarray:
        return np.concatenate([generate(p[None], torch.ones_like(p)[None]) for p in prefixes])

    def padded_batch() -> np.ndarray:
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad(prefixes, batch_first=True, padding_side="left")
        masks = [torch.ones_like(prefix) for prefix in prefixes]
        return generate(tokens, pad(masks, batch_first=True, padding_side="left"))

    decoders = (inspect, one_forward, state_by_state, padded_batch)
    return dict(zip(WAYS, decoders, strict=True))


def seconds(name: str, decode: Decode) -> tuple[float, float]:
    """Of one run: on the wall, and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    decode()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    common.say(f"{name}: {wall:.3f} s, CPU {cpu:.3f} s")
    return wall, cpu


def timed(decoders: dict[str, Decode], repeats: int) -> dict[str, Any]:
    """All runs of each, taken in turn, and their medians by clock."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(repeats):
        for name, decode in decoders.items():
            runs[name].append(seconds(name, decode))
    medians = {
        clock: {name: statistics.median(run[i] for run in runs[name]) for name in runs}
        for i, clock in enumerate(CLOCKS)
    }
    return {"all_seconds": runs, **{clock: {"seconds": medians[clock]} for clock in CLOCKS}}


def compare(model: Any, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Check that all ways give the same tokens at T = steps, then time them."""
    trunk, _ = common.trajectory(argparse.Namespace(**{**vars(options), "steps": steps}))
    decoders = ways(model, trunk, options.action_tokens)
    if steps != options.steps:
        del decoders["padded batch"]
        if steps > options.slow_steps:
            del decoders["state by state"]
    common.say(f"T = {steps}: checking that the tokens are the same …")
    tokens = {name: decode() for name, decode in decoders.items()}
    for name in set(tokens) - {"one forward"}:
        found, shape = tokens[name], (steps, options.action_tokens)
        common.check(found.shape == shape, f"{name} gave tokens {found.shape}, not {shape}")
        different = int((found != tokens["inspect"]).any(axis=1).sum())
        common.check(different == 0, f"{name}: other tokens than inspect at {different} states")
    point = timed(decoders, options.repeats)
    for clock in CLOCKS:
        median = point[clock]["seconds"]
        point[clock]["ms_per_step"] = {way: 1000 * median[way] / steps for way in median}
        point[clock]["speedup"] = {way: median[way] / median["inspect"] for way in median}
    compared = sorted(set(tokens) & set(RIVALS))
    return {"steps": steps, "same_tokens_as_inspect": compared, **point}


def agreeing(model: Any, options: argparse.Namespace, share: float) -> sa.Trunk:
    """The trajectory with the model's own greedy action at so many of its states, spread out."""
    trunk, _ = common.trajectory(options)
    chosen = np.random.default_rng(1).permutation(trunk.num_steps)[: round(share * trunk.num_steps)]
    ids = torch.from_numpy(trunk.input_ids.astype(np.int64))
    for t in sorted(chosen):
        start, stop = trunk.action_spans[t].tolist()
        prefix = sa.Trunk(ids[:stop].numpy(), trunk.action_spans[: t + 1])
        decode = ways(model, prefix, options.action_tokens)["inspect"]
        ids[start:stop] = torch.from_numpy(decode()[-1])
    return sa.Trunk(ids.numpy(), trunk.action_spans)


def agree(model: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """inspect and state by state where the agent does as the expert at a share of the states."""
    points = []
    for share in AGREEMENT:
        decoders = ways(model, agreeing(model, options, share), options.action_tokens)
        decoders = {name: decoders[name] for name in ("inspect", "one forward", "state by state")}
        same = np.array_equal(decoders["inspect"](), decoders["state by state"]())
        common.check(same, f"other tokens than state by state at agreement {share}")
        point = timed(decoders, options.repeats)
        for clock in CLOCKS:
            median = point[clock]["seconds"]
            point[clock]["speedup"] = median["state by state"] / median["inspect"]
        points.append({"agreement": share, **point})
    return points


def draw_samples(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The cost of k actions per state; the first ones must be those of a run with fewer."""
    trunk, _ = common.trajectory(options)

    def decode(samples: int) -> np.ndarray:
        new_tokens, no_end = options.action_tokens, {"eos_token_id": NO_END}
        (steps,) = sa.inspect(model, [trunk], samples=samples, max_new_tokens=new_tokens, **no_end)
        return np.stack([[branch.token_ids for branch in step] for step in steps])

    decoders = {f"k = {k}": functools.partial(decode, k) for k in SAMPLES}
    tokens = [draw() for draw in decoders.values()]
    for k, found in zip(SAMPLES, tokens, strict=True):
        same = bool((found == tokens[-1][:, :k]).all())
        common.check(same, f"{k} samples are not the first of {SAMPLES[-1]}")
    result = timed(decoders, options.repeats)
    for clock in CLOCKS:
        median = result[clock]["seconds"]
        result[clock]["cost"] = {name: median[name] / median["k = 1"] for name in median}
    return result


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for way in WAYS[:3]:
        known = [point for point in points if way in point["cpu"]["ms_per_step"]]
        steps = [point["steps"] for point in known]
        axes.plot(steps, [p["cpu"]["ms_per_step"][way] for p in known], "o-", label=way)
    axes.set(xscale="log", yscale="log", xlabel="steps of the trajectory", ylabel="CPU ms per step")
    steps = [point["steps"] for point in points]
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)
    common.say(f"wrote {path}")


def tables(
    points: list[dict[str, Any]], agreements: list[dict[str, Any]], samples: dict[str, Any]
) -> str:
    def cell(figures: dict[str, float], way: str, unit: str = "") -> str:
        return f"{figures[way]:.1f}{unit}" if way in figures else "–"

    by_steps = [
        [
            point["steps"],
            clock,
            *(cell(point[clock]["ms_per_step"], way) for way in WAYS),
            *(cell(point[clock]["speedup"], way, "×") for way in RIVALS),
        ]
        for point in points
        for clock in CLOCKS
    ]
    header = ["T", "clock", *(f"{way}, ms/step" for way in WAYS)]
    header += ["on state by state (target ≥ 10×)", "on padded batch (target ≥ 20×)"]
    by_agreement = [
        [
            f"{point['agreement']:.0%}",
            clock,
            *(f"{1000 * seconds:.0f} ms" for seconds in point[clock]["seconds"].values()),
            f"{point[clock]['speedup']:.1f}×",
        ]
        for point in agreements
        for clock in CLOCKS
    ]
    by_samples = [
        [clock]
        + [
            f"{1000 * samples[clock]['seconds'][name]:.0f} ms ({samples[clock]['cost'][name]:.2f}×)"
            for name in samples[clock]["cost"]
        ]
        for clock in CLOCKS
    ]
    columns = ["clock", *samples["cpu"]["cost"]]
    columns[-1] += " (target ≤ 3×)"
    parts = [
        common.table(header, by_steps),
        common.table(
            ["as the expert", "clock", *agreements[0]["cpu"]["seconds"], "on state by state"],
            by_agreement,
        ),
        common.table(columns, by_samples),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.add_argument("--sweep", type=int, nargs="*", metavar="T", help=f"{SWEEP} if empty")
    parser.add_argument("--slow-steps", type=int, default=20, metavar="T")
    options = parser.parse_args()
    where = common.environment()
    model = common.llama(options).eval()
    sweep = {options.steps, *((options.sweep or SWEEP) if options.sweep is not None else ())}
    points = [compare(model, options, steps) for steps in sorted(sweep)]
    agreements = agree(model, options)
    samples = draw_samples(model, options)
    shape = common.shape(options, model)
    measured = {"points": points, "agreements": agreements, "samples": samples}
    result = {"benchmark": "inspection", "shape": shape, **measured}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        plot(points, options.json.with_suffix(".png"))
    title = f"Inspection: {common.described(options, model)}"
    common.report(
        title, __doc__ or "", tables(points, agreements, samples), result, options.json, where
    )


if __name__ == "__main__":
    main()
