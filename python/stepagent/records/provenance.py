"""How a run came about: a small JSON file beside what it wrote.

What decides the episodes stands in each record; this is what does not, and differs from sitting to
sitting: when, for how long, with which versions.

    mine.jsonl  →  mine.run.json        a folder  →  run.json in it

    {"sittings": [{"started": "2025-01-31T12:00:00+00:00", "seconds": 12.3, "versions": {…}}, …]}
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..files import write_text

_PACKAGES = ("stepagent", "torch", "transformers")


def provenance_path(output: Path) -> Path:
    """Where the sittings of ``output``, a file or a folder, are written."""
    return output / "run.json" if output.is_dir() else output.with_suffix(".run.json")


@contextmanager
def sitting(output: Path, **told: Any) -> Iterator[None]:
    """Add to the file beside ``output`` that it was worked on, however that ended.

    Nothing is written where ``output`` is not there in the end, or an empty file.

    Args:
        output: a file or a folder.
        told: what else to say, as JSON can hold it.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        yield
    finally:
        if output.is_dir() or (output.is_file() and output.stat().st_size):
            entry = {
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 1),
                "versions": versions(),
                **told,
            }
            path = provenance_path(output)
            write_text(path, json.dumps({"sittings": [*sittings(output), entry]}, indent=1) + "\n")


def sittings(output: Path) -> list[dict[str, Any]]:
    """What `sitting` wrote, in order; empty where there is no such file.

    Raises:
        ValueError: for a file that holds something else.
    """
    path = provenance_path(output)
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sittings"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold the sittings of a run, as JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path}: sittings must be a list of objects, got {found!r}")
    return found


def versions(*more: str) -> dict[str, str]:
    """Of Python, of the packages that decide what a run does, and of ``more`` of them."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
