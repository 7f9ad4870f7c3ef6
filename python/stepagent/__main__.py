"""``python -m stepagent``: the command line."""

from .cli import main

main(prog_name="stepagent")
