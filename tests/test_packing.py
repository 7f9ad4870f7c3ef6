"""Bins and balanced parts: the core against its twins, what must hold of both, and bad input."""

import math

import numpy as np
import pytest
import torch
import twins
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from stepagent.trees.packing import balance, pack_bins, train_flops

CAPACITY = 20
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=40)
COSTS = st.lists(st.integers(0, 12), min_size=1, max_size=30)  # few values: many ties
BIN_PACKERS = pytest.mark.parametrize("pack", [pack_bins, twins.pack_bins])
BALANCERS = pytest.mark.parametrize("divide", [balance, twins.balance])


# Bins


@given(LENGTHS)
def test_bins_equal_their_twin(lengths):
    assert pack_bins(lengths, CAPACITY) == twins.pack_bins(lengths, CAPACITY)


@BIN_PACKERS
@given(lengths=LENGTHS)
def test_every_item_is_in_one_bin_and_no_bin_above_the_budget(pack, lengths):
    bins = pack(lengths, CAPACITY)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in items) for items in bins]
    assert max(filled, default=0) <= CAPACITY
    # Two bins of half the budget or less would have been one.
    assert sum(2 * size <= CAPACITY for size in filled) <= 1


def test_best_fit_takes_the_fullest_bin_that_fits():
    assert pack_bins([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_bins([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    "convert", [list, tuple, np.array, torch.tensor, lambda n: np.array(n, np.uint64)]
)
def test_lengths_of_any_kind(convert):
    assert pack_bins(convert([3, 3, 4]), np.int64(7)) == [[2, 1], [0]]


def test_nothing_to_pack():
    assert pack_bins([], 5) == []
    assert pack_bins(np.empty(0, np.int32), 5) == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "error", "message"),
    [
        ([3, 9, 10], 8, ValueError, r"lengths\[1\] must lie in \[1, capacity=8\], got 9"),
        ([3, 0], 8, ValueError, r"lengths\[1\] must lie in .*, got 0"),
        ([-1], 8, ValueError, r"lengths\[0\] must .*, got -1"),
        (
            np.uint64([2**63]),
            8,
            ValueError,
            r"lengths\[0\] must lie in .*, got 9223372036854775808",
        ),
        ([1.5], 8, TypeError, "lengths must hold integers, got dtype float64"),
        ([[1]], 8, ValueError, r"lengths must be one-dimensional, got shape \(1, 1\)"),
        ([1], 0, ValueError, "capacity must be at least 1, got 0"),
        ([1], 2.0, TypeError, r"capacity must be an integer, got 2\.0"),
    ],
)
def test_bad_lengths_are_named(lengths, capacity, error, message):
    with pytest.raises(error, match=message):
        pack_bins(lengths, capacity)


# Parts


@given(COSTS, st.integers(1, 8), st.booleans())
def test_parts_equal_their_twin(costs, parts, equal_size):
    if len(costs) >= parts:
        expected = twins.balance(costs, parts, equal_size=equal_size)
        assert balance(costs, parts, equal_size=equal_size) == expected


@BALANCERS
@given(costs=COSTS, parts=st.integers(1, 8), equal_size=st.booleans())
def test_every_item_is_in_one_part_and_none_is_empty(divide, costs, parts, equal_size):
    if len(costs) < parts:
        return
    groups = divide(costs, parts, equal_size=equal_size)
    assert len(groups) == parts
    assert sorted(i for items in groups for i in items) == list(range(len(costs)))
    sizes, sums = [len(items) for items in groups], [sum(costs[i] for i in g) for g in groups]
    assert min(sizes) >= 1
    assert sums == sorted(sums, reverse=True)
    # Differencing never lets parts lie further apart than the largest item.
    assert sums[0] - sums[-1] <= max(costs)
    if equal_size:
        assert max(sizes) - min(sizes) <= 1


def test_largest_differences_are_combined_first():
    # 8-7 → 1, 6-5 → 1, 4-1 → 3, 3-1 → 2: sums 16 and 14, where 15 and 15 exist (8 + 7).
    assert balance([8, 7, 6, 5, 4], 2) == [[1, 3, 4], [0, 2]]
    costs = [4, 5, 6, 7, 8, 9, 10, 11]
    assert [sum(costs[i] for i in part) for part in balance(costs, 2)] == [30, 30]


def test_float_costs_and_large_integers():
    costs = np.random.default_rng(0).uniform(0, 1, 500)
    sums = [costs[part].sum() for part in balance(costs, 8)]
    assert max(sums) - min(sums) < 1e-4 * sum(costs)
    assert balance([2**53, 1], 2) == [[0], [1]]


@pytest.mark.parametrize(
    ("costs", "parts", "error", "message"),
    [
        (
            [1, 2],
            3,
            ValueError,
            "parts must be at least 1 and at most the number of items, 2, got 3",
        ),
        ([], 1, ValueError, "at most the number of items, 0, got 1"),
        ([1, -2], 1, ValueError, r"costs\[1\] must be finite and not negative, got -2"),
        ([1, math.nan], 1, ValueError, r"costs\[1\] must be finite and not negative, got nan"),
        ([math.inf], 1, ValueError, r"costs\[0\] must be finite and not negative, got inf"),
        ([1e308] * 4, 2, ValueError, "the sum of costs must be finite in float64, got inf"),
        ([2**53 + 1], 1, ValueError, r"costs\[0\] must be at most .*, got 9007199254740993"),
        (["a"], 1, TypeError, "costs must hold numbers, got dtype <U1"),
        ([True], 1, TypeError, "costs must hold numbers, got dtype bool"),
        ([1], 0, ValueError, "parts must be at least 1, got 0"),
        ([1], 1.0, TypeError, r"parts must be an integer, got 1\.0"),
    ],
)
def test_bad_costs_are_named(costs, parts, error, message):
    with pytest.raises(error, match=message):
        balance(costs, parts)


# Costs


def counted(length, config, windows, mlp):
    """The multiplications of each product of the forward pass, one by one; × 2 × 3."""
    h, d = config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    total = 0
    for window in windows:
        for token in range(length):
            total += h * heads * d + 2 * h * kv * d + heads * d * h + mlp
            # Pairs are counted as areas: the token's own is half a pair.
            seen = min(token + 0.5, window - 0.5 if window <= token else math.inf)
            total += 2 * heads * d * seen
    return 6 * total


@pytest.mark.parametrize("length", [0, 1, 7, 50])
def test_flops_are_those_of_each_product(length):
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
    llama = LlamaConfig(**shape, num_hidden_layers=3, num_key_value_heads=2)
    dense = 3 * 24 * 40
    expected = counted(length, llama, [math.inf] * 3, dense)
    assert train_flops([length], llama) == pytest.approx(expected)
    mixtral = MixtralConfig(
        **shape, num_hidden_layers=2, num_key_value_heads=2, num_experts_per_tok=2
    )
    expected = counted(length, mixtral, [math.inf] * 2, 2 * dense)
    assert train_flops([length], mixtral) == pytest.approx(expected)
    qwen = Qwen3MoeConfig(
        **shape, num_hidden_layers=1, num_key_value_heads=2, moe_intermediate_size=10
    )
    expected = counted(length, qwen, [math.inf], qwen.num_experts_per_tok * 3 * 24 * 10)
    assert train_flops([length], qwen) == pytest.approx(expected)


def test_windows_bound_the_pairs():
    llama, mistral = LlamaConfig(num_hidden_layers=2), MistralConfig(num_hidden_layers=2)
    for config in (llama, mistral):
        config.hidden_size, config.num_key_value_heads, config.head_dim = 64, 4, 8
        config.num_attention_heads, config.intermediate_size = 8, 128
    mistral.sliding_window = 100
    short, exact, long = train_flops([50, 100, 200], mistral)
    assert [short, exact] == train_flops([50, 100], llama).tolist()
    hidden_pairs = 100 * 100 / 2  # the triangle that the window cuts off
    assert train_flops([200], llama)[0] - long == pytest.approx(2 * 12 * 64 * hidden_pairs)
    gemma = Gemma3TextConfig(num_hidden_layers=2, sliding_window=100)
    gemma.layer_types = ["sliding_attention", "full_attention"]
    full = gemma.__class__(num_hidden_layers=2)
    full.layer_types = ["full_attention"] * 2
    q = gemma.num_attention_heads * gemma.head_dim
    saved = train_flops([200], full)[0] - train_flops([200], gemma)[0]
    assert saved == pytest.approx(12 * q * hidden_pairs)


def test_full_attention_is_linear_plus_quadratic():
    a, b, c = train_flops([1, 2, 3], LlamaConfig())
    quadratic = (c - 2 * b + a) / 2
    linear = a - quadratic
    lengths = np.array([10, 5000])
    expected = linear * lengths + quadratic * lengths**2.0
    assert train_flops(lengths, LlamaConfig()) == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="multi-head latent attention"):
        train_flops([1], DeepseekV3Config())
    with pytest.raises(ValueError, match="MambaConfig"):
        train_flops([1], MambaConfig())
    with pytest.raises(ValueError, match=r"lengths\[1\] must .*, got -1"):
        train_flops([1, -1], LlamaConfig())
    with pytest.raises(TypeError, match="dtype float64"):
        train_flops([1.0], LlamaConfig())
