"""An action out of an agent's text, as ReAct prompts and ETO's expert files write it."""

from __future__ import annotations

import re

# The last "Action:" at the start of a line; a thought may quote the word.
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*", re.MULTILINE)


def parse_action(text: str) -> str:
    """What ``text`` does: of ``"Thought: …\\nAction: …"`` what stands after the last ``Action:``.

    A text without a line that begins with ``Action:`` is an action itself. White space at the ends
    is dropped. An empty action comes back as ``""``, for the environment to refuse.
    """
    return _ACTION.split(text)[-1].strip()
