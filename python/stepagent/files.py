"""Where a file is written, and how: whole or not at all.

Only regular files are written, made and removed. A device, a FIFO, a socket or a folder that stands
at an output's path stays as it is, and a symbolic link stays a link: what it leads to is written.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$STEPAGENT_CACHE``, or else in the user's cache."""
    chosen = os.environ.get("STEPAGENT_CACHE")
    cache = chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "stepagent")
    return Path(cache).expanduser()


def destination(path: str | os.PathLike[str]) -> Path:
    """What ``path`` leads to, with symbolic links followed: a regular file, or nothing yet.

    Raises:
        OSError: for anything else, naming what it is; IsADirectoryError for a folder.
    """
    found = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        check_regular(path, found.stat().st_mode)
    return found


def check_regular(path: str | os.PathLike[str], mode: int) -> None:
    """OSError unless ``mode``, the ``st_mode`` of what is at ``path``, is a regular file's."""
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        error = IsADirectoryError if stat.S_ISDIR(mode) else OSError
        raise error(f"an output must be a regular file, or none yet, got {kind}: {os.fspath(path)}")


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to be written in place of what is at ``path``, which is replaced in one step at the
    end: whoever reads ``path`` meanwhile, or after a failure, finds it as it was.

    Raises:
        OSError: where ``path`` is no regular file; see `destination`.
    """
    target = destination(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` as it stands; as `atomic`."""
    with atomic(path) as file:
        file.write(text.encode())
