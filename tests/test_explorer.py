"""The explorer of the inverse form: a second adapter that acts, is judged and learns for itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_trainer import LEVEL, logps_of
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent import reference
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.data.trunk import Trunk
from stepagent.learning.batches import counts_of
from stepagent.learning.collecting import Acting
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import (
    Comparison,
    load_comparisons,
    pack_with_steps,
    save_comparisons,
)
from stepagent.learning.explorer import Explorer, ExploringReflection, distinct_states
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.learning.turns import in_turn

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT's

LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
OPTIONS: dict[str, Any] = {
    "method": "inverse",
    "states": "agent",
    "explorer": "optimistic",
    "discriminators": 3,
    "discriminator_diversity": 1.0,
    "discriminator_body": "frozen",
    "rollouts": 4,
    "max_steps_per_episode": 3,
    "cycles": 2,
    "critic_epochs": 2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "seed": 3,
}


@pytest.fixture(scope="module")
def trajectories() -> list[Any]:
    return [episode.trajectory() for episode in run_episodes(LEVEL, ExpertPolicy(), range(4))]


@pytest.fixture
def trainer(tmp_path: Path, trajectories: list[Any]) -> Callable[..., StepAgentTrainer]:
    def make(**options: Any) -> StepAgentTrainer:
        mine = {"peft_config": LORA, "env": LEVEL}
        mine |= {name: options.pop(name) for name in ("peft_config", "engine") if name in options}
        config = StepAgentConfig(output_dir=str(tmp_path / "run"), **OPTIONS | options)
        return StepAgentTrainer(tiny_agent(), config, trajectories, babyai_tokenizer(), **mine)

    return make


def reflection(made: StepAgentTrainer) -> ExploringReflection:
    return made._method.reflection


def explorer(made: StepAgentTrainer) -> Explorer:
    return reflection(made).explorer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of the adapter, as they are now."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def moved(made: StepAgentTrainer, size: float = 0.3) -> Explorer:
    """The explorer of a run that has not begun, with other weights than the learner's."""
    generator = torch.Generator().manual_seed(9)
    own = explorer(made)
    for weight in own._weights.values():
        weight += size * torch.randn(weight.shape, generator=generator)
    return own


def rollouts_by_hand(answers: list[list[int]], explored: list[bool]) -> list[Comparison]:
    """Rollouts of the action 5 at every step, and what the expert answers there."""
    rng, made = np.random.default_rng(1), []
    for own, second in zip(answers, explored, strict=True):
        ids, spans, branches = [1], [], []
        for answer in own:
            ids += [int(rng.integers(10, 50)), 5, 2]
            spans.append((len(ids) - 2, len(ids)))
            branches.append([np.array([answer, 2], np.int32)])
        scores = np.full(4 * len(own), -1.0, np.float32)
        logps = {"old_logps": scores, "ref_logps": scores}
        made.append(Comparison(Trunk(ids, spans), branches, False, **logps, explored=second))
    return made


# ------------------------------------------------------------------ who acts


def test_actors_take_turns_by_episode_whatever_their_number() -> None:
    now = ["nobody"]

    def acting(name: str) -> Any:
        @contextmanager
        def block() -> Any:
            now[0] = name
            yield

        return block

    def rolled_out(places: list[int]) -> Any:
        return [(now[0], place) for place in places]

    for count in (0, 1, 5):
        found = in_turn([acting("a"), acting("b")], rolled_out, count, alike=False)
        assert found == [("ab"[place % 2], place) for place in range(count)]


def collected(made: StepAgentTrainer) -> list[Comparison]:
    return made._method.collect(Acting(made._collector, made.model, 0, False), 0)[0]


def test_every_other_rollout_is_the_explorers_own(trainer):
    """Each is the one that a policy of these weights alone would have acted there."""
    made = trainer()
    own = moved(made)
    both = collected(made)
    assert [c.explored for c in both] == [False, True, False, True]
    before = weights(made.model)
    alone = made._collector.collect(made.model, 0, sharded=False)
    with own.acting():
        other = made._collector.collect(made.model, 0, sharded=False)
    assert equal(before, weights(made.model))
    for place, c in enumerate(both):
        expected = (alone, other)[place % 2][place]
        assert c.trunk.input_ids.tolist() == expected.trunk.input_ids.tolist()
    pairs = zip(alone, other, strict=True)
    assert any(a.trunk.input_ids.tolist() != b.trunk.input_ids.tolist() for a, b in pairs)


def test_whoever_acted_is_known_after_a_checkpoint(tmp_path):
    cycle = rollouts_by_hand([[5, 6], [6]], [False, True])
    save_comparisons(tmp_path / "cycle.safetensors", cycle, {})
    loaded, _ = load_comparisons(tmp_path / "cycle.safetensors")
    assert [c.explored for c in loaded] == [False, True]


def test_a_state_counts_once_however_often_it_is_met():
    cycle = rollouts_by_hand([[5, 6], [6]], [False, True])
    assert distinct_states(cycle) == 3
    assert distinct_states([*cycle, *cycle]) == 3
    assert distinct_states([]) == 0


# ------------------------------------------------------------------ what each learns


def test_the_actors_are_credited_by_different_aggregates(trainer):
    """Advantages by hand, two cycles: least and bounded largest −log D, scaled, discounted; each
    less what its own value function said before the cycle."""
    made = trainer(gamma=0.5, gae_lambda=1.0, discriminator_diversity=4.0)
    judge, learnt = reflection(made), []
    judge.explorer.learn = lambda comparisons, cycle: learnt.append(comparisons)  # it stays put
    cycle = rollouts_by_hand([[6, 5, 6], [5, 6]], [False, True])
    cycle = made._scorer.with_scores(made.model, cycle, ("ref_logps", "old_logps"), sharded=False)
    steps = pack_with_steps(cycle, 4096)[1]
    agent = torch.nonzero(~steps.expert_S).squeeze(1)
    offsets = torch.tensor([0, 3, 5])
    for number in range(2):
        rows = judge._judge(cycle, steps)[2]
        before = [judge.critic.values(rows, actor)[agent].detach() for actor in range(2)]
        assert bool(before[0].any()) == bool(before[1].any()) == (number > 0)
        learners, figures = judge.prepare(cycle, number)
        logits_ES, _, _ = judge._judge(cycle, steps)
        minus_log_D = -torch.log(torch.sigmoid(logits_ES[:, agent]))
        least_A = minus_log_D.min(0).values
        largest_A = minus_log_D.clamp(-math.log(0.95), -math.log(0.05)).max(0).values
        credited = []
        for found, raw_A, values_A in zip(
            (learners, learnt[-1]), (least_A, largest_A), before, strict=True
        ):
            scaled_A = (raw_A - raw_A.mean()) / raw_A.std(correction=0)
            expected, _ = reference.step_gae(scaled_A, values_A, offsets, gamma=0.5, lam=1.0)
            actual = torch.from_numpy(np.concatenate([c.advantages for c in found])).double()
            torch.testing.assert_close(actual[agent], expected, atol=1e-5, rtol=0)
            assert not actual[steps.expert_S].any()
            credited.append(actual[agent])
        assert float((credited[0] - credited[1]).abs().max()) > 0.1
        assert figures["learner_reward"] == pytest.approx(float(least_A[:3].mean()))
        assert figures["explorer_reward"] == pytest.approx(float(largest_A[3:].mean()))
        assert (figures["learner_states"], figures["explorer_states"]) == (3, 2)
        assert figures["discriminator_spread"] > 0.1


@pytest.mark.parametrize("form", ["agent", "expert", "difference"])
def test_optimism_is_bounded_where_no_discriminator_has_seen_the_text(trainer, form):
    made = trainer(discriminator_smoothing=0.1, reward_form=form)
    logits_EA = torch.tensor([[0.0, -1e4, 1e4, -2.0], [0.5, 1.0, 1e4, -3.0]], dtype=torch.float64)
    rewards_A, share = reflection(made).optimistic(logits_EA)
    D = torch.tensor([0.5, 0.1, 0.9, 0.1], dtype=torch.float64)  # of the least, in [ε, 1 − ε]
    expected = {"agent": -D.log(), "expert": (1 - D).log(), "difference": ((1 - D) / D).log()}
    torch.testing.assert_close(rewards_A, expected[form])
    assert share == 0.5  # −1e4 and −3 are below −log 9 = −2.2
    assert reflection(made)._rewards(logits_EA).abs().max() >= 1e4  # unbounded


def test_ratios_are_to_the_policy_that_acted(trainer):
    """The learner's and the explorer's loss are PPO's in float64, each text in a forward alone."""
    made = trainer(explorer_reset=3, sft_weight=0.0, clip=0.5)
    own = moved(made, 0.05)
    twin = copy.deepcopy(made.model)  # the explorer, in a model of its own
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own._weights[name])
    learner = copy.deepcopy(made.model)
    cycle = made._with_scores(collected(made))
    scored = own.scored(cycle)
    rng = np.random.default_rng(0)
    scored = [replace(c, advantages=rng.normal(size=len(c.step_tokens()))) for c in scored]
    steps = pack_with_steps(scored, 4096)[1]
    agent = torch.nonzero(~steps.expert_S).squeeze(1).tolist()
    advantages = torch.from_numpy(np.concatenate([c.advantages for c in scored]))[agent]
    for acts, model in ((False, learner), (True, twin)):
        with torch.no_grad():
            now = logps_of(copy.deepcopy(model).double(), scored)
            old = [
                logps
                for c in scored
                for logps in logps_of(copy.deepcopy(twin if c.explored else learner).double(), [c])
            ]
        offsets = torch.tensor([0, *(len(now[s]) for s in agent)]).cumsum(0)
        chosen = [torch.cat([part[s] for s in agent]) for part in (now, old)]
        expected = reference.ppo_loss(*chosen, advantages, offsets, clip=0.5)
        # Somewhere off 1, or there would be nothing to see.
        assert float((chosen[0] - chosen[1]).abs().max()) > 0.05
        batch = made._collate(scored)
        if acts:
            with own.acting():
                loss = made._method.loss(own._under_policy(batch, counts_of(batch["steps"])))[0]
        else:
            loss = made.compute_loss(made.model, batch)
        assert loss.item() == pytest.approx(float(expected), abs=1e-5)


def test_what_the_explorer_learns_leaves_the_learner_as_it_is(trainer):
    made = trainer()
    own, before = explorer(made), weights(made.model)
    cycle = [
        replace(c, advantages=np.ones(len(c.step_tokens()), np.float32))
        for c in own.scored(made._with_scores(collected(made)))
    ]
    own.learn(cycle, 0)
    assert equal(before, weights(made.model))
    assert not equal(before, own._weights)
    assert all(p.grad is None for p in made.model.parameters())
    steps = {int(state["step"]) for state in own._optimizer.state.values()}
    assert steps == {2}  # four rollouts, two a batch, one pass


def test_an_error_while_it_acts_puts_the_learner_back(trainer):
    made = trainer()
    own, before = moved(made), weights(made.model)

    def crash() -> None:
        with own.acting():
            assert not equal(before, weights(made.model))
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert equal(before, weights(made.model))


def test_steps_are_as_large_as_the_learners(trainer):
    """Accumulated batches are one step, and its gradient is that of all at once."""
    found = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        made = trainer(**options, adam_epsilon=1e-2)
        own = explorer(made)
        cycle = own.scored(made._with_scores(collected(made)))
        cycle = [replace(c, advantages=np.arange(len(c.step_tokens())) - 1.0) for c in cycle]
        own.learn(cycle, 0)
        found.append(torch.cat([w.flatten() for w in own._weights.values()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)


# ------------------------------------------------------------------ a run


def test_a_run_logs_both_actors_and_ships_the_learner(trainer, tmp_path):
    made = trainer(save_strategy="steps", save_steps=2)
    made.train()
    logged = [entry for entry in made.state.log_history if "cycle" in entry]
    for entry in logged:
        for name in (
            *("learner_reward", "explorer_reward", "discriminator_spread", "explorer_bounded"),
            *("learner_states", "explorer_states"),
        ):
            assert math.isfinite(entry[name]), name
    assert len(logged) == 2
    assert not equal(explorer(made)._weights, weights(made.model))
    made.save_model(str(tmp_path / "shipped"))
    assert not list((tmp_path / "shipped").rglob("*explorer*"))
    loaded = PeftModel.from_pretrained(tiny_agent(), tmp_path / "shipped")
    assert list(loaded.peft_config) == ["default"]
    mine, shipped = dict(made.model.named_parameters()), dict(loaded.named_parameters())
    assert all(torch.equal(mine[name], shipped[name]) for name in mine)
    kept = load_file(tmp_path / "run" / "checkpoint-4" / "explorer.safetensors")
    assert equal(kept, explorer(made)._weights)


def test_the_explorer_is_reset_every_so_many_cycles(trainer):
    """It then learns from where the learner was when the cycle began."""
    made = trainer(cycles=3, explorer_reset=2, learning_rate=1e-3)
    own, at_start, after = explorer(made), [], []
    begin, learn = made._begin_cycle, own.learn

    made.create_optimizer_and_scheduler(6)
    for cycle in range(3):
        at_start.append(weights(made.model))

        def noted(comparisons: Any, cycle: int) -> None:
            after.append({n: w.clone() for n, w in own._weights.items()})
            learn(comparisons, cycle)

        own.learn = noted  # what it is set to before it learns
        begin(cycle)
        with torch.no_grad():
            for parameter in own._adapter.values():
                parameter.add_(0.01)  # the learner learns
    assert [equal(a, b) for a, b in zip(at_start, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    "stop", [2, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 3))]
)
def test_a_run_resumes_bit_for_bit(trainer, tmp_path, stop):
    options = {"save_strategy": "steps", "save_steps": 1, "explorer_reset": 2, "cycles": 2}
    whole, again = trainer(**options), trainer(**options)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{stop}"))
    assert equal(weights(whole.model), weights(again.model))
    assert equal(explorer(whole)._weights, explorer(again)._weights)
    critics = [reflection(made).critic.state_dict() for made in (whole, again)]
    assert equal(*critics)
    moments = [explorer(made)._optimizer.state_dict()["state"] for made in (whole, again)]
    assert all(equal(moments[0][key], moments[1][key]) for key in moments[0])
    last = [
        [entry for entry in made.state.log_history if "cycle" in entry][-1]
        for made in (whole, again)
    ]
    assert last[0] == last[1]


def test_a_checkpoint_without_the_explorer_or_of_another_form_is_refused(trainer, tmp_path):
    made = trainer()
    explorer(made).save(tmp_path)
    other = trainer(peft_config=LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="must hold an adapter of the form that the policy has"):
        explorer(other).load(tmp_path)
    (tmp_path / "explorer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"explorer\.safetensors is missing"):
        explorer(made).load(tmp_path)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explorer": "bold"}, "explorer must be one of"),
        ({"discriminators": 1, "discriminator_diversity": 0.0}, "discriminators must be 2 or more"),
        ({"discriminator_diversity": 0.0}, "discriminator_diversity must be above 0"),
        ({"states": "expert", "rollouts": None}, "states must be 'agent'"),
        ({"states": "mixed"}, "states must be 'agent'"),
        ({"reward_aggregate": "optimistic"}, "reward_aggregate must be 'pessimistic' or 'mean'"),
        ({"discriminator_smoothing": 0.0}, "discriminator_smoothing must be above 0: -log of it"),
        ({"rollouts": 1}, "rollouts must be 2 or more, .* got 1"),
        ({"target_kl": 0.1}, "target_kl must be left out"),
        ({"verify": 2}, "verify must be left out"),
        ({"explorer_reset": 0}, "explorer_reset must be a whole number >= 1, got 0"),
        ({"explorer": "none", "explorer_reset": 3}, "explorer_reset=3 needs explorer='optimistic'"),
        ({"reward_form": "iq"}, "discriminator_diversity must be 0 with reward_form='iq'"),
    ],
)
def test_an_explorer_that_would_be_none_is_refused(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


@pytest.mark.parametrize("name", ["explorer", "explorer_reset"])
def test_another_method_has_no_explorer(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is an option of method='inverse'"):
        StepAgentConfig(
            str(tmp_path), method="implicit", **{name: "optimistic" if name == "explorer" else 3}
        )


def test_without_an_adapter_it_says_what_to_give(trainer):
    with pytest.raises(ValueError, match="LlamaForCausalLM has none: give a peft_config"):
        trainer(peft_config=None)


def test_an_engine_is_refused(trainer):
    with pytest.raises(ValueError, match="engine must be None with explorer='optimistic'"):
        trainer(engine="http://localhost:1")
