"""Branch decoding: what `model.generate` writes state by state, from one prefill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import END, VOCAB, generate, random_trunks, tiny_model

from stepagent.acting import forest
from stepagent.acting.decoding import SlotCache, make_truncations, sample_tokens
from stepagent.acting.inspection import inspect
from stepagent.data.branch import Branch
from stepagent.data.draws import uniforms
from stepagent.data.encoding import Trunk
from stepagent.data.ends import model_ends
from stepagent.models import check_tree_support, score_trees
from stepagent.trees.tree import pack_step_pairs

# So many tokens end an action that actions of all lengths come about.
ENDS = [END, *range(10, 26)]
NEW = 8


@pytest.fixture(scope="module")
def trunks() -> list[Trunk]:
    rng = np.random.default_rng(3)
    return random_trunks(rng, count=4)[0] + random_trunks(rng, count=2)[0]


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square test at about 1 in 1000, by the Wilson-Hilferty approximation."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    assert (statistic / freedom) ** (1 / 3) < 1 - spread + 3.1 * spread**0.5


def flat(branches: list[list[list[Branch]]]) -> list[Branch]:
    return [branch for steps in branches for step in steps for branch in step]


def tokens(branches: list[list[list[Branch]]]) -> list[list[int]]:
    return [branch.token_ids.tolist() for branch in flat(branches)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gemma3_text"])
def test_greedy_branches_are_what_generate_writes_state_by_state(name, trunks):
    model = tiny_model(name)
    trunks = [*trunks, *random_trunks(np.random.default_rng(4), count=2)[0]]

    def greedy(trunks, **options):
        options |= {"max_new_tokens": NEW, "temperature": 0.0, "eos_token_id": ENDS}
        return tokens(inspect(model, trunks, **options))

    expected = [
        generate(model, trunk.input_ids[:start], NEW, ENDS)
        for trunk in trunks
        for start in trunk.action_spans[:, 0]
    ]
    assert greedy(trunks) == expected  # eight in one batch
    assert greedy(trunks, max_batch_tokens=150) == expected  # a few in a batch
    assert greedy(trunks, max_batch_tokens=20) == expected  # in pieces
    assert [ids for trunk in trunks for ids in greedy([trunk])] == expected
    lengths = {len(action) for action in expected}
    assert {1, NEW} < lengths  # some end at once, some are cut


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("max_batch_tokens", [8192, 20])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5, "top_p": 0.8, "min_p": 0.05}])
def test_logps_are_those_of_the_same_branches_scored_on_a_tree(
    name, max_batch_tokens, truncation, trunks
):
    model = tiny_model(name)
    branches = inspect(
        model,
        trunks,
        samples=3,
        max_new_tokens=NEW,
        temperature=0.7,
        eos_token_id=ENDS,
        max_batch_tokens=max_batch_tokens,
        **truncation,
    )
    trees = pack_step_pairs(trunks, branches)  # as it is
    tried = np.concatenate([np.repeat(t.step_branch, np.diff(t.step_offsets)) for t in trees]) > 0
    with torch.no_grad():
        scored = score_trees(model, trees).numpy()[tried]
    logps = np.concatenate([branch.logps for branch in flat(branches)])
    np.testing.assert_allclose(logps, scored, rtol=0, atol=1e-4)
    assert logps.dtype == np.float32


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_expert_step_gets_exactly_the_samples_asked_for(samples, temperature, trunks):
    branches = inspect(
        tiny_model("llama"),
        trunks,
        samples=samples,
        max_new_tokens=NEW,
        temperature=temperature,
        eos_token_id=ENDS,
    )
    assert [[len(step) for step in steps] for steps in branches] == [
        [samples] * trunk.num_steps for trunk in trunks
    ]
    for branch in flat(branches):
        assert branch.token_ids.dtype == np.int32
        assert len(branch.token_ids) == len(branch.logps) <= NEW
        ended = np.isin(branch.token_ids, ENDS)
        assert not ended[:-1].any()
        assert ended[-1] or len(branch.token_ids) == NEW


def test_no_trunks_give_no_branches():
    assert inspect(tiny_model("llama"), [], max_new_tokens=3) == []


def test_the_models_own_end_tokens_are_the_default(trunks):
    model = tiny_model("llama", eos_token_id=ENDS)
    assert model_ends(model, None) == ENDS
    assert tokens(inspect(model, trunks, max_new_tokens=NEW, seed=1)) == tokens(
        inspect(model, trunks, max_new_tokens=NEW, seed=1, eos_token_id=ENDS)
    )
    assert model_ends(model, 5) == [5]
    assert model_ends(model, np.int64(5)) == [5]
    assert model_ends(model, torch.tensor([5, 6])) == [5, 6]


def test_the_model_keeps_its_mode(trunks):
    model = tiny_model("llama").train()
    inspect(model, trunks[:1], max_new_tokens=2, eos_token_id=ENDS)
    assert model.training


def test_dropout_is_off(trunks):
    dropout = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    still, noisy = tiny_model("gpt2"), tiny_model("gpt2", **dropout).train()
    greedy = {"max_new_tokens": NEW, "temperature": 0.0, "eos_token_id": ENDS}
    assert tokens(inspect(noisy, trunks, **greedy)) == tokens(inspect(still, trunks, **greedy))


# ------------------------------------------------------------------ sampling


@pytest.mark.parametrize("truncation", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}])
def test_samples_depend_on_seed_and_place_and_not_on_the_batch(truncation, trunks):
    model = tiny_model("llama")

    def sampled(trunks=trunks, **options):
        options = {"samples": 3, "max_new_tokens": NEW, "eos_token_id": ENDS, "seed": 5} | options
        return inspect(model, trunks, **options, **truncation)

    first = sampled()
    assert tokens(sampled()) == tokens(first)
    for budget in (300, 40):
        assert tokens(sampled(max_batch_tokens=budget)) == tokens(first)
    # Fewer trunks and fewer samples: those that stay are the same.
    assert tokens(sampled(trunks[:2])) == tokens(first[:2])
    fewer = [[step[:2] for step in steps] for steps in first]
    assert tokens(sampled(samples=2)) == tokens(fewer)
    assert tokens(sampled(seed=6)) != tokens(first)
    # A part of the trunks, told its place, is that part of the whole.
    assert tokens(sampled(trunks[2:], first_trunk=2)) == tokens(first[2:])
    assert tokens(sampled(trunks[2:])) != tokens(first[2:])
    part = sampled([trunks[2], trunks[0]], places=[2, 0])
    assert tokens(part) == tokens([first[2], first[0]])
    with pytest.raises(ValueError, match=f"places must have {len(trunks)} entries"):
        sampled(places=[0])
    # One state asked twice is two draws.
    twice = sampled([trunks[0], trunks[0]])
    assert tokens(twice[:1]) != tokens(twice[1:])
    assert len({tuple(ids) for ids in tokens(first)}) > len(tokens(first)) / 2


def drawn(seed: int, *keys) -> torch.Tensor:
    return torch.from_numpy(uniforms(seed, *keys))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_sampled_frequencies_are_the_softmax(temperature):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    draws = 20_000
    numbers = drawn(7, np.arange(draws), 3, 1)
    picked = sample_tokens(logits.expand(draws, -1), temperature, numbers)
    counts = np.bincount(picked.numpy(), minlength=12)
    assert_drawn_from(counts, torch.softmax(logits.double() / temperature, 0).numpy())
    with pytest.raises(AssertionError):  # the test tells another temperature from this one
        assert_drawn_from(counts, torch.softmax(logits.double() / temperature / 1.1, 0).numpy())


TRUNCATIONS = [
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.25},
]


def truncated(probabilities, top_k=None, top_p=None, min_p=None):
    """The distribution that is left, by the words of the definition, one token at a time."""
    p = np.array(probabilities)
    if top_k is not None:
        p[np.argsort(-p)[top_k:]] = 0
        p /= p.sum()
    if top_p is not None:
        before = 0.0  # probability of the likelier tokens: enough of it, and the rest goes
        for token in np.argsort(-p):
            mass, p[token] = p[token], p[token] if before < top_p else 0
            before += mass
        p /= p.sum()
    if min_p is not None:
        p[p < min_p * p.max()] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_truncated_frequencies_are_those_of_the_tokens_left(truncation):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    whole = torch.softmax(logits.double() / 1.3, 0).numpy()
    expected = truncated(whole, **truncation)
    options = [truncation.get(name) for name in ("top_k", "top_p", "min_p")]
    draws = 20_000
    numbers = drawn(8, np.arange(draws), 3, 1)
    picked = sample_tokens(logits.expand(draws, -1), 1.3, numbers, make_truncations(*options))
    counts = np.bincount(picked.numpy(), minlength=12)
    left = expected > 0
    assert 2 <= left.sum() < 12
    assert counts[~left].sum() == 0
    assert_drawn_from(counts[left], expected[left])
    with pytest.raises(AssertionError):  # the test tells the whole distribution from this one
        assert_drawn_from(counts, whole)


def test_truncation_comes_in_the_order_of_generate():
    """top_p = 0.6 keeps one token of the best three renormalised, and three of all."""
    logits = torch.tensor([[0.4, 0.15, 0.11, 0.1, 0.09, 0.08, 0.07]]).log().expand(1000, -1)
    picked = sample_tokens(logits, 1.0, drawn(0, np.arange(1000)), make_truncations(3, 0.6, None))
    assert set(picked.tolist()) == {0}


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_truncation_leaves_greedy_actions_alone(truncation, trunks):
    options = {"max_new_tokens": NEW, "temperature": 0.0, "eos_token_id": ENDS}
    model = tiny_model("llama")
    plain = inspect(model, trunks, **options)
    assert tokens(inspect(model, trunks, **options, **truncation)) == tokens(plain)


def test_one_token_left_is_the_greedy_one(trunks):
    options = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    model = tiny_model("llama")
    greedy = tokens(inspect(model, trunks, temperature=0.0, **options))
    for truncation in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert tokens(inspect(model, trunks, temperature=2.0, **truncation, **options)) == greedy


def test_sampling_never_picks_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    numbers = torch.tensor([0.0, 0.5 - 1e-9, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_tokens(logits, 1.0, numbers).tolist() == [1, 1, 3, 3]


def test_inspected_actions_follow_the_policy():
    """The first token of many samples at one state, against the model's own distribution."""
    model = tiny_model("llama", vocab_size=20, initializer_range=0.15)
    trunk = Trunk(np.array([3, 7, 11, 4, 9]), [(4, 5)])
    draws = 5000
    branches = inspect(model, [trunk], samples=draws, max_new_tokens=1, max_batch_tokens=10**6)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3, 7, 11, 4]])).logits[0, -1]
    counts = np.bincount([int(b.token_ids[0]) for b in branches[0][0]], minlength=20)
    assert_drawn_from(counts, torch.softmax(logits.double(), 0).numpy())


def test_uniforms_are_uniform_and_keyed():
    grid = np.meshgrid(np.arange(40), np.arange(30), np.arange(10), indexing="ij")
    numbers = uniforms(0, *grid)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    assert_drawn_from(np.histogram(numbers, bins=50, range=(0, 1))[0], np.full(50, 0.02))
    for axis in range(3):  # neighbours along a key are independent
        keyed = np.moveaxis(numbers, axis, 0)
        assert abs(np.corrcoef(keyed[1:].ravel(), keyed[:-1].ravel())[0, 1]) < 0.03
    assert uniforms(1, 2, 3) != uniforms(1, 3, 2)
    assert uniforms(-1, 2) == uniforms(-1, 2)
    # A number alone is the number in an array.
    assert uniforms(0, 5, 7, 2) == numbers[5, 7, 2]


# ------------------------------------------------------------------ along the trunk


def followed_trunk(model, wanted: list[int]) -> Trunk:
    """A trunk whose action at each step begins with so many tokens of the model's own, greedily."""
    rng = np.random.default_rng(8)
    ids, spans = [int(i) for i in rng.integers(30, VOCAB, 5)], []
    for count in wanted:
        own = generate(model, np.array(ids), NEW, ENDS)
        action = own[:count]
        if count < len(own):  # then it goes another way
            action = [*action, next(i for i in range(30, VOCAB) if i != own[count]), 31]
        spans.append((len(ids), len(ids) + len(action)))
        ids += [*action, *(int(i) for i in rng.integers(30, VOCAB, 3))]
    return Trunk(ids, spans)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
@pytest.mark.parametrize("max_batch_tokens", [8192, 20])
def test_an_agent_that_follows_the_expert_for_a_while_writes_what_generate_writes(
    name, max_batch_tokens
):
    model = tiny_model(name)
    trunk = followed_trunk(model, [0, NEW, 1, 2, NEW, 3])
    options = {"max_new_tokens": NEW, "temperature": 0.0, "eos_token_id": ENDS}
    both = inspect(model, [trunk, trunk], **options, max_batch_tokens=max_batch_tokens)
    expected = [generate(model, trunk.input_ids[:a], NEW, ENDS) for a, _ in trunk.action_spans]
    assert tokens(both) == 2 * expected
    (tree,) = pack_step_pairs([trunk], both[:1])
    scored = np.split(score_trees(model, [tree]).detach().numpy(), tree.step_offsets[1:-1])[1::2]
    for branch, logps in zip(flat(both[:1]), scored, strict=True):
        np.testing.assert_allclose(branch.logps, logps, rtol=0, atol=1e-4)


def test_an_agent_that_does_as_the_expert_does_needs_no_forward_of_its_own():
    model = tiny_model("llama")
    check_tree_support(model)  # which probes it once
    forwards = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    counts = {}
    for wanted in ([NEW] * 6, [NEW, NEW, 0, NEW, NEW, NEW], [0] * 6):
        trunk = followed_trunk(model, wanted)
        forwards.clear()
        (steps,) = inspect(
            model, [trunk], max_new_tokens=NEW, temperature=0.0, eos_token_id=ENDS, samples=2
        )
        counts[wanted.count(NEW)] = len(forwards)
        same = [
            branch.token_ids.tolist() == trunk.input_ids[a:b].tolist()
            for (a, b), step in zip(trunk.action_spans, steps, strict=True)
            for branch in step
        ]
        assert sum(same) == 2 * wanted.count(NEW)
    hook.remove()
    assert counts[6] == 1
    assert counts[5] > 1


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_the_expert_does_at_a_state_does_not_change_what_the_agent_does_there(name):
    model = tiny_model(name)
    rng = np.random.default_rng(2)
    before = rng.integers(30, VOCAB, 12).tolist()
    options = {"samples": 40, "max_new_tokens": NEW, "eos_token_id": ENDS, "temperature": 0.7}
    drawn = []
    for action in ([33, 34, 35], [*generate(model, np.array(before), NEW, ENDS)], [36]):
        trunk = Trunk([*before, *action], [(3, 5), (12, 12 + len(action))])
        (steps,) = inspect(model, [trunk], **options)
        drawn.append([branch.token_ids.tolist() for branch in steps[1]])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({tuple(ids) for ids in drawn[0]}) > 10


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
@pytest.mark.parametrize("budget", [300, 90, 40, 7])
def test_a_budget_bounds_the_cache_and_the_forward_and_changes_nothing(name, budget, monkeypatch):
    model = tiny_model(name)
    ids = np.random.default_rng(5).integers(3, VOCAB, 84)
    trunk = Trunk(ids, [(start, start + 4) for start in (9, 20, 31, 45, 60, 80)])
    caches, forwards = [], []

    class Recorded(SlotCache):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            caches.append(self._cache)

    def sampled(budget):
        return inspect(
            model,
            [trunk],
            samples=3,
            max_new_tokens=NEW,
            eos_token_id=ENDS,
            max_batch_tokens=budget,
        )

    whole = sampled(8192)
    monkeypatch.setattr(forest, "SlotCache", Recorded)
    hook = model.register_forward_pre_hook(
        lambda _model, _args, inputs: forwards.append(inputs["input_ids"].numel()),
        with_kwargs=True,
    )
    parts = sampled(budget)
    hook.remove()
    assert tokens(parts) == tokens(whole)
    for part, one in zip(flat(parts), flat(whole), strict=True):
        np.testing.assert_allclose(part.logps, one.logps, rtol=0, atol=1e-5)

    # The trunk is read to the end of its last action; a branch's last token is never encoded.
    states, branches, branch = 84, 18, NEW - 1
    (cache,) = caches
    slots = {
        layer.keys.untyped_storage().nbytes() // layer.keys[:, :, 0].nbytes
        for layer in cache.layers
    }
    assert len(slots) == 1
    bound = max(budget, states + max(budget // 2, branch))
    assert states + branch <= slots.pop() <= min(bound, states + branches * branch)
    assert max(forwards) == min(budget, states)


def test_logits_exist_for_a_few_rows_at_a_time(trunks, monkeypatch):
    options = {"samples": 3, "max_new_tokens": NEW, "eos_token_id": ENDS}
    model = tiny_model("llama")
    whole = inspect(model, trunks, **options)
    monkeypatch.setattr(forest, "_LOGITS", 2 * VOCAB)
    parts = inspect(model, trunks, **options)
    assert tokens(parts) == tokens(whole)
    for part, one in zip(flat(parts), flat(whole), strict=True):
        np.testing.assert_allclose(part.logps, one.logps, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ the cache


def test_a_cache_extended_in_pieces_gives_the_states_of_one_forward():
    model = tiny_model("mistral")
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    depths = torch.arange(20).expand(2, -1)
    causal = torch.ones(20, 20).tril().bool().expand(2, -1, -1)
    with torch.no_grad():
        whole = SlotCache(model, 2).extend(ids, depths, causal)
        cache, pieces = SlotCache(model, 2), []
        for a, b in [(0, 5), (5, 6), (6, 20)]:
            pieces.append(cache.extend(ids[:, a:b], depths[:, a:b], causal[:, a:b, :b]))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)


def test_a_cache_keeps_only_the_rows_asked_for():
    model = tiny_model("llama")
    ids = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    depths = torch.arange(6).expand(3, -1)
    causal = torch.ones(6, 6).tril().bool().expand(3, -1, -1)
    with torch.no_grad():
        cache = SlotCache(model, 3)
        whole = cache.extend(ids, depths, causal)
        cache = SlotCache(model, 3)
        cache.extend(ids[:, :4], depths[:, :4], causal[:, :4, :4])
        rows = torch.tensor([2, 0])
        cache.keep_rows(rows)
        rest = cache.extend(ids[rows, 4:], depths[:2, 4:], causal[:2, 4:])
    torch.testing.assert_close(rest, whole[rows, 4:], rtol=0, atol=1e-5)


def test_a_cache_filled_in_pieces_and_cut_back_gives_the_states_of_one_forward():
    model = tiny_model("gemma3_text")
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = SlotCache(model, 2).prefill(ids)
        cache = SlotCache(model, 2, slots=12)  # it must grow
        pieces = [cache.prefill(ids[:, a:b]) for a, b in [(0, 5), (5, 6), (6, 20)]]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
        cache.truncate(8)
        assert cache.slots == 8
        torch.testing.assert_close(cache.prefill(ids[:, 8:]), whole[:, 8:], rtol=0, atol=1e-5)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"samples": 1.5}, r"samples must be a whole number >= 1, got 1\.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and >= 0, got inf"),
        ({"temperature": -1.0}, r"temperature must be finite and >= 0, got -1\.0"),
        ({"max_new_tokens": 200}, r"trunks\[0\] with max_new_tokens=200 must fit .*embeddings=128"),
        ({"top_k": 0}, "top_k must be a whole number >= 1, got 0"),
        ({"top_k": 2.5}, r"top_k must be a whole number >= 1, got 2\.5"),
        ({"top_p": 0.0}, r"top_p must be > 0 and <= 1, got 0\.0"),
        ({"top_p": 1.1}, r"top_p must be > 0 and <= 1, got 1\.1"),
        ({"top_p": float("nan")}, "top_p must be > 0 and <= 1, got nan"),
        ({"min_p": -0.1}, r"min_p must be >= 0 and <= 1, got -0\.1"),
        ({"min_p": 1.5}, r"min_p must be >= 0 and <= 1, got 1\.5"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be a whole number >= 1, got 0"),
        ({"eos_token_id": []}, "no token ends an action"),
    ],
)
def test_an_option_out_of_range_is_named(options, message, trunks):
    options = {"max_new_tokens": 4, "eos_token_id": ENDS} | options
    with pytest.raises(ValueError, match=message):
        inspect(tiny_model("llama"), trunks, **options)


def test_a_model_that_names_no_end_token_needs_one(trunks):
    with pytest.raises(ValueError, match="pass the id of the end-of-turn token"):
        inspect(tiny_model("llama", eos_token_id=None), trunks, max_new_tokens=4)


def test_a_trunk_that_does_not_fit_the_model_is_named(trunks):
    fitting = Trunk(np.full(20, 3), [(4, 5)])
    long = Trunk(np.full(129, 3), [(4, 5)])
    with pytest.raises(ValueError, match=r"trunks\[1\].*got 129 positions"):
        inspect(tiny_model("llama"), [fitting, long], max_new_tokens=4)
    foreign = Trunk(np.full(20, VOCAB), [(4, 5)])
    with pytest.raises(ValueError, match=rf"trunks\[1\].*below vocab_size={VOCAB}, got {VOCAB}"):
        inspect(tiny_model("llama"), [fitting, foreign], max_new_tokens=4)


def test_a_refused_model_is_refused_here_too(trunks):
    jamba = {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    with pytest.raises(ValueError, match="JambaForCausalLM"):
        inspect(tiny_model("jamba", **jamba), trunks, max_new_tokens=4)


@pytest.mark.parametrize("after_check", [False, True])
def test_nan_weights_stop_before_anything_is_sampled(after_check, trunks):
    model = tiny_model("llama")
    if after_check:
        inspect(model, trunks[:1], max_new_tokens=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        inspect(model, trunks, max_new_tokens=4)


def test_a_nan_head_stops_before_anything_is_sampled(trunks):
    model = tiny_model("llama")
    inspect(model, trunks[:1], max_new_tokens=1)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        inspect(model, trunks, max_new_tokens=4)
