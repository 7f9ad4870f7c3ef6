"""Decoding in fixed shapes, what the host is asked for, and the random numbers it is drawn with."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from tiny_models import END, generate, random_trunks, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from stepagent.acting import forest, inspection
from stepagent.acting.decoding import SlotCache, sample_tokens
from stepagent.acting.inspection import default_batch_tokens, inspect
from stepagent.acting.replay import Replay, _warn
from stepagent.data.branch import Branch
from stepagent.data.draws import next_uniforms, streams, uniforms
from stepagent.data.encoding import Trunk
from stepagent.models import check_tree_support, lm_head

ENDS = [END, *range(10, 26)]
NEW = 8
MODELS = ["llama", "mistral", "gemma3_text", "gemma2", "gpt2"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def trunks() -> list[Trunk]:
    rng = np.random.default_rng(3)
    return random_trunks(rng, count=4)[0] + random_trunks(rng, count=2)[0]


@pytest.fixture
def fixed(monkeypatch):
    """On the CPU too, and with every change of shape that can be."""
    monkeypatch.setattr(forest, "_in_fixed_shapes", lambda _model: True)
    monkeypatch.setattr(forest, "_FEW_CELLS", 0)


def flat(branches: list[list[list[Branch]]]) -> list[Branch]:
    return [branch for steps in branches for step in steps for branch in step]


def tokens(branches: list[list[list[Branch]]]) -> list[list[int]]:
    return [branch.token_ids.tolist() for branch in flat(branches)]


def assert_same(found, expected) -> None:
    assert tokens(found) == tokens(expected)
    for one, other in zip(flat(found), flat(expected), strict=True):
        np.testing.assert_allclose(one.logps, other.logps, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ fixed shapes


@pytest.mark.parametrize("budget", [8192, 150, 20])
@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_write_what_generate_writes(name, budget, trunks, fixed):
    model = tiny_model(name)
    found = inspect(
        model,
        trunks,
        max_new_tokens=NEW,
        temperature=0.0,
        eos_token_id=ENDS,
        max_batch_tokens=budget,
    )
    starts = [(trunk, start) for trunk in trunks for start in trunk.action_spans[:, 0]]
    expected = [generate(model, trunk.input_ids[:start], NEW, ENDS) for trunk, start in starts]
    assert tokens(found) == expected
    assert {1, NEW} < {len(action) for action in expected}


@pytest.mark.parametrize("budget", [8192, 150, 20])
@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_change_nothing_that_is_drawn(name, budget, trunks, monkeypatch):
    options = {"samples": 3, "max_new_tokens": NEW, "eos_token_id": ENDS, "seed": 4}
    if budget == 150:
        options |= {"temperature": 1.5, "top_k": 40, "top_p": 0.95}
    model = tiny_model(name)
    expected = inspect(model, trunks, **options)
    monkeypatch.setattr(forest, "_in_fixed_shapes", lambda _model: True)
    for few in (0, 10**6):  # with every change of shape, and with none
        monkeypatch.setattr(forest, "_FEW_CELLS", few)
        assert_same(inspect(model, trunks, **options, max_batch_tokens=budget), expected)


def test_heads_that_share_keys_read_them_once(trunks, fixed, monkeypatch):
    """No copy of keys for each query head, which at every token would move several caches."""
    model = tiny_model("llama")
    shapes = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, *args, attn_mask=None, **kwargs):
        if attn_mask is not None:
            shapes.add((query.shape[1], key.shape[1], attn_mask.shape[2] // query.shape[2]))
        return attention(query, key, value, *args, attn_mask=attn_mask, **kwargs)

    check_tree_support(model)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    inspect(model, trunks, max_new_tokens=NEW, eos_token_id=ENDS)
    assert shapes == {(2, 2, 1)}  # of 4 query heads and 2 key heads
    assert model.config._attn_implementation == "sdpa"


def test_branches_that_have_ended_stay_within_the_positions_of_the_model(fixed, monkeypatch):
    """They are fillers for as long as others grow; GPT-2 has no embedding of a position more."""
    monkeypatch.setattr(forest, "_FEW_CELLS", 10**6)
    trunk = random_trunks(np.random.default_rng(3), count=4)[0][-1]
    model = tiny_model("gpt2", n_positions=int(trunk.action_spans[-1, 0]) + NEW)
    options = {"samples": 4, "max_new_tokens": NEW, "eos_token_id": ENDS}
    found = inspect(model, [trunk], **options)
    assert {1, NEW} < {len(branch.token_ids) for branch in found[0][-1]}


class Shapes(SlotCache):
    """Notes the shapes of its forwards."""

    seen: list[tuple[int, ...]]

    def write(self, tokens_BQ, depths_BQ, visible_BQS, slots_Q):
        self.seen.append(tuple(visible_BQS.shape))
        return super().write(tokens_BQ, depths_BQ, visible_BQS, slots_Q)


def test_few_shapes_are_seen_and_ended_branches_are_dropped(trunks, fixed, monkeypatch):
    monkeypatch.setattr(forest, "SlotCache", Shapes)
    Shapes.seen = []
    options = {"samples": 16, "max_new_tokens": 40, "eos_token_id": ENDS}
    inspect(tiny_model("llama"), trunks, **options, max_batch_tokens=10**5)
    runs = [(shape, len(list(group))) for shape, group in itertools.groupby(Shapes.seen)]
    cells = [rows * columns for (rows, columns, _), _ in runs]
    assert all(later <= earlier / 2 for earlier, later in itertools.pairwise(cells))
    assert len({room for (_, _, room), _ in runs}) == 1
    assert runs[0][0][2] % 16 == 0
    assert runs[-1][0][0] < runs[0][0][0] == len(trunks)  # rows, too
    assert len(runs) >= 4
    assert len(Shapes.seen) > 2 * len(runs)


# ------------------------------------------------------------------ what the host asks


class NoHostReads(TorchDispatchMode):
    """Fails at every operation whose result, or its shape, the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [a for a in args[1] if a is not None] if name in ("index", "index_put_") else []
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"}
        assert name not in waits, name
        assert not any(mask.dtype == torch.bool for mask in masks), "an index by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_asks_the_host_once(temperature, trunks, fixed, monkeypatch):
    model = tiny_model("llama")
    check_tree_support(model)
    reads, forwards = [], []
    real = forest.read
    monkeypatch.setattr(forest, "read", lambda status: reads.append(status) or real(status))
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    options = {"samples": 2, "max_new_tokens": NEW, "temperature": temperature}
    with NoHostReads():
        inspect(model, trunks, **options, eos_token_id=ENDS)
    # One for each forward but the prefill, and at most one for each token along the trunk.
    along = max(int(np.diff(trunk.action_spans).max()) for trunk in trunks) + 1
    assert len(forwards) - 1 <= len(reads) <= len(forwards) - 1 + along
    assert {status.dtype for status in reads} == {torch.int8}
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="by a mask"), NoHostReads():
        torch.ones(2)[torch.tensor([True, False])]


@pytest.mark.parametrize("in_fixed_shapes", [False, True])
def test_logits_that_are_not_finite_stop_a_branch_wherever_it_is(in_fixed_shapes, monkeypatch):
    """A token that no trunk holds makes NaN: it is met only after it has been drawn."""
    monkeypatch.setattr(forest, "_in_fixed_shapes", lambda _model: in_fixed_shapes)
    model = tiny_model("llama")
    trunk = Trunk(np.arange(30, 40), [(4, 5), (8, 10)])
    options = {"max_new_tokens": NEW, "temperature": 0.0, "eos_token_id": END}
    first = inspect(model, [trunk], **options)[0][0][0].token_ids[0]
    assert first not in trunk.input_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[first] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        inspect(model, [trunk], **options)


# ------------------------------------------------------------------ random numbers


def splitmix(seed: int, *keys: int) -> float:
    """One number, in Python's own integers."""

    def mix(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        return state ^ (state >> 31)

    state = mix(seed % 2**64)
    for key in keys:
        state = mix(state ^ mix(key % 2**64))
    return (state >> 11) * 2.0**-53


HOSTILE = [0, 1, -1, 2**31, -(2**31), 2**53 + 1, 2**62, 2**63 - 1, -(2**63), 0x9E3779B9]


def test_torch_and_numpy_draw_the_same_bits():
    keys = np.array(list(itertools.product(HOSTILE, HOSTILE[::-1])), np.int64).T
    for seed in HOSTILE:
        expected = np.array([splitmix(seed, int(a), int(b)) for a, b in keys.T])
        assert (uniforms(seed, *keys) == expected).all()
        states = torch.from_numpy(streams(seed, keys[0]))
        found = next_uniforms(states, torch.from_numpy(keys[1]))
        assert found.dtype == torch.float64
        assert (found.numpy() == expected).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 511, 512, 513, 5000])
def test_the_token_is_the_one_whose_share_of_the_softmax_holds_the_number(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(60, vocabulary, generator=generator)
    forbidden = torch.rand(60, vocabulary, generator=generator) < 0.5
    forbidden[torch.arange(60), logits.argmax(1)] = False
    logits = logits.masked_fill(forbidden, -torch.inf)
    numbers = torch.rand(60, generator=generator, dtype=torch.float64)
    numbers[:4] = torch.tensor([0.0, 1 - 2.0**-53, 2.0**-53, 0.5], dtype=torch.float64)
    picked = sample_tokens(logits, 0.8, numbers)[:, None]
    shares = torch.softmax(logits.double() / 0.8, dim=1)
    ends = shares.cumsum(1).gather(1, picked).squeeze(1)
    share = shares.gather(1, picked).squeeze(1)
    assert (share > 0).all()
    assert (ends > numbers - 1e-12).all()
    assert (ends - share < numbers + 1e-12).all()


def test_a_row_of_nan_gives_a_token_of_the_vocabulary():
    logits = torch.full((3, 700), torch.nan)
    for temperature in (0.0, 1.0):
        picked = sample_tokens(logits, temperature, torch.full((3,), 0.9, dtype=torch.float64))
        assert ((picked >= 0) & (picked < 700)).all()


# ------------------------------------------------------------------ budget and head


def test_the_budget_counts_the_cache_and_a_forward():
    assert default_batch_tokens(tiny_model("llama")) == 8192
    for name in MODELS:
        model = tiny_model(name)
        cache = SlotCache(model, 1)
        with torch.no_grad():
            cache.prefill(torch.ones(1, 5, dtype=torch.long))
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache._cache.layers)
        assert kept / 5 < inspection._bytes_per_token(model) < 10 * kept


def test_autocast_does_not_round_the_logits():
    head = lm_head(tiny_model("llama"))
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head.logits(hidden)
        rounded = hidden @ head.weight_VH.T
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head.logits(hidden))
    assert not torch.equal(rounded.float(), inside)


# ------------------------------------------------------------------ replay


def test_without_a_gpu_a_step_runs_each_time():
    replay, calls = Replay(torch.device("cpu")), []
    for n in range(3):
        assert int(replay(lambda: calls.append(1) or torch.tensor(len(calls)))) == n + 1


@cuda
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_gpu_replays_and_draws_what_the_cpu_draws(name, trunks, monkeypatch, caplog):
    options = {"samples": 8, "max_new_tokens": NEW, "eos_token_id": ENDS}
    expected = inspect(tiny_model(name), trunks, **options)
    replays = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or real(graph)
    )
    with caplog.at_level(logging.WARNING):
        found = inspect(tiny_model(name).cuda(), trunks, **options)
    assert not caplog.records
    assert replays
    assert tokens(found) == tokens(expected)
    for one, other in zip(flat(found), flat(expected), strict=True):
        np.testing.assert_allclose(one.logps, other.logps, rtol=0, atol=1e-3)


@cuda
def test_a_step_that_waits_for_the_host_is_run_as_it_is_and_said_once(caplog):
    _warn.cache_clear()
    device = torch.device("cuda")
    total = torch.zeros((), device=device)

    def step() -> torch.Tensor:
        return total.add_(1 if bool(total >= 0) else 2).clone()

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            replay = Replay(device)
            for _ in range(3):
                replay(step)
    assert total.item() == 6
    assert len([r for r in caplog.records if "without a CUDA graph" in r.message]) == 1


@cuda
def test_a_gpu_multiplies_halves_into_float32_without_a_copy_of_the_head():
    head = lm_head(tiny_model("llama", vocab_size=20000).cuda().bfloat16())
    hidden = torch.randn(5, 32, device="cuda").bfloat16()
    expected = hidden.double() @ head.weight_VH.double().T
    head.logits(hidden)  # takes cuBLAS its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits = head.logits(hidden)
    peak = torch.cuda.max_memory_allocated()
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
    assert peak - before < head.weight_VH.nbytes
