"""Every op against what else computes it: checked first, then timed, then set against the machine.

``problems.py`` makes inputs, ``providers.py`` names who computes, ``checks.py`` compares with the
reference, ``clocks.py`` measures, ``runner.py`` goes through all of them, ``output.py`` and
``profiles.py`` write what came out.
"""
