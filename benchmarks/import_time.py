"""What importing stepagent costs over ``import torch``, what the command line takes to answer, and
what neither must load.

Measured, imports: seconds from before to after the statements in a fresh interpreter, on the wall
and of CPU; "every name" uses all public names but the trainer's, which are imported at first use.
The interpreter's own start is left out. Commands: seconds of the whole process, beside
``python -c pass``. All in turn, so that they meet the same load; the first of each warms the file
cache and is dropped. Ratios are those of medians.

Checked first: ``import stepagent`` loads no torch; every name loads no triton, matplotlib,
transformers' model code or Trainer; the commands end with the status that they should.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import common

PROGRAM = """
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
{statements}
seconds = {{"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}}
print(json.dumps([seconds, sorted(sys.modules)]))
"""
EVERY_NAME = """
import stepagent
for name in stepagent.__all__:
    if not name.startswith("StepAgent"):
        getattr(stepagent, name)
"""
IMPORTS = {
    "import torch": "import torch",
    "import stepagent": "import stepagent",
    "every name": EVERY_NAME,
}
COMMANDS: dict[str, tuple[list[str], int]] = {
    "python -c pass": (["-c", "pass"], 0),
    "stepagent --version": (["-m", "stepagent", "--version"], 0),
    "stepagent --help": (["-m", "stepagent", "--help"], 0),
    "stepagent train --help": (["-m", "stepagent", "train", "--help"], 0),
    "stepagent train --method typo": (["-m", "stepagent", "train", "--method", "typo"], 2),
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


def fresh_import(statements: str, folder: str) -> tuple[dict[str, float], list[str]]:
    """Seconds of the statements in a new interpreter, and the modules it then holds."""
    command = [sys.executable, "-c", PROGRAM.format(statements=statements)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    common.check(done.returncode == 0, f"{statements} fails:\n{done.stderr}")
    seconds, loaded = json.loads(done.stdout)
    return seconds, loaded


def fresh_command(arguments: list[str], status: int, folder: str) -> dict[str, float]:
    """Seconds of a command: on the wall, and of CPU, its children's included."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder)
    seconds = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    common.check(done.returncode == status, f"{arguments} ends with {done.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": seconds, "cpu": cpu}


def heavy_modules(loaded: list[str]) -> list[str]:
    return [name for name in HEAVY if any(f"{module}.".startswith(f"{name}.") for module in loaded)]


def main() -> None:
    options = common.parser(__doc__).parse_args()
    where = common.environment()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in (*IMPORTS, *COMMANDS)}
    loaded: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats + 1):
            for name in times:
                if name in IMPORTS:
                    seconds, loaded[name] = fresh_import(IMPORTS[name], folder)
                else:
                    seconds = fresh_command(*COMMANDS[name], folder)
                note = "" if repeat else " (warm-up)"
                common.say(f"{name}: {seconds['wall']:.3f} s{note}")
                times[name] += [seconds] if repeat else []
            common.check("torch" not in loaded["import stepagent"], "import stepagent loads torch")
            found = heavy_modules(loaded["every name"])
            common.check(not found, f"the names of stepagent load {', '.join(found)}")
    added = sorted(set(loaded["every name"]) - set(loaded["import torch"]))
    medians = {
        name: {clock: statistics.median(t[clock] for t in found) for clock in ("wall", "cpu")}
        for name, found in times.items()
    }
    result: dict[str, Any] = {
        "benchmark": "import_time",
        "repeats": options.repeats,
        "check": {"not_loaded": HEAVY},
        "modules_added": [name for name in added if not name.startswith("stepagent")],
        "medians": medians,
        "all_seconds": times,
    }
    rows = []
    for name, found in medians.items():
        rival = "import torch" if name in IMPORTS else "python -c pass"
        ratio = f"{found['wall'] / medians[rival]['wall']:.2f}×"
        target = {"every name": "≤ 1.5×"}.get(name, "" if name in IMPORTS else "< 1 s")
        rows.append([name, f"{found['wall']:.3f}", f"{found['cpu']:.3f}", ratio, rival, target])
    head = ["", f"seconds, median of {options.repeats}", "of CPU", "ratio", "to", "target"]
    text = common.table(head, rows)
    common.report("Import time", __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
