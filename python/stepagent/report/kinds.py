"""What a file is that was taken for a run: an answer in place of a riddle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def what_is(path: Path) -> str | None:
    """In words, with what reads it; None for what is not known."""
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        return "Parquet, as stepagent inspect writes it (stepagent.load_branches reads that)"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, perhaps a report"
    if start.startswith(b"kernel_name,"):
        return "figures of stepagent bench"
    return _of_json(_first(path))


def _of_json(record: Any) -> str | None:
    if isinstance(record, list):
        record = record[0] if record else None
        if isinstance(record, dict) and record.keys() & {"loss", "epoch", "cycle"}:
            return "a trainer's log (it belongs beside episodes.jsonl, as log.json of a folder)"
    if not isinstance(record, dict):
        return None
    if record.keys() >= {"index", "input_ids", "steps", "run"}:
        return "the branches of stepagent inspect (stepagent.load_branches reads them)"
    if "success_rate" in record or "metrics" in record:
        return "the report of a command (--json); its --output is what is shown here"
    if "sittings" in record:
        return "how a run came about; the run itself is the .jsonl beside it"
    if "messages" in record or "conversations" in record:
        return "trajectories (stepagent train reads them)"
    return None


def _first(path: Path) -> Any:
    """The first record of JSON lines, or the whole of JSON; None for anything else."""
    with path.open("rb") as file:
        line = file.readline()
    for text in (line, None):
        try:
            return json.loads(path.read_bytes() if text is None else text)
        except ValueError:
            continue
    return None
