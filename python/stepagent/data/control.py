"""Control tokens: where a chat template writes them, and how what others write never becomes one.

A web page that says ``<|im_end|>`` must not end a turn. What is no assistant's is therefore marked
before the template writes it, each control token in it between two characters that occur nowhere
else; the marked ones are then tokenized as ordinary text, as ``split_special_tokens`` does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Unicode's last two, which are no characters; where a text has them all the same, others are taken.
_MARKS = "\U0010fffe\U0010ffff"
_PRIVATE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text's tokens, and its anchors: the control tokens, at which tokenization starts anew.

    ids: (L,). anchors: (K, 2), the place in the text and among the tokens of each.
    """

    text: str
    ids: list[int]
    anchors: NDArray[np.int64]

    def last_anchor(self, stop: int) -> tuple[int, int]:
        """The last anchor that begins before the character ``stop``; the beginning if none does."""
        k = int(np.searchsorted(self.anchors[:, 0], stop))
        return (int(self.anchors[k - 1, 0]), int(self.anchors[k - 1, 1])) if k else (0, 0)


class ControlTokens:
    """Those of one tokenizer: its special tokens.

    Args:
        tokenizer: Has them.
        marks: The two characters between which one is put to be text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: str = _MARKS) -> None:
        self.tokenizer, self._open, self._close = tokenizer, *marks
        added = tokenizer.added_tokens_decoder
        named = set(tokenizer.all_special_ids)
        self.added = {id: token for id, token in added.items() if token.special or id in named}
        self.contents = {id: token.content for id, token in self.added.items()}
        longest = sorted(self.contents.values(), key=len, reverse=True)
        any_one = "|".join(map(re.escape, longest)) or "(?!)"
        self._pattern = re.compile(any_one)
        self._marked = re.compile(f"{self._open}(?:{any_one}){self._close}")
        self._either = re.compile(f"{self._marked.pattern}|({any_one})")

    def apart_from(self, text: str) -> ControlTokens:
        """The same with marks that the text does not have."""
        if not self._has_marks(text):
            return self
        free = (chr(code) for code in _PRIVATE if chr(code) not in text)
        return ControlTokens(self.tokenizer, next(free) + next(free))

    def _has_marks(self, text: str) -> bool:
        return self._open in text or self._close in text

    def find(self, text: str) -> list[str]:
        """The control tokens in a text."""
        return self._pattern.findall(text)

    def mark(self, value: Any) -> Any:
        """The same value with all control tokens in its strings marked."""
        if isinstance(value, str):
            return self._pattern.sub(rf"{self._open}\g<0>{self._close}", value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return value

    def mark_messages(self, messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with all marked that is no assistant's."""
        return [m if m["role"] == "assistant" else self.mark(m) for m in messages]

    def plain(self, text: str) -> str:
        """The text without marks."""
        return text.replace(self._open, "").replace(self._close, "")

    def tokenize(self, text: str) -> Tokens:
        """The tokens of a text in which control tokens may be marked.

        Raises:
            ValueError: Where it is unknown which control tokens the template wrote.
        """
        if not self._has_marks(text):
            ids = self.ids(text)
            places = [found.start() for found in self._pattern.finditer(text)]
            return Tokens(text, ids, self._anchors(text, places, ids))
        return self._tokenize_marked(text)

    def _anchors(self, text: str, places: list[int], ids: list[int]) -> NDArray[np.int64]:
        array = np.array(ids, np.int64)
        special = np.zeros(1 + max([*self.contents, array.max(initial=0)]), bool)
        special[list(self.contents)] = True
        found = np.flatnonzero(special[array])
        unknown = self.tokenizer.unk_token_id
        if len(found) != len(places) and unknown is not None:  # unknown words have its id, too
            found = found[array[found] != unknown]
            name = self.contents.get(unknown)
            places = [place for place in places if name is None or not text.startswith(name, place)]
        if len(found) != len(places):
            raise ValueError(
                f"the tokenizer gives {len(found)} special tokens for a text that names "
                f"{len(places)}; it must give each of them as one token"
            )
        return np.stack([np.array(places, np.int64), found], axis=1).reshape(-1, 2)

    def _tokenize_marked(self, text: str) -> Tokens:
        marks = text.count(self._open) + text.count(self._close)
        if len(self._marked.findall(text)) * 2 != marks:
            raise ValueError(
                "an observation holds control tokens, and the chat template takes them apart, so "
                "that they cannot be kept from becoming real ones; take them out of the text"
            )
        if not self._pieces_stand_alone:
            raise ValueError(
                "an observation holds control tokens, which this tokenizer cannot encode as text: "
                "its tokens depend on what stands before a piece; take them out of the text"
            )
        ids: list[int] = []
        anchors, done, strip = [], 0, False
        by_content = {token.content: (id, token) for id, token in self.added.items()}
        for found in self._either.finditer(text):
            if found.group(1) is None:
                continue
            id, token = by_content[found.group(1)]
            piece = text[done : found.start()].lstrip() if strip else text[done : found.start()]
            ids += self._as_text(piece.rstrip() if token.lstrip else piece)
            anchors.append((found.start(), len(ids)))
            ids.append(id)
            done, strip = found.end(), token.rstrip
        ids += self._as_text(text[done:].lstrip() if strip else text[done:])
        return Tokens(text, ids, np.array(anchors, np.int64).reshape(-1, 2))

    def ids(self, text: str) -> list[int]:
        """The tokens alone."""
        return self._ids(text) if not self._has_marks(text) else self._tokenize_marked(text).ids

    def _as_text(self, piece: str) -> list[int]:
        return self._ids(self.plain(piece), split_special_tokens=True) if piece else []

    def _ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    @cached_property
    def _pieces_stand_alone(self) -> bool:
        """Whether a piece between two control tokens has the same tokens without them."""
        name = next(iter(self.contents.values()))
        for piece in ("a b", "\na", " a"):
            if self._ids(name + piece + name)[1:-1] != self._ids(piece, split_special_tokens=True):
                return False
        return True

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, control tokens and all spaces included."""
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @cached_property
    def lossless(self) -> bool:
        """Whether decoding gives every space back, as byte-level tokenizers do."""
        probe = f"{next(iter(self.contents.values()), '')}a b"
        return self.decode(self._ids(probe)) == probe
