"""Chat templates as text: a conversation, and every beginning of it, as the template writes it.

What the template writes of ``messages[:k]`` is needed for every step. A template is a program that
may do anything, so in general each is written on its own. For most templates one run tells all of
them, exactly: they loop over the messages, look at none before its turn, and write the same after
the loop whatever came before (`_ends_alike`). Such a run is watched: up to where it first asks for
message k it has written what it writes of ``messages[:k]``, because it has seen nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .arguments import CLOCK, run_arguments

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]

# What tells a loop's body that more messages come, or how many.
_AHEAD = frozenset(("last", "length", "revindex", "revindex0", "nextitem"))


@functools.cache
def start_of_run() -> str:
    """The moment that this process takes for now wherever a template asks for it, in ISO format."""
    return datetime.now().isoformat(timespec="seconds")


class ChatTemplate:
    """A tokenizer's chat template with what is given to it beside the messages.

    Its clock stands still: at ``arguments["strftime_now"]``, or where this process began.

    Args:
        tokenizer: Has the template, and perhaps a run's arguments for it.
        tools: As ``apply_chat_template`` takes them, or None.
        arguments: ``chat_template_kwargs``, each one that the template knows; they go before the
            run's.

    Raises:
        ValueError: For a tokenizer without a template and for an argument of no effect.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: list[dict[str, Any]] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{type(tokenizer).__name__} must have a chat template, got none: set chat_template"
            )
        self.tokenizer, self.tools = tokenizer, tools
        self.arguments = {**run_arguments(tokenizer), **(arguments or {})}
        self.source = str(tokenizer.get_chat_template(None, tools))
        self._compiled = _compiled(self.source)
        self._context = {
            **tokenizer.special_tokens_map,
            **self._checked_arguments(),
            "tools": tools,
            "documents": None,
            CLOCK: self._clock,
        }

    def _checked_arguments(self) -> dict[str, Any]:
        known = _variables(self.source)
        for name in self.arguments:
            if name not in known:
                raise ValueError(
                    f"chat_template_kwargs must be among those that the chat template knows, "
                    f"{', '.join(sorted(known - _OWN))}, got {name!r}"
                )
        return self.arguments

    def _clock(self, format: str) -> str:
        return datetime.fromisoformat(self.arguments.get(CLOCK, start_of_run())).strftime(format)

    @property
    def fixed_arguments(self) -> dict[str, Any]:
        """The arguments, and the moment where the template asks for it: with these it writes the
        same on another day."""
        if CLOCK not in _variables(self.source):
            return self.arguments
        return {CLOCK: start_of_run(), **self.arguments}

    def render(self, messages: Messages, generation: bool = False) -> str:
        """What ``apply_chat_template`` gives as text.

        Raises:
            ValueError: Where the template raises anything.
        """
        return "".join(self._write(_aliased(messages), generation))

    def _write(self, messages: Any, generation: bool) -> Iterator[str]:
        try:
            yield from self._compiled.generate(
                messages=messages, add_generation_prompt=generation, **self._context
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template fails: {error}") from error

    def beginnings(self, messages: Messages) -> Beginnings:
        """What the template writes of ``messages[:k]``, for every k."""
        return Beginnings(self, messages)

    def watch(self, messages: Messages) -> tuple[str, list[int | None]] | None:
        """What it writes of the messages without a prompt for generation, and how much of it was
        there when its loop asked for message k, for k = 0 … M, the latter for the end; None for
        one that it looked at before. None where that tells nothing of fewer messages."""
        if not _ends_alike(self.source):
            return None
        watch = _Watch(_aliased(messages))
        parts = []
        try:
            for part in self._write(_View(watch, 0), generation=False):
                parts.append(part)
                watch.written += len(part)
        except ValueError:  # it does with them what a list alone can
            return None
        return ("".join(parts), watch.asked_in_turn) if watch.in_turn else None


class Beginnings:
    """All beginnings of a conversation as a template writes them.

    A beginning is a text and how much of it counts: most are so much of the whole conversation,
    which is then not copied.
    """

    def __init__(self, template: ChatTemplate, messages: Messages) -> None:
        self._template, self.messages = template, messages
        watched = template.watch(messages)
        if watched is None:
            self.whole = template.render(messages)
            self._asked: list[int | None] = [None] * (len(messages) + 1)
            return
        self.whole, self._asked = watched
        end = self._asked[-1]
        self._after = {
            False: self.whole[end:],
            True: template.render(messages, generation=True)[end:],
        }

    def of(self, count: int, generation: bool) -> tuple[str, int]:
        """What is written of ``messages[:count]``: the text's first so many characters."""
        start = self._asked[count]
        if start is None:
            text = self._template.render(self.messages[:count], generation)
            return text, len(text)
        after = self._after[generation]
        if self.whole.startswith(after, start):
            return self.whole, start + len(after)
        text = self.whole[:start] + after
        return text, len(text)


class _Watch:
    """Notes how much was written when each message was first asked for, and by which loop."""

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self.written = 0
        self.newest: object = None  # of the loops
        self._asked: list[tuple[int, object]] = []

    def ask(self, index: int, loop: object = None) -> None:
        """Message ``index`` is asked for, or whether it is there."""
        while len(self._asked) <= min(index, len(self.messages)):
            self._asked.append((self.written, loop))

    def ask_all(self) -> None:
        """What depends on how many there are is asked for."""
        self.ask(len(self.messages))

    @property
    def in_turn(self) -> bool:
        """Whether the last loop went through all messages, and was the first to see the end."""
        done = len(self._asked) > len(self.messages)
        return done and self.newest is not None and self._asked[-1][1] is self.newest

    @property
    def asked_in_turn(self) -> list[int | None]:
        """How much was written when the last loop asked for each; None where another did."""
        return [written if loop is self.newest else None for written, loop in self._asked]


class _View:
    """The messages from ``first`` on, watched; whatever it lacks makes the template fail."""

    def __init__(self, watch: _Watch, first: int) -> None:
        self._watch, self._first = watch, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loop, messages = object(), self._watch.messages
        self._watch.newest = loop
        for index in range(self._first, len(messages)):
            self._watch.ask(index, loop)
            yield messages[index]
        self._watch.ask(len(messages), loop)

    def __getitem__(self, key: Any) -> Any:
        messages = self._watch.messages[self._first :]
        if isinstance(key, slice):
            if (key.stop, key.step) == (None, None) and (key.start or 0) >= 0:
                return _View(self._watch, self._first + (key.start or 0))
            self._watch.ask_all()
        elif key >= 0:
            self._watch.ask(self._first + key)
        else:
            self._watch.ask_all()
        return messages[key]

    def __bool__(self) -> bool:
        self._watch.ask(self._first)
        return len(self._watch.messages) > self._first

    def __len__(self) -> int:
        self._watch.ask_all()
        return max(0, len(self._watch.messages) - self._first)


_OWN = frozenset(("messages", "tools", "documents", "add_generation_prompt", "raise_exception"))


def _compiled(source: str) -> jinja2.Template:
    # transformers' own, so that all that templates may use is there; it keeps them
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template: jinja2.Template = _compile_jinja_template(source)
    return template


@functools.lru_cache(maxsize=64)
def _variables(source: str) -> frozenset[str]:
    """The names that a template is given, and the clock's, which has a value without that."""
    from jinja2 import meta, nodes

    tree = _compiled(source).environment.parse(source)
    clock = {name.name for name in tree.find_all(nodes.Name) if name.name == CLOCK}
    return frozenset(meta.find_undeclared_variables(tree) | clock)


@functools.lru_cache(maxsize=64)
def _ends_alike(source: str) -> bool:
    """Whether a template ends in a loop over the messages that does not look ahead, and in what
    depends on nothing that was set before."""
    from jinja2 import nodes

    tree = _compiled(source).environment.parse(source)
    loops = [place for place, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not loops:
        return False
    before, loop, after = tree.body[: loops[-1]], tree.body[loops[-1]], tree.body[loops[-1] + 1 :]
    assert isinstance(loop, nodes.For)
    used = {name.name for node in after for name in _all(node, nodes.Name)}
    written = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    written |= {macro.name for macro in tree.find_all(nodes.Macro)}
    written |= {attribute.name for attribute in tree.find_all(nodes.NSRef)}
    early = {name.name for node in (*before, loop) for name in _all(node, nodes.Name)}
    return (
        _is_messages(loop.iter, tree)
        and not loop.recursive
        and not loop.else_
        and "add_generation_prompt" not in early
        and not used & (written | {"messages", "loop", "self", "caller"})
        and not any(_looks_ahead(node) for node in loop.body)
        and (loop.test is None or not _looks_ahead(loop.test))
    )


def _all(node: Any, kind: Any) -> Iterator[Any]:
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


def _is_messages(node: Any, tree: Any, seen: frozenset[str] = frozenset()) -> bool:
    """Whether it is ``messages``, those from one on, or a name that is never set to another."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_messages(node.node, tree, seen)
    if not isinstance(node, nodes.Name):
        return False
    if node.name in seen:
        return True
    if any(node.name == name.name for block in _blocks(tree) for name in _all(block, nodes.Name)):
        return False
    values = [
        assign.node
        for assign in tree.find_all(nodes.Assign)
        if any(name.name == node.name for name in _all(assign.target, nodes.Name))
    ]
    known = node.name == "messages" or bool(values)
    return known and all(_is_messages(value, tree, seen | {node.name}) for value in values)


def _blocks(tree: Any) -> Iterator[jinja2.nodes.Node]:
    """What else names are set by: blocks of text, loops and macros."""
    from jinja2 import nodes

    yield from (block.target for block in tree.find_all(nodes.AssignBlock))
    yield from (loop.target for loop in tree.find_all(nodes.For))
    yield from (name for macro in tree.find_all(nodes.Macro) for name in macro.args)


def _looks_ahead(node: Any) -> bool:
    """Whether the body of a loop asks what comes after the present item."""
    from jinja2 import nodes

    if isinstance(node, nodes.For):  # a loop of its own
        return _looks_ahead(node.iter)
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return bool(node.node.name == "loop" and node.attr in _AHEAD)
    if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name):
        return bool(node.node.name == "loop") or _looks_ahead(node.arg)
    if isinstance(node, nodes.Name):
        return bool(node.name == "loop")
    return any(_looks_ahead(child) for child in node.iter_child_nodes())


def _aliased(messages: Messages) -> list[dict[str, Any]]:
    """Thoughts under both names that templates know, as transformers gives them."""
    return [
        {"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m
        for m in messages
    ]
