"""What ``import stepagent`` and the use of its names cost beside ``import torch``.

Three statements are timed: ``import torch``, ``import stepagent``, and the import of every public
name but the trainer's two, which loads torch. Measured: seconds from before to after the statement
in a fresh interpreter, on the wall and of CPU, in turn, so that all meet the same load. The first
of each fills the file cache and is dropped. Ratios are those of the medians, to ``import torch``.
The start of the interpreter is left out.

Checked first: ``import stepagent`` does not load torch, and none of the names loads triton,
matplotlib, transformers' model code or its Trainer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import common

PROGRAM = """
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
seconds = {{"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}}
print(json.dumps([seconds, sorted(sys.modules)]))
"""
TRAINER = ("StepAgentConfig", "StepAgentTrainer")
STATEMENTS = {
    "torch": "import torch",
    "stepagent": "import stepagent",
    "names": "import stepagent as sa\n"
    f"for name in set(sa.__all__) - {set(TRAINER)}: getattr(sa, name)",
}
HEAVY = (
    "triton",
    "matplotlib",
    "accelerate",
    "transformers.models",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.trainer",
    "stepagent.learning.trainer",
    "stepagent.kernels",
)


def fresh_import(statement: str, folder: str) -> tuple[dict[str, float], list[str]]:
    """Seconds of the statement in a new interpreter, and the modules it then holds."""
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    common.check(done.returncode == 0, f"{statement} fails:\n{done.stderr}")
    seconds, loaded = json.loads(done.stdout)
    return seconds, loaded


def heavy_modules(loaded: list[str]) -> list[str]:
    return [name for name in HEAVY if any(f"{module}.".startswith(f"{name}.") for module in loaded)]


def main() -> None:
    options = common.parser(__doc__).parse_args()
    where = common.environment()
    times: dict[str, list[dict[str, float]]] = {what: [] for what in STATEMENTS}
    loaded: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats + 1):
            for what, statement in STATEMENTS.items():
                seconds, loaded[what] = fresh_import(statement, folder)
                note = "" if repeat else " (warm-up)"
                common.say(f"{what}: {seconds['wall']:.3f} s{note}")
                times[what] += [seconds] if repeat else []
            common.check("torch" not in loaded["stepagent"], "import stepagent loads torch")
            found = heavy_modules(loaded["names"])
            common.check(not found, f"the names of stepagent load {', '.join(found)}")
    added = sorted(set(loaded["names"]) - set(loaded["torch"]))
    result: dict[str, Any] = {
        "benchmark": "import_time",
        "repeats": options.repeats,
        "check": {"not_loaded": HEAVY},
        "modules_added": [name for name in added if not name.startswith("stepagent")],
        "all_seconds": times,
    }
    rows = []
    for clock in ("wall", "cpu"):
        medians = {what: statistics.median(t[clock] for t in times[what]) for what in STATEMENTS}
        ratios = {what: seconds / medians["torch"] for what, seconds in medians.items()}
        result[clock] = medians | {"ratio": ratios}
        cells = [f"{medians[what]:.2f} ({ratios[what]:.2f}×)" for what in STATEMENTS]
        rows.append([f"seconds, {clock}, median of {options.repeats}", *cells])
    rows.append(["modules", *(len(loaded[what]) for what in STATEMENTS)])
    heads = ["", "import torch", "import stepagent", "all names but the trainer's"]
    text = common.table(heads, rows)
    common.report("Import time", __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
