"""Files of JSON lines of one run, written by appending, by a process that may be killed any moment.

A line that was written is on the disk; a last line that is cut short is dropped on resuming.
Each record says in ``run`` what it depends on: a file holds one run.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..files import atomic, check_regular, destination


@contextmanager
def open_journal(path: Path, beginning: bytes, writer: str) -> Iterator[Journal]:
    """The journal at ``path``, made where it is missing, for this process alone.

    Args:
        path: a regular file or nothing yet; what a symbolic link leads to.
        beginning: of all its lines.
        writer: the commands that write such lines, for errors.

    Raises:
        OSError: where another process writes it, and where ``path`` is a device, a FIFO or a
            folder: see `stepagent.files`.
    """
    target = destination(path)
    file, made = _open(target)
    with file:
        check_regular(path, os.fstat(file.fileno()).st_mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{path} is being written by another process") from error
        journal = Journal(file, path, beginning, writer, made)
        try:
            yield journal
        except BaseException:
            journal.discard()  # so that a run that could not begin leaves nothing behind
            raise


def _open(target: Path) -> tuple[BinaryIO, bool]:
    """The file, and whether it was made now."""
    try:
        return open(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "r+b"), True
    except FileExistsError:
        return open(os.open(target, os.O_RDWR), "r+b"), False


class Journal:
    """See `open_journal`."""

    def __init__(
        self, file: BinaryIO, path: Path, beginning: bytes, writer: str, made: bool
    ) -> None:
        self._file, self.path, self._made = file, path, made
        self._beginning, self._writer = beginning, writer

    def records(self) -> Iterator[tuple[str, Any, int]]:
        """Each whole record with ``path:line`` and its length in bytes. When all are read, a last
        line that is cut short is dropped, and what is appended follows them.

        Raises:
            ValueError: for a last line that the writer cannot have begun, and for what is no JSON.
        """
        whole = self._whole_lines()
        self._file.seek(0)
        for line, (where, record) in zip(self._file, json_records(self.path, whole), strict=False):
            yield where, record, len(line)
        self._file.truncate(whole)
        self._file.seek(whole)

    def append(self, lines: Iterable[bytes]) -> None:
        """Write the lines; they are on the disk on return."""
        self._file.writelines(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def tell(self) -> int:
        """Where the next line begins."""
        return self._file.tell()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of the file from ``start`` to ``stop``."""
        self._file.seek(start)
        return self._file.read(stop - start)

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Put these lines in place of all others, in one atomic step; nothing is appended after."""
        with atomic(self.path) as file:
            file.writelines(lines)

    def discard(self) -> None:
        """Remove the file if it was made by this process and holds nothing."""
        target, own = destination(self.path), os.fstat(self._file.fileno())
        here = target.exists() and os.path.samestat(target.stat(), own)
        if self._made and here and not own.st_size:
            target.unlink()

    def _whole_lines(self) -> int:
        """The length of the file without a last line that is cut short."""
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                if not line.startswith(self._beginning[: len(line)]):
                    raise ValueError(f"{self.path} ends with what {self._writer} does not write")
                break
            end += len(line)
        return end


def check_run(where: str, recorded: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """ValueError, naming the difference, unless a record is of this run."""
    for name in {**run, **recorded}:
        if recorded.get(name) != run.get(name):
            refuse_run(where, f"{name} {recorded.get(name)!r}, not {run.get(name)!r}")


def refuse_run(where: str, found: str) -> NoReturn:
    """ValueError: the file is of another run than the one that is asked for."""
    raise ValueError(
        f"{where} is of another run: it has {found}; write to another file, or delete this one"
    )


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
