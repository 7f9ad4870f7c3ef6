"""Another version of stepagent against this one, on the CPU: is anything slower than it was?

    git worktree add ../before REVISION    # and an environment in which it is installed
    python benchmarks/before_after.py --before ../before/.venv/bin/python

Measured, in a process of its own for each version, in turns: `update` (score_trees of a step-pair
tree, the implicit step loss, backward and an AdamW step), `inspect` (an agent that hardly ever does
as the expert), `head` (linear_logprobs forward and backward, 512 rows, H = 1,024, V = 32,768). Each
process runs each once to warm up, then --repeats times; the least CPU time counts, as other work
only adds to it. All must compute the same: losses within 1e-5 relative, the same greedy tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

ROUNDS = 3


def main() -> None:
    parser = common.parser(__doc__)
    common.add_shape_options(parser)
    parser.add_argument("--before", type=Path, help="a Python with the other version")
    parser.add_argument("--measure", action="store_true", help="this version alone, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    if options.before is None:
        parser.error("--before is missing: a Python with the other version")
    where = common.environment()
    rounds = [
        {side: one_process(python, options) for side, python in sides(options).items()}
        for _ in range(ROUNDS)
    ]
    rows = []
    for name in rounds[0]["now"]:
        check(name, rounds)
        before, now = (min(r[side][name]["cpu_s"] for r in rounds) for side in ("before", "now"))
        rows.append([name, f"{before:.3f}", f"{now:.3f}", f"{now / before:.2f}"])
    text = common.table(["", "before, CPU s", "now, CPU s", "now / before"], rows)
    title = "This version against another, on the CPU"
    common.report(title, __doc__ or "", text, {"rounds": rounds}, options.json, where)


def sides(options: Any) -> dict[str, str]:
    return {"before": str(options.before), "now": sys.executable}


def one_process(python: str, options: Any) -> dict[str, Any]:
    shape = (
        "steps",
        "observation_tokens",
        "action_tokens",
        "layers",
        "hidden",
        "threads",
        "repeats",
    )
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in shape]
    command = [python, __file__, "--measure", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def check(name: str, rounds: list[dict[str, Any]]) -> None:
    results = [r[side][name]["result"] for r in rounds for side in ("before", "now")]
    same = (
        all(abs(x - results[0]) <= 1e-5 * abs(results[0]) for x in results)
        if isinstance(results[0], float)
        else all(x == results[0] for x in results)
    )
    if not same:
        sys.exit(f"{name}: the versions do not compute the same: {results}")


def measure(options: Any) -> dict[str, Any]:
    work = {"update": update(options), "inspect": inspection(options), "head": head()}
    return {name: least(run, options.repeats) for name, run in work.items()}


def least(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    result, times = run(), []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"cpu_s": min(times), "result": result}


def update(options: Any) -> Callable[[], float]:
    import torch

    import stepagent as sa

    model = common.llama(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    trunk, agent = common.trajectory(options)
    (tree,) = sa.pack_step_pairs([trunk], [[[action] for action in agent]])

    def run() -> float:
        optimizer.zero_grad()
        logps_N = sa.score_trees(model, [tree])
        rewards_S = sa.step_rewards(logps_N, 0 * logps_N, tree.step_offsets, beta=0.1)
        loss = sa.implicit_step_loss(rewards_S[0::2], rewards_S[1::2]).mean()
        loss.backward()
        optimizer.step()
        return float(loss)

    return run


def inspection(options: Any) -> Callable[[], list[list[int]]]:
    import stepagent as sa

    model = common.llama(options).eval()
    trunk, _ = common.trajectory(options)

    def run() -> list[list[int]]:
        (steps,) = sa.inspect(
            model,
            [trunk],
            max_new_tokens=options.action_tokens,
            temperature=0,
            eos_token_id=common.VOCABULARY - 1,
        )
        return [step[0].token_ids.tolist() for step in steps]

    return run


def head() -> Callable[[], float]:
    import torch

    import stepagent as sa

    g = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(512, 1024, generator=g, requires_grad=True)
    weight_VH = (torch.randn(32768, 1024, generator=g) / 16).requires_grad_()
    labels_N = torch.randint(32768, (512,), generator=g)

    def run() -> float:
        loss = -sa.linear_logprobs(hidden_RH, weight_VH, labels_N).mean()
        torch.autograd.grad(loss, (hidden_RH, weight_VH))
        return float(loss)

    return run


if __name__ == "__main__":
    main()
