"""On-policy distillation: towards a teacher's probabilities of the agent's own tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_ranks import trajectories
from test_trainer import LEVEL, cycles_of, first_batch, grads, logps_of
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.envs import ExpertUnavailable
from stepagent.learning.averages import Counts
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import Comparison, StepTable
from stepagent.learning.methods.distillation import Distillation
from stepagent.learning.methods.method import Batch
from stepagent.learning.trainer import StepAgentTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_gradients


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def make(**options: Any) -> StepAgentConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "method": "distillation",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 5,
            "learning_rate": 1e-2,
            "cycles": 2,
        }
        return StepAgentConfig(**defaults | options)

    return make


def trainer(args: StepAgentConfig, rows: Any = None, **others: Any) -> StepAgentTrainer:
    rows = trajectories() if rows is None else rows
    others = {"ref_model": tiny_agent(seed=1).double(), **others}
    return StepAgentTrainer(tiny_agent().double(), args, rows, babyai_tokenizer(), **others)


# ------------------------------------------------------------------ the loss


def table(lengths: list[int], expert: list[bool]) -> StepTable:
    none, expert_S = torch.zeros(0, dtype=torch.long), torch.tensor(expert)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return StepTable(offsets, expert_S.long(), expert_S.long(), expert_S, none, none, none.bool())


def test_the_loss_of_four_tokens_by_hand(config):
    """Steps: the expert's of two tokens, the agent's of three, and of one."""
    method = Distillation(config(clip=0.2, sft_weight=0.5))
    new = np.array([-0.3, -0.7, -1.0, -2.0, -1.5, -3.0])
    old = np.array([-9.0, -9.0, -1.0, -2.5, -1.1, -3.1])
    teacher = np.array([-9.0, -9.0, -0.5, -1.0, -4.0, -3.3])
    logps = torch.tensor(new, requires_grad=True)
    scores = {"old_logps": torch.tensor(old), "ref_logps": torch.tensor(teacher)}
    steps = table([2, 3, 1], [True, False, False])
    loss, figures = method.loss(Batch(logps, None, scores, steps, steps.counts()))
    (slope,) = torch.autograd.grad(loss, logps)

    ratios, advantages = np.exp(new - old)[2:], (teacher - old)[2:]
    bound = np.clip(ratios, 0.8, 1.2)
    expected = -np.minimum(ratios * advantages, bound * advantages).mean() + 0.5 * 0.5
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    # The second has gone far enough up; the third down, where the teacher wants it.
    free = np.array([1, 0, 0, 1])
    agent = -free * ratios * advantages / 4
    np.testing.assert_allclose(slope.numpy(), [-0.25, -0.25, *agent], atol=1e-12)
    np.testing.assert_allclose(figures["reverse_kl"].numpy(), ratios * (new - teacher)[2:])
    assert figures["clip_fraction"].tolist() == [0, 1, 1, 0]
    moved = np.array([(new - old)[2:5].sum(), (new - old)[5]])
    np.testing.assert_allclose(figures["kl"].numpy(), np.expm1(moved) - moved)
    # A share of the step's mean, however few of its tokens are here.
    whole = Counts(expert_tokens=4, agent_tokens=8, agent_steps=4)
    half, _ = method.loss(Batch(logps, None, scores, steps, whole))
    assert half.item() == pytest.approx(expected / 2, abs=1e-12)


def test_the_gradient_is_that_of_the_exact_divergence_in_expectation(config):
    """Every token of the vocabulary as often as it is sampled: the sum over all is exact."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    exact = (logps.exp() * (logps - teacher)).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    steps, found = table([1], [False]), torch.zeros(7, dtype=torch.float64)
    method = Distillation(config())
    estimate = 0.0
    for token in range(7):
        logp = logits.log_softmax(0)[[token]]
        scores = {"old_logps": logp.detach(), "ref_logps": teacher[[token]]}
        loss, figures = method.loss(Batch(logp, None, scores, steps, steps.counts()))
        weight = logp.detach().exp().item()
        found += weight * torch.autograd.grad(loss, logits)[0]
        estimate += weight * figures["reverse_kl"].item()
    torch.testing.assert_close(found, expected)
    assert estimate == pytest.approx(exact.item())


def test_a_batch_without_the_agents_tokens_is_a_connected_zero(config):
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    scores = {"old_logps": logps.detach(), "ref_logps": logps.detach()}
    steps = table([2], [True])
    loss, _ = Distillation(config()).loss(Batch(logps, None, scores, steps, steps.counts()))
    loss.backward()
    assert loss.item() == 0
    assert logps.grad.tolist() == [0, 0]


# ------------------------------------------------------------------ in the trainer


def test_the_loss_is_that_of_separate_sequences(config):
    """Under agent and teacher as they are, each action scored alone in float64."""
    made = trainer(config(samples=2, clip=0.1))
    teacher = tiny_agent(seed=1).double()
    comparisons, batch = first_batch(made)
    with torch.no_grad():
        old, wanted = logps_of(made.model, comparisons), logps_of(teacher, comparisons)
        torch.manual_seed(5)
        for parameter in made.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = [made.compute_loss(made.model, batch)]
    found[0].backward()
    gradients = [grads(made.model)]
    new, terms = logps_of(made.model, comparisons), []
    for step in agents_steps(comparisons):
        ratio, advantage = (new[step] - old[step]).exp(), wanted[step] - old[step]
        terms.append(torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage))
    found.append(-torch.cat(terms).mean())
    found[1].backward()
    gradients.append(grads(made.model))
    assert found[0].item() == pytest.approx(found[1].item(), abs=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-5)


def agents_steps(comparisons: list[Comparison]) -> list[int]:
    """Places of the agent's actions at the expert's states."""
    own = [k > 0 for c in comparisons for tried in c.branches for k in range(1 + len(tried))]
    return np.flatnonzero(own).tolist()


def test_the_agent_comes_nearer_to_its_teacher(config):
    options = {"cycles": 4, "samples": 4, "learning_rate": 2e-2, "per_device_train_batch_size": 1}
    made = trainer(config(**options), trajectories()[:3])
    made.train()
    divergence = [cycle["reverse_kl"] for cycle in cycles_of(made)]
    assert divergence[-1] < 0.8 * divergence[0], divergence


def test_a_step_has_one_gradient_however_it_is_cut(tmp_path, monkeypatch):
    options = {"cycles": 1, "samples": 2, "sft_weight": 0.3}
    monkeypatch.setitem(step_gradients.METHODS, "distillation", options)
    cuts = [
        step_gradients.gradient(("distillation", cut, 1, "fp32"), tmp_path)
        for cut in ("8×1", "1×8")
    ]
    assert float((cuts[1] - cuts[0]).norm() / cuts[0].norm()) < 1e-5


def test_a_run_resumes_bit_for_bit(config, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    whole = trainer(config(**options))
    whole.train()
    assert whole.state.global_step == 6
    again = trainer(config(**options))
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def mute(env: Any) -> str:
    raise ExpertUnavailable("no answer")


def test_at_the_agents_states_no_answer_is_needed(config):
    rows = [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), range(2))]
    options = {"states": "agent", "cycles": 1, "max_steps_per_episode": 2, "max_new_tokens": 3}
    made = trainer(config(**options), rows, env=LEVEL, expert=mute)
    made.train()
    (cycle,) = cycles_of(made)
    assert cycle["expert_answers"] == 0
    assert cycle["reverse_kl"] > 0


def test_held_out_divergence_is_measured(config):
    made = trainer(config(cycles=1), eval_dataset=trajectories()[:2])
    made.begin_epoch(0)
    (held,) = made._evaluator._sets.values()
    metrics = made.evaluate()
    terms = []
    for c in held.comparisons:  # the policy has not moved yet
        lengths = [len(a) for a in steps_of(c)]
        own = np.repeat([k > 0 for tried in c.branches for k in range(1 + len(tried))], lengths)
        terms.append((c.old_logps - c.ref_logps)[own])
    assert metrics["eval_reverse_kl"] == pytest.approx(np.concatenate(terms).mean(), rel=1e-4)


def steps_of(c: Comparison) -> list[Any]:
    return [
        ids
        for (start, stop), tried in zip(c.trunk.action_spans, c.branches, strict=True)
        for ids in (c.trunk.input_ids[start:stop], *tried)
    ]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "temperature must be 1 with method='distillation', .* got 0.7"),
        (
            {"kl_coef": 0.1},
            "kl_coef is an option of method='inverse' or 'srl' or .*, got kl_coef=0.1",
        ),
        ({"clip": 0.0}, "clip must be finite and > 0, got 0.0"),
    ],
)
def test_what_it_cannot_do_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_teacher_is_needed(config):
    with pytest.raises(ValueError, match="method='distillation' needs a ref_model: the teacher"):
        trainer(config(), ref_model=None)
    with pytest.raises(ValueError, match="ref_model must have the policy's vocabulary of"):
        trainer(config(), ref_model=tiny_agent(seed=1, vocab_size=7))
