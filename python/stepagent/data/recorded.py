"""Token ids that a record holds: what was sampled is scored as it is, never tokenized again.

A record of ``evaluate`` or ``collect``, and a Trace, say in ``meta`` which tokens there were and
which of them the agent sampled. They mean nothing under another tokenizer, and the wrong states
under another chat template: a record that says what it was made with is refused by that, and every
record is checked by decoding.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from .chat import ChatTemplate
from .control import ControlTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from .trajectory import Trajectory
    from .trunk import Trunk

_REMEDY = "use the model that it was sampled with, or drop token_ids from meta to tokenize it anew"
# A template may write today's date, which is another one than on the day of the record.
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2} [A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}, \d{4}")


# What of a tokenizer says which ids a text has. Added tokens decode to their own names, so that the
# check by decoding tells them, and one that was added since, as for padding, changes nothing.
_TOKENIZES = ("model", "normalizer", "pre_tokenizer")
_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def made_with(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of a tokenizer and of its chat template, as a record of its ids has them; none of a
    tokenizer that is not a fast one."""
    if not getattr(tokenizer, "is_fast", False):
        return {}
    if tokenizer not in _hashes:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = json.dumps([parts[name] for name in _TOKENIZES], sort_keys=True)
        _hashes[tokenizer] = _hash(kept)
    return {"tokenizer": _hashes[tokenizer], "chat_template": _hash(str(tokenizer.chat_template))}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_made_with(meta: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    said = meta.get("made_with")  # not in older records, nor in those of others
    if not isinstance(said, dict):
        return
    for what, own in made_with(tokenizer).items():
        if said.get(what) not in (None, own):
            raise ValueError(
                f"meta['made_with'] says that the recorded tokens are of the {what} {said[what]}, "
                f"which must be this one's {own}: they were made with another {what}; {_REMEDY}"
            )


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
        ValueError: Where the record names another tokenizer or chat template (`made_with`), or its
            ids do not read as the messages do under these.
    """
    _check_made_with(trajectory.meta, tokenizer)
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
        self._trajectory, self._tokenizer, self._record = trajectory, tokenizer, record
        self._ids = record.input_ids.tolist()
        said = json.dumps([trajectory.messages, trajectory.tools], ensure_ascii=False)
        self._control = ControlTokens(tokenizer).apart_from(said)
        tools = self._control.mark(trajectory.tools)
        self._template = ChatTemplate(tokenizer, tools, trajectory.chat_template_kwargs)

    def check(self, indices: list[int], spans: list[list[int]]) -> None:
        """Compare each action and its state. Of a record that is one line of tokens, whose later
        states may keep what a template would drop, those are what stands between two actions."""
        states = range(len(spans) if len(self._record.rewinds) else 1)
        for step in states:
            self._check_state(indices[step], step)
        messages, previous, position = self._trajectory.messages, indices[0], spans[0][0]
        for index, (start, end) in zip(indices, spans, strict=True):
            between = _squeeze(self._decode(position, start))
            for place in range(previous + 1, index):
                if messages[place]["role"] == "assistant":
                    continue  # its thoughts may be gone from what the agent saw
                content = messages[place]["content"]
                if _squeeze(content) not in between and not self._has(content, position, start):
                    raise self._differs(place, content, position, start)
            self._check_action(index, start, end)
            previous, position = index, end

    def _check_state(self, index: int, step: int) -> None:
        messages = self._control.mark_messages(self._trajectory.messages[:index])
        rendered = self._template.render(messages, generation=True)
        ids = self._record.state_ids(step).tolist()
        recorded, written = self._text(ids), self._control.plain(rendered)
        place = "the first action" if step == 0 else f"messages[{index}]"
        same = _squeeze(_DATE.sub("", written)) == _squeeze(_DATE.sub("", recorded))
        if not same and ids != self._control.tokenize(rendered).ids:
            raise ValueError(
                f"the recorded tokens before {place} read as {_shown(recorded)}, but the chat "
                f"template writes {_shown(written)}: they were made with another tokenizer, "
                f"template or tools; {_REMEDY}"
            )
        known = "made_with" in self._trajectory.meta  # and found to be the same
        if known and self._went_back(step) and ids != self._control.tokenize(rendered).ids:
            raise ValueError(
                f"the recorded tokens before {place} must be those of the prompt there, to which "
                f"meta['rewinds'] goes back, but are others: the record was changed; {_REMEDY}"
            )

    def _went_back(self, step: int) -> bool:
        """Whether a state does not go on from the action before it, but is a prompt made anew."""
        places, spans = self._record.rewinds[:, 0], self._record.action_spans
        before = spans[step - 1, 1] if step else 0
        return bool(((places >= before) & (places < spans[step, 0])).any())

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

    def _has(self, text: str, start: int, end: int) -> bool:
        """Whether the text has these ids among others: a word that the tokenizer does not know
        cannot be read in them."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        ends = range(start + len(ids), end + 1)
        return any(self._ids[stop - len(ids) : stop] == ids for stop in ends)

    def _differs(self, index: int, content: str, start: int, end: int) -> ValueError:
        return ValueError(
            f"the recorded tokens of messages[{index}] read as {_shown(self._decode(start, end))}, "
            f"but the message is {_shown(content)}: they were made with another tokenizer, or the "
            f"message was changed since; {_REMEDY}"
        )

    def _decode(self, start: int, end: int) -> str:
        return self._text(self._ids[start:end])

    def _text(self, ids: list[int]) -> str:
        text: Any = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def _squeeze(text: str) -> str:
    """Without spaces: decoders of one kind put some in, others leave some out."""
    return "".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:120]} … {text[-60:]}")
