"""Runs as one self-contained HTML page: what agents did, step by step, and how well.

`load_runs` reads runs, `write_report` writes the board. The page has its data, script
and style within and loads nothing. ``demo.py`` adds the demo's own summary to the board.
"""

from .page import write_report
from .runs import Run, load_run, load_runs

__all__ = ["Run", "load_run", "load_runs", "write_report"]
