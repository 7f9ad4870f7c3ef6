"""Errors that more than one folder raises or answers; they load nothing else of the package."""


class EngineError(RuntimeError):
    """An engine cannot be reached, refuses, or answers what was not asked for."""


class RequestRefused(EngineError):
    """A server refused one request for what it holds; others may pass.

    ``place`` is that of its prompt among those asked for; None where no prompts are.
    """

    place: int | None = None


class ContextLimit(RequestRefused):
    """The request is too long for the model."""
