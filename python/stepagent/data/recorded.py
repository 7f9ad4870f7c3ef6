"""Token ids that a record holds: what was sampled is scored as it is, never tokenized again.

A record of ``evaluate`` or ``collect``, and a Trace, say in ``meta`` which tokens there were and
which of them the agent sampled. They mean nothing under another tokenizer, and the wrong states
under another chat template, so both are checked by decoding.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from .trajectory import Trajectory
    from .trunk import Trunk

_REMEDY = "use the model that it was sampled with, or drop token_ids from meta to tokenize it anew"
# A template may write today's date, which is another one than on the day of the record.
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2} [A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}, \d{4}")


def scored_spans(
    trajectory: Trajectory, record: Trunk, tokenizer: PreTrainedTokenizerBase
) -> NDArray[np.int32]:
    """Those of a record's action spans that are scored.

    Args:
        trajectory: The record's messages.
        record: Its tokens, and the spans of all its assistant messages, or of the scored ones.
        tokenizer: That of the model to be scored.

    Returns:
        (S, 2), one span for each scored message.

    Raises:
        ValueError: Where the ids do not read as the messages do under this tokenizer and its chat
            template.
    """
    token_ids, spans = record.input_ids, record.action_spans
    steps = trajectory.step_indices
    actions = [i for i, m in enumerate(trajectory.messages) if m["role"] == "assistant"]
    if len(spans) not in (len(steps), len(actions)):
        raise ValueError(
            f"action_spans in meta must be one for each of the {len(actions)} assistant messages, "
            f"or of the {len(steps)} that are scored, got {len(spans)}"
        )
    known = len(tokenizer)
    if token_ids.max() >= known:
        raise ValueError(
            f"the recorded token {token_ids.max()} is none of the tokenizer's {known}: it was "
            f"sampled with another tokenizer; {_REMEDY}"
        )
    indices = steps if len(spans) == len(steps) else actions
    _Record(trajectory, record, tokenizer).check(indices, spans.tolist())
    kept = set(steps)
    return spans[[index in kept for index in indices]]


class _Record:
    """A conversation twice: as messages, and as the ids that it was when it happened."""

    def __init__(
        self,
        trajectory: Trajectory,
        record: Trunk,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._trajectory, self._tokenizer = trajectory, tokenizer
        self._ids, self._rewinds = record.input_ids.tolist(), record.rewinds

    def check(self, indices: list[int], spans: list[list[int]]) -> None:
        """Compare the first state, each action, and what stands between two of them."""
        self._check_first(indices[0], spans[0][0])
        messages, previous, position = self._trajectory.messages, indices[0], spans[0][0]
        for index, (start, end) in zip(indices, spans, strict=True):
            between = _squeeze(self._decode(position, start))
            for place in range(previous + 1, index):
                if messages[place]["role"] == "assistant":
                    continue  # its thoughts may be gone from what the agent saw
                if _squeeze(messages[place]["content"]) not in between:
                    raise self._differs(place, messages[place]["content"], position, start)
            self._check_action(index, start, end)
            previous, position = index, end

    def _check_first(self, index: int, start: int) -> None:
        trajectory = self._trajectory
        rendered = str(
            self._tokenizer.apply_chat_template(
                trajectory.messages[:index],
                tools=trajectory.tools,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=True,
                **trajectory.chat_template_kwargs,
            )
        )
        recorded = self._decode(0, start)
        if _squeeze(_DATE.sub("", rendered)) != _squeeze(_DATE.sub("", recorded)):
            raise ValueError(
                "the recorded tokens before the first action read as "
                f"{_shown(recorded)}, but the chat template writes {_shown(rendered)}: they were "
                f"made with another tokenizer, template or tools; {_REMEDY}"
            )

    def _check_action(self, index: int, start: int, end: int) -> None:
        message = self._trajectory.messages[index]
        content, whole = message["content"], self._decode(start, end)
        texts = {_squeeze(whole), _squeeze(self._decode(start, end - 1))}  # perhaps less its end
        plain = not message.keys() & {"tool_calls", "reasoning_content"}
        parts = [content, message.get("reasoning_content", "")]
        parts += [call["function"]["name"] for call in message.get("tool_calls", [])]
        if (plain and _squeeze(content) not in texts) or any(
            _squeeze(part) not in _squeeze(whole) for part in parts
        ):
            raise self._differs(index, content, start, end)

    def _differs(self, index: int, content: str, start: int, end: int) -> ValueError:
        return ValueError(
            f"the recorded tokens of messages[{index}] read as {_shown(self._decode(start, end))}, "
            f"but the message is {_shown(content)}: they were made with another tokenizer, or the "
            f"message was changed since; {_REMEDY}"
        )

    def _decode(self, start: int, end: int) -> str:
        text: Any = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def _squeeze(text: str) -> str:
    """Without spaces: decoders of one kind put some in, others leave some out."""
    return "".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:120]} … {text[-60:]}")
