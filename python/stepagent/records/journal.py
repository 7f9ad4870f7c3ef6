"""Files of lines that are written by appending, by a process that may be killed at any moment.

A line that was written is on the disk; a last line that is cut short is dropped by whoever goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def exclusive(path: Path) -> Iterator[BinaryIO]:
    """The file, made where it is missing, for this process alone; OSError where another has it."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{path} is being written by another process") from error
        try:
            yield file
        except BaseException:
            if not os.fstat(file.fileno()).st_size:
                path.unlink()  # so that a run that could not begin leaves nothing behind
            raise


def append(file: BinaryIO, lines: Iterable[bytes]) -> None:
    """Write the lines; they are on the disk on return."""
    file.writelines(lines)
    file.flush()
    os.fsync(file.fileno())


def whole_lines(file: BinaryIO, path: Path, beginning: bytes, writer: str) -> int:
    """The length of the file without a last line that is cut short.

    :raises ValueError: for a last line that ``writer``, whose lines all have this beginning, cannot
        have begun.
    """
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            if not line.startswith(beginning[: len(line)]):
                raise ValueError(f"{path} ends with what {writer} does not write")
            break
        end += len(line)
    return end


def json_records(path: Path, size: int | None = None) -> Iterator[tuple[str, Any]]:
    """The records of the file, or of its first ``size`` bytes, each with ``path:line``."""
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            read += len(line)
            if size is not None and read > size:
                return
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
