"""Trunks: a trajectory as token ids, with the span of tokens that each of its actions covers.

The conversation is rendered and tokenized once, as a whole. Where its actions lie is found in the
text, by a second rendering with a sentinel in place of each message's content; what stands between
two sentinels is the template's glue:

    glue₀ content₀ glue₁ content₁ glue₂ …      user: go?<eot>  assistant: left<eot>
                                               └glue₀┘  └──── glue₁ ────┘    └glue₂
    span of an assistant's message:                                      left<eot>

So it needs no ``{% generation %}`` in the template and works for any that keeps contents as they
are, or strips them. Whatever cannot be told exactly is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stepagent.data.messages import is_step
from stepagent.data.recorded import scored_spans
from stepagent.data.trajectory import Trajectory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedTokenizerBase

INT32_MAX = np.iinfo(np.int32).max
SENTINEL = "stepagent-sentinel-"


@dataclass(frozen=True, eq=False)
class Trunk:
    """One trajectory's tokens and the half-open spans of its T actions.

    input_ids: (L,) token ids, ≥ 0. action_spans: (T, 2), T ≥ 1, each ``[start, end)`` with
    1 ≤ start < end ≤ L, ascending, not overlapping; the end-of-turn token is inside the span.
    A span starts at 1 at the earliest because a row must predict its first token.

    Lists, numpy and torch arrays of int32 or int64 are accepted; read-only int32 numpy copies are
    kept. Raises TypeError for other dtypes and ValueError where a rule above is broken.
    """

    input_ids: NDArray[np.int32]
    action_spans: NDArray[np.int32]

    def __init__(self, input_ids: ArrayLike, action_spans: ArrayLike) -> None:
        ids = _integers("input_ids", input_ids)
        spans = _integers("action_spans", action_spans)
        _check_ids(ids)
        _check_spans(spans, len(ids))
        object.__setattr__(self, "input_ids", _frozen_int32(ids))
        object.__setattr__(self, "action_spans", _frozen_int32(spans))

    @property
    def num_steps(self) -> int:
        """T, the number of actions."""
        return len(self.action_spans)

    @property
    def action_mask(self) -> NDArray[np.bool_]:
        """(L,), True for the tokens of actions, as :func:`stepagent.pack_sequences` takes it."""
        mask = np.zeros(len(self.input_ids), dtype=bool)
        for start, end in self.action_spans:
            mask[start:end] = True
        return mask


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError as error:  # ragged lists
        raise ValueError(f"{name} is not an array: {error}") from error
    if array.size and array.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} has dtype {array.dtype}; it must be int32 or int64")
    return array.astype(np.int64)


def _frozen_int32(array: NDArray[np.int64]) -> NDArray[np.int32]:
    copy = array.astype(np.int32)
    copy.flags.writeable = False
    return copy


def _check_ids(ids: NDArray[np.int64]) -> None:
    if ids.ndim != 1:
        raise ValueError(f"input_ids has shape {ids.shape}; it must be one-dimensional")
    for index in np.flatnonzero((ids < 0) | (ids > INT32_MAX))[:1]:
        raise ValueError(f"input_ids[{index}] is {ids[index]}; ids must lie in [0, {INT32_MAX}]")


def _check_spans(spans: NDArray[np.int64], length: int) -> None:
    if spans.ndim != 2 or spans.shape[1] != 2 or len(spans) == 0:
        raise ValueError(f"action_spans has shape {spans.shape}; it must be (T, 2) with T >= 1")
    previous_end = 1
    for index, (start, end) in enumerate(spans.tolist()):
        if start < 1:
            rule = "must start at 1 or later: a row must predict the first token"
        elif end <= start:
            rule = "must not be empty: start < end"
        elif end > length:
            rule = f"must end within the {length} input_ids"
        elif start < previous_end:
            rule = f"must start at or after {previous_end}, where the span before it ends"
        else:
            previous_end = end
            continue
        raise ValueError(f"action_spans[{index}] is [{start}, {end}); it {rule}")


def encode(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Trunk:
    """Tokenize a trajectory under the tokenizer's chat template.

    Token ids that a record holds in ``meta`` (``token_ids``, ``action_spans``) are taken as they
    were sampled. Otherwise the span of a step holds the tokens of the assistant's content and all
    up to and including the special token that ends the turn. Needs a fast tokenizer, for its
    offsets.

    Raises ValueError, naming the trajectory, the message and the rule, where the spans would not
    be exact: the template raises, rewrites contents, or ends a turn without a special token; a
    content holds a special token or unknown words; a token is part content and part template.
    """
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory is a {type(trajectory).__name__}; it must be a Trajectory")
    if "token_ids" in trajectory.meta:
        try:
            return _recorded(trajectory, tokenizer)
        except ValueError as error:
            raise ValueError(f"trajectory {trajectory.id!r}: {error}") from error
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name} gives no character offsets; use a fast tokenizer")
    if tokenizer.chat_template is None:
        raise ValueError(f"{name} has no chat template; set its chat_template")
    try:
        return _Conversation(trajectory.messages, tokenizer).trunk()
    except ValueError as error:
        raise ValueError(f"trajectory {trajectory.id!r}: {error}") from error


def _recorded(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Trunk:
    """The trunk as it was sampled."""
    record = Trunk(trajectory.meta["token_ids"], trajectory.meta.get("action_spans", []))
    spans = scored_spans(trajectory, record.input_ids, record.action_spans, tokenizer)
    return Trunk(record.input_ids, spans)


class _Conversation:
    """A rendered conversation: its text, where each content lies in it, and its tokens."""

    def __init__(self, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.messages = messages
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = {id: token.content for id, token in added.items() if token.special}
        _check_contents(messages, self.special.values())
        self.text = _render(tokenizer, messages)
        self.contents = _locate(messages, _glue(tokenizer, messages), self.text)
        tokens = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        self.ids: list[int] = tokens["input_ids"]
        self.offsets = np.array(tokens["offset_mapping"], np.int64).reshape(-1, 2)

    def trunk(self) -> Trunk:
        steps = [i for i, message in enumerate(self.messages) if is_step(message)]
        trunk = Trunk(self.ids, [self._span(index) for index in steps])
        for index, (first, end) in zip(steps, trunk.action_spans.tolist(), strict=True):
            self._check_span(index, first, end - 1)
        return trunk

    def _span(self, index: int) -> tuple[int, int]:
        return self._token_after(self.contents[index][0]), self._end_of_turn(index) + 1

    def _token_after(self, position: int) -> int:
        """The first token that reaches past this place in the text."""
        return int(np.searchsorted(self.offsets[:, 1], position, side="right"))

    def _end_of_turn(self, index: int) -> int:
        """The special token that follows the assistant's content before any other text."""
        content_end, limit = self.contents[index][1], self._next_content(index)
        for token in range(self._token_after(content_end), len(self.ids)):
            start, end = self.offsets[token].tolist()
            if start >= limit or self.text[content_end:start].strip():
                break
            # an unknown word also becomes a special token, but does not read like one
            if self.text[start:end].strip() == self.special.get(self.ids[token]):
                if end > limit:
                    raise self._seam(index, "end of the turn", start, limit, end)
                return token
        raise ValueError(
            "the template does not close assistant turns with a special token: "
            f"{self.text[content_end:limit]!r} follows the content of messages[{index}]"
        )

    def _next_content(self, index: int) -> int:
        return self.contents[index + 1][0] if index + 1 < len(self.messages) else len(self.text)

    def _check_span(self, index: int, first: int, last: int) -> None:
        """Require that the tokens first … last read as the action, and as nothing more."""
        self._check_known(index, first, last)
        content_start = self.contents[index][0]
        start, end_of_turn = int(self.offsets[first, 0]), self.special[self.ids[last]]
        # not its offsets: those of a token that strips hold the spaces around it
        turn_end = self.text.index(end_of_turn, self.offsets[last, 0]) + len(end_of_turn)
        action = self.text[content_start:turn_end]
        decoded = self._decode_action(first, last)
        if self._lossless and decoded.endswith(action):
            # GPT-2's offsets leave out the space of 'Ġgo'; decoding does not
            start = content_start - (len(decoded) - len(action))
        if start < content_start:
            self._check_start(index, first, start)
            action = self.text[start:content_start] + action
        if decoded != action and (self._lossless or _squeeze(decoded) != _squeeze(action)):
            raise ValueError(
                f"the tokens of messages[{index}] decode to {decoded!r}, but its rendered text is "
                f"{action!r}; the tokenizer must give the text back"
            )

    def _check_known(self, index: int, first: int, last: int) -> None:
        # without the last token: GPT-2 has one token for unknown words and for the end of text
        for token in range(first, last):
            if self.ids[token] == self.tokenizer.unk_token_id:
                start, end = self.offsets[token].tolist()
                raise ValueError(
                    f"messages[{index}] holds {self.text[start:end]!r}, unknown to the tokenizer; "
                    "an action must be made of known tokens"
                )

    def _check_start(self, index: int, token: int, start: int) -> None:
        """Let a token begin in the glue only where generation begins there too.

        Llama 2's template goes from '[/INST]' to ' go': the agent itself writes the token '▁go'.
        """
        before = self.messages[:index]
        if before and _render(self.tokenizer, before, generation=True) == self.text[:start]:
            return
        content_start, end = self.contents[index][0], int(self.offsets[token, 1])
        raise self._seam(index, "start of the content", start, content_start, end)

    def _seam(self, index: int, place: str, start: int, boundary: int, end: int) -> ValueError:
        return ValueError(
            f"the token {self.text[start:end]!r} crosses the {place} of messages[{index}]: "
            f"{self.text[start:boundary]!r} | {self.text[boundary:end]!r}; the template must "
            "separate contents so that no token holds both sides"
        )

    def _decode_action(self, first: int, last: int) -> str:
        # after the token before: Llama 2's decoder drops the space at the start of a text
        before = len(self._decode(first - 1, first))
        return self._decode(first - 1, last + 1)[before:]

    def _decode(self, first: int, end: int) -> str:
        return _decode(self.tokenizer, self.ids[first:end])

    @cached_property
    def _lossless(self) -> bool:
        """Whether decoding gives every space back, as byte-level tokenizers do."""
        probe = f"{next(iter(self.special.values()))}a b"
        ids = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
        return _decode(self.tokenizer, ids) == probe


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_contents(messages: list[dict[str, Any]], special_tokens: Collection[str]) -> None:
    for index, message in enumerate(messages):
        content = message["content"]
        if SENTINEL in content:
            raise ValueError(f"messages[{index}] holds {SENTINEL!r}, which encode uses as a mark")
        for token in special_tokens:
            if message["role"] == "assistant" and token in content:
                raise ValueError(
                    f"messages[{index}] holds the special token {token!r}; an action must not: "
                    "it would be read as the template's"
                )


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], generation: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
        )
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template fails: {error}") from error


def _glue(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[str]:
    """What the template writes around the M contents: M + 1 texts."""
    marked = [{**message, "content": f"{SENTINEL}{i}."} for i, message in enumerate(messages)]
    parts = re.split(rf"{SENTINEL}(\d+)\.", _render(tokenizer, marked))
    found = [int(index) for index in parts[1::2]]
    for index in range(len(messages)):
        if found[index : index + 1] != [index]:
            raise ValueError(
                f"the chat template does not write the content of messages[{index}] in its place; "
                "it must write each content once, in order"
            )
    if len(found) > len(messages):
        raise ValueError(f"the chat template writes the content of messages[{found[-1]}] twice")
    return parts[::2]


def _locate(messages: list[dict[str, Any]], glue: list[str], text: str) -> list[tuple[int, int]]:
    """The (start, end) of each content in the text, as it is or stripped; else an error."""
    if not text.startswith(glue[0]):
        raise _rewritten(messages, 0)
    spans = []
    position = len(glue[0])
    for index, message in enumerate(messages):
        content, after = message["content"], glue[index + 1]
        shapes = (content, content.strip(), content.lstrip())
        ends = [position + len(s) for s in shapes if text.startswith(s, position)]
        fitting = [end for end in ends if text.startswith(after, end)]
        if not fitting:  # where the content itself is there, the next one changes the glue
            raise _rewritten(messages, min(index + bool(ends), len(messages) - 1))
        spans.append((position, fitting[0]))
        position = fitting[0] + len(after)
    if position != len(text):
        raise _rewritten(messages, len(messages) - 1)
    return spans


def _rewritten(messages: list[dict[str, Any]], index: int) -> ValueError:
    return ValueError(
        f"the chat template rewrites messages[{index}] ({messages[index]['role']}); it must keep "
        "contents as they are, or stripped"
    )


def _squeeze(text: str) -> str:
    return "".join(text.split())
