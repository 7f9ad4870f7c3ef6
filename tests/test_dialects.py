"""Files of other tools: each form of a row becomes the right trajectory, or the right error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stepagent import Trajectory, as_trajectory, load_trajectories
from stepagent.data.messages import LOSS_FLAGS

CALL = {"type": "function", "function": {"name": "search", "arguments": {"q": "key"}}}
GO = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "go left"}]
TURNS = [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "go left"}]
WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}


def assistant(**message: Any) -> dict[str, Any]:
    (found,) = as_trajectory({"messages": [{"role": "assistant", **message}]}).messages
    return found


def refused(row: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        as_trajectory(row)


# -- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_openai_tool_calls_need_no_content_and_their_arguments_become_a_dict(absent):
    written = {"id": "c1", "type": "function", "function": {"name": "search"}}
    written["function"]["arguments"] = '{"q": "key"}'
    expected = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}
    assert assistant(**absent, tool_calls=[written]) == expected
    assert written["function"]["arguments"] == '{"q": "key"}'  # the row stays as it was


@pytest.mark.parametrize("arguments", [{}, None, "", " ", "{}"])
def test_a_call_without_arguments_has_an_empty_dict(arguments):
    call = {"function": {"name": "look", "arguments": arguments}}
    (found,) = assistant(tool_calls=[call])["tool_calls"]
    assert found == {"type": "function", "function": {"name": "look", "arguments": {}}}


def test_calls_of_older_forms_are_the_same_calls():
    bare = {"name": "search", "arguments": {"q": "key"}}
    expected = {"role": "assistant", "content": "hm", "tool_calls": [CALL]}
    for form in (
        {"tool_calls": [bare]},
        {"tool_calls": json.dumps([bare])},
        {"function_call": {"name": "search", "arguments": '{"q": "key"}'}},
        {"tool_calls": [CALL], "function_call": None},
    ):
        assert assistant(content="hm", **form) == expected
    row = {"messages": [*GO, {"role": "function", "name": "search", "content": "3"}]}
    assert as_trajectory(row).messages[2] == {"role": "tool", "name": "search", "content": "3"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_have_one_name(name):
    assert assistant(content="go", **{name: "hm"}) == {
        "role": "assistant", "content": "go", "reasoning_content": "hm",
    }  # fmt: skip
    assert assistant(content="go", **{name: ""}) == {"role": "assistant", "content": "go"}
    assert assistant(content=None, **{name: "hm"})["content"] == ""


def test_lists_of_text_parts_are_joined_and_thoughts_before_them_are_thoughts():
    parts = [{"type": "text", "text": "go "}, {"type": "output_text", "text": "left"}, "!"]
    assert assistant(content=parts) == {"role": "assistant", "content": "go left!"}
    thought = {"type": "thinking", "thinking": "hm", "closed": True}
    assert assistant(content=[thought, *parts])["reasoning_content"] == "hm"


def test_null_and_empty_fields_are_absent():
    extra = {"tool_calls": [], "audio": None, "refusal": None, "prefix": False, "name": None}
    assert assistant(content="go", **extra) == {"role": "assistant", "content": "go"}
    assert assistant(content="go", name="Ann") == {
        "role": "assistant", "content": "go", "name": "Ann",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"content": None}, r"messages\[0\] must have a text as 'content' or tool_calls, got none"),
        ({"content": None, "tool_calls": []}, "must have a text as 'content'"),
        ({"content": 3}, "content must be a str, or a list of text parts, got a int"),
        ({"content": {"a": 1}}, "content must be a str, or a list of text parts, got a dict"),
        (
            {"content": [{"type": "image_url", "image_url": {}}]},
            r"content\[0\] must be text, .*, got type 'image_",
        ),
        ({"content": [{"type": "input_image"}]}, "type 'input_image'"),
        ({"content": [{"type": "tool_use"}]}, "type 'tool_use'"),
        ({"content": [{"type": "text"}]}, "must hold a str, got None"),
        ({"content": [3]}, r"content\[0\] must be a str or a dict"),
        ({"content": ["x", {"type": "thinking", "thinking": "y"}]}, "must stand before the text"),
        ({"content": "x", "images": ["a.png"]}, "must be without 'images': only text"),
        ({"content": "x", "prefix": True}, "must be without 'prefix': the beginning"),
        ({"content": "x", "partial": True}, "'partial'"),
        ({"content": "x", "refusal": "no"}, "'refusal'"),
        (
            {"content": "x", "reasoning": "a", "thinking": "b"},
            "must have one text of thoughts, got different ones in reasoning, ",
        ),
        (
            {"content": "x", "reasoning_content": 3},
            "reasoning_content must be a str, got a int",
        ),
        ({"content": "x", "reasoning_content": "\ud800"}, "not valid Unicode"),
        ({"tool_calls": 3}, "tool_calls must be a list, got a int"),
        ({"tool_calls": [3]}, r"tool_calls\[0\] must be a dict"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "a function with a name"),
        (
            {"tool_calls": [{"type": "custom", "name": "x"}]},
            "type must be 'function', got 'custom'",
        ),
        ({"tool_calls": [{"name": "x", "arguments": '{"q": '}]}, "must be JSON, got '{\"q\": '"),
        ({"tool_calls": [{"name": "x", "arguments": "[1]"}]}, r"must be an object, got \[1\]"),
        ({"tool_calls": [{"name": "x", "arguments": [1]}]}, r"must be an object, got \[1\]"),
        ({"tool_calls": [{"name": "x", "arguments": '{"q": NaN}'}]}, "NaN is not JSON"),
        ({"tool_calls": [{"name": "x", "arguments": '{"q": "\\ud800"}'}]}, "not valid Unicode"),
        ({"tool_calls": [{"name": "x", "arguments": "[" * 200_000}]}, "nested less deeply"),
        (
            {"tool_calls": [CALL], "function_call": {"name": "x"}},
            "must have one of tool_calls and function_call, got both",
        ),
    ],
)
def test_a_message_that_would_be_trained_wrongly_is_refused_by_name(message, match):
    refused({"messages": [{"role": "assistant", **message}]}, match)


@pytest.mark.parametrize("role", ["user", "tool", "system", "developer"])
def test_only_the_assistant_calls_and_thinks_and_only_it_may_be_empty(role):
    for field, match in (
        ({"tool_calls": [CALL]}, "tool_calls, which must be an assistant's"),
        ({"reasoning": "hm"}, "reasoning_content, which must be an assistant's"),
        ({"content": None}, "must have a text as 'content'"),
    ):
        refused({"messages": [{"role": role, "content": "x", **field}, *GO]}, match)
    assert as_trajectory({"messages": [{"role": role, "content": ""}, *GO]}).num_steps == 1


# -- loss flags ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", LOSS_FLAGS)
@pytest.mark.parametrize("style", ["sharegpt", "openai"])
def test_a_message_whose_loss_flag_says_no_is_state_only(flag, style):
    no, yes = (True, False) if flag == "masked" else (False, True)
    for off, on in ((no, yes), (int(no), int(yes)), (float(no), None)):
        if style == "sharegpt":
            ok = {"from": "gpt", "value": "Ok.", flag: off}
            row = {"conversations": [TURNS[0], ok, TURNS[0], {**TURNS[1], flag: on}]}
        else:
            ok = {"role": "assistant", "content": "Ok.", flag: off}
            row = {"messages": [GO[0], ok, GO[0], {**GO[1], flag: on}]}
        trajectory = as_trajectory(row)
        assert trajectory.messages[1] == {"role": "assistant", "content": "Ok.", "loss": False}
        assert trajectory.messages[3] == GO[1]
        assert (trajectory.num_steps, trajectory.step_indices) == (1, [3])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"loss": True, "train": False}, "must have loss flags that agree"),
        ({"loss": False, "masked": False}, "must have loss flags that agree"),
        ({"weight": 0.5}, r"weight must be true or false, 1 or 0, .*, got 0\.5"),
        ({"loss": "false"}, r"loss must be true or false, .*, got 'false'"),
        ({"train_detail": [{"begin_offset": 0}]}, "must be without 'train_detail'"),
    ],
)
def test_a_loss_flag_that_is_none_or_contradicts_another_is_refused(flags, match):
    refused({"messages": [*GO, {**GO[1], **flags}]}, match)


def test_a_flag_that_asks_for_the_loss_of_another_role_is_refused():
    refused({"messages": [{**GO[0], "train": True}, GO[1]]}, "only assistant messages are scored")
    refused({"messages": [{**GO[0], "masked": False}, GO[1]]}, "only assistant messages are score")
    row = {"messages": [{**GO[0], "loss": False, "masked": True, "weight": None}, GO[1]]}
    assert as_trajectory(row) == Trajectory(GO)


def test_a_conversation_of_which_nothing_is_scored_is_refused():
    refused({"messages": [GO[0], {**GO[1], "loss": False}]}, "an assistant message must be scored")


def test_settings_of_the_whole_row_are_followed_or_refused():
    two = {"messages": [*GO, *GO]}
    assert as_trajectory({**two, "mask_history": True}).step_indices == [3]
    assert as_trajectory({**two, "mask_history": False}).step_indices == [1, 3]
    same = {"train_on_inputs": False, "mask": "User", "weight": 1, "train_on_eos": "turn"}
    assert as_trajectory({**two, **same}) == Trajectory([*GO, *GO])
    for setting in (
        {"train_on_inputs": True},
        {"train_on_eos": "none"},
        {"weight": 0.2},
        {"mask": "Assistant"},
        {"roles_to_train": ["user"]},
    ):
        (name,) = setting
        refused({**two, **setting}, f"{name} must be absent or")
    refused({**two, "mask_history": "yes"}, "mask_history must be true or false, got 'yes'")


# -- rows ----------------------------------------------------------------------------------------


def test_the_system_column_of_sharegpt_is_the_first_message():
    system = {"role": "system", "content": "act"}
    expected = Trajectory([system, *GO])
    assert as_trajectory({"conversations": TURNS, "system": "act"}) == expected
    said = [{"from": "system", "value": "act"}, *TURNS]
    assert as_trajectory({"conversations": said, "system": "act"}) == expected
    assert as_trajectory({"messages": GO, "system": "act"}) == expected
    for nothing in ("", None):
        assert as_trajectory({"conversations": TURNS, "system": nothing}) == Trajectory(GO)
    refused({"conversations": said, "system": "other"}, "must agree")
    refused({"conversations": TURNS, "system": ["act"]}, "system must be a str")


def test_tools_are_read_in_each_of_their_forms():
    wrapped = [{"type": "function", "function": WEATHER}]
    for tools in (wrapped, [WEATHER], json.dumps([WEATHER]), [{**WEATHER, "type": "function"}]):
        assert as_trajectory({"conversations": TURNS, "tools": tools}).tools == wrapped
    assert as_trajectory({"messages": GO, "functions": [WEATHER]}).tools == wrapped
    for nothing in (None, "", "[]", []):
        assert as_trajectory({"messages": GO, "tools": nothing}).tools is None
    refused({"messages": GO, "tools": "{"}, "tools must be JSON, got '{'")
    refused({"messages": GO, "tools": {"a": 1}}, "tools must be a list, got a dict")
    refused(
        {"messages": GO, "tools": [{"a": 1}]},
        r"tools\[0\] must .*a 'function' that has a name, got",
    )
    refused(
        {"messages": GO, "tools": [WEATHER], "functions": [WEATHER]},
        "must have one of 'tools' and 'functions', got both",
    )


def test_sharegpt_with_function_calls_and_observations():
    """LLaMA-Factory's tool data."""
    value = json.dumps({"name": "search", "arguments": {"q": "key"}})
    row = {
        "conversations": [
            {"from": "human", "value": "where?"},
            {"from": "function_call", "value": value},
            {"from": "observation", "value": "in the box"},
            {"from": "gpt", "value": "in the box"},
        ],
        "tools": json.dumps([WEATHER]),
    }
    expected = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "in the box"},
        {"role": "assistant", "content": "in the box"},
    ]
    assert as_trajectory(row).messages == expected
    row["conversations"][1]["value"] = f"<think>\nhm\n</think>\n\n[{value}, {value}]"
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert as_trajectory(row).messages[1] == {**thought, "tool_calls": [CALL, CALL]}
    for bad, match in (("go", "a call as JSON, got 'go'"), ("[]", "at least one"), ("3", "a dict")):
        row["conversations"][1]["value"] = bad
        refused(row, match)


def test_ms_swift_calls_and_answers():
    value = json.dumps({"name": "search", "arguments": {"q": "key"}})
    turns = [{"role": "tool_call", "content": value}, {"role": "tool_response", "content": "box"}]
    assert as_trajectory({"messages": [GO[0], *turns, GO[1]]}).messages[1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "box"},
    ]


@pytest.mark.parametrize("form", ["from", "role"])
def test_every_name_of_a_speaker(form):
    names = {
        "user": ("human", "user"),
        "assistant": ("gpt", "assistant"),
        "tool": ("tool", "observation", "tool_response"),
    }
    for role, speakers in names.items():
        for speaker in speakers:
            if form == "role" and speaker in ("human", "gpt"):
                continue
            said = {"from": speaker, "value": "x"}
            if form == "role":
                said = {"role": speaker, "content": "x"}
            row = {"conversations": [said, *TURNS]}
            assert as_trajectory(row).messages == [{"role": role, "content": "x"}, *GO]


def test_agentgym_files_are_read_and_success_is_no_reward():
    row = {
        "item_id": "webshop_7",
        "conversations": [
            {"from": "human", "loss": None, "value": "rules"},
            {"from": "gpt", "loss": False, "value": "Ok."},
            {"from": "human", "loss": None, "value": "page"},
            {"from": "gpt", "loss": True, "value": "click[buy]"},
        ],
        "success": 1,
    }
    trajectory = as_trajectory(row)
    assert (trajectory.id, trajectory.reward) == ("webshop_7", None)
    assert trajectory.meta == {"success": 1}
    assert trajectory.step_indices == [3]
    assert as_trajectory({**row, "reward": 0.5}).reward == 0.5


def test_prompt_and_completion_of_trl_score_the_completion():
    trajectory = as_trajectory({"prompt": [*GO, GO[0]], "completion": [GO[1]]})
    assert trajectory.step_indices == [3]
    assert len(trajectory.messages) == 4
    refused(
        {"prompt": "where?", "completion": "left"}, "prompt must be a list of messages, got a str"
    )


def test_ids_that_are_whole_numbers_become_text_and_null_meta_is_none():
    for id in (7, 7.0, "7"):
        assert as_trajectory({"messages": GO, "id": id, "meta": None}) == Trajectory(GO, id="7")
    refused({"messages": GO, "id": 7.5}, "id must be a str or None, got 7.5")
    refused({"messages": GO, "id": True}, "id must be a str or None, got True")


def test_columns_beside_the_conversation_are_kept_in_meta():
    row = {"messages": GO, "meta": {"a": 1}, "source": "x", "empty": None}
    assert as_trajectory(row).meta == {"a": 1, "source": "x"}
    refused({**row, "a": 2}, "'a' of the row must agree")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"messages": GO, "conversations": TURNS},
            "must have one of 'messages' and 'conversations', got both",
        ),
        ({"messages": GO, "images": ["a.png"]}, "must be without 'images': only text"),
        ({"conversations": TURNS, "chosen": "a", "rejected": "b"}, "pair of preferences"),
        ({"prompt": GO, "chosen": GO, "rejected": GO}, "pair of preferences"),
        ({"messages": GO, "enable_thinking": True}, "give it in chat_template_kwargs"),
        ({"instruction": "x", "output": "y"}, "an Alpaca row has no steps"),
        ({"role": "user", "content": "x"}, "a single message"),
        ({"segments": []}, "axolotl's segments"),
        ({"conversations": TURNS, "reward": 1, "meta": {"reward": 0}}, "must agree"),
        (
            {"conversations": [{**TURNS[1], "role": "user"}]},
            "must have one of 'from' and 'role', got both",
        ),
        (
            {"conversations": [{**TURNS[1], "content": "x"}]},
            "must have one of 'value' and 'content', got both",
        ),
        ({"messages": "[{"}, r"messages must be JSON, got '\[\{'"),
        ({"messages": GO, "chat_template_kwargs": 3}, "chat_template_kwargs must be a dict, got 3"),
        (
            {"messages": GO, "chat_template_kwargs": {"add_generation_prompt": True}},
            "must hold arguments of the template alone, got 'add_generation_prompt'",
        ),
    ],
)
def test_a_row_that_would_be_read_wrongly_is_refused_by_name(row, match):
    refused(row, match)


def test_a_trajectory_is_its_own_and_a_file_gives_what_its_rows_give(tmp_path):
    trajectory = Trajectory(GO, tools=[{"type": "function", "function": WEATHER}])
    assert as_trajectory(trajectory) is trajectory
    row = {"conversations": TURNS, "tools": [WEATHER], "chat_template_kwargs": {"thinking": False}}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(row))
    assert load_trajectories(path) == load_trajectories([row]) == [as_trajectory(row)]
