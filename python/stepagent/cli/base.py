"""What the commands share: their reports, their errors, the types of their options."""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from ..engines import EngineError
from ..envs import ExpertUnavailable

# What a user can cause and mend: one line instead of a traceback.
_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    ExpertUnavailable,
    FloatingPointError,
    EngineError,
)

POSITIVE = click.IntRange(min=1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)


class Interrupted(click.ClickException):
    exit_code = 130

    def show(self, file: Any = None) -> None:
        click.echo(f"Interrupted: {self.message}", err=True)


class Commands(click.Group):
    """Commands in the order of a project's life, whose errors end as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with cleaned_up_at_sigterm():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted("nothing was written") from interrupt
        except _USER_ERRORS as error:
            message = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(message) from error


@contextmanager
def cleaned_up_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as an exit does, so that what is open is closed: environments give
    back what they hold, and leave nothing behind. The exit code is 143, that of a shell."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reports(function: Callable[..., tuple[dict[str, Any], str] | None]) -> Callable[..., None]:
    """Give a command ``--json``; print its report, and nothing else that is printed, on stdout.

    A command has none, None, where another process of the same run reports.
    """

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    @functools.wraps(function)
    def command(as_json: bool, **options: Any) -> None:
        with redirect_stdout(sys.stderr):
            reported = function(**options)
        if reported is None:
            return
        report, text = reported
        click.echo(json.dumps(report) if as_json else text)
        if report.get("interrupted"):
            raise Interrupted("the report holds what there was until then")
        if report.get("failed"):
            raise click.ClickException("; ".join(report["failed"]))

    return command


def make_parent(output: Path) -> None:
    """At once, so that no work is lost to a folder that cannot be made."""
    output.parent.mkdir(parents=True, exist_ok=True)
