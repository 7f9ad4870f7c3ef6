"""What a run leaves behind: a CSV in Liger's schema, plots, and a table for a person."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...files import atomic, destination
from .clocks import MODES
from .providers import OURS

# Of Liger-Kernel's benchmark/data, so that its tools read ours.
COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "version",
)
_MIB = 2**20


class CsvFile:
    """Rows that are on disk as soon as they are written; nowhere without a path."""

    def __init__(self, path: Path | None, environment: dict[str, Any]) -> None:
        self.environment = environment
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.file = None
        if path is not None:
            self.file = destination(path).open("w", newline="", encoding="utf-8")

    def __enter__(self) -> CsvFile:
        if self.file is not None:
            csv.DictWriter(self.file, COLUMNS).writeheader()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, results: Sequence[dict[str, Any]]) -> None:
        if self.file is not None:
            writer = csv.DictWriter(self.file, COLUMNS)
            writer.writerows(row for result in results for row in self._rows(result))
            self.file.flush()

    def _rows(self, result: dict[str, Any]) -> Iterable[dict[str, Any]]:
        speed = {"metric_name": "speed", "metric_unit": "ms"}
        for mode in MODES:
            yield self._row(result, mode, speed, result["ms"][mode])
        memory = {"metric_name": "memory", "metric_unit": "MB"}  # Liger's MB is MiB
        peak = result["peak_bytes"] / _MIB
        yield self._row(result, "full", memory, {"p20": peak, "p50": peak, "p80": peak})

    def _row(
        self, result: dict[str, Any], mode: str, metric: dict[str, str], values: dict[str, float]
    ) -> dict[str, Any]:
        config = {name: result[name] for name in ("H", "V", "dtype", "scored")}
        return {
            "kernel_name": result["op"],
            "kernel_provider": result["provider"],
            "kernel_operation_mode": mode,
            **metric,
            "x_name": "N",
            "x_label": "tokens",
            "x_value": result["N"],
            **{f"y_value_{q}": values[f"p{q}"] for q in (50, 20, 80)},
            "extra_benchmark_config_str": json.dumps(config),
            "gpu_name": self.environment["device"],
            "timestamp": self.environment["date"],
            "version": self.environment["versions"]["stepagent"],
        }


def write_plots(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """A PNG for each op: time and memory of every provider, a row of panels for each shape."""
    from matplotlib.figure import Figure  # needs no display, unlike pyplot

    folder.mkdir(parents=True, exist_ok=True)
    by_op: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_op[result["op"]][result["shape"]].append(result)
    for op, by_shape in by_op.items():
        figure = Figure(figsize=(10, 0.8 + 2.4 * len(by_shape)), layout="constrained")
        panels = figure.subplots(len(by_shape), 2, squeeze=False)
        for (time, memory), (shape, group) in zip(panels, by_shape.items(), strict=True):
            names = [result["provider"] for result in group]
            colors = ["tab:blue" if name == OURS else "tab:gray" for name in names]
            forward = [result["ms"]["forward"]["p50"] for result in group]
            backward = [result["ms"]["backward"]["p50"] for result in group]
            time.barh(names, forward, color=colors)
            time.barh(names, backward, left=forward, color=colors, alpha=0.5)
            time.set(title=shape, xlabel="ms, forward (dark) and backward (light)")
            memory.barh(names, [result["peak_bytes"] / _MIB for result in group], color=colors)
            memory.set(title=shape, xlabel="peak MiB above inputs and gradients")
            for panel in (time, memory):
                panel.invert_yaxis()
                panel.title.set_fontsize("small")
        figure.suptitle(op)
        with atomic(folder / f"{op}.png") as file:
            figure.savefig(file, format="png", dpi=150)


def describe(report: dict[str, Any]) -> str:
    """The report for a person."""
    where = report["environment"]
    lines = [f"{where['device']}, {where['threads']} threads"]
    for dtype, rates in report["ceilings"].items():
        flops, copies = rates["FLOP"] / 1e12, rates["byte"] / 1e9
        lines.append(f"measured ceilings, {dtype}: {flops:.3g} TFLOP/s, copy {copies:.3g} GB/s")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in report["results"]:
        groups[result["op"], result["shape"]].append(result)
    for (op, shape), group in groups.items():
        lines += ["", f"{op}, {shape}", *table([_HEADER, *map(_cells, group)])]
    lines += ["", *(f"without {name}: {why}" for name, why in _reasons(report["absent"]))]
    if report["wrote"]:
        lines.append(f"Wrote {', '.join(report['wrote'])}")
    return "\n".join(lines)


_HEADER = [
    *("provider", "forward ms", "backward ms", "full ms", "× ours", "rate"),
    *("of ceiling", "in turns"),
    *("peak MiB", "max error", "64-token sum", "gradient"),
]


def _cells(result: dict[str, Any]) -> list[str]:
    rate = result["per_second"]["full"]
    flops = result["unit"] == "FLOP"
    errors = result["errors"]
    return [
        result["provider"],
        *(f"{result['ms'][mode]['p50']:.4g}" for mode in MODES),
        f"{result['times_ours']['full']:.2f}",
        f"{rate / 1e12:.3g} TFLOP/s" if flops else f"{rate / 1e9:.3g} GB/s",
        f"{result['of_ceiling']['full']:.1%}",
        f"{result['of_ceiling_in_turns']['full']:.1%}",
        f"{result['peak_bytes'] / _MIB:.1f}",
        *(f"{errors[name]:.1e}" for name in ("value", "sum64", "gradient")),
    ]


def _reasons(absent: Sequence[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    """Each reason once, with the ops it is for."""
    ops: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in absent:
        ops[entry["provider"], entry["reason"]].append(entry["op"])
    for (provider, reason), names in ops.items():
        yield provider, f"{reason} ({', '.join(dict.fromkeys(names))})"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns line up."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
