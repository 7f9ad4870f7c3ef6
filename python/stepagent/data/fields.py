"""What a message says must be in the text: a field that a template passes over is refused.

Where a text shows all that its message says, that is plain. Where it does not, or a field comes for
the first time, the message is written once more without the field: if that changes nothing, the
template drops it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .chat import Beginnings, ChatTemplate
from .control import ControlTokens

if TYPE_CHECKING:
    Message = dict[str, Any]


class Step(Protocol):
    """A scored message and what the template writes of it."""

    @property
    def index(self) -> int: ...
    @property
    def action(self) -> str: ...


def check_fields(
    template: ChatTemplate,
    control: ControlTokens,
    conversation: Beginnings,
    steps: Sequence[Step],
) -> None:
    """Require that all that is said shows in the text.

    Args:
        conversation: As the template writes it.
        steps: The scored ones.

    Raises:
        ValueError: Naming the message and what is lost, or which control token it must not hold.
    """
    _Fields(template, control, conversation).check(steps)


class _Fields:
    def __init__(
        self, template: ChatTemplate, control: ControlTokens, conversation: Beginnings
    ) -> None:
        self._template, self._control = template, control
        self._messages, self._whole = conversation.messages, conversation.whole
        self._seen: set[str] = set()  # kinds of fields that this template is known to write

    def check(self, steps: Sequence[Step]) -> None:
        last = steps[-1].index
        self._check_tools(steps[0].index)
        self._check_turns(steps[0].index, last)
        for step in steps:
            self._check_action(step)
        self._check_observations()

    def _check_tools(self, first: int) -> None:
        template = self._template
        if template.tools is None:
            return
        without = ChatTemplate(template.tokenizer, None, template.arguments)
        state = self._messages[:first]
        if template.render(state, True) == without.render(state, True):
            raise ValueError(
                "tools are given, but the chat template does not write them; use a template for "
                "tools, or put them into the system message"
            )

    def _check_turns(self, first: int, last: int) -> None:
        """No assistant's text may hold what the template opens a turn with."""
        spoken = [m for m in self._messages[: last + 1] if m["role"] == "assistant"]
        if not any(self._control.find(text) for m in spoken for text in _texts(m)):
            return
        state = self._messages[:first]
        whole = self._template.render(state, generation=True)
        bare = self._template.render(state) if state else ""
        opening = set(self._control.find(whole[len(bare) :] if whole.startswith(bare) else whole))
        for index, message in enumerate(self._messages[: last + 1]):
            if message["role"] != "assistant":
                continue
            for token in (t for text in _texts(message) for t in self._control.find(text)):
                if token in opening:
                    raise ValueError(
                        f"messages[{index}] must not hold a special token that opens a turn, as it "
                        f"would be read as the template's, got {token!r}"
                    )

    def _check_action(self, step: Step) -> None:
        message = self._messages[step.index]
        text = _squeeze(self._control.plain(step.action))
        for token in self._control.contents.values():
            text = text.replace(token, "\0")
        parts = list(_parts(message))
        said = [_squeeze(word) for _, words, _ in parts for word in words]
        for name, words, without in parts:
            kind = name.partition("[")[0]
            shown = all(
                text.count(word) >= sum(other.count(word) for other in said)
                for word in map(_squeeze, words)
                if word
            )
            new = kind != "content" and kind not in self._seen
            if (not shown or new) and self._changes_nothing(step.index, without):
                raise ValueError(
                    f"messages[{step.index}] has {name}, which changes nothing in what the chat "
                    "template writes, so it would not be trained; use a template that writes it, "
                    "or take it out"
                )
            if not shown and kind in ("content", "reasoning_content"):
                self._check_kept(step, name, words[0], text)
            self._seen.add(kind)

    def _changes_nothing(self, index: int, without: Message) -> bool:
        state = self._messages[:index]
        try:
            return self._template.render([*state, without]) == self._template.render(
                [*state, self._messages[index]]
            )
        except ValueError:  # it cannot be left out
            return False

    def _check_kept(self, step: Step, name: str, said: str, text: str) -> None:
        """A text may be moved or stripped, but not changed."""
        said = _squeeze(said)
        for token in self._control.contents.values():
            said = said.replace(token, "\0")
        escaped = _squeeze(json.dumps(said, ensure_ascii=False)[1:-1])
        if said not in text and escaped not in text:
            raise ValueError(
                f"the chat template must keep the {name} of messages[{step.index}] (assistant) as "
                f"it is, or stripped, {self._messages[step.index][name]!r}, got {step.action!r}"
            )

    def _check_observations(self) -> None:
        """What is no assistant's shows in the text, or changes the state that it ends."""
        text = _squeeze(self._whole)
        for index, message in enumerate(self._messages):
            if message["role"] == "assistant":
                continue
            words = _squeeze(message["content"])
            if words in text or _squeeze(json.dumps(message["content"])[1:-1]) in text:
                continue
            if self._shows(index, message):
                continue
            raise ValueError(
                f"the chat template must write the content of messages[{index}] "
                f"({message['role']}) in its place, got a text without it"
            )

    def _shows(self, index: int, message: Message) -> bool:
        """Whether the message without its content is another text where it is the newest."""
        state, empty = self._messages[:index], {**message, "content": ""}
        try:
            with_it = self._template.render([*state, message], generation=True)
            return self._template.render([*state, empty], generation=True) != with_it
        except ValueError:
            return True


def _parts(message: Message) -> Iterator[tuple[str, list[str], Message]]:
    """What a message says: its name, its words, and the message without it."""
    if message["content"].strip():
        yield "content", [message["content"]], {**message, "content": ""}
    if "reasoning_content" in message:
        without = {key: value for key, value in message.items() if key != "reasoning_content"}
        yield "reasoning_content", [message["reasoning_content"]], without
    calls = message.get("tool_calls", [])
    for place, call in enumerate(calls):
        others = [*calls[:place], *calls[place + 1 :]]
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        if others:
            without["tool_calls"] = others
        function = call["function"]
        yield f"tool_calls[{place}]", [function["name"], *_strings(function["arguments"])], without


def _texts(message: Message) -> Iterator[str]:
    for _, words, _ in _parts(message):
        yield from words


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _squeeze(text: str) -> str:
    return "".join(text.split())
