"""The main job: from expert trajectories to a better agent, on a real environment, from scratch.

Collect the BabyAI bot's trajectories → tokenizer → supervised training of a small transformer →
StepAgent cycles, beside their fair rivals → evaluation on held-out episodes → report. Each stage
leaves its result in its own folder; a run that was interrupted continues where it stopped, and one
that is run again with the other method adds that method's stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...files import write_text
from ...report.demo import write_demo_report
from .agents import Demo
from .example import example
from .measuring import measure
from .settings import Settings
from .stages import METHODS, Method, stage_options

__all__ = ["METHODS", "Demo", "Method", "Settings", "run_demo", "stage_options"]


def run_demo(output: Path, settings: Settings, method: Method = "implicit") -> dict[str, Any]:
    """Run the demo into ``output``, or finish it there; returns what ``metrics.json`` holds.

    Args:
        method: of `METHODS`; stages of the other that ``output`` has are reported beside it.

    Raises:
        ValueError: when ``output`` holds a run with other settings.
    """
    demo = Demo(output, settings, method)
    demo.train_all()
    metrics = measure(demo)
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_demo_report(output, metrics, example(demo))
    return metrics
