"""Pairs of trajectories as trees: the same sums, losses and gradients as of sequences apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversations import tokenizer_of
from tiny_models import VOCAB, random_trunks, tiny_model

import stepagent as sa
from stepagent.data.trunk import Trunk
from stepagent.learning.cycle import (
    CHOSEN,
    REJECTED,
    Comparison,
    load_comparisons,
    naive_tokens,
    pack_with_steps,
    save_comparisons,
    unique_tokens,
)
from stepagent.learning.trajectory_pairs import Rival, compared_with, trajectory_pair
from stepagent.models import score_trees

CHOSEN_IDS = [1, 5, 6, 7, 8, 9, 10, 11, 12]
A = Trunk(CHOSEN_IDS, [(2, 4), (6, 7), (8, 9)])
B = Trunk([1, 5, 6, 7, 8, 9, 20, 21, 22, 23], [(2, 4), (6, 7), (8, 10)])


def pairs_of_random_trunks(count: int = 6, seed: int = 0) -> list[tuple[Trunk, Trunk]]:
    """Pairs that part at any step, within an action or at its first token."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        one, other = (random_trunks(rng, 4, VOCAB)[0][3] for _ in range(2))
        step = int(rng.integers(0, 4))
        start, stop = one.action_spans[step].tolist()
        cut = int(rng.integers(start, stop))
        begins = int(other.action_spans[0, 0])
        ids = np.concatenate([one.input_ids[:cut], other.input_ids[begins:]])
        moved = cut - begins
        spans = np.concatenate([one.action_spans[:step], other.action_spans + moved])
        spans[step, 0] = start
        pairs.append((one, Trunk(ids, spans)))
    return pairs


def apart(model: torch.nn.Module, trunk: Trunk, first: int = 0) -> torch.Tensor:
    """Σ log π of the actions from ``first`` on: each line of the trunk in a forward of its own."""
    total, step = torch.zeros((), dtype=torch.float64), 0
    for line in trunk.lines():
        ids = torch.tensor(line.input_ids.tolist())
        table = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for start, stop in line.action_spans.tolist():
            if step >= first:
                total = total + table[torch.arange(start - 1, stop - 1), ids[start:stop]].sum()
            step += 1
    return total


def on_trees(model: torch.nn.Module, comparisons: list[Comparison]) -> Any:
    trees, steps = pack_with_steps(comparisons, 100_000)
    return sa.step_sums(score_trees(model, trees), steps.offsets), steps


# ------------------------------------------------------------------ as it is worked out by hand


def test_a_pair_is_one_trunk_that_goes_back_to_where_they_part():
    pair = trajectory_pair(A, B)
    # The state's last token, 9, is there again: it predicts the action.
    assert pair.trunk.input_ids.tolist() == [*CHOSEN_IDS, 9, 20, 21, 22, 23]
    assert pair.trunk.rewinds.tolist() == [[9, 5]]
    assert pair.trunk.action_spans.tolist() == [[2, 4], [6, 7], [8, 9], [10, 11], [12, 14]]
    assert pair.sides_KT.tolist() == [[3, 1, 1, 2, 2]]
    assert pair.expert_T.tolist() == [True, True, True, False, False]
    assert unique_tokens([pair], 100) == 14
    assert naive_tokens([pair]) == 9 + 10


def test_sums_of_a_side_are_of_its_own_steps():
    _, steps = pack_with_steps([trajectory_pair(A, B), trajectory_pair(B, A, first=1)], 100)
    values_S = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    assert steps.side_sums(values_S, CHOSEN).tolist() == [2 + 4, 64 + 128]
    assert steps.side_sums(values_S, REJECTED).tolist() == [8 + 16, 256 + 512]
    # Step 0 of the second pair is before its suffixes.
    assert steps.side_sums(values_S, CHOSEN | REJECTED).tolist() == [1, 0]
    assert steps.trajectory_pairs == steps.counts().pairs == 2


def test_the_rivals_of_one_trajectory_share_its_tree():
    c = Trunk([1, 5, 30, 31, 32], [(2, 3), (4, 5)])
    pair = compared_with(A, [Rival(c, preferred=True), Rival(B, first=1)])
    assert pair.sides_KT.tolist() == [[2, 2, 2, 0, 0, 1, 1], [0, 1, 1, 2, 2, 0, 0]]
    assert pair.trunk.rewinds.tolist() == [[9, 5], [14, 1]]
    assert unique_tokens([pair], 100) == 9 + 5 + 4


def test_a_side_that_goes_on_where_the_other_ends_is_that_other_and_more():
    pair = trajectory_pair(A.first_steps(2), A)
    assert pair.trunk.input_ids.tolist() == CHOSEN_IDS
    assert len(pair.trunk.rewinds) == 0
    assert pair.sides_KT.tolist() == [[3, 3, 2]]
    assert trajectory_pair(A, A.first_steps(2)).sides_KT.tolist() == [[3, 3, 1]]
    assert trajectory_pair(A, A).sides_KT.tolist() == [[3, 3, 3]]


def test_the_first_steps_of_a_trunk_end_with_an_action():
    assert A.first_steps(2).input_ids.tolist() == CHOSEN_IDS[:7]
    assert A.first_steps(9) is A
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        A.first_steps(0)


def test_suffixes_of_trajectories_that_part_before_are_refused():
    with pytest.raises(ValueError, match=r"rivals\[0\].trunk must be .* before step 2, .* step 1"):
        trajectory_pair(A, B, first=2)
    with pytest.raises(ValueError, match=r"rivals\[0\].first must lie in \[0, 3\), .* got 3"):
        trajectory_pair(A, B, first=3)


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_sums_of_trees_are_those_of_sequences_apart(model):
    made = tiny_model(model, max_position_embeddings=256).double()
    pairs = pairs_of_random_trunks()
    with torch.no_grad():
        logps_S, steps = on_trees(made, [trajectory_pair(*pair) for pair in pairs])
        expected = [(apart(made, c), apart(made, r)) for c, r in pairs]
    both = steps.side_sums(logps_S, CHOSEN | REJECTED)
    for side, of in ((0, CHOSEN), (1, REJECTED)):
        found = steps.side_sums(logps_S, of) + both
        torch.testing.assert_close(found, torch.stack([e[side] for e in expected]))


def test_the_gradient_of_a_margin_is_that_of_sequences_apart():
    made = tiny_model("llama", max_position_embeddings=256).double()
    pairs = pairs_of_random_trunks()
    logps_S, steps = on_trees(made, [trajectory_pair(*pair) for pair in pairs])
    margins = steps.side_sums(logps_S, CHOSEN) - steps.side_sums(logps_S, REJECTED)
    on_tree = torch.autograd.grad(
        -torch.nn.functional.logsigmoid(margins).mean(), made.parameters()
    )
    margins = torch.stack([apart(made, c) - apart(made, r) for c, r in pairs])
    each = torch.autograd.grad(-torch.nn.functional.logsigmoid(margins).mean(), made.parameters())
    for ours, theirs in zip(on_tree, each, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_several_rivals_of_one_trunk_are_the_pairs_apart():
    made = tiny_model("llama", max_position_embeddings=256).double()
    ((trunk, _), *_) = pairs_of_random_trunks(1)
    rng = np.random.default_rng(1)
    rivals = []
    for step in (2, 0, 3, 1, 2):
        start = int(trunk.action_spans[step, 0])
        ids = np.concatenate([trunk.input_ids[:start], rng.integers(3, VOCAB, 9)])
        spans = np.concatenate(
            [trunk.action_spans[:step], [[start, start + 2], [start + 6, start + 9]]]
        )
        rivals.append(Rival(Trunk(ids, spans), preferred=step == 3, first=step))
    with torch.no_grad():
        logps_S, steps = on_trees(made, [compared_with(trunk, rivals)])
        found = torch.stack([steps.side_sums(logps_S, side) for side in (CHOSEN, REJECTED)], 1)
        for row, rival in zip(found, rivals, strict=True):
            sides = [apart(made, t, rival.first) for t in (trunk, rival.trunk)]
            expected = torch.stack(sides[::-1] if rival.preferred else sides)
            torch.testing.assert_close(row, expected)


def test_templates_that_rewrite_history_are_paired_too():
    """Each action after exactly the state that the agent saw, whichever side it is of."""
    tokenizer = tokenizer_of("qwen3")
    made = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).double()

    def trunk(*answers: str) -> Trunk:
        turns = []
        for n, answer in enumerate(answers):
            turns.append({"role": "user", "content": f"see {n}"})
            turns.append(
                {"role": "assistant", "content": f"<think>\nso {answer}\n</think>\n\n{answer}"}
            )
        return sa.encode(sa.Trajectory(messages=turns), tokenizer)

    chosen, rejected = trunk("go", "take", "eat"), trunk("go", "drop", "look", "eat")
    pair = trajectory_pair(chosen, rejected)
    assert len(chosen.rewinds) == 2
    assert pair.sides_KT.tolist() == [[3, 1, 1, 2, 2, 2]]
    with torch.no_grad():
        logps_S, steps = on_trees(made, [pair])
        both = steps.side_sums(logps_S, CHOSEN | REJECTED)
        for side, of in ((chosen, CHOSEN), (rejected, REJECTED)):
            torch.testing.assert_close((steps.side_sums(logps_S, of) + both)[0], apart(made, side))
    lines = [*chosen.lines(), *rejected.lines()]
    assert naive_tokens([pair]) == sum(int(line.action_spans[-1, 1]) for line in lines)


# ------------------------------------------------------------------ files


def test_pairs_keep_their_sides_in_a_file(tmp_path: Path):
    made = [trajectory_pair(A, B), Comparison.demonstration(A), compared_with(A, [Rival(B)] * 2)]
    save_comparisons(tmp_path / "c.safetensors", made, {})
    again, _ = load_comparisons(tmp_path / "c.safetensors")
    for one, other in zip(made, again, strict=True):
        np.testing.assert_array_equal(one.sides_KT, other.sides_KT)
        np.testing.assert_array_equal(one.trunk.rewinds, other.trunk.rewinds)
        assert other.sides.dtype == np.int8
