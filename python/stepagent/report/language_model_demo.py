"""The page of the demo on a language model: the demo's, with all that was measured of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .demo import ExampleTrajectory, gains, label, stages_of, write_stages_page
from .numbers import count, gigabytes, interval, percent

__all__ = ["language_model_table", "write_language_model_report"]

_MEASURES = {
    "valid_actions": "Valid actions",
    "success": "Success",
    "progress": "Progress",
    "agreement": "Agreement",
}
_TERMS = {
    "sft_continued": "More of the same, for as many updates as the others.",
    "dagger": "SFT on the expert’s answers at the agent’s own states, aggregated.",
    "stepagent": "Implicit step rewards at the agent’s own states: the expert’s answer there is "
    "raised above the agent’s action.",
    "rft": "The demonstrations, and the games that the agent won itself, are imitated.",
    "eto": "Of a whole game the expert’s is preferred over the agent’s worse one.",
    "inverse_expert_states": "At the expert’s states a discriminator learns to tell the agent’s "
    "actions from the expert’s; its verdict is the reward, which PPO follows.",
}


def write_language_model_report(
    folder: Path, metrics: dict[str, Any], example: ExampleTrajectory
) -> None:
    """Write ``report.html`` about the run in ``folder``, whose ``metrics.json`` is given."""
    values = {"terms": _TERMS, "measures": _MEASURES}
    write_stages_page(folder, metrics, example, "language_model_demo.html.jinja", values)


def language_model_table(metrics: Mapping[str, Any]) -> str:
    """What was reached, for the terminal."""
    rows = [["", *_MEASURES.values(), "updates", "tokens/s"]]
    for stage in stages_of(metrics):
        found, cost = metrics[stage]["measures"], metrics[stage].get("cost", {})
        shown = [
            f"{percent(found[key]['mean'])} [{interval([found[key]['low'], found[key]['high']])}]"
            for key in _MEASURES
        ]
        figures = [count(cost.get(key)) for key in ("updates", "tokens_per_second")]
        rows.append([label(stage), *shown, *(("" if f == "n/a" else f) for f in figures)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *gains(metrics), f"peak memory: {gigabytes(metrics['peak_memory'])}"])
