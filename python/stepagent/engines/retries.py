"""When a request to a server is sent again: after which failures, how often, and how long later."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from httpx2 import Response
    from tenacity import AsyncRetrying, RetryCallState

BUSY = (408, 409, 425, 429)  # with 5xx: worth another try
_LONGEST = 60.0  # seconds between two tries, where the server does not say


class PassingFailure(Exception):
    """A failure after which another try may help.

    Attributes:
        problem: for a person.
        retry_after: the seconds that the server asked to wait; None where it did not.
    """

    def __init__(self, problem: str, retry_after: float | None = None) -> None:
        super().__init__(problem)
        self.problem, self.retry_after = problem, retry_after


@dataclass(frozen=True)
class Retries:
    """How a request is tried again.

    Attributes:
        retries: further tries.
        backoff: seconds before the first of them; each waits twice as long as the one before it,
            at most a minute, and up to ``backoff`` more by chance, so that requests that failed
            together do not come back together.
        budget: seconds after which no further try begins, all waiting included.
    """

    retries: int
    backoff: float
    budget: float

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries must be >= 0, got {self.retries}")
        if not self.backoff >= 0:
            raise ValueError(f"backoff must be >= 0 seconds, got {self.backoff}")
        if not self.budget > 0:
            raise ValueError(f"budget must be > 0 seconds, got {self.budget}")

    def attempts(self) -> AsyncRetrying:
        """To be gone through by ``async for``; the last failure is raised as it came."""
        from tenacity import (
            AsyncRetrying,
            retry_if_exception_type,
            stop_after_attempt,
            stop_before_delay,
        )

        return AsyncRetrying(
            retry=retry_if_exception_type(PassingFailure),
            stop=stop_after_attempt(self.retries + 1) | stop_before_delay(self.budget),
            wait=self._wait,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        """What the server asked for, if it did; a part by chance on top of either."""
        from tenacity import wait_exponential, wait_random

        failure = state.outcome.exception() if state.outcome is not None else None
        asked = failure.retry_after if isinstance(failure, PassingFailure) else None
        jitter = float(wait_random(0, self.backoff)(state))
        if asked is not None:
            return asked + jitter
        return float(wait_exponential(self.backoff, max=_LONGEST)(state)) + jitter


def retry_after(response: Response) -> float | None:
    """The seconds that a server asks to wait, as a number or a date; None for none, or nonsense."""
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.fromtimestamp(time.time(), UTC)).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None
