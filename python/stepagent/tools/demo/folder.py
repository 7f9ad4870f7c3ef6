"""A run's folder: whose it is, and how long the work in it took."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ...files import write_text


class Stopwatch:
    """Seconds of work, added up over interruptions."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        write_text(self._path, json.dumps(self.total()))
        self._start = time.monotonic()

    def total(self) -> float:
        """Seconds up to now."""
        earlier = json.loads(self._path.read_text()) if self._path.exists() else 0.0
        return float(earlier + time.monotonic() - self._start)


def check_same_run(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        write_text(path, json.dumps(settings, indent=2))
        return
    found = json.loads(path.read_text())
    if found != settings:
        changed = [name for name in settings if settings[name] != found.get(name)]
        raise ValueError(
            f"{path.parent} holds a run with other settings ({', '.join(changed)}); "
            "choose another output folder or delete it"
        )
