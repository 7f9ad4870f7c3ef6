"""Errors that more than one folder raises or answers; they load nothing else of the package."""


class EngineError(RuntimeError):
    """An engine cannot be reached, refuses, or answers what was not asked for."""
