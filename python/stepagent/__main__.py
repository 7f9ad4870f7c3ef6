"""The process of the command line: its standard streams and signals, then the command.

stdout is the report's alone: whatever else writes to it, a library in C or a process of an
environment, reaches stderr. stderr is for people: a run continues where it is closed or unread.
A reader of stdout that leaves ends the command as it ends other tools, with status 141 and no word.
Ctrl-C and SIGTERM end it at any time, while modules are imported too: status 130 or 143, folders
and processes cleaned up, no traceback.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from _thread import interrupt_main
from typing import Any, TextIO

_AGAIN = 0.05  # seconds


def run() -> None:
    """Be the process: ends in SystemExit."""
    status: object = 0
    try:
        signal.signal(signal.SIGTERM, _terminate)
        sys.unraisablehook = _interrupt_again
        _open_streams()
        from .cli import main

        main(prog_name="stepagent")
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        status = 130
    except SystemExit as stop:
        status = stop.code
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be cleaned up
    sys.exit(status)  # type: ignore[arg-type]


def _terminate(number: int, frame: object) -> None:
    """SIGTERM unwinds the stack as Ctrl-C does; a second one ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _interrupt_again(unraisable: Any) -> None:
    """An interrupt that met a callback, of an import for example, is lost: it comes once more."""
    numbers = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    number = numbers.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
        return
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, _terminate)
    again = threading.Timer(_AGAIN, interrupt_main, [number])
    again.daemon = True
    again.start()


def _open_streams() -> None:
    """Give the report a descriptor of its own; what is written to 1 goes where 2 goes."""
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would be taken for it
            os.set_inheritable(os.open(os.devnull, mode), True)
    report = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = _text(_Report(report, "w"), sys.stdout)
    sys.stderr = _text(_Notes(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: TextIO | None) -> TextIO:
    """In the encoding of the stream before."""
    encoding = getattr(before, "encoding", "utf-8")
    errors = getattr(before, "errors", "backslashreplace")
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=True
    )


class _Report(io.FileIO):
    """stdout; a reader that left ends the process as SIGPIPE does, but cleaned up."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _close(self.fileno())  # what is still buffered cannot be written either
            if isinstance(error, BrokenPipeError):
                raise SystemExit(128 + signal.SIGPIPE) from None
            raise


class _Notes(io.FileIO):
    """stderr, which no run depends on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            _close(1, 2)
            return memoryview(data).nbytes


def _close(*descriptors: int) -> None:
    """Let what is still written there vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor, inheritable=descriptor <= 2)
    os.close(nowhere)


if __name__ == "__main__":
    run()
