"""Trees in other packages' formats: what each position sees there, and those packages' own code."""

import numpy as np
import pytest
import torch
import twins
from hypothesis import given
from hypothesis import strategies as st
from test_sequences import batches
from test_tree import trunks_and_branches

from stepagent import _core
from stepagent.trees.exports import tree_kwargs, trl_row
from stepagent.trees.tree import pack_sequences, pack_step_pairs


@st.composite
def trees(draw):
    """Of step pairs, whose siblings may begin alike, and of sequences, whose runs do not."""
    if draw(st.booleans()):
        return pack_step_pairs(*draw(trunks_and_branches()))[0]
    sequences, masks = draw(batches().filter(lambda batch: batch[0]))
    logps = [[-0.5 * p for p in range(len(s))] for s in sequences]
    return pack_sequences(sequences, masks, extras={"old_log_probs": logps})[0]


def seen_by_segments(row):
    """The positions each query sees: its segment's path up to itself, as a causal kernel reads
    the last keys of the path against the queries of the segment."""
    cu_q, cu_k = row["tree_cu_seqlens_q"].tolist(), row["tree_cu_seqlens_k"].tolist()
    paths = row["tree_kv_index"].tolist()
    for s in range(len(cu_q) - 1):
        path = paths[cu_k[s] : cu_k[s + 1]]
        size = cu_q[s + 1] - cu_q[s]
        for n in range(size):
            yield path[: len(path) - size + n + 1]


@given(trees())
def test_paths_show_what_the_tree_shows(tree):
    kwargs = tree_kwargs(tree)
    assert list(seen_by_segments(kwargs)) == twins.visible(tree.subtree_end)
    sizes_q, sizes_k = (kwargs[f"tree_cu_seqlens_{name}"].diff() for name in "qk")
    assert kwargs["tree_max_seqlen_q"] == max(sizes_q)
    assert kwargs["tree_max_seqlen_k"] == max(sizes_k)
    for s, parent in enumerate(kwargs["tree_segment_parents"].tolist()):
        depth = kwargs["tree_segment_depths"][s]
        assert (depth == 0) == (parent == -1)
        above = 0 if parent == -1 else sizes_k[parent]
        assert sizes_k[s] == above + sizes_q[s]
        assert parent == -1 or depth == kwargs["tree_segment_depths"][parent] + 1


@given(trees())
def test_trl_row_scores_the_same_tokens_after_the_same_tokens(tree):
    row = trl_row(tree)
    here, there = twins.visible(tree.subtree_end), list(seen_by_segments(row))
    assert row["position_ids"].tolist() == [len(seen) - 1 for seen in there]
    labels = row["shift_labels"][row["token_index"]]
    assert labels.tolist() == tree.labels.tolist(), "one label per position"
    assert (row["shift_labels"] != -100).sum() == len(set(row["token_index"].tolist()))
    for index, label_row in zip(row["token_index"].tolist(), tree.label_rows, strict=True):
        expected = [tree.input_ids[k] for k in here[label_row]]
        assert row["input_ids"][there[index]].tolist() == expected
    owner_N = np.repeat(tree.step_trunk, np.diff(tree.step_offsets))
    assert row["segment_id"].tolist() == [sorted(set(owner_N)).index(i) for i in owner_N]
    for name, values in tree.extras.items():
        assert row[name].tolist() == values.tolist()


@given(trees())
def test_a_tree_forks_one_token_earlier_and_no_more(tree):
    children = np.zeros(len(tree.input_ids), int)
    for seen in twins.visible(tree.subtree_end):
        if len(seen) > 1:
            children[seen[-2]] += 1
    extra = np.maximum(children - 1, 0).sum()
    assert len(trl_row(tree)["input_ids"]) == len(tree.input_ids) + extra


@given(batches().filter(lambda batch: batch[0]))
def test_trl_builds_the_same_row_where_no_sequence_ends_inside_another(batch):
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    sequences = [[*s, 1000 + i] for i, s in enumerate(batch[0])]  # ends of their own
    masks = [[*mask, True] for mask in batch[1]]
    logps = [np.arange(len(s), dtype=np.float32) for s in sequences]
    advantages = [np.full(len(s), i, np.float32) for i, s in enumerate(sequences)]
    theirs = packing.TreeRow()
    for i, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        theirs.add(
            {
                "input_ids": torch.tensor(sequence),
                "completion_mask": torch.tensor(mask).long(),
                "old_log_probs": torch.from_numpy(logps[i]),
                "advantage": float(i),
                "group_id": 0,
            }
        )
    extras = {"old_log_probs": logps, "advantages": advantages}
    (tree,) = pack_sequences(sequences, masks, extras=extras)
    row, expected = trl_row(tree), theirs.pack()
    assert sorted(row["input_ids"].tolist()) == sorted(expected["input_ids"].tolist())
    assert set(row) == set(expected)
    assert {key: value.dtype for key, value in row.items()} == {
        key: value.dtype for key, value in expected.items()
    }
    # The order of siblings may differ: TRL tells them apart one token earlier.
    for ours, trls in zip(paths_of_terms(row), paths_of_terms(expected), strict=True):
        assert ours == trls
    for key in ("old_log_probs", "advantages", "segment_id"):
        assert torch.equal(row[key], expected[key]), key


def paths_of_terms(row):
    seen = list(seen_by_segments(row))
    for index in row["token_index"].tolist():
        yield row["input_ids"][seen[index]].tolist(), row["shift_labels"][index].item()


@given(trees())
def test_tree_recurrence_reads_the_same_plan_from_paths_and_from_parents(tree):
    package = pytest.importorskip("tree_recurrence.plan")
    kwargs = tree_kwargs(tree)
    given_parents = package.TreePlan.from_kwargs(kwargs)
    paths_only = {k: v for k, v in kwargs.items() if "segment" not in k}
    parents_only = {k: v for k, v in kwargs.items() if k not in ("tree_kv_index",)}
    for plan in (package.TreePlan.from_kwargs(k) for k in (paths_only, parents_only)):
        for name in ("cu_seqlens", "parents", "depths", "kv_index", "cu_seqlens_k"):
            assert (getattr(plan, name) == getattr(given_parents, name)).all(), name
    assert given_parents.num_tokens == len(tree.input_ids)


BAD_TREES = [
    ({"label_rows": [9]}, r"label_rows\[0\] must lie in \[0, 3\), got 9"),
    ({"label_rows": [-1]}, r"label_rows\[0\] must lie in .* got -1"),
    ({"labels": [7]}, r"labels\[0\] must be a token that follows that of row 0, got 7"),
    ({"labels": [2, 3]}, "label_rows must be as long as labels, 2, got "),
    ({"position_ids": [0]}, "must be as long as input_ids, "),
    ({"step_offsets": [0, 2, 1]}, "step_offsets must ascend from 0, got "),
    ({"step_offsets": [1, 1]}, "step_offsets must ascend from 0, got "),
    ({"step_offsets": [0, 2]}, "step_offsets must end with the number of labels, "),
    ({"subtree_end": [3, 3, 4]}, r"subtree_end\[2\] must lie in .* got 4"),
    (
        {"labels": [2, 1], "label_rows": [0, 0], "step_offsets": [0, 2]},
        "must lie after a first token, got 0",
    ),
]


@pytest.mark.parametrize(("changed", "message"), BAD_TREES)
def test_arrays_that_are_no_tree_are_refused(changed, message):
    arrays = {
        "input_ids": [1, 2, 3],
        "position_ids": [0, 1, 1],
        "subtree_end": [3, 2, 3],
        "labels": [2],
        "label_rows": [0],
        "step_offsets": [0, 1],
    }
    arrays = {name: np.array(values, np.int32) for name, values in (arrays | changed).items()}
    with pytest.raises(ValueError, match=message):
        _core.fork_early(**arrays)
