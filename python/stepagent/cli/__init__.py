"""The command line: ``stepagent demo | check | collect | train | … | bench | warmup | doctor``.

A command's report goes to stdout, as text or with ``--json`` as one JSON object; progress and logs
go to stderr. Exit codes: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM.
What takes time to import, and what is optional, is imported inside the command that needs it: help
and refusals come at once.
"""

from __future__ import annotations

import click

from .base import Commands
from .behaviours import behaviours
from .check import check
from .demo import demo
from .diagnose import diagnose
from .episodes import collect, evaluate
from .evolve import evolve
from .inspect import inspect_command
from .kernels import bench, doctor, warmup
from .report import report
from .subgoals import subgoals
from .train import train


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stepagent")
def main() -> None:
    """Step-wise rewards for LLM agents: from expert trajectories to a better agent."""


_TRAINING = (demo, check, collect, train, evaluate, diagnose, evolve, inspect_command, report)
_ANALYSIS = (subgoals, behaviours)
for _command in (*_TRAINING, *_ANALYSIS, bench, warmup, doctor):
    main.add_command(_command)
