"""What the commands share: their reports, their errors, the types of their options."""

from __future__ import annotations

import functools
import json
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from ..envs import ExpertUnavailable
from ..errors import EngineError
from ..files import check_regular

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


class _New(click.Path):
    """What a command writes: nothing yet, or one of its own kind, however links lead there."""

    def __init__(self, *, folder: bool) -> None:
        super().__init__(file_okay=not folder, dir_okay=folder, writable=True, path_type=Path)
        self._folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]
        try:
            mode = path.stat().st_mode
        except OSError:  # nothing yet, or nothing there can be: whoever makes it says why
            return path
        if self._folder and not stat.S_ISDIR(mode):
            self.fail(f"{str(path)!r} must be a folder, or nothing yet.", param, ctx)
        if not self._folder:
            try:
                check_regular(path, mode)
            except OSError as error:
                self.fail(f"{error}.", param, ctx)
        return path


POSITIVE = click.IntRange(min=1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = _New(folder=False)
NEW_FOLDER = _New(folder=True)


class Interrupted(click.ClickException):
    exit_code = 130

    def show(self, file: Any = None) -> None:
        click.echo(f"Interrupted: {self.message}", err=True)


class Commands(click.Group):
    """Commands in the order of a project's life, whose errors end as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    """What a user can mend ends as one line."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted("nothing was written") from interrupt
    except _USER_ERRORS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise click.ClickException(message) from error


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
