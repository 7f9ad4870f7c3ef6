"""What a policy may answer beside the text of an action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Answer(str):
    """A text as the model wrote it, with what is known of it.

    Attributes:
        truncated: it was cut at the token limit.
        problem: why it holds no action whatever the format, such as ``no text``; or None.
        action: what it does, where that is not to be read in it.
        overruled: the token ids of the policy's own answer, where the expert's is in its place.
    """

    truncated: bool
    problem: str | None
    action: str | None
    overruled: NDArray[np.int32] | None

    def __new__(
        cls,
        text: str,
        truncated: bool = False,
        problem: str | None = None,
        action: str | None = None,
        overruled: NDArray[np.int32] | None = None,
    ) -> Answer:
        answer = super().__new__(cls, text)
        answer.truncated, answer.problem, answer.action = truncated, problem, action
        answer.overruled = overruled
        return answer

    @property
    def text(self) -> str:
        """The text alone."""
        return str.__str__(self)


@dataclass(frozen=True)
class Stop:
    """No answer: the episode ends here, and the others continue.

    Attributes:
        kind: ``context_limit`` where the prompt does not fit the model; the episode has the outcome
            that it had until then. ``failed`` where the policy failed at it alone; it then counts
            as crashed.
        reason: for a person.
    """

    kind: Literal["context_limit", "failed"]
    reason: str


Decision = str | Stop | None
"""What a policy decides: a text, which may be an `Answer`; None gives the episode up."""
