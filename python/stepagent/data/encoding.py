"""Encoding: a trajectory as the tokens that the model will see, or the true reason why not.

The state of a scored message i is the prompt that the agent is given there, and what it has to
produce is what the chat template writes of its message after that:

    render(messages[:i], add_generation_prompt=True)   user: go? <eot> assistant:
    render(messages[:i + 1])                           user: go? <eot> assistant: left <eot>
    scored                                                                        └────────┘

So the second must begin with the first, in tokens too, or have its newest part where it rewrites
what was before; and it must end with a control token, after which white space alone may follow. It
needs no ``{% generation %}`` in the template. Where the next state does not continue what was
produced, the trunk branches (`stepagent.Trunk`).

docs/encoding.md has the contract, and which templates keep it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import check_agrees, run_arguments
from .chat import ChatTemplate
from .control import ControlTokens, Tokens
from .ends import ends_of
from .fields import check_fields
from .recorded import scored_spans
from .trajectory import Trajectory
from .trunk import Trunk as Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Trunk:
    """Tokenize a trajectory under the tokenizer's chat template.

    Token ids that a record holds in ``meta`` (``token_ids``, ``action_spans``) are taken as they
    were sampled. Otherwise each state is the prompt of its step, with the trajectory's tools and
    template arguments and those that the tokenizer carries for the run, and the scored tokens are
    what the template writes of the assistant's message after it (thoughts, content, calls) up to
    the token that ends the turn. Control tokens in what is no assistant's are encoded as ordinary
    text.

    Raises:
        TypeError: For another object than a `Trajectory`.
        ValueError: Naming the trajectory, the message and the rule, where the spans would not be
            exact: the template raises, leaves out or changes what it is given, writes a message
            otherwise than it prompts for it, or ends a turn without a control token; a token is
            part state and part action.
    """
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory must be a Trajectory, got a {type(trajectory).__name__}")
    try:
        check_agrees(trajectory, run_arguments(tokenizer))
        if "token_ids" in trajectory.meta:
            return _recorded(trajectory, tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} must be a fast tokenizer: AutoTokenizer gives one"
            )
        return _Conversation(trajectory, tokenizer).trunk()
    except ValueError as error:
        raise ValueError(f"trajectory {trajectory.id!r}: {error}") from error


def _recorded(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Trunk:
    """The trunk as it was sampled."""
    meta = trajectory.meta
    record = Trunk(meta["token_ids"], meta.get("action_spans", []), meta.get("rewinds", []))
    spans = scored_spans(trajectory, record, tokenizer)
    return Trunk(record.input_ids, spans, record.rewinds)


@dataclass(frozen=True)
class _Step:
    """A scored message: of ``text``, the state ends at ``start`` and the action at ``stop``."""

    index: int
    text: str
    start: int
    stop: int

    @property
    def action(self) -> str:
        return self.text[self.start : self.stop]


class _Conversation:
    """A trajectory as its template writes it, and its steps in there."""

    def __init__(self, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> None:
        self._trajectory, self._tokenizer = trajectory, tokenizer
        said = json.dumps([trajectory.messages, trajectory.tools], ensure_ascii=False)
        self._control = ControlTokens(tokenizer).apart_from(said)
        self._template = ChatTemplate(
            tokenizer,
            self._control.mark(trajectory.tools),
            trajectory.chat_template_kwargs,
        )
        self._messages = self._control.mark_messages(trajectory.messages)
        self._beginnings = self._template.beginnings(self._messages)

    def trunk(self) -> Trunk:
        steps = [self._step(index) for index in self._trajectory.step_indices]
        check_fields(self._template, self._control, self._beginnings, steps)
        trunk = _laid_out(self._lines(steps), self._control)
        for step, span in zip(steps, trunk.action_spans.tolist(), strict=True):
            self._check_tokens(step, trunk, *span)
        return trunk

    def _step(self, index: int) -> _Step:
        text, stop = self._beginnings.of(index + 1, generation=False)
        state, start = self._beginnings.of(index, generation=True)
        if not ((state is text and start <= stop) or text.startswith(state[:start])):
            produced = self._produced(index, text[:stop])
            if produced is None:
                raise self._not_prompted(index, state[:start], text[:stop])
            text, stop = state[:start] + produced, start + len(produced)
        stop = len(text[:stop].rstrip())
        if stop <= start:
            raise ValueError(f"the chat template writes nothing of messages[{index}] (assistant)")
        ending = self._ending(text, stop)
        if not ending or stop - len(ending) < start:
            raise ValueError(
                "the chat template must end an assistant's turn with a special token, so that the "
                f"agent learns to end it: messages[{index}] ends in "
                f"{self._control.plain(text[start:stop])[-40:]!r}"
            )
        if (
            self._ending(text, before := len(text[: stop - len(ending)].rstrip()))
            and before > start
        ):
            stop = self._closed_before(index, text, before, stop)
        return _Step(index, text, start, stop)

    def _produced(self, index: int, text: str) -> str | None:
        """What is written of a message whose coming rewrites what was before it, as gpt-oss's final
        answer takes away the thoughts of the calls before: all after the newest observation and the
        prompt. None where the text does not have these, one after the other."""
        if index < 2:
            return None
        try:
            before, history = (self._of(count, False) for count in (index - 1, index))
        except ValueError:  # of so few messages the template makes nothing
            return None
        prompt = self._of(index, True)
        if not (history.startswith(before) and prompt.startswith(history)):
            return None
        newest, opening = history[len(before) :], prompt[len(history) :]
        place = text.rfind(newest)
        told = self._control.find(newest) and self._control.find(opening)  # no other text has these
        kept = text.count(newest) == history.count(newest)
        after = text[place + len(newest) :]
        return after[len(opening) :] if told and kept and after.startswith(opening) else None

    def _of(self, count: int, generation: bool) -> str:
        text, stop = self._beginnings.of(count, generation)
        return text[:stop]

    def _closed_before(self, index: int, text: str, before: int, stop: int) -> int:
        """Of two control tokens at the end, the second may close the conversation, as Phi 3's: it
        is none of this message's, then, and not there where a prompt comes instead."""
        going_on, end = self._beginnings.of(index + 1, generation=True)
        closing = text[before:stop].strip()
        kept = going_on.startswith(text[:before])
        return before if kept and not going_on[before:end].lstrip().startswith(closing) else stop

    def _ending(self, text: str, stop: int) -> str:
        """The control token that a text ends with, or nothing."""
        names = [name for name in self._control.contents.values() if text.endswith(name, 0, stop)]
        return max(names, key=len, default="")

    def _not_prompted(self, index: int, state: str, text: str) -> ValueError:
        same = next(
            (i for i, (a, b) in enumerate(zip(state, text, strict=False)) if a != b),
            min(len(state), len(text)),
        )
        prompt, written = (self._control.plain(t[same : same + 40]) for t in (state, text))
        before = self._control.plain(state[max(0, same - 40) : same])
        return ValueError(
            f"the prompt for messages[{index}] continues with {prompt!r} after {before!r}, but the "
            f"chat template writes the message with {written!r} there, so the agent would be "
            "trained on a state that it never sees; template arguments (chat_template_kwargs) may "
            "change that, as may thoughts in reasoning_content"
        )

    def _lines(self, steps: list[_Step]) -> list[list[_Step]]:
        """Steps that go on from each other, together: each line is one text, that of its last."""
        lines = [[steps[0]]]
        for before, step in pairwise(steps):
            kept = before.text is step.text or step.text.startswith(before.text[: before.stop])
            if kept and before.stop <= step.start:
                lines[-1].append(step)
            else:
                lines.append([step])
        whole, last = self._beginnings.whole, steps[-1]
        if whole is not last.text and whole.startswith(last.text[: last.stop]):
            lines[-1].append(_Step(-1, whole, len(whole), len(whole)))  # what follows it
        return lines

    def _check_tokens(self, step: _Step, trunk: Trunk, start: int, stop: int) -> None:
        """Require that the tokens [start, stop) read as the action, and as nothing more."""
        name, ids = f"messages[{step.index}]", trunk.input_ids[start - 1 : stop].tolist()
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown in ids[1:-1]:
            raise ValueError(
                f"{name} must be made of tokens that the tokenizer knows, got "
                f"{self._unknown(step)!r}"
            )
        ends = self._ends(trunk)
        for token in ids[1:-1]:
            if token in ends:
                raise ValueError(
                    f"{name} must not hold a special token that ends a turn, as it would be read "
                    f"as the template's, got {self._control.contents[token]!r}"
                )
        # After the token before: Llama 2's decoder drops the space at the start of a text.
        decoded = self._control.decode(ids)[len(self._control.decode(ids[:1])) :]
        if not self._reads_as(decoded, step.action):
            raise ValueError(
                f"the tokens of {name} must decode to its rendered text, {step.action!a}, got "
                f"{decoded!a}"
            )

    def _ends(self, trunk: Trunk) -> set[int]:
        if not hasattr(self, "_known_ends"):
            self._known_ends = set(ends_of([trunk]))
        return self._known_ends

    def _reads_as(self, decoded: str, action: str) -> bool:
        if decoded == action:
            return True
        # Canonically equal texts, as 'é' in one and in two characters, are one text to Unicode.
        decoded, action = (unicodedata.normalize("NFC", text) for text in (decoded, action))
        if self._control.lossless:
            return decoded == action
        return "".join(decoded.split()) == "".join(action.split())

    def _unknown(self, step: _Step) -> str:
        words = self._tokenizer(step.action, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(words["input_ids"], words["offset_mapping"], strict=True)
        unknown = self._tokenizer.unk_token_id
        return next((step.action[a:b] for id, (a, b) in pairs if id == unknown), step.action)


# ------------------------------------------------------------------ from texts to tokens


def _laid_out(lines: list[list[_Step]], control: ControlTokens) -> Trunk:
    """The trunk of lines, each of which goes on from what it has in common with the one before."""
    ids: list[int] = []  # of the trunk
    spans: list[tuple[int, int]] = []
    rewinds: list[tuple[int, int]] = []
    before: Tokens | None = None
    path: list[int] = []  # the tokens of the line before, up to its last action
    for line in lines:
        tokens = _tokens(line[-1].text, before, control)
        found = _spans([step for step in line if step.index >= 0], tokens, control)
        depth = min(common_prefix(path, tokens.ids), found[0][0] - 1)
        if depth < len(path):
            rewinds.append((len(ids), depth))
        end = len(tokens.ids) if line is lines[-1] else found[-1][1]
        shift = len(ids) - depth
        ids += tokens.ids[depth:end]
        spans += [(start + shift, stop + shift) for start, stop in found]
        before, path = tokens, tokens.ids[:end]
    return Trunk(ids, spans, rewinds)


def _tokens(text: str, before: Tokens | None, control: ControlTokens) -> Tokens:
    """The tokens of a text; what it has in common with the one before is not tokenized again."""
    if before is None:
        return control.tokenize(text)
    place, token = before.last_anchor(common_prefix(before.text, text))
    rest = control.tokenize(text[place:])
    kept = before.anchors[before.anchors[:, 0] < place]
    anchors = np.concatenate([kept, rest.anchors + np.array([place, token])])
    return Tokens(text, before.ids[:token] + rest.ids, anchors)


def _spans(steps: Sequence[_Step], tokens: Tokens, control: ControlTokens) -> list[tuple[int, int]]:
    """The tokens of each action: after those of its state, up to and including its end."""
    tails: dict[str, list[int]] = {}
    spans = []
    for step in steps:
        place, token = tokens.last_anchor(step.start)
        tail = tokens.text[place : step.start]
        if tail not in tails:
            tails[tail] = control.ids(tail)
        start = token + len(tails[tail])
        if not start:
            raise ValueError(
                f"the prompt for messages[{step.index}] must not be empty: its action must start "
                "at token 1 or later, where a token before can predict it"
            )
        if tokens.ids[token:start] != tails[tail]:
            raise _seam(step, tails[tail], tokens.ids[token : start + 1], control)
        _, last = tokens.last_anchor(step.stop)
        spans.append((start, last + 1))
    return spans


def _seam(step: _Step, state: list[int], ids: list[int], control: ControlTokens) -> ValueError:
    same = common_prefix(state, ids)
    shared = len(control.decode(ids[:same]))
    before, token = control.decode(state)[shared:], control.decode(ids[: same + 1])[shared:]
    if not token.startswith(before):
        before = ""
    return ValueError(
        f"the token {token!r} crosses the start of the action of messages[{step.index}]: "
        f"{before!r} | {token[len(before) :]!r}; the template must separate contents so that no "
        "token holds both sides"
    )


def common_prefix(a: Any, b: Any) -> int:
    """How much two sequences have in common at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
