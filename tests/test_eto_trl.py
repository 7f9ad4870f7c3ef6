"""ETO's loss on a token tree, in TRL's own DPO on padded rows of the same pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_integrations_trl import BETA, TOKENIZER, conversation, dpo, message, models, pytestmark

import stepagent as sa
from stepagent.learning.cycle import pack_with_steps
from stepagent.learning.methods.eto import preference_loss
from stepagent.learning.methods.method import Batch
from stepagent.learning.trajectory_pairs import trajectory_pair
from stepagent.models import score_trees

__all__ = ["pytestmark"]


def rows() -> list[dict[str, Any]]:
    """Trajectories of 4 turns that part after i of them."""
    made = []
    for i in range(4):
        expert, other = conversation(i, 4), conversation(i + 1, 4)
        agent = [*expert[: 2 * i + 1], message("assistant", "key and room"), *other[2 * i + 2 :]]
        made.append({"prompt": expert[:1], "chosen": expert[1:], "rejected": agent[1:]})
    return made


def test_the_loss_on_a_tree_is_trls_on_padded_rows(tmp_path: Path) -> None:
    """TRL's trainer and its loss; which tokens are the assistant's, our collator tells it."""
    from trl import DPOTrainer

    from stepagent.integrations.trl import StepDPOTrainer

    masked, theirs = (dpo(each, tmp_path, rows()) for each in (StepDPOTrainer, DPOTrainer))
    batch = next(iter(masked.get_train_dataloader()))
    theirs.model.train()
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    policy, reference = models()
    policy.train()
    pairs = [
        trajectory_pair(
            *(sa.encode(sa.Trajectory([*row["prompt"], *row[k]]), TOKENIZER) for k in sides)
        )
        for sides in (("chosen", "rejected"),)
        for row in rows()
    ]
    trees, steps = pack_with_steps(pairs, 4096)
    scores = {"ref_logps": score_trees(reference, trees).detach()}
    logps_N = score_trees(policy, trees)
    ours, figures = preference_loss(Batch.of(logps_N, None, scores, steps, steps.counts()), BETA)
    ours.backward()
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    for (name, mine), other in zip(
        policy.named_parameters(), theirs.model.parameters(), strict=True
    ):
        error = (mine.grad - other.grad).norm() / other.grad.norm()
        assert error <= 1e-5, f"{name}: {error}"
    margin = theirs._metrics["train"]["rewards/margins"]
    assert figures["reward_margin"].mean().item() == pytest.approx(margin[0], abs=1e-5)
    assert sum(len(tree.input_ids) for tree in trees) < batch["attention_mask"].sum()
