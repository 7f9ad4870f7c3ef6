"""What an agent's text does: the action formats, in which a model writes thought and action.

A format reads a text as thought and action, or says in a word why it cannot. The agent then
gets the format's ``refusal`` in place of an observation, as AgentBench and ETO do, and the step
counts as invalid. The text itself is never changed: it is what the model wrote, and is learnt from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

_THINK = re.compile(r"\A\s*(?:<think>)?(?P<thought>(?:(?!<think>).)*?)</think>", re.DOTALL)
# At the start of a line; a thought may quote the words.
_ACTION = re.compile(r"^[ \t>*#]*Action[ \t]*:(?:\*\*)?[ \t]*", re.MULTILINE | re.IGNORECASE)
_NEXT = re.compile(r"^[ \t>*#]*(?:Action|Thought|Observation)[ \t]*:", re.MULTILINE | re.IGNORECASE)
_OBSERVATION = re.compile(r"^[ \t>*#]*Observation[ \t]*:", re.MULTILINE | re.IGNORECASE)
_THOUGHT = re.compile(r"\A[ \t>*#]*Thought[ \t]*:(?:\*\*)?[ \t]*", re.IGNORECASE)
_FENCE = re.compile(r"```[^\S\n]*[\w+-]*[^\S\n]*\n(.*?)\n?[^\S\n]*```", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_QUOTES = ("**", '"', "'", "`", "“”", "‘’", "«»")


FormatName: TypeAlias = Literal["plain", "react", "json", "tool_call"]


@dataclass(frozen=True)
class Parsed:
    """A text as thought and action.

    Attributes:
        action: what goes to the environment; None where the text holds none.
        thought: what the text says beside it; None where it says nothing.
        problem: where there is no action, why: a short text of a few kinds.
    """

    action: str | None
    thought: str | None = None
    problem: str | None = None


class NoAction(ValueError):
    """A text holds no action in its format; the message is a short text of a few kinds."""


@dataclass(frozen=True)
class ActionFormat:
    """How an agent writes an action.

    Attributes:
        name: as in records and settings.
        read: the action of a text; raises `NoAction` (or ValueError) where it holds none.
        write: the text of an action alone, as the expert's; without a thought.
        refusal: what the agent reads after a text without an action.
        instructions: asks a model to write so; may be empty.
        place: where an action stands that is no piece of its text, as a call's name and arguments.
    """

    name: str
    read: Callable[[str], str] = field(compare=False)
    write: Callable[[str], str] = field(compare=False, default=str)
    refusal: str = field(compare=False, default="Invalid format. The answer holds no action.")
    instructions: str = field(compare=False, default="")
    place: Callable[[str], tuple[int, int] | None] | None = field(compare=False, default=None)

    def parse(self, text: str) -> Parsed:
        """Thought and action of a text.

        Args:
            text: all that the model wrote in one turn.

        Returns:
            With an action, or with the problem.

        Raises:
            TypeError: a user's function answered something that is no text.
        """
        thought = _thought(text)
        try:
            action = self.read(text)
        except ValueError as error:
            return Parsed(None, thought, str(error) or "no action")
        if not isinstance(action, str):
            raise TypeError(f"action format {self.name!r} must give a str, got {action!r}")
        return Parsed(action, thought)

    def located(self, text: str) -> tuple[int, int] | None:
        """Where in a text its action stands: the rest is thought, and what marks the two.

        A thought may hold the action's words as well. The action is where another word, put in
        its place, is what the format reads.

        Args:
            text: all that the model wrote in one turn.

        Returns:
            (start, stop) in characters; None for a text without an action.

        Raises:
            ValueError: where the format reads an action that stands nowhere in the text.
        """
        action = self.parse(text).action
        if action is None:
            return None
        probe = "probe"
        while probe in text:
            probe += "e"
        for start, stop in _mentions(action, text):
            if self.parse(text[:start] + probe + text[stop:]).action == probe:
                return start, stop
        found = self.place(text) if self.place else None
        if found is None:
            raise ValueError(
                f"action format {self.name!r} must read an action that stands in the text, got "
                f"{action!r} of {text!r}: take scored_part='all', or a format whose action is a "
                "piece of what the model writes"
            )
        return found

    def written(self, action: str) -> str:
        """The text of an action alone; ValueError where it would be read as another."""
        text = self.write(action)
        if (back := self.parse(text)).action != action:
            raise ValueError(
                f"action format {self.name!r} must read what it writes, but of {action!r} "
                f"it reads {back.action!r}"
            )
        return text


def action_format(given: Any) -> ActionFormat:
    """The format of this name, of a user's function, or the format itself.

    Args:
        given: ``"plain"``, ``"react"``, ``"json"``, ``"tool_call"``, a function from a text to its
            action that raises ValueError where there is none, or an `ActionFormat`.

    Raises:
        ValueError: for another name.
        TypeError: for anything else.
    """
    if isinstance(given, ActionFormat):
        return given
    if callable(given):
        module, name = getattr(given, "__module__", ""), getattr(given, "__qualname__", "")
        return ActionFormat(f"{module}:{name}" if name else type(given).__qualname__, given)
    if not isinstance(given, str):
        raise TypeError(f"action_format must be a name, a function or an ActionFormat, got {given}")
    if given not in FORMATS:
        raise ValueError(f"action_format must be one of {', '.join(FORMATS)}, got {given!r}")
    return FORMATS[given]


def parse_action(text: str) -> str:
    """What ``text`` does: of ``"Thought: …\\nAction: …"`` the first action, up to ``Observation:``.

    A text without a line that begins with ``Action:`` is an action itself. White space at the ends
    is dropped. An empty action comes back as ``""``, for the environment to refuse.
    """
    text = _spoken(text)
    start = _ACTION.search(text)
    if start is None:
        stop = _OBSERVATION.search(text)
        return text[: stop.start() if stop else None].strip()
    text = text[start.end() :]
    stop = _NEXT.search(text)
    return text[: stop.start() if stop else None].strip()


def call_text(name: str, arguments: Any) -> str:
    """A tool call as text, as Hermes and Qwen models write it."""
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


# ------------------------------------------------------------------ the formats


def _plain(text: str) -> str:
    """The action in whatever it is wrapped in; of a text that is none, the text."""
    if _CALL.search(_spoken(text)):
        raise NoAction("tool call")
    action = parse_action(text)
    while (inner := _unwrapped(action)) != action:
        action = inner
    return action


def _react(text: str) -> str:
    if not _ACTION.search(_spoken(text)):
        raise NoAction("no action")
    action = _plain(text)
    if not action:
        raise NoAction("no action")
    return action


def _json(text: str) -> str:
    found = _first_object(_spoken(text))
    if found is None:
        raise NoAction("no JSON object")
    action = found.get("action")
    if not isinstance(action, str) or not action.strip():
        raise NoAction("no action in JSON")
    return action.strip()


def _tool_call(text: str) -> str:
    text = _spoken(text)
    marked = _CALL.search(text)
    call = _first_object(marked[1] if marked else text)
    # OpenAI's wrap it once more.
    call = call["function"] if call and isinstance(call.get("function"), dict) else call
    if call is None or not isinstance(call.get("name"), str):
        raise NoAction("no tool call")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = _loaded(arguments) if arguments.strip() else None
        if arguments is None and str(call.get("arguments", "")).strip():
            raise NoAction("broken tool call")
    if arguments is not None and not isinstance(arguments, dict):
        raise NoAction("broken tool call")
    return _called(call["name"], arguments or {})


def _call_place(text: str) -> tuple[int, int] | None:
    """Where the call's JSON object stands."""
    spoken = _spoken(text)
    before = len(text.rstrip()) - len(spoken)  # the thinking
    marked = _CALL.search(spoken)
    found = _found_object(marked[1] if marked else spoken)
    if found is None:
        return None
    before += marked.start(1) if marked else 0
    return before + found[1], before + found[2]


def _called(name: str, arguments: dict[str, Any]) -> str:
    """The argument ``action`` where there is one; otherwise the name and what it is given."""
    if isinstance(arguments.get("action"), str):
        return str(arguments["action"]).strip()
    return " ".join([name, *map(str, arguments.values())]).strip()


FORMATS: dict[str, ActionFormat] = {
    "plain": ActionFormat("plain", _plain, instructions="Answer with one action and nothing else."),
    "react": ActionFormat(
        "react",
        _react,
        write=lambda action: f"Action: {action}",
        refusal="Invalid format. The answer must contain 'Action: '.",
        instructions="Answer with your thought and one action, as\nThought: …\nAction: …",
    ),
    "json": ActionFormat(
        "json",
        _json,
        write=lambda action: json.dumps({"action": action}, ensure_ascii=False),
        refusal='Invalid format. The answer must contain a JSON object {"action": "…"}.',
        instructions='Answer with one JSON object: {"thought": "…", "action": "…"}',
    ),
    "tool_call": ActionFormat(
        "tool_call",
        _tool_call,
        write=lambda action: call_text("act", {"action": action}),
        refusal="Invalid format. The answer must contain a tool call.",
        instructions="Answer with one tool call, as\n" + call_text("act", {"action": "…"}),
        place=_call_place,
    ),
}

PLAIN = FORMATS["plain"]

# ------------------------------------------------------------------ parts of a text


def _spoken(text: str) -> str:
    """Without the thinking that stands before it; of thinking that never ends, nothing is left."""
    rest = _THINK.sub("", text, count=1).strip()
    return "" if rest.startswith("<think>") else rest


def _thought(text: str) -> str | None:
    thinking = _THINK.match(text)
    spoken = _spoken(text)
    action = _ACTION.search(spoken)
    said = _THOUGHT.sub("", spoken[: action.start()]) if action else ""
    parts = [thinking["thought"].strip() if thinking else "", said.strip()]
    if not action and (found := _first_object(spoken)) and isinstance(found.get("thought"), str):
        parts.append(found["thought"].strip())
    return "\n".join(part for part in parts if part) or None


def _unwrapped(action: str) -> str:
    """Without one of: a code fence, JSON around it, quotes, a period at the end."""
    fences = _FENCE.findall(action)
    if len(fences) == 1 and fences[0].strip():  # with or without words around it
        return parse_action(fences[0])
    if action.endswith("\n```"):  # one that was opened before "Action:"
        return action.removesuffix("```").strip()
    if action[:1] in ('"', "{"):
        loaded = _loaded(action)
        inner = loaded.get("action") if isinstance(loaded, dict) else loaded
        if isinstance(inner, str):
            return inner.strip()
    for quotes in _QUOTES:
        left, right = (quotes[0], quotes[1]) if quotes[0] != quotes[-1] else (quotes, quotes)
        inner = action[len(left) : -len(right)]
        if inner and action.startswith(left) and action.endswith(right) and left not in inner:
            return inner.strip()
    if action.endswith(".") and not action.endswith("..") and action[:-1].strip():
        return action[:-1].strip()
    return action


def _mentions(action: str, text: str) -> Iterator[tuple[int, int]]:
    """Where a text has these words: to the letter, or as a JSON string with its escapes."""
    start = text.find(action) if action else -1
    while start >= 0:
        yield start, start + len(action)
        start = text.find(action, start + 1)
    decoder = json.JSONDecoder(strict=False)
    for quote in re.finditer('"', text):
        try:
            inner, stop = decoder.raw_decode(text, quote.start())
        except ValueError:
            continue
        if inner.strip() == action:
            yield quote.end(), stop - 1


def _first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text."""
    found = _found_object(text)
    return found[0] if found else None


def _found_object(text: str) -> tuple[dict[str, Any], int, int] | None:
    """The first JSON object in a text, and where it stands."""
    decoder = json.JSONDecoder(strict=False)
    place = text.find("{")
    while place >= 0:
        try:
            found, stop = decoder.raw_decode(text, place)
        except ValueError:
            found, stop = None, place
        if isinstance(found, dict):
            return found, place, stop
        place = text.find("{", place + 1)
    return None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None
