"""Alignment: the C++ core against its twins, against rapidfuzz, and hostile input."""

import array
import math

import numpy as np
import pytest
import torch
import twins
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

import stepagent as sa

INT32_MAX = 2**31 - 1


def ids(alphabet, max_size=40):
    return st.lists(st.integers(0, alphabet), max_size=max_size)


def edited(seed, length, edits, alphabet=30000):
    """Two sequences of token ids, a few edits apart."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, alphabet, length)
    b = a.copy()
    for place in rng.integers(0, length, edits):
        kind = rng.integers(3)
        if kind == 0:
            b[place % len(b)] = rng.integers(alphabet)
        elif kind == 1:
            b = np.delete(b, place % len(b))
        else:
            b = np.insert(b, place % len(b), rng.integers(alphabet))
    return a.astype(np.int32), b.astype(np.int32)


# Edit distance

# Few symbols and many repeat runs and rotations; many symbols leave most rows without a match.
SEQUENCES = st.one_of(*[st.tuples(ids(n), ids(n)) for n in (0, 1, 3, 10**6)])


@given(SEQUENCES, st.none() | st.integers(0, 45))
@example(([], []), 0)
@example(([], [1, 2, 3]), 2)
@example(([0, 1] * 20, [1, 0] * 20), None)
def test_edit_distance_equals_its_twin(pair, cutoff):
    expected = twins.edit_distance(*pair, cutoff=cutoff)
    assert sa.edit_distance(*pair, cutoff=cutoff) == expected
    assert sa.edit_distance(*pair[::-1], cutoff=cutoff) == expected


# Around one word of 64 rows, several words, the sweep's eight columns, and each of the two ways.
@pytest.mark.parametrize("length", [7, 8, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("alphabet", [2, 4, 30000])
@pytest.mark.parametrize("other", [1, 8, 64, 150])
def test_long_edit_distance_equals_its_twin(length, alphabet, other):
    rng = np.random.default_rng([length, alphabet, other])
    a, b = (rng.integers(0, alphabet, n).astype(np.int32) for n in (length, other))
    distance = twins.edit_distance(a.tolist(), b.tolist())
    assert sa.edit_distance(a, b) == distance
    cutoffs = {0, 1, distance // 2, distance - 1, distance, distance + 1, 10 * distance}
    for cutoff in sorted(cutoffs - {-1}):
        assert sa.edit_distance(a, b, cutoff=cutoff) == min(distance, cutoff + 1), cutoff


@pytest.mark.parametrize("length", [1000, 3000])
@pytest.mark.parametrize("edits", [1, 30, 200, 900])
@pytest.mark.parametrize("alphabet", [2, 30, 30000])
def test_edit_distance_equals_rapidfuzz(length, edits, alphabet):
    levenshtein = pytest.importorskip("rapidfuzz.distance").Levenshtein
    a, b = edited(length + edits, length, edits, alphabet)
    # lists: rapidfuzz reads int32 arrays wrongly
    distance = levenshtein.distance(a.tolist(), b.tolist())
    assert sa.edit_distance(a, b) == distance
    for cutoff in {0, 64, distance // 2, distance - 1, distance, 2 * distance}:
        assert sa.edit_distance(a, b, cutoff=cutoff) == min(distance, cutoff + 1), cutoff


def test_edit_distance_of_a_prefix_of_a_suffix_and_of_the_inner_part():
    a = np.arange(1000, dtype=np.int32)
    for b in (a[:700], a[300:], a[100:900], np.delete(a, np.arange(10, 990, 50))):
        assert sa.edit_distance(a, b) == len(a) - len(b)
        assert sa.edit_distance(b, a, cutoff=len(a) - len(b) - 1) == len(a) - len(b)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, np.uint64),
        lambda ids: np.repeat(np.array(ids, np.int32), 3)[::3],
        lambda ids: np.array(ids, ">i4"),
        lambda ids: array.array("q", ids),
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32).repeat_interleave(2)[::2],
    ],
)
def test_every_kind_of_ids_is_read_alike(convert):
    a, b = [5, 1, INT32_MAX, 0, 7, 7], [1, INT32_MAX, 2, 7, 8]
    assert sa.edit_distance(convert(a), convert(b)) == twins.edit_distance(a, b) == 3


def test_ids_are_not_written_to():
    a, b = edited(0, 300, 60)
    a.flags.writeable = b.flags.writeable = False
    assert sa.edit_distance(a, b) == twins.edit_distance(a.tolist(), b.tolist())


def test_strings_are_compared_by_code_point():
    assert sa.edit_distance("kitten", "sitting") == 3
    assert sa.edit_distance("a😀b", "ab") == 1
    assert sa.edit_distance("\ud800", "") == 1  # a lone surrogate


@pytest.mark.parametrize(
    ("a", "b", "cutoff", "error", "message"),
    [
        ([1.5], [1], None, TypeError, "a must hold integers, got dtype float64"),
        ([1], [True], None, TypeError, "b must hold integers, got dtype bool"),
        ([1], [[1]], None, ValueError, r"b must be one-dimensional, got shape \(1, 1\)"),
        ([1], [[1], [2, 3]], None, TypeError, "b must be an array"),
        ([1], 3, None, ValueError, r"b must be one-dimensional, got shape \(\)"),
        ([1], [None], None, TypeError, "b must hold integers, got dtype object"),
        ([1], [0, 2**31], None, ValueError, r"b\[1\] must fit int32, got 2147483648"),
        ([2**70], [0], None, TypeError, "a must hold integers, got dtype object"),
        ([-(2**40)], [0], None, ValueError, r"a\[0\] must fit int32, got -1099511627776"),
        ([1], [torch.nan], None, TypeError, "b must hold integers, got dtype float64"),
        ([1], torch.ones(2, dtype=torch.bfloat16), None, TypeError, "b must be an array"),
        ("a", [1], None, TypeError, "both be strings"),
        ([1], [1], -1, ValueError, "cutoff must be at least 0, got -1"),
        ([1], [1], 1.0, TypeError, r"cutoff must be an integer or None, got 1\.0"),
    ],
)
def test_edit_distance_refuses(a, b, cutoff, error, message):
    with pytest.raises(error, match=message):
        sa.edit_distance(a, b, cutoff=cutoff)


def test_negative_ids_and_huge_cutoffs_are_fine():
    assert sa.edit_distance([-100, 5, -(2**31)], [5, -(2**31)], cutoff=2**80) == 1


# Tokens of one text


@st.composite
def tokenizations(draw):
    """Offsets as tokenizers give them: gaps, shared characters, tokens without any at (0, 0)."""
    start = end = 0
    offsets = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.integers(0, 4))
        if kind == 0:
            offsets.append(draw(st.sampled_from([(0, 0), (end, end), (3, 3)])))
            continue
        if kind == 1:
            start = draw(st.integers(start, end))  # shares characters with the one before
        else:
            start = end + draw(st.sampled_from([0, 0, 0, 1]))
        end = max(end, start + draw(st.integers(1, 3)))
        offsets.append((start, end))
    return offsets


def tiled(alignment, m, n):
    """The pairs and seams as one ascending list of blocks; each must begin where one ends."""
    blocks = [(a, a + 1, b, b + 1) for a, b in alignment.pairs.tolist()]
    blocks = sorted(blocks + [tuple(seam) for seam in alignment.seams.tolist()])
    place = (0, 0)
    for a0, a1, b0, b1 in blocks:
        assert (a0, b0) == place
        place = (a1, b1)
    assert place == (m, n)


@settings(max_examples=400)
@given(tokenizations(), tokenizations(), st.data())
def test_align_tokens_equals_its_twin(a, b, data):
    ids = [None, None]
    if data.draw(st.booleans(), "with ids"):
        token = st.integers(0, 1)
        ids = [data.draw(st.lists(token, min_size=len(x), max_size=len(x))) for x in (a, b)]
    got = sa.align_tokens(a, b, recorded_ids=ids[0], retokenized_ids=ids[1])
    assert (got.pairs.dtype, got.seams.dtype) == (np.int32, np.int32)
    pairs, seams = twins.align_tokens(a, b, *ids)
    assert (got.pairs.tolist(), got.seams.tolist()) == (pairs, seams)
    tiled(got, len(a), len(b))


@given(tokenizations())
def test_a_tokenization_agrees_with_itself(offsets):
    got = sa.align_tokens(offsets, offsets)
    assert got.pairs.tolist() == [[i, i] for i in range(len(offsets))]
    assert got.seams.shape == (0, 4)


def test_seams_are_the_runs_between_pairs():
    #           ab  c   d  e  fg           ab  cd      e  f  g
    recorded = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 7)]
    retokenized = [(0, 2), (2, 4), (4, 5), (5, 6), (6, 7)]
    got = sa.align_tokens(recorded, retokenized)
    assert got.pairs.tolist() == [[0, 0], [3, 2]]
    assert got.seams.tolist() == [[1, 3, 1, 2], [4, 5, 3, 5]]


def test_special_tokens_stand_where_the_token_before_them_ends():
    #            <s>  ab  </s> at (0, 0), as BERT's template puts it
    recorded = [(0, 0), (0, 2), (0, 0)]
    got = sa.align_tokens(recorded, [(0, 2), (2, 2)])
    assert got.pairs.tolist() == [[1, 0], [2, 1]]
    assert got.seams.tolist() == [[0, 1, 0, 0]]
    # which of two belongs to the one cannot be told
    got = sa.align_tokens([*recorded, (0, 0)], recorded)
    assert got.pairs.tolist() == [[0, 0], [1, 1]]
    assert got.seams.tolist() == [[2, 4, 2, 3]]


def test_special_token_between_two_that_share_a_character_is_no_text():
    recorded, retokenized = [(0, 2), (0, 0), (1, 3)], [(0, 2), (1, 2), (1, 3)]
    assert sa.align_tokens(recorded, retokenized).seams.tolist() == [[0, 3, 0, 3]]
    assert len(sa.align_tokens(recorded, [(0, 2), (7, 7), (1, 3)]).pairs) == 3


def test_bytes_of_one_character_agree_as_a_whole():
    a, b = [(0, 1), (1, 2), (1, 2), (1, 2)], [(0, 1), (1, 2), (1, 2)]
    assert sa.align_tokens(a, b).seams.tolist() == [[1, 4, 1, 3]]
    assert sa.align_tokens(a, a).pairs.tolist() == [[i, i] for i in range(4)]
    # same offsets, other bytes: only ids can tell, and their common prefix is certain
    got = sa.align_tokens(b, b, recorded_ids=[7, 8, 9], retokenized_ids=[7, 8, 10])
    assert got.pairs.tolist() == [[0, 0], [1, 1]]
    assert got.seams.tolist() == [[2, 3, 2, 3]]
    got = sa.align_tokens(b, b, recorded_ids=[7, 9, 8], retokenized_ids=[7, 10, 8])
    assert got.pairs.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([(0, 2), (3, 1)], r"\[1\] must not end before it starts, got \[3, 1\)"),
        ([(-1, 2)], r"\[0\] must not be negative, got \[-1, 2\)"),
        ([(-1, -1)], r"\[0\] must not be negative, got \[-1, -1\)"),
        ([(0, 2), (5, 5), (1, 1), (0, 1)], r"\[3\] must not come before the .*, got \[0, 1\)"),
        (
            [(2, 4), (1, 5)],
            r"\[1\] must not come before the token before it, \[2, 4\), got \[1, 5\)",
        ),
        ([(2, 4), (2, 3)], r"\[1\] must not come before .*, got \[2, 3\)"),
        ([[0, 1, 2]], r" must have shape \(n, 2\), got \(1, 3\)"),
        ([0, 1], r" must have shape \(n, 2\), got \(2,\)"),
    ],
)
def test_bad_offsets_are_named(offsets, message):
    with pytest.raises(ValueError, match="recorded_offsets" + message):
        sa.align_tokens(offsets, [])
    with pytest.raises(ValueError, match="retokenized_offsets" + message):
        sa.align_tokens([(0, 1)], np.array(offsets))
    with pytest.raises(ValueError, match="offsets" + message):
        sa.token_spans([], offsets)


@pytest.mark.parametrize("dtype", [np.float64, np.uint8, object, bool])
def test_offsets_are_int32_or_int64(dtype):
    with pytest.raises(TypeError, match="recorded_offsets must be int32 or int64, got dtype"):
        sa.align_tokens(np.zeros((1, 2), dtype), [])


def test_every_kind_of_offsets_is_read_alike():
    offsets = [(0, 2), (2, 3), (3, 7)]
    kinds = [
        np.array(offsets, np.int32),
        np.array(offsets)[::-1][::-1],
        np.array(offsets).T.copy().T,
        torch.tensor(offsets),
    ]
    for kind in kinds:
        assert len(sa.align_tokens(kind, offsets).pairs) == 3
    huge = [(0, 2**62), (2**62, 2**63 - 1)]
    assert len(sa.align_tokens(huge, huge).pairs) == 2


def test_ids_come_for_both_sides_and_every_token():
    offsets = [(0, 1)]
    with pytest.raises(ValueError, match="together"):
        sa.align_tokens(offsets, offsets, recorded_ids=[1])
    with pytest.raises(ValueError, match=r"retokenized_ids must be as long as .* 1, got 2"):
        sa.align_tokens(offsets, offsets, recorded_ids=[1], retokenized_ids=[1, 2])


# Spans


@given(tokenizations(), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=4))
def test_token_spans_equal_their_twin_or_are_refused(offsets, pieces):
    spans = [(start, start + size) for start, size in pieces]
    cuts = {place for s, e in offsets for place in range(s + 1, e)}
    cut = [span for span in spans if cuts & set(span)]
    if cut:
        start, end = cut[0]
        with pytest.raises(ValueError, match=rf"cut through a token, got \[{start}, {end}\), and "):
            sa.token_spans(spans, offsets)
        return
    got = sa.token_spans(spans, offsets)
    assert got.dtype == np.int32
    for (first, end), expected in zip(got.tolist(), twins.token_spans(spans, offsets), strict=True):
        assert first == end if expected is None else [first, end] == expected


@given(tokenizations(), st.data())
def test_char_spans_go_back_where_token_spans_came_from(offsets, data):
    first = data.draw(st.integers(0, len(offsets)))
    end = data.draw(st.integers(first, len(offsets)))
    inside = [offset for offset in offsets[first:end] if offset[0] < offset[1]]
    outside = [o for o in offsets[:first] + offsets[end:] if o[0] < o[1]]
    shared = any(s < oe and os < e for s, e in inside for os, oe in outside)
    note(f"inside {inside}, outside {outside}")
    if shared:
        with pytest.raises(
            ValueError, match=r"token_spans\[0\] must not cut through a character, got "
        ):
            sa.char_spans([(first, end)], offsets)
    elif inside:
        got = sa.char_spans([(first, end)], offsets)
        assert got.dtype == np.int64
        assert got.tolist() == [[inside[0][0], inside[-1][1]]]
        tokens = [i for i in range(first, end) if offsets[i][0] < offsets[i][1]]
        assert sa.token_spans(got, offsets).tolist() == [[tokens[0], tokens[-1] + 1]]


def test_spans_without_tokens_or_characters_are_empty():
    offsets = [(0, 2), (0, 0), (4, 6)]
    assert sa.token_spans([(2, 4), (3, 3), (6, 9), (0, 6)], offsets).tolist() == [
        [2, 2],
        [2, 2],
        [3, 3],
        [0, 3],
    ]
    assert sa.char_spans([(1, 2), (0, 0), (3, 3)], offsets).tolist() == [[2, 2], [0, 0], [6, 6]]
    # the one without characters stands at 2, inside the span but after all of its text
    assert sa.token_spans([(0, 5)], [(1, 2), (0, 0), (6, 7)]).tolist() == [[0, 1]]
    assert sa.token_spans([], offsets).shape == sa.char_spans([], []).shape == (0, 2)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(1, 0)], r"token_spans\[0\] must not end before it starts, got \[1, 0\)"),
        ([(0, 1), (-1, 0)], r"token_spans\[1\] must not be negative, got \[-1, 0\)"),
        ([(0, 3)], r"token_spans\[0\] must lie within the 2 tokens, got \[0, 3\)"),
    ],
)
def test_bad_token_spans_are_named(spans, message):
    with pytest.raises(ValueError, match=message):
        sa.char_spans(spans, [(0, 1), (1, 2)])


# Steps of two trajectories

METHODS = ["nw", "lcs", "dtw"]
EIGHTHS = st.integers(0, 20).map(lambda n: n / 8)  # sums are exact, and ties are frequent


def cost_matrices(entries, max_side=4):
    side = st.integers(0, max_side)
    return st.tuples(side, side).flatmap(
        lambda shape: st.lists(entries, min_size=math.prod(shape), max_size=math.prod(shape)).map(
            lambda values: np.array(values, np.float64).reshape(shape)
        )
    )


@settings(max_examples=300)
@given(cost_matrices(EIGHTHS), st.sampled_from(METHODS), st.none() | st.integers(0, 4), EIGHTHS)
def test_align_steps_equals_its_twin(costs, method, extra, cutoff):
    m, n = costs.shape
    if method == "dtw" and (m == 0) != (n == 0):
        return
    band = None if extra is None else abs(m - n) + extra
    got = sa.align_steps(range(m), range(n), method=method, cost=costs, band=band)
    pairs, distance = twins.align_steps(costs, method, band)
    assert got.distance == distance
    assert got.pairs.tolist() == pairs
    assert got.first_divergence == twins.first_divergence(costs)
    under = sa.align_steps(range(m), range(n), method=method, cost=costs, band=band, cutoff=cutoff)
    if distance <= cutoff:
        assert (under.distance, under.pairs.tolist()) == (distance, pairs)
    else:
        assert (under.distance, under.pairs) == (math.inf, None)
    assert under.first_divergence == got.first_divergence


@given(cost_matrices(st.floats(0, 4), max_side=3), st.sampled_from(METHODS))
def test_distance_is_the_least_of_all_paths_for_any_costs(costs, method):
    m, n = costs.shape
    if method == "dtw" and (m == 0) != (n == 0):
        return
    got = sa.align_steps(range(m), range(n), method=method, cost=costs)
    assert got.distance == twins.align_steps(costs, method)[1]


@given(cost_matrices(EIGHTHS), st.sampled_from(["nw", "lcs"]), st.integers(0, 4))
def test_a_band_keeps_steps_from_pairing_and_from_nothing_else(costs, method, extra):
    m, n = costs.shape
    band = abs(m - n) + extra
    i, j = np.indices((m, n))
    unpaired = np.where(abs(i - j) <= band, costs, 9)
    got = sa.align_steps(range(m), range(n), method=method, cost=costs, band=band)
    assert got.distance == twins.align_steps(unpaired, method)[1]


STEPS = st.lists(ids(2, max_size=5), max_size=4)


@given(STEPS, STEPS, st.sampled_from(["nw", "lcs"]), st.integers(0, 4))
def test_built_in_cost_is_the_edit_distance_over_the_longer_length(expert, agent, method, extra):
    band = abs(len(expert) - len(agent)) + extra
    costs = np.array([[twins.step_cost(a, b) for b in agent] for a in expert])
    costs = costs.reshape(len(expert), len(agent))
    arrays = [[np.array(step, np.int32) for step in steps] for steps in (expert, agent)]
    strings = [["".join(map(chr, step)) for step in steps] for steps in (expert, agent)]
    expected = sa.align_steps(expert, agent, method=method, cost=costs, band=band)
    kinds = [(*arrays, None), (*strings, None), (expert, agent, twins.step_cost)]
    for one, other, cost in kinds:
        got = sa.align_steps(one, other, method=method, cost=cost, band=band)
        assert got.pairs.tolist() == expected.pairs.tolist()
        assert (got.distance, got.first_divergence) == (
            expected.distance,
            expected.first_divergence,
        )


def test_steps_of_two_rollouts():
    expert = ["go north", "open door", "take key", "go south"]
    agent = ["go north", "look", "open door", "take the key"]
    got = sa.align_steps(expert, agent)
    assert got.pairs.tolist() == [[0, 0], [1, 2], [2, 3]]
    assert got.first_divergence == 1
    assert got.distance == pytest.approx(2 + 4 / 12)
    lcs = sa.align_steps(expert, agent, method="lcs")
    assert (lcs.pairs.tolist(), lcs.distance) == ([[0, 0], [1, 2]], 4)
    dtw = sa.align_steps(expert, agent, method="dtw", band=1)
    assert dtw.pairs.tolist()[0] == [0, 0]
    assert dtw.pairs.tolist()[-1] == [3, 3]
    same = sa.align_steps(expert, expert)
    assert (same.first_divergence, same.distance) == (None, 0)
    assert same.pairs.tolist() == [[i, i] for i in range(4)]
    assert sa.align_steps(expert, expert[:2]).first_divergence == 2


def test_ties_prefer_a_pair_then_the_expert_step_alone():
    assert sa.align_steps(["x", "x"], ["x"]).pairs.tolist() == [[1, 0]]
    twos = np.full((1, 1), 2.0)  # a pair at 2, or both alone at 1 each
    got = sa.align_steps(["a"], ["b"], cost=twos)
    assert (got.pairs.tolist(), got.distance) == ([[0, 0]], 2)
    # a square of equal costs: straight along the diagonal
    got = sa.align_steps(range(3), range(3), method="dtw", cost=np.ones((3, 3)))
    assert got.pairs.tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_aligns_with_nothing(method):
    got = sa.align_steps([], [], method=method, band=0, cutoff=0)
    assert (got.pairs.shape, got.first_divergence, got.distance) == ((0, 2), None, 0)


@pytest.mark.parametrize("method", ["nw", "lcs"])
def test_one_side_empty_leaves_the_other_alone(method):
    got = sa.align_steps(["a", "b"], [], method=method)
    assert (got.pairs.shape, got.first_divergence, got.distance) == ((0, 2), 0, 2)
    with pytest.raises(
        ValueError, match="a warping path must have steps on both sides, got 0 and 1"
    ):
        sa.align_steps([], ["a"], method="dtw")


def test_cost_is_called_inside_the_band_only():
    calls = []

    def cost(a, b):
        calls.append((a, b))
        return abs(a - b)

    sa.align_steps([0, 1, 2], [0, 1, 2], cost=cost, band=1)
    assert calls == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    got = sa.align_steps([0, 1, 2], [5, 1, 7], method="dtw", cost=cost, band=0)
    assert (got.pairs.tolist(), got.distance) == ([[0, 0], [1, 1], [2, 2]], 10)
    got = sa.align_steps([0, 1, 2], [5, 1, 7], cost=cost, band=0)
    assert (got.pairs.tolist(), got.distance) == ([[1, 1]], 4)


def test_errors_of_a_cost_function_pass_through():
    with pytest.raises(ZeroDivisionError):
        sa.align_steps([1], [2], cost=lambda a, b: 1 / 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "needle"}, ValueError, "method must be .*, got 'needle'"),
        ({"method": None}, ValueError, "method must be .*, got None"),
        ({"band": 0}, ValueError, "band must be at least 1 for 2 and 3 steps.* got 0"),
        ({"band": -1}, ValueError, "band must be at least 0, got -1"),
        ({"band": 1.0}, TypeError, r"band must be an integer or None, got 1\.0"),
        ({"cutoff": -0.5}, ValueError, r"cutoff must be at least 0, got -0\.5"),
        ({"cutoff": math.nan}, ValueError, "cutoff must be at least 0, got nan"),
        ({"cost": np.zeros((3, 2))}, ValueError, r"cost must have shape \(2, 3\).*, got \(3, 2\)"),
        (
            {"cost": [[0, 1, 2], [0, -1, 0]]},
            ValueError,
            r"cost\[1, 1\] must be finite and at least 0, got -1\.0",
        ),
        (
            {"cost": [[0, math.nan, 2], [0, 1, 0]]},
            ValueError,
            r"cost\[0, 1\] must be finite and at least 0, got nan",
        ),
        (
            {"cost": lambda a, b: math.inf},
            ValueError,
            r"cost\[0, 0\] must be finite and at least 0, got inf",
        ),
        (
            {"cost": lambda a, b: -1e-9},
            ValueError,
            r"cost\[0, 0\] must be finite and at least 0, got -1e-09",
        ),
        ({"cost": [["a"] * 3] * 2}, TypeError, "cost must hold numbers, got dtype"),
        ({"cost": [[1j] * 3] * 2}, TypeError, "cost must hold numbers, got dtype complex128"),
    ],
)
def test_align_steps_refuses(options, error, message):
    with pytest.raises(error, match=message):
        sa.align_steps(["a", "b"], ["a", "b", "c"], **options)


@pytest.mark.parametrize(
    ("expert", "agent", "error", "message"),
    [
        ("abc", ["abc"], TypeError, "expert must be a list of steps, got a str"),
        (["a"], [[1]], TypeError, "all strings, or all token ids"),
        (["a", [1]], ["a"], TypeError, "all strings, or all token ids"),
        ([[1]], [[1], [0.5]], TypeError, r"agent\[1\] must hold integers, got dtype float64"),
        ([[1], [2**31]], [[1]], ValueError, r"expert\[1\]\[0\] must fit int32, got 2147483648"),
        (
            [[1]],
            [np.zeros((2, 2), np.int32)],
            ValueError,
            r"agent\[0\] must be one-dimensional, got shape \(2, 2\)",
        ),
    ],
)
def test_steps_are_strings_or_ids(expert, agent, error, message):
    with pytest.raises(error, match=message):
        sa.align_steps(expert, agent)


def test_a_cost_matrix_of_another_layout_or_dtype_is_read_alike():
    costs = np.arange(6.0).reshape(2, 3) % 4 / 2
    expected = sa.align_steps(range(2), range(3), cost=costs)
    for other in (np.asfortranarray(costs), costs.astype(np.float32), torch.tensor(costs)):
        got = sa.align_steps(range(2), range(3), cost=other)
        assert (got.pairs.tolist(), got.distance) == (expected.pairs.tolist(), expected.distance)
