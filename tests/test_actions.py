"""Action formats: which action a text holds, or why it holds none."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepagent.data.actions import FORMATS, PLAIN, ActionFormat, NoAction, Parsed, action_format
from stepagent.data.actions import call_text as call
from stepagent.envs import parse_action


@pytest.mark.parametrize(
    "text",
    [
        "forward",
        "  forward\n",
        "Thought: The ball is ahead.\nAction: forward",
        "Thought: The ball is ahead.\n\nAction:\nforward\n",
        "**Thought:** The ball.\n**Action:** forward",
        "action: forward",
        "```\nforward\n```",
        "```text\nforward\n```",
        "I walk to it:\n```\nforward\n```",
        "Thought: x\nAction:\n```\nforward\n```",
        "Thought: x\n```\nAction: forward\n```",
        '{"action": "forward"}',
        '{"thought": "The ball is ahead.", "action": "forward"}',
        '```json\n{"action": "forward"}\n```',
        '"forward"',
        "'forward'",
        "`forward`",
        "“forward”",
        "**forward**",
        "forward.",
        '"forward."',
        "Action: `forward`.",
        "<think>\nThe ball is ahead.\n</think>\n\nforward",
        "The ball is ahead.\n</think>\nforward",  # the prompt has opened it
        "<think>Action: left</think>Action: forward",
        "forward\nObservation: done",
        "Thought: x\nAction: forward\nObservation: done\nThought: y\nAction: left",
        "Thought: x\nAction: forward\nAction: left",
        "Thought: x\nAction: forward\nThought: y",
    ],
)
def test_plain_finds_the_action_in_other_words(text: str) -> None:
    assert PLAIN.parse(text).action == "forward"


@pytest.mark.parametrize(
    "action",
    [
        "search[red shoes, size 8]",
        "click[Buy Now]",
        "put 'a' in 'b'",
        '"a" is in "b"',
        "wait...",
        "Reaction: none",
        ".",
        "'",
        "",
        "{not json",
        "{}",
        "look at the Action: sign",
    ],
)
def test_plain_leaves_what_is_in_nothing_wrapped(action: str) -> None:
    assert PLAIN.parse(action) == Parsed(action)


def test_thinking_that_never_ends_holds_no_action() -> None:
    assert PLAIN.parse("<think>Action: forward").action == ""
    assert FORMATS["react"].parse("<think>Action: forward").problem == "no action"


@pytest.mark.parametrize(
    ("name", "text", "parsed"),
    [
        ("react", "Thought: a b\nAction: left", Parsed("left", "a b")),
        ("react", "left", Parsed(None, None, "no action")),
        ("react", "Thought: a\nAction:", Parsed(None, "a", "no action")),
        ("react", "Thought: a\nAction: left\nObservation: x\nAction: right", Parsed("left", "a")),
        ("json", '{"thought": "t", "action": "left"}', Parsed("left", "t")),
        ("json", 'Sure: {"action": "left"} done', Parsed("left")),
        ("json", "left", Parsed(None, None, "no JSON object")),
        ("json", '{"act": "left"}', Parsed(None, None, "no action in JSON")),
        ("json", '{"action": 3}', Parsed(None, None, "no action in JSON")),
        ("json", '{"action": ""}', Parsed(None, None, "no action in JSON")),
        ("json", '["action"]', Parsed(None, None, "no JSON object")),
        ("tool_call", call("act", {"action": "left"}), Parsed("left")),
        ("tool_call", call("forward", {}), Parsed("forward")),
        ("tool_call", call("go", {"to": "north"}), Parsed("go north")),
        ("tool_call", '{"name": "go", "parameters": {"to": "north"}}', Parsed("go north")),
        (
            "tool_call",
            '{"function": {"name": "act", "arguments": "{\\"action\\": \\"left\\"}"}}',
            Parsed("left"),
        ),
        ("tool_call", "left", Parsed(None, None, "no tool call")),
        ("tool_call", call("go", "north"), Parsed(None, None, "broken tool call")),
        ("tool_call", call("go", [1]), Parsed(None, None, "broken tool call")),
        ("plain", call("forward", {}), Parsed(None, None, "tool call")),
        ("plain", "<think>a\nb</think>left", Parsed("left", "a\nb")),
    ],
)
def test_a_text_is_thought_and_action_or_a_problem(name: str, text: str, parsed: Parsed) -> None:
    assert FORMATS[name].parse(text) == parsed


@given(st.sampled_from(sorted(FORMATS)), st.text())
def test_no_text_breaks_a_format(name: str, text: str) -> None:
    parsed = FORMATS[name].parse(text)
    assert (parsed.action is None) == (parsed.problem is not None)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("action", ["left", "open box", "click[Buy Now]"])
def test_what_a_format_writes_it_reads(name: str, action: str) -> None:
    assert FORMATS[name].parse(FORMATS[name].written(action)) == Parsed(action)


def first_word(text: str) -> str:
    if not text:
        raise NoAction("nothing said")
    return text.split()[0]


def test_a_function_is_a_format() -> None:
    form = action_format(first_word)
    assert form.name == "test_actions:first_word"
    assert form.parse("left or right") == Parsed("left")
    assert form.parse("").problem == "nothing said"
    message = "must read what it writes, but of 'go north' it reads 'go'"
    with pytest.raises(ValueError, match=message):
        form.written("go north")
    assert action_format(str).parse(" Exactly. ") == Parsed(" Exactly. ")
    with pytest.raises(TypeError, match="must give a str, got 3"):
        action_format(lambda text: 3).parse("x")


def test_what_is_no_format_is_refused() -> None:
    assert action_format("react") is action_format(FORMATS["react"])
    message = "action_format must be one of plain, react, json, tool_call, got 'xml'"
    with pytest.raises(ValueError, match=re.escape(message)):
        action_format("xml")
    with pytest.raises(TypeError, match="must be a name, a function or an ActionFormat, got 3"):
        action_format(3)


def test_parse_action_takes_the_first_action_up_to_an_observation() -> None:
    assert parse_action("left\nObservation: done") == "left"
    assert parse_action("Action: left\nObservation: done\nAction: right") == "left"
    assert parse_action("Thought: quote 'Action: x'\nAction: search[a\nb]") == "search[a\nb]"
    assert isinstance(PLAIN, ActionFormat)
