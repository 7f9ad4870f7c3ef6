"""What ``import stepagent`` costs over ``import torch``, and what it must not load.

Measured: seconds from before to after the import statement in a fresh interpreter, on the wall and
of CPU, the two modules in turn, so that both meet the same load; the first of each warms the file
cache and is dropped. The ratio is that of the medians. The interpreter's own start is left out.

Checked first: triton, matplotlib, transformers' model code and its Trainer are not in sys.modules.
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
import {module}
seconds = {{"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}}
print(json.dumps([seconds, sorted(sys.modules)]))
"""
MODULES = ("torch", "stepagent")
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


def fresh_import(module: str, folder: str) -> tuple[dict[str, float], list[str]]:
    """Seconds of the import in a new interpreter, and the modules it then holds."""
    command = [sys.executable, "-c", PROGRAM.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    common.check(done.returncode == 0, f"import {module} fails:\n{done.stderr}")
    seconds, loaded = json.loads(done.stdout)
    return seconds, loaded


def heavy_modules(loaded: list[str]) -> list[str]:
    return [name for name in HEAVY if any(f"{module}.".startswith(f"{name}.") for module in loaded)]


def main() -> None:
    options = common.parser(__doc__).parse_args()
    where = common.environment()
    times: dict[str, list[dict[str, float]]] = {module: [] for module in MODULES}
    loaded: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats + 1):
            for module in MODULES:
                seconds, loaded[module] = fresh_import(module, folder)
                note = "" if repeat else " (warm-up)"
                common.say(f"import {module}: {seconds['wall']:.3f} s{note}")
                times[module] += [seconds] if repeat else []
            found = heavy_modules(loaded["stepagent"])
            common.check(not found, f"import stepagent loads {', '.join(found)}")
    added = sorted(set(loaded["stepagent"]) - set(loaded["torch"]))
    result: dict[str, Any] = {
        "benchmark": "import_time",
        "repeats": options.repeats,
        "check": {"not_loaded": HEAVY},
        "modules_added": [name for name in added if not name.startswith("stepagent")],
        "all_seconds": times,
    }
    rows = []
    for clock, target in (("wall", "≤ 1.5"), ("cpu", "")):
        torch, ours = (statistics.median(t[clock] for t in times[module]) for module in MODULES)
        result[clock] = {"torch": torch, "stepagent": ours, "ratio": ours / torch}
        name = f"seconds, {clock}, median of {options.repeats}"
        rows.append([name, f"{torch:.2f}", f"{ours:.2f}", f"{ours / torch:.2f}×", target])
    rows.append(["modules", *(len(loaded[module]) for module in MODULES), "", ""])
    text = common.table(["", "import torch", "import stepagent", "ratio", "target"], rows)
    common.report("Import time", __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
