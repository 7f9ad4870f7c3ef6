"""DAgger with half, and with a quarter, of the expert's answers: who should choose the states?

    python benchmarks/claim/budget.py --runs 10 --output runs/demo_runs        # resumes

The runs of ``demo_runs.py``: each has demonstrations, initial weights and data of its own, and its
arms go on from the same SFT model with as many updates; success on the same 200 held-out episodes.
The arms ask the expert at the same share of the states of each cycle, and differ in which:
anywhere (``random``), where the agent's action was least probable (``unsure``), where the answer
will most likely differ (``worth``, learnt from the run's answers so far), and the same by an asker
that the answers to another learner, that of the run before, have taught (``taught``).

Expected, from the issue: ``worth`` at half within the interval of asking always, and above
``random`` at the same budget.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment
from demo_runs import run_cell, table

from stepagent.askers import save_asker
from stepagent.learning.trainer import StepAgentTrainer

SHARES = {"half": 0.5, "a quarter": 0.25, "a tenth": 0.1}
ASKS = {"random": "random", "worth": "worth", "taught": "worth", "unsure": "unsure"}
ARMS = [f"{ask}, {words}" for words in SHARES for ask in ASKS]
ALWAYS, SAME = "DAgger", {"unsure, half": "DAgger, half the answers"}  # cells of demo_runs.py


def run(folder: Path, place: int, runs: int, arm: str) -> dict[str, Any]:
    """A cell; the asker of ``worth`` is left for the ``taught`` arm of the next run."""
    if arm == ALWAYS or arm == "SFT":
        return run_cell(folder, place, arm)
    if arm in SAME:
        return run_cell(folder, place, SAME[arm]) | {"arm": arm}
    ask, words = arm.split(", ")
    options = {"ask": ASKS[ask], "ask_share": SHARES[words]}
    if ask == "taught":
        options["ask_from"] = str(_asker(folder, (place - 1) % runs, words))

    def keep(trainer: StepAgentTrainer) -> None:
        if ask == "worth":
            path = _asker(folder, place, words)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_asker(trainer.asker, path)

    return run_cell(folder, place, arm, {arm: ("dagger", options)}, keep)


def _asker(folder: Path, place: int, words: str) -> Path:
    return folder / f"run{place}" / "askers" / f"{words}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:8])
    parser.add_argument("--output", type=Path, default=Path("runs/demo_runs"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # An asker has to be there before the run after it is taught by it.
    order = sorted(args.arms, key=lambda arm: arm.startswith("taught"))
    cells = [run(args.output, place, args.runs, "SFT") for place in range(args.runs)]
    for arms in ([ALWAYS], [a for a in order if "taught" not in a], order):
        for place in range(args.runs):
            cells += [run(args.output, place, args.runs, arm) for arm in arms]
    cells = list({(cell["run"], cell["arm"]): cell for cell in cells}.values())
    rivals = [ALWAYS, *(arm for arm in args.arms if arm.startswith(("random", "unsure")))]
    text = table(cells, [ALWAYS, *args.arms], rivals)
    print(text)
    if args.json:
        about = environment() | {"capability": os.environ.get("ATEN_CPU_CAPABILITY", "native")}
        args.json.write_text(json.dumps({"environment": about, "cells": cells}) + "\n")
        args.json.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
