"""Token trees: the C++ packer against its twin, what each token sees, masks, and hostile input."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import twins
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaConfig, Qwen3Config

from stepagent import _core
from stepagent.data.encoding import Trunk
from stepagent.trees.tree import TokenTree, layer_windows, pack_sequences, pack_step_pairs

INT32_MAX = 2**31 - 1
TOKENS = st.integers(0, 2)  # few, so that branches often repeat each other and the trunk's action


@st.composite
def rewinds(draw, spans):
    """Some places between actions, each with a depth to go back to."""
    found, before, depth = [], 0, 0
    gaps = zip([1, *(end for _, end in spans)], [start for start, _ in spans], strict=False)
    for first, last in gaps:
        if first < last and draw(st.booleans()):
            at = draw(st.integers(first, last - 1))
            depth, before = draw(st.integers(0, depth + at - before - 1)), at
            found.append([at, depth])
    return found


@st.composite
def trunks_and_branches(draw, max_trunks=3):
    trunks, branches = [], []
    for _ in range(draw(st.integers(1, max_trunks))):
        ids, spans = draw(st.lists(TOKENS, min_size=1, max_size=3)), []
        for _ in range(draw(st.integers(1, 4))):
            ids += draw(st.lists(TOKENS, max_size=3))  # an observation, possibly none
            action = draw(st.lists(TOKENS, min_size=1, max_size=3))
            spans.append([len(ids), len(ids) + len(action)])
            ids += action
        ids += draw(st.lists(TOKENS, max_size=2))  # a tail after the last action
        trunks.append(Trunk(ids, spans, draw(rewinds(spans))))
        branch = st.lists(TOKENS, max_size=3)
        branches.append([draw(st.lists(branch, max_size=4)) for _ in spans])
    return trunks, branches


def as_lists(tree):
    lists = {name: np.asarray(array).tolist() for name, array in vars(tree).items()}
    return lists | {"extras": {k: np.asarray(v).tolist() for k, v in tree.extras.items()}}


def actions(trunks, branches):
    """Every (trunk, step, branch, state, action) as plain sequences: what the tree stands for."""
    for i, trunk in enumerate(trunks):
        ids = trunk.input_ids.tolist()
        for t, (start, end) in enumerate(trunk.action_spans.tolist()):
            state = _line(trunk, start)
            for k, action in enumerate([ids[start:end], *branches[i][t]]):
                yield i, t, k, state, list(action)


def _line(trunk, stop):
    """The tokens that the one at `stop` sees, read off the rewinds one by one."""
    line, backs = [], dict(trunk.rewinds.tolist())
    for place, token in enumerate(trunk.input_ids[:stop].tolist()):
        line = [*line[: backs.get(place, len(line))], token]
    return line


def random_tree(length, seed=0):
    """One tree of about `length` tokens: several trunks with steps and branches of random size."""
    rng = np.random.default_rng(seed)
    trunks, branches, size = [], [], 0
    while size < length:
        lengths = rng.integers(1, 60, size=(rng.integers(1, 8), 2))  # observation, action
        ends = lengths.ravel().cumsum()
        trunks.append(Trunk(rng.integers(0, 99, ends[-1]), ends.reshape(-1, 2)))
        branches.append(
            [
                [rng.integers(0, 99, n) for n in rng.integers(1, 40, rng.integers(4))]
                for _ in lengths
            ]
        )
        size += ends[-1] + sum(len(branch) for step in branches[-1] for branch in step)
    (tree,) = pack_step_pairs(trunks, branches)
    return tree


def cut(tree: TokenTree, length):
    """The first `length` tokens of a tree: a tree again, of an exact size."""
    return replace(
        tree,
        input_ids=tree.input_ids[:length],
        position_ids=tree.position_ids[:length],
        subtree_end=np.minimum(tree.subtree_end[:length], length),
    )


@pytest.fixture
def trunk():
    return Trunk([10, 11, 12, 13, 14, 15, 16, 17], [[2, 4], [5, 7]])


# The layout


def test_layout_is_the_one_drawn_in_the_design(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[20, 21]], [[22]]]])
    assert as_lists(tree) == {
        #                u   o1  â1  â1  a1  a1  o2  â2  a2  a2  tail
        "input_ids": [10, 11, 20, 21, 12, 13, 14, 22, 15, 16, 17],
        "position_ids": [0, 1, 2, 3, 2, 3, 4, 5, 5, 6, 7],
        "subtree_end": [11, 11, 4, 4, 11, 11, 11, 8, 11, 11, 11],
        "labels": [12, 13, 20, 21, 15, 16, 22],
        "label_rows": [1, 4, 1, 2, 6, 8, 6],
        "step_offsets": [0, 2, 4, 6, 7],
        "step_trunk": [0, 0, 0, 0],
        "step_index": [0, 0, 1, 1],
        "step_branch": [0, 1, 0, 1],
        "extras": {},
    }


@given(trunks_and_branches(), st.none() | st.integers(1, 60))
def test_core_equals_its_twin(pairs, max_tokens):
    try:
        expected = twins.pack_step_pairs(*pairs, max_tokens=max_tokens)
    except ValueError as error:
        name = str(error).replace("[", r"\[")
        with pytest.raises(ValueError, match=name):
            pack_step_pairs(*pairs, max_tokens=max_tokens)
        return
    trees = pack_step_pairs(*pairs, max_tokens=max_tokens)
    assert [as_lists(tree) for tree in trees] == [as_lists(tree) for tree in expected]


@given(trunks_and_branches(), st.none() | st.just(60))
def test_each_scored_token_is_predicted_from_exactly_its_own_sequence(pairs, max_tokens):
    expected = iter(actions(*pairs))
    for tree in pack_step_pairs(*pairs, max_tokens=max_tokens):
        visible = tree.attention_mask(torch.bool)[0, 0].numpy()
        for s in range(len(tree.step_trunk)):
            trunk, step, branch, state, action = next(expected)
            key = (tree.step_trunk[s], tree.step_index[s], tree.step_branch[s])
            assert key == (trunk, step, branch)
            scored = slice(tree.step_offsets[s], tree.step_offsets[s + 1])
            assert tree.labels[scored].tolist() == action
            for n, row in enumerate(tree.label_rows[scored]):
                (seen,) = np.nonzero(visible[row])
                seen = seen[np.argsort(tree.position_ids[seen], kind="stable")]
                assert tree.input_ids[seen].tolist() == state + action[:n]
                assert tree.position_ids[seen].tolist() == list(range(len(seen)))
    assert next(expected, None) is None


@given(trunks_and_branches())
def test_every_unique_token_is_there_once(pairs):
    trunks, branches = pairs
    (tree,) = pack_step_pairs(trunks, branches)
    unique = sum(len(trunk.input_ids) for trunk in trunks)
    for i, trunk in enumerate(trunks):
        for (start, end), tried in zip(trunk.action_spans, branches[i], strict=True):
            own = tuple(trunk.input_ids[start:end].tolist())
            unique += sum(len(branch) for branch in {tuple(b) for b in tried} - {own})
    assert len(tree.input_ids) == unique


def test_tokens_grow_linearly_with_steps():
    def tokens(steps):
        spans = np.arange(1, 2 * steps + 1).reshape(-1, 2)
        trunk = Trunk(np.arange(2 * steps + 1), spans)
        (tree,) = pack_step_pairs([trunk], [[[[7, 7]]] * steps])
        return len(tree.input_ids)

    assert tokens(2000) - tokens(1000) == tokens(1000) - 1  # 4 a step, and one before the first


# Branches


def test_branch_equal_to_the_own_action_costs_nothing_and_stays_a_step(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[12, 13]], []]])
    assert tree.input_ids.tolist() == trunk.input_ids.tolist()
    assert tree.step_branch.tolist() == [0, 1, 0]
    assert tree.labels.tolist() == [12, 13, 12, 13, 15, 16]
    assert tree.label_rows.tolist() == [1, 2, 1, 2, 4, 5]


def test_repeated_branches_share_the_rows_of_the_first(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[20, 21], [22], [20, 21], [12, 13]], []]])
    assert tree.input_ids.tolist() == [10, 11, 20, 21, 22, 12, 13, 14, 15, 16, 17]
    assert tree.label_rows.tolist() == [1, 5, 1, 2, 1, 1, 2, 1, 5, 7, 8]


def test_the_same_branch_at_another_step_is_another_branch(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[20, 21]], [[20, 21]]]])
    assert tree.input_ids.tolist().count(20) == 2


def test_siblings_that_only_begin_alike_are_not_merged(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[12], [12, 99], [12, 13, 14]], []]])
    assert tree.input_ids.tolist()[:10] == [10, 11, 12, 12, 99, 12, 13, 14, 12, 13]


def test_empty_branches_are_steps_without_labels(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[], [20], []], [[]]]])
    assert tree.step_offsets.tolist() == [0, 2, 2, 3, 3, 5, 5]
    assert tree.step_branch.tolist() == [0, 1, 2, 3, 0, 1]
    assert len(tree.input_ids) == 9


def test_one_step_trunk_that_begins_with_one_token():
    (tree,) = pack_step_pairs([Trunk([5, 6], [[1, 2]])], [[[[7]]]])
    assert tree.input_ids.tolist() == [5, 7, 6]
    assert tree.label_rows.tolist() == [0, 0]
    assert tree.subtree_end.tolist() == [3, 2, 3]


def test_actions_without_an_observation_between():
    (tree,) = pack_step_pairs([Trunk([5, 6, 7], [[1, 2], [2, 3]])], [[[[8]], [[9]]]])
    assert tree.input_ids.tolist() == [5, 8, 6, 9, 7]
    assert tree.label_rows.tolist() == [0, 0, 2, 2]


# Budgets


def test_trunks_fill_trees_in_order_and_an_exact_fit_fits():
    trunks = [Trunk(np.arange(n), [[1, 2]]) for n in (4, 4, 2, 7, 8, 2)]
    branches = [[[[99]]]] * 6  # one token more each: 5, 5, 3, 8, 9, 3
    trees = pack_step_pairs(trunks, branches, max_tokens=10)
    assert [len(tree.input_ids) for tree in trees] == [10, 3, 8, 9, 3]
    # The third and the fourth (3 + 8) do not fit together, nor is an earlier tree opened again.
    assert [sorted(set(tree.step_trunk.tolist())) for tree in trees] == [[0, 1], [2], [3], [4], [5]]
    for tree in trees:
        assert tree.position_ids[0] == 0
        assert tree.step_offsets[0] == 0
        assert tree.subtree_end[-1] == len(tree.input_ids)


def test_trunks_in_one_tree_do_not_see_each_other():
    trunks = [Trunk(np.arange(4), [[1, 3]])] * 2
    (tree,) = pack_step_pairs(trunks, [[[[9]]], [[[9]]]])
    mask = tree.attention_mask(torch.bool)[0, 0]
    assert not mask[5:, :5].any()
    assert tree.position_ids.tolist() == [0, 1, 1, 2, 3] * 2


def test_trunk_that_exceeds_the_budget_is_named():
    small, large = Trunk([1, 2], [[1, 2]]), Trunk(np.arange(6), [[1, 2]])
    pack_step_pairs([small, large], [[[]], [[[8, 9]]]], max_tokens=8)
    with pytest.raises(ValueError, match=r"trunks\[1\] .* must fit max_tokens=7, .* got 8 tokens"):
        pack_step_pairs([small, large], [[[]], [[[8, 9]]]], max_tokens=7)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (8.0, TypeError)])
def test_max_tokens_is_a_positive_integer(trunk, value, error):
    with pytest.raises(error, match="max_tokens"):
        pack_step_pairs([trunk], [[[], []]], max_tokens=value)


def test_max_tokens_beyond_int32_is_no_limit(trunk):
    assert len(pack_step_pairs([trunk], [[[], []]], max_tokens=np.int64(2**62))) == 1


@given(trunks_and_branches(), st.none() | st.integers(20, 60), st.integers(1, 4))
def test_trees_do_not_depend_on_the_number_of_threads(pairs, max_tokens, threads):
    trunks, branches = pairs
    args = (
        [trunk.input_ids for trunk in trunks],
        [trunk.action_spans for trunk in trunks],
        [trunk.rewinds for trunk in trunks],
        [np.array(b, np.int32) for steps in branches for actions in steps for b in actions],
        np.array([len(actions) for steps in branches for actions in steps]),
        max_tokens,
    )

    def packed(threads):
        try:
            trees = _core.pack_step_pairs(*args, threads)
        except ValueError as error:
            return str(error)
        return [{name: array.tolist() for name, array in tree.items()} for tree in trees]

    assert packed(threads) == packed(1)


def test_of_several_bad_branches_the_first_is_named_whatever_the_threads(trunk):
    bad = [np.array([-1 - k]) for k in range(50)]
    for threads in (1, 2, 7):
        with pytest.raises(ValueError, match=r"branches\[0\]\[0\]\[1\]\[0\] must lie in .* got -1"):
            _core.pack_step_pairs(
                [trunk.input_ids],
                [trunk.action_spans],
                [],
                [np.array([7]), *bad],
                np.array([51, 0]),
                None,
                threads,
            )


def test_a_tree_of_more_than_2_to_the_31_tokens_is_refused_before_it_is_made():
    # One trunk 2,200 times over: the core sees its ids where they lie.
    trunk = Trunk(np.zeros(2**20, np.int32), [[1, 2]])
    with pytest.raises(ValueError, match=r"a token tree must have .* got 2306867200"):
        pack_step_pairs([trunk] * 2200, [[[]]] * 2200)


CORE_REFUSALS = [
    (
        {"action_spans": [[[2, 4], [3, 7]]]},
        r"trunks\[0\]\.action_spans\[1\] must lie in .* got \[3, 7\)",
    ),
    ({"action_spans": [[[0, 4], [5, 7]]]}, r"action_spans\[0\] must lie in .* got \[0, 4\)"),
    ({"action_spans": [[[-5, 4], [5, 7]]]}, r"action_spans\[0\] must lie in .* got \[-5, 4\)"),
    ({"action_spans": [[[2, 2], [5, 7]]]}, r"action_spans\[0\] must lie in .* got \[2, 2\)"),
    (
        {"action_spans": [[[2, 4], [5, 9]]]},
        r"action_spans\[1\] must lie in \[4, 8\) .* got \[5, 9\)",
    ),
    ({"rewinds": [[], []]}, "rewinds must have those of each of the 1 trunks, got 2"),
    ({"rewinds": [[4]]}, r"trunks\[0\]\.rewinds must come in pairs, got 1 numbers"),
    ({"rewinds": [[3, 1]]}, r"rewinds\[0\] must come after .* got \[3, 1\]"),
    ({"rewinds": [[4, 4]]}, r"rewinds\[0\] must .* and go back, got \[4, 4\]"),
    ({"rewinds": [[4, -1]]}, r"rewinds\[0\] must .* got \[4, -1\]"),
    ({"rewinds": [[5, 1]]}, r"rewinds\[0\] must .* got \[5, 1\]"),
    ({"rewinds": [[7, 1]]}, r"rewinds\[0\] must .* got \[7, 1\]"),
    ({"action_spans": [[2, 4, 5]]}, r"trunks\[0\]\.action_spans must come in pairs, got 3 bounds"),
    ({"action_spans": []}, "action_spans must have those of each of the 1 trunks, got 0"),
    ({"branch_counts": [1]}, "branch_counts must have one for each of the 2 steps, got 1"),
    ({"branch_counts": [1, -1]}, r"branch_counts\[1\] must lie in .* got -1"),
    ({"branch_counts": [1, 2**40]}, r"branch_counts\[1\] must lie in .* got 1099511627776"),
    ({"branch_counts": [1, 1]}, "branch_counts must sum to the number of branches, 1, got 2"),
    ({"trunks": [[-1] * 8]}, r"trunks\[0\]\[0\] must lie in .* got -1"),
]


@pytest.mark.parametrize(("changed", "message"), CORE_REFUSALS)
def test_core_refuses_spans_and_counts_that_a_trunk_cannot_hold(trunk, changed, message):
    given = {"trunks": [trunk.input_ids], "action_spans": [trunk.action_spans]}
    given |= {"rewinds": [], "branch_counts": [1, 0]} | changed
    with pytest.raises(ValueError, match=message):
        _core.pack_step_pairs(
            [np.array(ids, np.int32) for ids in given["trunks"]],
            [np.array(spans, np.int32) for spans in given["action_spans"]],
            [np.array(backs, np.int32).reshape(-1) for backs in given["rewinds"]],
            [np.array([9], np.int32)],
            np.array(given["branch_counts"]),
            None,
            1,
        )


def test_spans_of_any_layout_pack_alike(trunk):
    columns = Trunk(trunk.input_ids, np.asfortranarray(trunk.action_spans))
    (tree,), (expected,) = (pack_step_pairs([t], [[[[9]], []]]) for t in (columns, trunk))
    assert as_lists(tree) == as_lists(expected)


def test_no_trunks_give_no_trees():
    assert pack_step_pairs([], []) == []


# Kinds of input


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, np.int64),
        lambda ids: np.array(ids, np.uint64),
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: torch.tensor(ids, dtype=torch.int64),
        lambda ids: np.repeat(np.array(ids, np.int32), 2)[::2],
        lambda ids: torch.tensor(ids).repeat_interleave(3)[::3],
        lambda ids: SimpleNamespace(token_ids=np.array(ids, np.int32)),
        lambda ids: SimpleNamespace(token_ids=torch.tensor(ids)),
    ],
    ids=[
        "list",
        "tuple",
        "int32",
        "int64",
        "uint64",
        "torch32",
        "torch64",
        "strided",
        "torch-strided",
        "sample",
        "t-sample",
    ],
)
def test_every_kind_of_branch_packs_alike(trunk, convert):
    branches = [[[[20, 21, 22], [23]], [[24]]]]
    converted = [[[convert(ids) for ids in step] for step in steps] for steps in branches]
    (tree,), (expected,) = pack_step_pairs([trunk], converted), pack_step_pairs([trunk], branches)
    assert as_lists(tree) == as_lists(expected)


def test_kinds_of_branches_can_be_mixed(trunk):
    mixed = [
        [[[], [20], np.array([21]), torch.tensor([22], dtype=torch.int32)], [np.array([[23]])[0]]]
    ]
    (tree,) = pack_step_pairs([trunk], mixed)
    assert tree.input_ids.tolist() == [10, 11, 20, 21, 22, 12, 13, 14, 23, 15, 16, 17]


def test_a_step_may_be_a_matrix_of_samples(trunk):
    (tree,) = pack_step_pairs([trunk], [[torch.tensor([[20, 21], [22, 23]]), []]])
    assert tree.input_ids.tolist()[2:6] == [20, 21, 22, 23]


def test_arrays_are_int32_and_outlive_the_tree(trunk):
    (tree,) = pack_step_pairs([trunk], [[[], []]])
    arrays = [getattr(tree, field.name) for field in fields(tree) if field.name != "extras"]
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    ids = tree.input_ids
    del tree
    assert ids.tolist() == trunk.input_ids.tolist()


# Failures


BAD_BRANCHES = [
    ([1, -1], ValueError, r"branches\[1\]\[1\]\[2\]\[1\] must lie in .*, got -1"),
    ([INT32_MAX + 1], ValueError, r"branches\[1\]\[1\]\[2\]\[0\] must lie in .*, got 2147483648"),
    (np.array([2**63], np.uint64), ValueError, r"branches\[1\]\[1\]\[2\]"),
    ([2**70], TypeError, r"branches\[1\]\[1\]\[2\] must hold integers, got dtype object"),
    ([1.0, 2.0], TypeError, r"branches\[1\]\[1\]\[2\] must hold integers, got dtype float64"),
    ([True], TypeError, r"branches\[1\]\[1\]\[2\] must hold integers, got dtype bool"),
    (["a"], TypeError, r"branches\[1\]\[1\]\[2\] must hold integers, got dtype <U1"),
    (
        torch.tensor([1.0]),
        TypeError,
        r"branches\[1\]\[1\]\[2\] must hold integers, got dtype float32",
    ),
    (torch.tensor([1.0], dtype=torch.bfloat16), TypeError, r"branches\[1\]\[1\]\[2\]"),
    ([[1, 2]], ValueError, r"branches\[1\]\[1\]\[2\] must be one-dimensional, got shape \(1, 2\)"),
    (
        np.empty((0, 2), int),
        ValueError,
        r"branches\[1\]\[1\]\[2\] must be one-dimensional, got shape \(0, 2\)",
    ),
    ([[1], [2, 3]], TypeError, r"branches\[1\]\[1\]\[2\] must be an array of integers"),
    (7, ValueError, r"branches\[1\]\[1\]\[2\] must be one-dimensional, got shape \(\)"),
    (None, ValueError, r"branches\[1\]\[1\]\[2\] must be one-dimensional, got shape \(\)"),
]


@pytest.mark.parametrize(("branch", "error", "message"), BAD_BRANCHES)
def test_bad_branch_is_named(trunk, branch, error, message):
    # Empty branches and steps without any come before, so the name must step over them.
    branches = [[[[1]], []], [[], [[5], [], branch]]]
    with pytest.raises(error, match=message):
        pack_step_pairs([trunk, trunk], branches)


def test_largest_int32_id_is_allowed(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[INT32_MAX, 0]], []]])
    assert tree.input_ids[2] == INT32_MAX


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([], "branches must have 1 entries, one a trunk, got 0"),
        ([[[], []], [[], []]], "branches must have 1 entries, one a trunk, got 2"),
        ([[[]]], r"branches\[0\] must have 2 entries, one a step of trunks\[0\], got 1"),
        ([[[], [], []]], r"branches\[0\] must have 2 entries, one a step of trunks\[0\], got 3"),
    ],
)
def test_branches_must_match_trunks_and_steps(trunk, branches, message):
    with pytest.raises(ValueError, match=message):
        pack_step_pairs([trunk], branches)


def test_trunks_must_be_trunks():
    with pytest.raises(TypeError, match=r"trunks\[0\] must be a Trunk, got a dict"):
        pack_step_pairs([{"input_ids": [1, 2]}], [[[]]])


# Masks


@given(trunks_and_branches(), st.none() | st.integers(1, 5))
def test_mask_follows_the_rule_entry_by_entry(pairs, window):
    (tree,) = pack_step_pairs(*pairs)
    mask = tree.attention_mask(torch.bool, window=window)
    length = len(tree.input_ids)
    expected = [
        [
            k <= q < tree.subtree_end[k]
            and (window is None or tree.position_ids[q] - tree.position_ids[k] < window)
            for k in range(length)
        ]
        for q in range(length)
    ]
    assert mask.shape == (1, 1, length, length)
    assert mask[0, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("window", [None, 2])
def test_float_mask_is_zero_or_the_minimum(trunk, dtype, window):
    (tree,) = pack_step_pairs([trunk], [[[[20]], [[21, 22]]]])
    mask = tree.attention_mask(dtype, window=window)
    visible = tree.attention_mask(torch.bool, window=window)
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, visible)
    assert torch.equal(mask == torch.finfo(dtype).min, ~visible)


def test_tensor_trees_equal_numpy_trees():
    tree = random_tree(300)
    held = tree.to("cpu")
    assert {getattr(held, f.name).dtype for f in fields(held)[:-1]} == {torch.int32}
    assert as_lists(held) == as_lists(tree)
    assert torch.equal(held.attention_mask(torch.bool), tree.attention_mask(torch.bool, "cpu"))
    assert torch.equal(
        held.attention_mask(torch.float32, window=9), tree.attention_mask(torch.float32, window=9)
    )
    assert torch.equal(held.block_mask("cpu").to_dense(), tree.block_mask("cpu").to_dense())


def test_a_mask_is_boolean_or_floating(trunk):
    (tree,) = pack_step_pairs([trunk], [[[], []]])
    with pytest.raises(TypeError, match=r"torch\.int32"):
        tree.attention_mask(torch.int32)
    with pytest.raises(ValueError, match="window must be at least 1"):
        tree.attention_mask(torch.bool, window=0)


@given(trunks_and_branches(), st.none() | st.integers(1, 5), st.integers(1, 5))
def test_mask_equals_its_twin_for_any_number_of_threads(pairs, window, threads):
    (tree,) = pack_step_pairs(*pairs)
    length = len(tree.input_ids)
    mask = np.full((length, length), 7, np.uint16)
    _core.fill_mask(tree.subtree_end, window, 1, 0, mask, threads)
    seen_by = twins.visible(tree.subtree_end, window)
    assert [np.flatnonzero(row).tolist() for row in mask] == seen_by
    assert mask.max() == 1


@given(trunks_and_branches(), st.none() | st.integers(1, 9), st.integers(1, 6))
def test_block_lists_equal_their_twin(pairs, window, size):
    (tree,) = pack_step_pairs(*pairs)
    length = len(tree.input_ids)
    blocks = -(-length // size)
    pairs_in = np.zeros((blocks, blocks), int)
    for q, keys in enumerate(twins.visible(tree.subtree_end, window)):
        np.add.at(pairs_in, (q // size, np.array(keys) // size), 1)
    full = pairs_in == size * size
    lists = _core.block_lists(tree.subtree_end, window, size)
    for counts, indices, kind in (
        (lists[0], lists[1], (pairs_in > 0) & ~full),
        (lists[2], lists[3], full),
    ):
        rows = indices.reshape(blocks, blocks).tolist()
        assert counts.tolist() == kind.sum(1).tolist()
        for listed, is_kind in zip(rows, kind, strict=True):
            assert listed == [*np.flatnonzero(is_kind), *np.flatnonzero(~is_kind)]


BAD_ENDS = [
    ([0], r"subtree_end\[0\] must lie in \(0, 1\], .* got 0"),
    ([2], r"subtree_end\[0\] must lie in \(0, 1\], .* got 2"),
    ([3, 1, 3], r"subtree_end\[1\] must lie in \(1, 3\], .* got 1"),
    ([2, 3, 3], r"subtree_end\[1\] must lie in \(1, 2\], .* got 3"),
    ([3, -(2**31), 3], r"subtree_end\[1\] must lie in .* got -2147483648"),
]


@pytest.mark.parametrize(("ends", "message"), BAD_ENDS)
def test_subtrees_that_do_not_nest_are_refused(trunk, ends, message):
    (tree,) = pack_step_pairs([trunk], [[[], []]])
    broken = replace(tree, subtree_end=np.array(ends, np.int32))
    with pytest.raises(ValueError, match=message):
        broken.attention_mask(torch.bool)
    with pytest.raises(ValueError, match=message):
        broken.block_mask("cpu")


def test_mask_of_another_size_or_type_is_refused(trunk):
    ends = np.array([2, 2], np.int32)
    with pytest.raises(ValueError, match=r"the mask must have .* entries, got 9"):
        _core.fill_mask(ends, None, 1, 0, np.empty((3, 3), np.uint8), 1)
    with pytest.raises(TypeError, match="must be contiguous"):
        _core.fill_mask(ends, None, 1, 0, np.empty((2, 4), np.uint8)[:, ::2], 1)
    with pytest.raises(TypeError):
        _core.fill_mask(ends.astype(np.int64), None, 1, 0, np.empty((2, 2), np.uint8), 1)


def test_core_refuses_a_window_without_the_token_itself():
    ends = np.array([2, 2], np.int32)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        _core.fill_mask(ends, 0, 1, 0, np.empty((2, 2), np.uint8), 1)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        _core.block_lists(ends, 0, 1)


@pytest.mark.parametrize("size", [3, 2**32, 2**63, 2**64 - 2, 2**64 - 1])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_block_larger_than_the_tree_is_one_partial_block(length, size):
    ends = np.full(length, length, np.int32)
    lists = [array.tolist() for array in _core.block_lists(ends, None, size)]
    assert lists == ([[1], [0], [0], [0]] if length else [[], [], [], []])


LAYERS = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 3}


def test_models_that_mix_layers_get_a_mask_for_each_kind(trunk):
    (tree,) = pack_step_pairs([trunk], [[[[20, 21, 22]], [[23]]]])
    config = Qwen3Config(**LAYERS, layer_types=["sliding_attention", "full_attention"])
    dense, blocks = tree.attention_masks(config, torch.bool), tree.block_masks(config)
    assert set(dense) == set(blocks) == {"full_attention", "sliding_attention"}
    for kind, window in (("full_attention", None), ("sliding_attention", 3)):
        assert torch.equal(dense[kind], tree.attention_mask(torch.bool, window=window))
        ends = torch.arange(len(tree.input_ids))
        rule = blocks[kind].mask_mod(0, 0, ends[:, None], ends)
        assert torch.equal(rule, dense[kind][0, 0])


def test_layers_without_a_mask_are_refused_by_name():
    assert layer_windows(Qwen3Config(num_hidden_layers=2)) == {"full_attention": None}
    with pytest.raises(ValueError, match="LlamaConfig has no layer_types"):
        layer_windows(LlamaConfig())
    config = Qwen3Config(num_hidden_layers=2)
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layers of Qwen3Config must be .*, got linear_attention"):
        layer_windows(config)


# Lengths below one block, of exactly one and two, ragged, and with full blocks.
@pytest.mark.parametrize("length", [5, 127, 128, 129, 256, 700, 1500])
@pytest.mark.parametrize("branching", [True, False])
@pytest.mark.parametrize("window", [None, 1, 300])
def test_block_mask_has_the_blocks_torch_finds_entry_by_entry(length, branching, window):
    if branching:
        tree = cut(random_tree(length, seed=length), length)
    else:
        (tree,) = pack_step_pairs([Trunk(np.arange(length), [[1, 2]])], [[[]]])
    visible = tree.attention_mask(torch.bool, window=window)[0, 0]
    expected = create_block_mask(
        lambda b, h, q, k: visible[q, k], 1, 1, length, length, device="cpu"
    )
    mask = tree.block_mask("cpu", window=window)
    assert mask.seq_lengths == expected.seq_lengths == (length, length)
    names = ["kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"]
    for name in names:
        count, expected_count = getattr(mask, name), getattr(expected, name)
        assert torch.equal(count, expected_count), name
        blocks = getattr(mask, name.replace("num_blocks", "indices"))
        expected_blocks = getattr(expected, name.replace("num_blocks", "indices"))
        listed = torch.arange(blocks.shape[-1]) < count[..., None]
        assert torch.equal(blocks[listed], expected_blocks[listed]), name
    assert length < 256 or branching or window == 1 or mask.full_kv_num_blocks.sum() > 0


@pytest.mark.parametrize("window", [None, 50, 300])
def test_block_mask_and_dense_mask_agree(window):
    tree = random_tree(900)
    mask = tree.block_mask("cpu", window=window)
    length = len(tree.input_ids)
    full = np.zeros((1, 1, *[-(-length // 128)] * 2), bool)
    for i, count in enumerate(mask.full_kv_num_blocks[0, 0]):
        full[0, 0, i, mask.full_kv_indices[0, 0, i, :count]] = True
    q, k = torch.arange(length)[:, None], torch.arange(length)
    blocks = mask.to_dense()[0, 0].bool()[q // 128, k // 128]
    inside_full = torch.from_numpy(full)[0, 0][q // 128, k // 128]
    implied = blocks & (inside_full | mask.mask_mod(0, 0, q, k))
    assert torch.equal(implied, tree.attention_mask(torch.bool, window=window)[0, 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own imports
@pytest.mark.parametrize("window", [None, 100])
def test_flex_attention_under_the_block_mask_equals_sdpa_under_the_dense_one(window):
    sequences = [np.random.default_rng(i).integers(0, 9, 200) for i in range(2)]
    sequences += [np.append(sequences[0][:150], np.arange(90))]
    (tree,) = pack_sequences(sequences, [np.arange(len(s)) > 9 for s in sequences])
    shape = (3, 1, 2, len(tree.input_ids), 16)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # Compiled, it computes listed blocks only; eager, every pair.
    compiled = torch.compile(flex_attention)
    flex = compiled(q, k, v, block_mask=tree.block_mask("cpu", window=window))
    mask = tree.attention_mask(torch.bool, window=window)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(flex, dense, atol=1e-5)
