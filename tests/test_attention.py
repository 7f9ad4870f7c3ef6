"""How models attend over trees: the layout of a batch, its masks, and FlexAttention."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo
from tiny_models import (
    WINDOW,
    babyai_tokenizer,
    random_trunks,
    separate_logprobs,
    tiny_agent,
    tiny_model,
)
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from stepagent.acting.inspection import inspect
from stepagent.cli.loading import load_model
from stepagent.data.encoding import Trunk
from stepagent.models import attention, check_tree_support, read_trees, score_trees
from stepagent.models.attention import (
    TREE_ATTENTION,
    attention_masks,
    choose_mask,
    dense_attention,
    lay_out,
    tree_inputs,
)
from stepagent.trees.tree import TokenTree, pack_sequences, pack_step_pairs, parent_rows

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention learns on CUDA")
# Weights so small that float32 itself errs by less than 1e-6.
SHAPE = {"max_position_embeddings": 512, "initializer_range": 0.08}
DENSE = {"gemma2": "eager"}  # sdpa has no soft cap
FAMILIES = ["llama", "mistral", "gemma3_text", "gemma2"]


@pytest.fixture
def trees() -> list[TokenTree]:
    """Of unequal lengths, together longer than two blocks and than a window."""
    trees = pack_step_pairs(*random_trunks(np.random.default_rng(0), 6), max_tokens=150)
    assert [len(tree.input_ids) for tree in trees] == [97, 132, 92]
    return trees


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention on the CPU, as on CUDA: it has a forward there, for lengths that stay."""
    monkeypatch.setattr(
        attention,
        "takes_block_mask",
        lambda model: model.config._attn_implementation == "flex_attention",
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


def gradients(model: torch.nn.Module, values: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(values), dtype=values.dtype, device=values.device)
    (values * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def enable_checkpointing(model: torch.nn.Module) -> None:
    """By the name that this version of transformers does not warn of."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


# ------------------------------------------------------------------ layout


def test_trees_share_a_row_where_that_costs_less(trees):
    model = tiny_model("llama")
    equal = lay_out(model, [trees[0]] * 3)
    assert [len(row.input_ids) for row in equal.rows] == [112] * 3  # 97, aligned
    for i, places in enumerate(equal.places):
        assert places.tolist() == [*range(112 * i, 112 * i + 97)]
    # A long tree and short ones: padding to the longest would be most of the batch.
    short = pack_step_pairs(*random_trunks(np.random.default_rng(1), 1))
    unequal = lay_out(model, [*short * 4, trees[1]])
    (row,) = unequal.rows
    length = len(short[0].input_ids)
    assert np.array_equal(np.concatenate(unequal.places), np.arange(4 * length + 132))
    assert [places[0] for places in unequal.places] == [i * length for i in range(5)]
    assert len(row.input_ids) % 16 == 0
    assert len(row.input_ids) - 4 * length - 132 < 16


@pytest.mark.parametrize("implementation", ["flex_attention", "sdpa"])
def test_a_row_holds_its_trees_side_by_side(implementation, trees, blocks, monkeypatch):
    monkeypatch.setattr(attention, "_dense_cost", lambda rows, width, hidden: rows)
    model = tiny_model("llama", attn_implementation=implementation)
    batch = lay_out(model, trees)
    (row,) = batch.rows
    assert len(row.input_ids) == (384 if implementation == "flex_attention" else 336)  # from 321
    visible, scored, steps = row.attention_mask(torch.bool)[0, 0], 0, 0
    for tree, places in zip(trees, batch.places, strict=True):
        for name in ("input_ids", "position_ids"):
            assert np.array_equal(getattr(row, name)[places], getattr(tree, name))
        inside = visible[places][:, places]
        assert torch.equal(inside, tree.attention_mask(torch.bool)[0, 0])
        assert visible[places].sum() == inside.sum()  # nothing outside
        labels = slice(scored, scored + len(tree.labels))
        assert np.array_equal(row.labels[labels], tree.labels)
        assert np.array_equal(row.label_rows[labels], places[tree.label_rows])
        offsets = row.step_offsets[steps : steps + len(tree.step_offsets)]
        assert np.array_equal(offsets, tree.step_offsets + scored)
        scored, steps = scored + len(tree.labels), steps + len(tree.step_trunk)
    padding = np.setdiff1d(np.arange(len(row.input_ids)), np.concatenate(batch.places))
    assert torch.equal(visible[padding], torch.eye(len(row.input_ids))[padding].bool())
    for name in ("step_trunk", "step_index", "step_branch"):
        whole = np.concatenate([getattr(tree, name) for tree in trees])
        assert np.array_equal(getattr(row, name), whole)


def test_a_block_row_has_its_trunk_before_its_branches(blocks):
    """Then blocks of the trunk are seen whole; in the tree's own order none is."""
    random = np.random.default_rng(0)
    spans = [(start, start + 8) for start in range(40, 2000, 60)]
    trunk = Trunk(random.integers(3, 97, 2000), spans)
    branches = [[random.integers(3, 97, 6), random.integers(3, 97, 30)] for _ in spans]
    (tree,) = pack_step_pairs([trunk], [branches])
    model = tiny_model("llama", attn_implementation="flex_attention")
    batch = lay_out(model, [tree])
    assert np.array_equal(batch.rows[0].input_ids[:2000], trunk.input_ids)
    moved, plain = batch.rows[0].block_mask(), tree.block_mask()
    assert plain.full_kv_num_blocks.sum() == 0
    assert moved.full_kv_num_blocks.sum() > 3 * moved.kv_num_blocks.sum()


@pytest.mark.parametrize("seed", range(20))
def test_another_order_of_children_is_the_same_tree(seed):
    random = np.random.default_rng(seed)
    sequences = [random.integers(0, 3, int(random.integers(1, 12))) for _ in range(30)]
    (tree,) = pack_sequences(sequences, [np.arange(len(s)) > 0 for s in sequences])
    moved, places = attention.heaviest_first(tree)
    assert sorted(places) == [*range(len(tree.input_ids))]
    for window in (None, 3):
        mask = moved.attention_mask(torch.bool, window=window)[0, 0]
        assert torch.equal(
            mask[places][:, places], tree.attention_mask(torch.bool, window=window)[0, 0]
        )
    assert np.array_equal(moved.input_ids[places], tree.input_ids)
    assert np.array_equal(moved.label_rows, places[tree.label_rows])
    sizes = moved.subtree_end - np.arange(len(places))
    parents = parent_rows(moved.position_ids.astype(np.int64))
    for parent in set(parents):
        assert (np.diff(sizes[parents == parent]) <= 0).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_shared_row_gives_what_rows_of_their_own_give(name, trees, monkeypatch):
    model = tiny_model(name, **SHAPE).double()
    rows = [np.array([3, 5]), np.array([], int), np.array([0])]

    def scored() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states, logps = read_trees(model, trees, rows)
        return states, logps, gradients(model, logps)

    assert len(lay_out(model, trees).rows) == 3
    alone = scored()
    monkeypatch.setattr(attention, "_dense_cost", lambda rows, width, hidden: rows)
    assert len(lay_out(model, trees).rows) == 1
    atol = 1e-5 if name == "gemma3_text" else 1e-12  # whose norms compute in float32
    for shared, own in zip(scored(), alone, strict=True):
        torch.testing.assert_close(shared, own, rtol=0, atol=atol)


# ------------------------------------------------------------------ dense masks


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_share_one_additive_mask_of_the_models_dtype(name, dtype, trees):
    model, masks = tiny_model(name).to(dtype), {}

    def note(module, args, kwargs):
        masks.setdefault(module.is_sliding if name == "gemma3_text" else None, []).append(
            kwargs["attention_mask"]
        )

    layers = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    for layer in layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        score_trees(model, trees)
        masks.clear()
        score_trees(model, trees)
    assert sum(len(seen) for seen in masks.values()) == len(layers) == 2
    for first, *others in masks.values():
        assert all(other is first for other in others)
        assert first.dtype == dtype
        assert first.shape[-1] % 16 == 0
        assert (first == 0).any(dim=-1).all()  # no token sees nothing
        assert first.min() == torch.finfo(dtype).min  # finite: such a row would not be NaN


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_additive_masks_equal_boolean_ones(name, trees, monkeypatch):
    model = tiny_model(name, **SHAPE)
    additive = score_trees(model, trees)
    gradient = gradients(model, additive)
    monkeypatch.setattr(attention, "_score_dtype", lambda model: torch.bool)
    boolean = score_trees(model, trees)
    torch.testing.assert_close(additive, boolean, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, gradients(model, boolean), rtol=1e-5, atol=1e-6)


def test_masks_inside_autocast_have_its_dtype(trees):
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        mask = tree_inputs(model, lay_out(model, trees).rows)["attention_mask"]
        assert mask.dtype == torch.bfloat16
        assert bool(torch.isfinite(score_trees(model, trees)).all())


# ------------------------------------------------------------------ FlexAttention


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own imports
@pytest.mark.parametrize("name", FAMILIES)
def test_block_masks_equal_dense_ones(name, trees, blocks):
    dense = tiny_model(name, attn_implementation=DENSE.get(name, "sdpa"), **SHAPE)
    flex = tiny_model(name, attn_implementation="flex_attention", **SHAPE)
    assert max(tree.position_ids.max() for tree in trees) > 2 * WINDOW
    with torch.no_grad():
        expected = score_trees(dense, trees)
        check_tree_support(flex)  # its probe runs under a block mask
        logps = score_trees(flex, trees)
        masks = tree_inputs(flex, lay_out(flex, trees).rows)["attention_mask"]
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        assert isinstance(mask, BlockMask)
        assert mask.seq_lengths == (384, 384)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)
    separate = separate_logprobs(dense, *random_trunks(np.random.default_rng(0), 6))
    torch.testing.assert_close(logps, separate, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_block_masks_in_bfloat16(trees, blocks):
    exact = tiny_model("llama", **SHAPE)
    sdpa = tiny_model("llama", **SHAPE).bfloat16()
    flex = tiny_model("llama", attn_implementation="flex_attention", **SHAPE).bfloat16()
    with torch.no_grad():
        truth = score_trees(exact, trees)
        errors = [(score_trees(model, trees) - truth).abs().mean() for model in (flex, sdpa)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("windows", [[None], [None, 64], [64, 100]])
def test_lengths_and_windows_are_compiled_once(windows, trees, blocks):
    """Once for the first length, once for all others; a window costs nothing but its first."""
    torch._dynamo.reset()
    counter = CompileCounter()  # Dynamo's part, which decides; without compiling the kernels
    compiled = torch.compile(flex_attention, backend=counter)
    model = tiny_model("llama", attn_implementation="flex_attention")
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        for count in (1, 3, 9, 5, 20):
            (row,) = lay_out(model, trees[:1] * count).rows
            q, k, v = torch.zeros(3, 1, 2, len(row.input_ids), 16)
            for window in windows:
                compiled(q, k, v, block_mask=row.block_mask(window=window))
    assert counter.frame_count == (4 if windows == [None, 64] else 2)


def test_many_kinds_of_compilations_stay_compiled(trees, blocks):
    model = tiny_model("llama", attn_implementation="flex_attention")
    with torch._dynamo.config.patch(recompile_limit=8):
        tree_inputs(model, lay_out(model, trees).rows)
        assert torch._dynamo.config.recompile_limit >= 64


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_block_masks_equal_dense_ones(name, dtype, trees):
    shape = {**SHAPE, "head_dim": 16, "query_pre_attn_scalar": 16}
    results = []
    for implementation in (DENSE.get(name, "sdpa"), "flex_attention"):
        model = tiny_model(name, attn_implementation=implementation, **shape).to("cuda", dtype)
        enable_checkpointing(model)
        logps = score_trees(model.train(), trees)
        results.append((logps, gradients(model, logps)))
        assert model.config._attn_implementation == implementation
    (expected, gradient), (logps, flex_gradient) = results
    atol, rtol = (1e-5, 1e-4) if dtype == torch.float32 else (5e-2, 5e-2)
    torch.testing.assert_close(logps, expected, rtol=0, atol=atol)
    assert (flex_gradient - gradient).norm() <= rtol * gradient.norm()


def test_a_block_mask_of_64k_tokens_is_small(blocks):
    trees = pack_step_pairs(*random_trunks(np.random.default_rng(0), 6))
    model = tiny_model("llama", attn_implementation="flex_attention")
    (row,) = lay_out(model, trees * 205).rows
    assert len(row.input_ids) > 2**16
    tensors = [value for value in row.block_mask().as_tuple() if isinstance(value, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) < 80 * len(row.input_ids)


# ------------------------------------------------------------------ where FlexAttention cannot run


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_flex_model_learns_on_a_cpu_as_another_implementation(name, checkpointing, trees, caplog):
    dense = tiny_model(name, attn_implementation=DENSE.get(name, "sdpa"), **SHAPE)
    flex = tiny_model(name, attn_implementation="flex_attention", **SHAPE).train()
    if checkpointing:
        enable_checkpointing(flex)
    with torch.no_grad():
        score_trees(flex, trees)
    assert flex.config._attn_implementation == "flex_attention"  # it may yet move to a GPU
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        logps = score_trees(flex, trees)
    assert f"no backward on cpu: {type(flex).__name__} runs as" in caplog.text
    expected = score_trees(dense, trees)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(gradients(flex, logps), gradients(dense, expected))


def test_inspection_of_a_flex_model_decodes_as_sdpa():
    sdpa, flex = (tiny_model("llama", attn_implementation=a) for a in ("sdpa", "flex_attention"))
    trunks, _ = random_trunks(np.random.default_rng(0), 3)
    options = {"samples": 2, "max_new_tokens": 4, "eos_token_id": 2}
    expected, branches = (inspect(model, trunks, **options) for model in (sdpa, flex))
    ids = [
        [list(sample.token_ids) for steps in found for step in steps for sample in step]
        for found in (expected, branches)
    ]
    assert ids[0] == ids[1]
    assert flex.config._attn_implementation == "flex_attention"


def test_dense_attention_restores_the_implementation_after_an_error():
    model = tiny_model("llama", attn_implementation="flex_attention")

    def fail() -> None:
        with dense_attention(model):
            assert model.config._attn_implementation == "sdpa"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("implementation", TREE_ATTENTION)
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_choice_of_a_mask_says_why(implementation, device):
    choice = choose_mask(implementation, device)
    flex, gpu = implementation == "flex_attention", device != "cpu"
    assert choice.kind == ("block" if flex and gpu else "additive")
    assert ("'flex_attention' needs O(L)" in choice.why) == (gpu and not flex)
    assert ("no backward outside CUDA" in choice.why) == (flex and not gpu)


def test_masks_of_cached_tokens_are_additive_for_every_implementation():
    visible = torch.ones(3, 3).tril().bool()[None]
    depths = torch.arange(3)[None]
    for implementation in TREE_ATTENTION:
        model = tiny_model("llama", attn_implementation=implementation)
        mask = attention_masks(model, visible, depths, depths)
        assert torch.equal(mask == 0, visible[:, None])


def test_the_commands_load_a_model_with_the_attention_asked_for(tmp_path):
    pytest.importorskip("minigrid")  # whose words the tokenizer has
    tiny_agent().save_pretrained(tmp_path)
    babyai_tokenizer().save_pretrained(tmp_path)
    flex, _ = load_model(tmp_path, attn_implementation="flex_attention")
    assert flex.config._attn_implementation == "flex_attention"
    assert load_model(tmp_path)[0].config._attn_implementation == "sdpa"
