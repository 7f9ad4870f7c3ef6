"""The page: templates filled, script and style within, nothing to be loaded."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from ..files import write_text
from .behaviours import shares
from .board import board
from .numbers import FILTERS, visible
from .payload import payload
from .runs import Run

if TYPE_CHECKING:
    from ..analysis import Subgoals


def write_report(
    path: Path,
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    subgoals: Subgoals | None = None,
    behaviours: Mapping[str, Any] | None = None,
) -> None:
    """Write the board of ``runs`` to ``path``: one HTML file that loads nothing.

    Args:
        baseline: The name of the run that others are compared with; the first by default.
        subgoals: Whose phases the steps of episodes are shown with.
        behaviours: What ``stepagent behaviours --output`` wrote, shown as a section.

    Raises:
        ValueError: For no runs, for a baseline that is none of them, and for other behaviours.
    """
    write_page(
        *(path, "board.html.jinja", runs),
        baseline=baseline,
        subgoals=subgoals,
        behaviours=behaviours,
    )


def write_page(
    path: Path,
    template: str,
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    subgoals: Subgoals | None = None,
    behaviours: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Fill a template that shows the board, and whatever else of ``values``."""
    names = [run.name for run in runs]
    if not runs:
        raise ValueError("runs must hold at least one, got none")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline must be one of {', '.join(names)}, got {baseline!r}")
    compared_with = runs[0 if baseline is None else names.index(baseline)]
    index, blocks = payload(runs, subgoals)
    script = _text("board.js")
    page = (
        _environment()
        .get_template(template)
        .render(
            board={**board(runs, compared_with), "behaviours": shares(behaviours)},
            index=index,
            blocks=blocks,
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            style=Markup(_text("board.css")),
            **(values or {}),
        )
    )
    write_text(path, page)


def _text(name: str) -> str:
    return (files("stepagent.report") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stepagent.report", "templates"),
        autoescape=True,  # observations, actions and names are text of environments and models
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({function.__name__: function for function in FILTERS})
    return environment
