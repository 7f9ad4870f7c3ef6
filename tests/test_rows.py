"""What trajectories are read from: files of each format, datasets, lists; and what is skipped."""

from __future__ import annotations

import json
import sys

import pytest

from stepagent import Trajectory, load_trajectories, save_trajectories
from stepagent.data.trajectory import Skipped, iterate_trajectories

GO = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "go left"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def call(**arguments):
    function = {"name": "look", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


CALLS = [GO[0], call(what="box"), {"role": "tool", "content": "key"}, call(where="bed"), GO[1]]
ROWS = [{"messages": CALLS, "tools": [TOOL]}, {"messages": GO, "reward": 0.5, "id": 3}]
EXPECTED = [Trajectory(CALLS, tools=[TOOL]), Trajectory(GO, 0.5, "3")]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_one_object_over_several_lines_is_read(tmp_path, indent):
    path = write(tmp_path / "one.json", "\n" + json.dumps(ROWS[0], indent=indent) + "\n")
    assert load_trajectories(path) == EXPECTED[:1]
    broken = json.dumps(GO, indent=2)
    path = write(tmp_path / "case", '{"messages": [\n' + broken[1:-1] + "\n]}")
    assert load_trajectories(path) == [Trajectory(GO)]
    path = write(tmp_path / "bad", '{"messages": [\n' + broken[1:-1] + "\n}")
    with pytest.raises(ValueError, match=r"bad:\d\d: column 1: Expecting ',' delimiter"):
        load_trajectories(path)


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000, '{"messages": ' + "[" * 10**5])
def test_deep_nesting_is_an_error_that_says_so(tmp_path, deep):
    good = json.dumps({"messages": GO})
    with pytest.raises(ValueError, match=r"t.jsonl:\d: .*nested less deeply"):
        load_trajectories(write(tmp_path / "t.jsonl", deep))
    with pytest.raises(ValueError, match=r"t.jsonl:2: .*nested less deeply"):
        load_trajectories(write(tmp_path / "t.jsonl", f"{good}\n{deep}\n{good}\n"))


def test_what_is_read_though_nested_deeply_is_saved_or_an_error(tmp_path):
    deep = "[" * 300 + "]" * 300
    path = write(tmp_path / "t.jsonl", f'{{"messages": {json.dumps(GO)}, "meta": {{"x": {deep}}}}}')
    loaded = load_trajectories(path)
    save_trajectories(tmp_path / "again.jsonl", loaded)
    assert load_trajectories(tmp_path / "again.jsonl") == loaded
    deepest: list = []
    for _ in range(5_000):
        deepest = [deepest]
    loaded[0].meta["x"] = deepest
    with pytest.raises(ValueError, match=r"trajectories\[0\] must be nested less deeply"):
        save_trajectories(tmp_path / "again.jsonl", loaded)


def test_bad_rows_are_skipped_and_named_when_asked(tmp_path):
    good = json.dumps({"messages": GO})
    path = write(tmp_path / "t.jsonl", f'{good}\n{{"messages": []}}\n{{oops\n{good}\n[1]\n')
    found = list(iterate_trajectories(path))
    assert [where.rpartition(":")[2] for where, _ in found] == ["1", "2", "3", "4", "5"]
    assert [type(one) for _, one in found] == [Trajectory, Skipped, Skipped, Trajectory, Skipped]
    reasons = [one.reason for _, one in found if isinstance(one, Skipped)]
    assert reasons[0].startswith("a message must be an assistant's")
    assert reasons[1].startswith("column 2: Expecting property name")
    assert reasons[2] == "a trajectory must be a JSON object, got a list"
    with pytest.warns(UserWarning, match="skipped .*t.jsonl:[235]: ") as warned:
        assert load_trajectories(path, on_error="skip") == [Trajectory(GO)] * 2
    assert len(warned) == 3
    with pytest.raises(ValueError, match=r"t\.jsonl:2: a message must be an assistant's"):
        load_trajectories(path)
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        load_trajectories(path, on_error="ignore")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"no trajectories: .*:1: a message must be an assistant's"),
    ):
        load_trajectories(write(tmp_path / "none", '{"messages": []}'), on_error="skip")


def test_a_list_of_rows_is_read_with_their_places():
    assert load_trajectories(ROWS) == load_trajectories(iter(ROWS)) == EXPECTED
    assert load_trajectories(EXPECTED) == EXPECTED
    with pytest.raises(ValueError, match=r"rows\[1\]: a message must be an assistant's"):
        load_trajectories([ROWS[0], {"messages": []}])
    with pytest.raises(ValueError, match="the source holds no trajectories"):
        load_trajectories([])
    with pytest.raises(TypeError, match=r"got a single row: \[row\]"):
        load_trajectories(ROWS[0])


def test_parquet_and_datasets_give_what_json_lines_give(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl"
    write(path, "".join(json.dumps(row) + "\n" for row in ROWS))
    columns = dict.fromkeys(("messages", "tools", "reward", "id"))
    dataset = datasets.Dataset.from_list([columns | row for row in ROWS])
    dataset.to_parquet(tmp_path / "rows.anything")
    assert load_trajectories(path) == EXPECTED
    assert load_trajectories(dataset) == EXPECTED  # Arrow's nulls are no arguments
    assert load_trajectories(tmp_path / "rows.anything") == EXPECTED
    splits = datasets.DatasetDict(train=dataset, test=dataset.select([1]))
    assert load_trajectories(splits, split="test") == EXPECTED[1:]
    assert load_trajectories(datasets.DatasetDict(only=dataset)) == EXPECTED
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'test'\], got None"):
        load_trajectories(splits)
    with pytest.raises(ValueError, match="split must be None for a file, got 'train'"):
        load_trajectories(path, split="train")
    streamed = dataset.to_iterable_dataset()
    assert load_trajectories(streamed) == EXPECTED


def test_a_broken_parquet_file_is_refused_with_its_name(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"x\.parquet must be a readable Parquet file"):
        load_trajectories(tmp_path / "x.parquet")


def test_parquet_without_pyarrow_names_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("stepagent.optional.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pyarrow: pip install 'stepagent\[train\]'"):
        load_trajectories(tmp_path / "x.parquet")


def test_a_folder_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"got a directory: .* datasets\.load_from_disk"):
        load_trajectories(tmp_path)
