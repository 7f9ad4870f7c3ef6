"""The same job on a real language model: SmolLM2-135M-Instruct learns TextWorld with LoRA, offline.

Collect the expert's games → the untrained model, told what the actions are → SFT, cut short and for
longer → ways to go on from the first with equal updates → held-out games → report. Each stage
leaves its adapter and its episodes in its own folder; a run that was interrupted continues where it
stopped, and one that is run again with other arms adds theirs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....files import write_text
from ....report.demo import ExampleTrajectory
from ....report.language_model_demo import write_language_model_report
from ..example import most_to_show, with_step_rewards
from .agents import LanguageModelDemo
from .measuring import held_out, measure, measure_stage
from .settings import SIZES, Settings, Size
from .stages import ARMS, DEFAULT_ARMS, UNTRAINED, stage_options

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "SIZES",
    "LanguageModelDemo",
    "Settings",
    "Size",
    "run_language_model_demo",
    "stage_options",
]


def run_language_model_demo(
    output: Path, settings: Settings, arms: Sequence[str] = DEFAULT_ARMS
) -> dict[str, Any]:
    """Run the demo into ``output``, or finish it there; returns what ``metrics.json`` holds.

    Args:
        arms: of `ARMS`, at least one; others that ``output`` has are reported beside them.

    Raises:
        ImportError: for a package that is missing, with the command that installs it.
        ValueError: for another arm, a model that cannot be read or has no chat template, and when
            ``output`` holds a run with other settings; before any work.
    """
    if not arms or set(arms) - set(ARMS):
        raise ValueError(f"arms must be some of {', '.join(ARMS)}, got {', '.join(arms) or 'none'}")
    demo = LanguageModelDemo(output, settings)
    with demo.seconds:
        measure_stage(demo, UNTRAINED)
    for stage in ("sft", "sft_long", *arms):
        with demo.seconds:
            demo.train(stage)
        with demo.seconds:
            measure_stage(demo, stage)
    with demo.seconds:
        metrics = measure(demo)
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_language_model_report(output, metrics, _example(demo, metrics))
    return metrics


def _example(demo: LanguageModelDemo, metrics: dict[str, Any]) -> ExampleTrajectory:
    before, after = (metrics[s]["per_game"]["success"] for s in ("sft", metrics["main"]))
    return with_step_rewards(
        most_to_show(held_out(demo), before, after),
        demo.model("sft"),
        demo.model(metrics["main"]),
        demo.tokenizer,
        beta=demo.settings.beta,
        max_new_tokens=demo.settings.max_new_tokens,
        ends=demo.ends,
    )
