"""Prefix trees of any sequences: one body for the core and its twin, then hostile input."""

from dataclasses import fields
from itertools import groupby

import numpy as np
import pytest
import torch
import twins
from hypothesis import given
from hypothesis import strategies as st

from stepagent import _core
from stepagent.trees.tree import pack_sequences

TOKENS = st.integers(0, 2)  # few, so that sequences often share beginnings
PACKERS = pytest.mark.parametrize("pack", [pack_sequences, twins.pack_sequences])


@st.composite
def batches(draw):
    """Sequences that share beginnings, are beginnings of each other, repeat, or share nothing."""
    sequences, masks = [], []
    for _ in range(draw(st.integers(0, 7))):
        kept = draw(st.sampled_from(sequences)) if sequences and draw(st.booleans()) else []
        kept = kept[: draw(st.integers(0, len(kept)))]
        sequence = kept + draw(st.lists(TOKENS, min_size=0 if kept else 1, max_size=5))
        sequences.append(sequence)
        scored = st.lists(st.booleans(), min_size=len(sequence) - 1, max_size=len(sequence) - 1)
        masks.append([False, *draw(scored)])
    return sequences, masks


def as_lists(tree):
    lists = {name: np.asarray(array).tolist() for name, array in vars(tree).items()}
    return lists | {"extras": {name: list(values) for name, values in tree.extras.items()}}


def runs(mask):
    """(start, end) of each run of True."""
    for scored, group in groupby(range(len(mask)), key=lambda p: mask[p]):
        places = list(group)
        if scored:
            yield places[0], places[-1] + 1


def spread_out(sequences):
    """A value per token that says where it is: 100 × sequence + position."""
    return {"place": [[100 * i + p for p in range(len(s))] for i, s in enumerate(sequences)]}


# What holds for the core and for its twin


@PACKERS
@given(batch=batches(), max_tokens=st.none() | st.just(25))
def test_every_scored_token_sees_its_own_sequence_and_comes_back_in_order(pack, batch, max_tokens):
    sequences, masks = batch
    steps = {}
    for tree in pack(sequences, masks, max_tokens=max_tokens, extras=spread_out(sequences)):
        tree = as_lists(tree)
        seen_by = twins.visible(tree["subtree_end"])
        assert tree["position_ids"] == [len(seen) - 1 for seen in seen_by]
        assert sorted(tree["step_trunk"]) == tree["step_trunk"]
        for s, key in enumerate(zip(tree["step_trunk"], tree["step_index"], strict=True)):
            scored = range(tree["step_offsets"][s], tree["step_offsets"][s + 1])
            steps[key] = [tree["extras"]["place"][n] for n in scored]
            assert tree["step_branch"][s] == 0
            for n in scored:
                i, p = divmod(tree["extras"]["place"][n], 100)
                assert i == key[0]
                assert tree["labels"][n] == sequences[i][p]
                seen = seen_by[tree["label_rows"][n]]
                assert [tree["input_ids"][k] for k in seen] == sequences[i][:p]
    assert steps == {
        (i, t): [100 * i + p for p in range(*run)]
        for i, mask in enumerate(masks)
        for t, run in enumerate(runs(mask))
    }


@PACKERS
@given(batch=batches())
def test_every_prefix_is_there_once_in_the_order_of_first_appearance(pack, batch):
    sequences, masks = batch
    trees = pack(sequences, masks)
    assert len(trees) == bool(sequences)
    prefixes = []
    for tree in map(as_lists, trees):
        for seen in twins.visible(tree["subtree_end"]):
            prefixes.append(tuple(tree["input_ids"][k] for k in seen))
    assert len(set(prefixes)) == len(prefixes)
    assert set(prefixes) == {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}

    def age(prefix):  # the first sequence that leads to each of its tokens
        return [
            next(i for i, s in enumerate(sequences) if tuple(s[: n + 1]) == prefix[: n + 1])
            for n in range(len(prefix))
        ]

    assert prefixes == sorted(prefixes, key=age)  # depth first: a prefix of a list is smaller


@PACKERS
@given(batch=batches(), max_tokens=st.integers(1, 30))
def test_blocks_fill_trees_in_order_up_to_the_budget(pack, batch, max_tokens):
    sequences, masks = batch
    too_long = [i for i, sequence in enumerate(sequences) if len(sequence) > max_tokens]
    if too_long:
        with pytest.raises(ValueError, match=rf"sequences\[{too_long[0]}\]"):
            pack(sequences, masks, max_tokens=max_tokens)
        return
    blocks = {}
    for i, sequence in enumerate(sequences):
        blocks.setdefault(sequence[0], []).append(i)
    sizes = [
        len({tuple(sequences[i][: n + 1]) for i in b for n in range(len(sequences[i]))})
        for b in blocks.values()
    ]
    trees = pack(sequences, masks, max_tokens=max_tokens)
    assert all(len(tree.input_ids) <= max_tokens for tree in trees)
    if max(sizes, default=0) > max_tokens:
        return  # some are cut: the tests after this one
    filled = [0]
    for size in sizes:
        if filled[-1] + size > max_tokens:
            filled.append(0)
        filled[-1] += size
    assert [len(tree.input_ids) for tree in trees] == (filled if sequences else [])


def test_a_forest_under_one_system_prompt_is_cut_into_trees_that_repeat_it():
    rng = np.random.default_rng(0)
    system = list(range(1, 41))
    chats = [[*system, 100 + i, *rng.integers(50, 99, 99).tolist()] for i in range(30)]
    masks = [[0] * 40 + [1] * 100] * 30
    trees = pack_sequences(chats, masks, max_tokens=1024)
    assert len(trees) == 4  # nine chats of 100 beside the prompt's 40: 940 tokens
    assert sum(len(tree.input_ids) for tree in trees) == 30 * 100 + 4 * 40
    steps = np.concatenate([tree.step_trunk for tree in trees])
    assert sorted(steps.tolist()) == list(range(30))


def test_a_forest_is_cut_where_the_least_is_repeated():
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 6, 7, 8], [1, 6, 7, 9]]
    trees = pack_sequences(sequences, [[0, 1, 1, 1]] * 4, max_tokens=7)
    assert [tree.input_ids.tolist() for tree in trees] == [[1, 2, 3, 4, 5], [1, 6, 7, 8, 9]]


# The core against its twin


@given(batches(), st.none() | st.integers(8, 60), st.integers(1, 4))
def test_core_equals_its_twin_for_any_number_of_threads(batch, max_tokens, threads):
    sequences, masks = batch
    try:
        expected = twins.pack_sequences(*batch, max_tokens=max_tokens, extras=spread_out(sequences))
    except ValueError:
        return  # a sequence above the budget
    trees = pack_sequences(*batch, max_tokens=max_tokens, extras=spread_out(sequences))
    assert [as_lists(tree) for tree in trees] == [as_lists(tree) for tree in expected]
    threaded = _core.pack_sequences(
        [np.array(sequence, np.int32) for sequence in sequences],
        [np.array(mask, np.uint8) for mask in masks],
        max_tokens,
        threads,
    )
    for tree, other in zip(trees, threaded, strict=True):
        assert {name: array.tolist() for name, array in other.items()} == {
            field.name: getattr(tree, field.name).tolist() for field in fields(tree)[:-1]
        }


def test_long_sequences_that_part_at_every_place():
    """Runs longer than the core compares at once, parting before, at and after its boundaries."""
    base = np.random.default_rng(0).integers(0, 1000, 800)
    places = [1, 2, 7, 8, 9, 255, 256, 257, 511, 512, 513, 768, 799]
    sequences = [base, *(np.append(base[:p], 1000 + p) for p in places), base[:300]]
    masks = [np.arange(len(s)) >= max(1, len(s) - 20) for s in sequences]
    (tree,) = pack_sequences(sequences, masks)
    assert len(tree.input_ids) == 800 + len(places)
    visible = tree.attention_mask(torch.bool)[0, 0].numpy()
    owner_N = np.repeat(tree.step_trunk, np.diff(tree.step_offsets))
    for i, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        assert (tree.labels[owner_N == i] == sequence[mask]).all()
        for row, p in zip(tree.label_rows[owner_N == i], np.flatnonzero(mask), strict=True):
            assert (tree.input_ids[visible[row]] == sequence[:p]).all()


def test_drawn_example():
    #             q  a  b     forked off after q a, and a block of its own
    sequences = [[5, 6, 7], [5, 6, 8, 9], [3, 4], [5, 6]]
    masks = [[0, 1, 1], [0, 0, 1, 1], [0, 1], [0, 1]]
    (tree,) = pack_sequences(sequences, masks)
    assert as_lists(tree) == {
        "input_ids": [5, 6, 7, 8, 9, 3, 4],
        "position_ids": [0, 1, 2, 2, 3, 0, 1],
        "subtree_end": [5, 5, 3, 5, 5, 7, 7],
        "labels": [6, 7, 8, 9, 4, 6],
        "label_rows": [0, 1, 1, 3, 5, 0],
        "step_offsets": [0, 2, 4, 5, 6],
        "step_trunk": [0, 1, 2, 3],
        "step_index": [0, 0, 0, 0],
        "step_branch": [0, 0, 0, 0],
        "extras": {},
    }


# Kinds of input


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, np.uint8),
        lambda ids: np.array(ids, ">i4"),
        lambda ids: np.array(ids, np.uint64),
        lambda ids: torch.tensor(ids),
        lambda ids: torch.tensor(ids, dtype=torch.int32).repeat_interleave(2)[::2],
        lambda ids: np.array(ids[::-1], np.int32)[::-1],
        lambda ids: np.frombuffer(b"x" + np.array(ids, np.int32).tobytes(), np.int32, offset=1),
    ],
    ids=["int32", "uint8", "big-endian", "uint64", "torch", "strided", "backwards", "unaligned"],
)
def test_every_kind_of_ids_packs_alike(convert):
    sequences, masks = [[5, 6, 7], [5, 6, 8]], [[0, 1, 1], [0, 0, 1]]
    (tree,) = pack_sequences([convert(s) for s in sequences], masks)
    assert as_lists(tree) == as_lists(pack_sequences(sequences, masks)[0])


@pytest.mark.parametrize(
    "convert", [list, tuple, np.array, torch.tensor, lambda m: np.array(m, int), torch.IntTensor]
)
def test_every_kind_of_mask_packs_alike(convert):
    masks = [[False, True, True, False, True], [False, False, False, False, True]]
    (tree,) = pack_sequences([[5, 6, 7, 8, 9]] * 2, [convert(mask) for mask in masks])
    assert tree.labels.tolist() == [6, 7, 9, 9]
    assert tree.step_index.tolist() == [0, 1, 0]


def test_extras_keep_their_dtype_and_follow_the_tree_to_tensors():
    extras = {
        "logps": [np.float32([0, -1, -2]), np.float32([0, -3])],
        "good": [[False, True, False], [True, False]],
    }
    trees = pack_sequences([[1, 2, 3], [4, 5]], [[0, 1, 1], [0, 1]], max_tokens=3, extras=extras)
    assert [tree.extras["logps"].tolist() for tree in trees] == [[-1, -2], [-3]]
    assert [tree.extras["good"].tolist() for tree in trees] == [[True, False], [False]]
    assert trees[0].extras["logps"].dtype == np.float32
    assert torch.equal(trees[0].to("cpu").extras["logps"], torch.tensor([-1.0, -2.0]))


def test_sequences_without_scored_tokens_are_tokens_without_steps():
    (tree,) = pack_sequences([[1, 2], [1, 3]], [[0, 0], [0, 0]], extras={"r": [[0.5, 1], [2, 3.0]]})
    assert tree.input_ids.tolist() == [1, 2, 3]
    assert tree.step_offsets.tolist() == [0]
    assert tree.extras["r"].dtype == np.float64
    assert len(tree.extras["r"]) == len(tree.labels) == 0


def test_no_sequences_give_no_trees():
    assert pack_sequences([], [], extras={"x": []}) == []


# Failures

FAILURES = [
    ([[1, 2]], [], {}, ValueError, "a mask for each of the 1 sequences, got 0"),
    (
        [[1, 2], []],
        [[0, 1], []],
        {},
        ValueError,
        r"sequences\[1\] must have a token at least, got none",
    ),
    (
        [[1, 2], [3, -4]],
        [[0, 1]] * 2,
        {},
        ValueError,
        r"sequences\[1\]\[1\] must lie in .*, got -4",
    ),
    ([[1, 2**31]], [[0, 1]], {}, ValueError, r"sequences\[0\]\[1\] must lie in .*, got 2147483648"),
    (
        [np.uint64([1, 2**63])],
        [[0, 1]],
        {},
        ValueError,
        r"\[0\]\[1\] must lie .*, got 9223372036854775808",
    ),
    (
        [[1.0, 2.0]],
        [[0, 1]],
        {},
        TypeError,
        r"sequences\[0\] must hold integers, got dtype float64",
    ),
    (
        [[[1, 2]]],
        [[0, 1]],
        {},
        ValueError,
        r"sequences\[0\] must be one-dimensional, got shape \(1, 2\)",
    ),
    (
        [[1, 2], "ab"],
        [[0, 1]] * 2,
        {},
        ValueError,
        r"sequences\[1\] must be one-dimensional, got shape \(\)",
    ),
    (
        [[1, 2]],
        [[0, 1, 1]],
        {},
        ValueError,
        r"action_masks\[0\] must .* the 2 tokens of sequences\[0\], got 3",
    ),
    ([[1, 2]], [[1, 1]], {}, ValueError, r"action_masks\[0\]\[0\] must be False, .*, got True"),
    ([[1, 2]], [[0, 2]], {}, ValueError, r"action_masks\[0\] must hold 0 and 1 only, got 2 at 1"),
    ([[1, 2]], [[0, -1]], {}, ValueError, r"action_masks\[0\] must hold 0 and 1 only, got -1 at 1"),
    (
        [[1, 2]],
        [[0.0, 1.0]],
        {},
        TypeError,
        r"action_masks\[0\] must be boolean.*, got dtype float64",
    ),
    (
        [[1, 2]],
        [[[0], [1]]],
        {},
        ValueError,
        r"action_masks\[0\] must be one-dimensional, got shape \(2, 1\)",
    ),
    ([[1, 2]], [[0, 1]], {"r": []}, ValueError, r"extras\['r'\] must have 1 entries, .* got 0"),
    (
        [[1, 2]],
        [[0, 1]],
        {"r": [[1]]},
        ValueError,
        r"extras\['r'\]\[0\] must have 2 entries, .* got 1",
    ),
    (
        [[1, 2]],
        [[0, 1]],
        {"r": ["ab"]},
        ValueError,
        r"extras\['r'\]\[0\] must be one-dimensional, got shape \(\)",
    ),
    (
        [[1, 2]],
        [[0, 1]],
        {"r": [["a", "b"]]},
        TypeError,
        r"extras\['r'\]\[0\] must hold numbers, got dtype <U1",
    ),
    (
        [[1, 2]] * 2,
        [[0, 1]] * 2,
        {"r": [[1, 2], [1.0, 2]]},
        TypeError,
        r"\[1\] must have .* int64, got float64",
    ),
]


@pytest.mark.parametrize(("sequences", "masks", "extras", "error", "message"), FAILURES)
def test_bad_input_is_named(sequences, masks, extras, error, message):
    with pytest.raises(error, match=message):
        pack_sequences(sequences, masks, extras=extras)


def test_a_sequence_above_the_budget_is_named():
    sequences, masks = [[9], [1, 2, 3], [1, 2, 4, 5]], [[0], [0, 1, 1], [0, 1, 1, 1]]
    assert len(pack_sequences(sequences, masks, max_tokens=5)) == 2
    assert len(pack_sequences(sequences, masks, max_tokens=4)) == 2
    with pytest.raises(ValueError, match=r"sequences\[2\] must fit max_tokens=3, .*, got 4 tokens"):
        pack_sequences(sequences, masks, max_tokens=3)


def test_core_refuses_what_its_callers_would_not_pass():
    ids, mask = np.array([1, 2], np.int32), np.array([0, 1], np.uint8)
    with pytest.raises(TypeError, match="must be a contiguous array"):
        _core.pack_sequences([ids.astype(np.float32)], [mask], 9, 1)
    with pytest.raises(TypeError, match="must be a contiguous array"):
        _core.pack_sequences([ids], [mask.astype(np.int64)], 9, 1)
    with pytest.raises(TypeError, match="must be a contiguous array"):
        _core.pack_sequences([np.repeat(ids, 2)[::2]], [mask], 9, 1)
    for limit in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"max_tokens must .*, got {limit}"):
            _core.pack_sequences([ids], [mask], limit, 1)


def test_a_tree_of_more_than_2_to_the_31_tokens_is_refused_before_it_is_made():
    # Views of one buffer, each with a first token of its own: 2.2e9 tokens in 8 MB.
    base = np.arange(2**20 + 2200, dtype=np.int32)
    mask = np.zeros(2**20, np.uint8)
    sequences = [base[i : i + 2**20] for i in range(2200)]
    with pytest.raises(ValueError, match=r"a token tree must have .* got 2306867200"):
        _core.pack_sequences(sequences, [mask] * 2200, None, 2)


def test_more_than_2_to_the_31_scored_tokens_are_refused_before_they_are_listed():
    # One sequence, 2,200 times: 2^20 tokens, each of them scored for every one of them.
    sequence = np.zeros(2**20, np.int32)
    mask = np.ones(2**20, np.uint8)
    mask[0] = 0
    with pytest.raises(ValueError, match=r"a token tree must have .* got 2306865000"):
        _core.pack_sequences([sequence] * 2200, [mask] * 2200, None, 2)
