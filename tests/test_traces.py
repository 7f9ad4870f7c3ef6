"""verifiers' Trace: its branches become trajectories with the token ids that were sampled."""

from __future__ import annotations

import copy
import json

import pytest
from tiny_tokenizers import CHATML, byte_level_bpe

from stepagent import Trajectory, as_trajectory, encode, load_trajectories

TOKENIZER = byte_level_bpe(CHATML)


def node(parent, role, text, *, sampled=False, before="", after="<|im_end|>\n", **extra):
    """A node whose tokens are the template's and, where sampled, single characters."""
    ids = TOKENIZER(before + f"<|im_start|>{role}\n", add_special_tokens=False).input_ids
    if sampled:
        chosen = [TOKENIZER(c, add_special_tokens=False).input_ids[0] for c in text]
        chosen.append(TOKENIZER.convert_tokens_to_ids("<|im_end|>"))
        mask = [False] * len(ids) + [True] * len(chosen)
        logprobs = [-0.12345678 - i for i in range(len(chosen))]
        ids += chosen
    else:
        ids += TOKENIZER(text + after, add_special_tokens=False).input_ids
        mask, logprobs = [False] * len(ids), []
    return {
        "parent": parent,
        "message": {"role": role, "content": text},
        "sampled": sampled,
        "token_ids": ids,
        "mask": mask,
        "logprobs": logprobs,
        **extra,
    }


def trace(**changes):
    """A trunk of one action; from there two actions that were tried, as from a compaction."""
    nodes = [
        node(None, "user", "where?"),
        node(0, "assistant", "look", sampled=True),
        node(1, "user", "a box", before="\n"),
        node(2, "assistant", "open", sampled=True),
        node(2, "assistant", "wait", sampled=True),
    ]
    rewards = {"solved": {"score": 1.0, "weight": 0.5}, "form": {"score": 0.25}}
    return {"id": "ab", "nodes": nodes, "rewards": rewards, "task": {}, **changes}


def test_each_branch_is_a_trajectory_and_what_they_share_is_scored_once():
    first, second = load_trajectories([trace()])
    assert (first.id, second.id) == ("ab/0", "ab/1")
    assert first.reward == second.reward == 0.75
    assert (first.step_indices, second.step_indices) == ([1, 3], [3])
    nodes = trace()["nodes"]
    for trajectory, path in ((first, nodes[:4]), (second, [*nodes[:3], nodes[4]])):
        trunk = encode(trajectory, TOKENIZER)
        assert trunk.input_ids.tolist() == [t for n in path for t in n["token_ids"]]
        steps = [path[i] for i in trajectory.step_indices]
        scored = [trunk.input_ids[a:b].tolist() for a, b in trunk.action_spans]
        assert scored == [
            [t for t, m in zip(n["token_ids"], n["mask"], strict=True) if m] for n in steps
        ]
        assert trajectory.meta["logps"] == [n["logprobs"] for n in steps]


def test_a_file_of_traces_is_read_and_one_with_several_branches_is_no_single_row(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(trace()) + "\n" + json.dumps(trace()) + "\n")
    assert len(load_trajectories(path)) == 4
    with pytest.raises(ValueError, match="holds 2 trajectories, and must hold one"):
        as_trajectory(trace())


def test_an_assistant_message_that_no_model_sampled_is_state_only():
    told = trace()
    told["nodes"] = [
        node(None, "user", "where?"),
        node(0, "assistant", "look"),
        node(1, "user", "a box"),
        node(2, "assistant", "open", sampled=True),
    ]
    trajectory = as_trajectory(told)
    assert trajectory.step_indices == [3]
    assert encode(trajectory, TOKENIZER).num_steps == 1


def test_a_trace_without_tokens_is_a_plain_conversation():
    told = trace()
    for one in told["nodes"]:
        one.update(token_ids=[], mask=[], logprobs=[])
    first, second = load_trajectories([told])
    assert first.meta.keys() == second.meta.keys() == {"rewards"}
    assert (first.step_indices, second.step_indices) == ([1, 3], [3])


def test_tools_calls_and_thoughts_of_a_trace():
    told = trace()
    told["nodes"] = told["nodes"][:2]
    told["nodes"][0]["tools"] = [{"type": "function", "name": "look", "parameters": {}}]
    told["nodes"][1]["message"] = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "oo",
        "tool_calls": [{"id": "1", "type": "function", "name": "look", "arguments": '{"a": 1}'}],
    }
    trajectory = as_trajectory(told)
    assert trajectory.tools == [
        {"type": "function", "function": {"name": "look", "parameters": {}}}
    ]
    function = {"name": "look", "arguments": {"a": 1}}
    assert trajectory.messages[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "oo",
        "tool_calls": [{"type": "function", "function": function, "id": "1"}],
    }


def test_a_failed_compaction_is_no_branch():
    told = trace()
    told["nodes"][4]["semantic_parents"] = [{"node": 3, "type": "compaction_attempt"}]
    assert as_trajectory(told).messages[-1]["content"] == "open"
    told["nodes"].append(node(None, "user", "go on", semantic_parents=[]))
    told["nodes"].append(
        node(
            5, "assistant", "go", sampled=True, semantic_parents=[{"node": 4, "type": "compaction"}]
        )
    )
    assert [t.messages[-1]["content"] for t in load_trajectories([told])] == ["open", "wait", "go"]


def test_a_reward_that_was_not_computed_is_none():
    assert load_trajectories([trace(rewards={})])[0].reward is None
    partly = {"a": {"score": 1.0}, "b": None}
    assert load_trajectories([trace(rewards=partly)])[0].reward is None


@pytest.mark.parametrize(
    ("index", "change", "match"),
    [
        (1, {"parent": 7}, r"nodes\[1\] parent must be an earlier node, got 7"),
        (1, {"parent": 1}, r"nodes\[1\] parent must be an earlier node, got 1"),
        (1, {"message": None}, r"nodes\[1\] message must be an object, got none"),
        (1, {"mask": [True]}, r"nodes\[1\] mask must be as long as token_ids, \d+, got 1"),
        (1, {"logprobs": [-1.0]}, "must have 5 logprobs, as sampled tokens, got 1"),
        (1, {"sampled": False}, "sampled must be true where tokens are"),
        (1, {"message": {"role": "user", "content": "x"}}, "must be an assistant's"),
        (2, {"token_ids": [], "mask": []}, r"nodes\[2\] must have token_ids, as other nodes"),
    ],
)
def test_a_graph_that_is_none_is_refused_by_its_node(index, change, match):
    told = copy.deepcopy(trace())
    told["nodes"][index].update(change)
    with pytest.raises(ValueError, match=rf"rows\[0\]: {match}|{match}"):
        load_trajectories([told])


def test_gaps_in_what_was_sampled_and_traces_without_any_are_refused():
    told = trace()
    told["nodes"][1]["mask"][-3] = False
    told["nodes"][1]["logprobs"].pop()
    with pytest.raises(ValueError, match="sampled tokens must be one run, got gaps"):
        load_trajectories([told])
    with pytest.raises(ValueError, match="must have a message that a model sampled, got none"):
        load_trajectories([trace(nodes=trace()["nodes"][:1])])
    with pytest.raises(ValueError, match="nodes must be a list"):
        load_trajectories([trace(nodes={})])


def test_an_object_that_dumps_itself_is_read_with_all_digits():
    class Trace:
        """As a model of pydantic does; its JSON has four digits unless told otherwise."""

        def model_dump(self, mode, context):
            assert (mode, context) == ("json", {"float_decimals": None})
            return trace()

    first, _ = load_trajectories([Trace()])
    assert isinstance(first, Trajectory)
    assert first.meta["logps"][0][0] == -0.12345678
