"""Trajectories: what is a valid one, and that files are read and written exactly or refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepagent.data.trajectory import ROLES, Trajectory, load_trajectories, save_trajectories

GO = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "go left"}]
TURNS = [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "go left"}]

texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda values: st.lists(values) | st.dictionaries(texts, values),
    max_leaves=5,
)  # fmt: skip
calls = st.fixed_dictionaries(
    {"name": texts.filter(bool), "arguments": st.dictionaries(texts, json_values, max_size=2)}
)
spoken = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts})
acted = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={
        "thinking": texts,
        "tool_calls": st.lists(calls, max_size=2),
        "loss": st.booleans(),
        "name": st.none() | texts,
    },
)
trajectories = st.builds(
    Trajectory,
    messages=st.lists(spoken | acted, max_size=4).map(
        lambda messages: [*messages, {"role": "assistant", "content": "go"}]
    ),
    tools=st.none() | st.lists(calls.map(lambda call: {"function": call}), min_size=1, max_size=2),
    chat_template_kwargs=st.dictionaries(texts, json_values, max_size=2),
    reward=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    id=st.none() | texts,
    meta=st.dictionaries(texts, json_values, max_size=3),
)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def native(**changes):
    return json.dumps({"messages": GO, **changes})


def test_steps_are_the_assistant_messages():
    assert Trajectory(GO).num_steps == 1
    assert Trajectory([{"role": "system", "content": "act"}, *GO, *GO]).num_steps == 2


def test_reward_is_kept_as_a_float_and_meta_is_not_shared():
    first, second = Trajectory(GO, reward=1), Trajectory(GO)
    first.meta["game"] = 3
    assert type(first.reward) is type(Trajectory(GO, reward=np.float32(1)).reward) is float
    assert second.meta == {}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"messages": "go"}, TypeError, "messages must be a list of dicts, got a str"),
        ({"messages": []}, ValueError, "a message must be an assistant's, got none among 0"),
        ({"messages": GO[:1]}, ValueError, "a message must be an assistant's, got none among 1"),
        ({"messages": [*GO, "go"]}, TypeError, r"messages\[2\] must be a dict, got a str"),
        ({"messages": [{"content": "go"}]}, ValueError, r"messages\[0\] must have a 'role'"),
        (
            {"messages": [{"role": "user"}]},
            ValueError,
            r"messages\[0\] must have a text as 'content'",
        ),
        (
            {"messages": [*GO, {"role": "gpt", "content": "go"}]},
            ValueError,
            r"messages\[2\] role must be one of: system, developer, user, .*, got 'gpt'",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            ValueError,
            "must have a text as 'content'",
        ),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, ValueError, "not valid Unic"),
        ({"messages": GO, "reward": math.nan}, ValueError, "reward must be finite, got nan"),
        ({"messages": GO, "reward": math.inf}, ValueError, "reward must be finite, got inf"),
        ({"messages": GO, "reward": True}, TypeError, "reward must be a float or None, got True"),
        ({"messages": GO, "reward": "1"}, TypeError, "reward must be a float or None, got '1'"),
        ({"messages": GO, "id": 7}, TypeError, "id must be a str or None, got 7"),
        ({"messages": GO, "meta": None}, TypeError, "meta must be a dict, got None"),
    ],
)
def test_an_invalid_trajectory_is_refused_by_name(arguments, error, match):
    with pytest.raises(error, match=match):
        Trajectory(**arguments)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(trajectories, min_size=1, max_size=3))
def test_saving_then_loading_gives_the_same_trajectories(tmp_path, saved):
    save_trajectories(tmp_path / "t.jsonl", saved)
    assert load_trajectories(tmp_path / "t.jsonl") == saved


def test_line_separators_inside_a_content_do_not_end_its_line(tmp_path):
    content = "a\nb\r\nc\u2028d\u2029e\x85f\x0b"
    written = [Trajectory([{"role": "assistant", "content": content}])] * 2
    save_trajectories(tmp_path / "escaped", written)
    raw = json.dumps(vars(written[0]), ensure_ascii=False)  # other writers leave U+2028 as it is
    write(tmp_path / "raw", f"{raw}\r\n\n{raw}\n")
    assert load_trajectories(tmp_path / "escaped") == written
    assert load_trajectories(tmp_path / "raw") == written


@pytest.mark.parametrize(
    ("meta", "error"), [({"x": math.nan}, ValueError), ({"x": {1}}, TypeError),
                        ({"x": (1, 2)}, ValueError), ({1: "x"}, ValueError)],
)  # fmt: skip
def test_what_json_would_change_is_refused_and_the_old_file_kept(tmp_path, meta, error):
    path = write(tmp_path / "t.jsonl", "old")
    with pytest.raises(error, match=r"trajectories\[1\]"):
        save_trajectories(path, [Trajectory(GO), Trajectory(GO, meta=meta)])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_nothing_or_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trajectories must hold at least one to save"):
        save_trajectories(tmp_path / "t", [])
    with pytest.raises(TypeError, match=r"trajectories\[0\] must be a Trajectory, got a list"):
        save_trajectories(tmp_path / "t", [GO])


def test_a_failed_write_leaves_no_temporary_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        save_trajectories(tmp_path / "taken", [Trajectory(GO)])
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_eto_expert_file_is_read_whatever_its_name(tmp_path):
    rows = [
        {"id": "webshop_1", "conversations": TURNS, "reward": 0.5},
        {"id": 2, "conversations": [{"from": "system", "value": "act"}, *TURNS], "game_file": "g"},
    ]
    for indent in (None, 2):
        path = write(tmp_path / "data.jsonl", json.dumps(rows, indent=indent))
        assert load_trajectories(path) == [
            Trajectory(GO, 0.5, "webshop_1"),
            Trajectory([{"role": "system", "content": "act"}, *GO], None, "2", {"game_file": "g"}),
        ]


def test_an_eto_rollout_file_is_read_and_its_reward_found_in_meta(tmp_path):
    rollout = {"meta": {"steps": 1, "reward": 1.0, "success": True}, "conversations": TURNS}
    for indent in (None, 4):
        path = write(tmp_path / "3.json", json.dumps(rollout, indent=indent))
        expected = Trajectory(GO, 1.0, meta={"steps": 1, "success": True})
        assert load_trajectories(path) == [expected]


def test_records_of_either_kind_may_stand_in_either_container(tmp_path):
    expected = [Trajectory(GO), Trajectory(GO)]
    records = [{"messages": GO}, {"conversations": TURNS}]
    lines = "\n".join(json.dumps(record) for record in records)
    assert load_trajectories(write(tmp_path / "list", records)) == expected
    assert load_trajectories(write(tmp_path / "lines", lines)) == expected
    assert load_trajectories(write(tmp_path / "bom", "\ufeff" + lines)) == expected


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "t.json must hold at least one row, got an empty file"),
        (" \n\n", "t.json must hold at least one row, got an empty file"),
        ("[]", "t.json holds no trajectories"),
        (native() + "\n\n{oops}\n", r"t\.json:3: column 2: Expecting property name"),
        ('{"messages": [\n' + native(), r"t\.json:1: column 15: Expecting value"),
        ('[\n{"id": 1},\n{"id": }]', r"t\.json:3: column 8: Expecting value"),
        ('{\n"messages": }', r"t\.json:2: column 13: Expecting value"),
        (native() + "\n" + native(reward=math.nan), r"t\.json:2: NaN is not JSON"),
        (
            native() + "\n" + native(reward="1"),
            r"t\.json:2: reward must be a float or None, got '1'",
        ),
        (native(reward=10**400), r"t\.json:1: int too large"),
        ("7", r"t\.json:1: a trajectory must be a JSON object, got a int"),
        ('{"prompt": 1, "chosen": 2}', r"must have 'messages' or 'conversations', got .*'chosen'"),
        (
            [{"conversations": TURNS}, {"conversations": 3}],
            r"t\.json: item 1: conversations must be a list",
        ),
        ([{"conversations": TURNS[:1]}], r"t\.json: item 0: a message must be an assistant's"),
        (
            [{"conversations": ["go"]}],
            r"conversations\[0\] must be an object with 'from' and 'value', got 'go'",
        ),
        (
            [{"conversations": [{"from": "bot", "value": ""}]}],
            r"\[0\] must be from one of: sys.*, got 'bot'",
        ),
        ([{"conversations": TURNS, "meta": 3}], r"t\.json: item 0: meta must be a dict, got 3"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_reason(tmp_path, content, match):
    with pytest.raises(ValueError, match=match):
        load_trajectories(write(tmp_path / "t.json", content))


def test_a_path_that_is_no_text_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        load_trajectories(tmp_path / "missing")
    with pytest.raises(ValueError, match="got a directory"):
        load_trajectories(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"messages": "\xe9"}')
    with pytest.raises(ValueError, match="latin must be valid UTF-8"):
        load_trajectories(str(tmp_path / "latin"))
