"""The inverse form: the critic on trees, rewards and advantages of a cycle, PPO in the trainer."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import first_batch, logps_of
from tiny_models import END, babyai_tokenizer, tiny_agent, tiny_model

from stepagent import reference
from stepagent.data.encoding import Trunk
from stepagent.envs import ExpertUnavailable
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.critic import StepCritic, critic_body
from stepagent.learning.cycle import Comparison, StepTable, pack_comparisons, pack_with_steps
from stepagent.learning.inverse import InverseReflection
from stepagent.learning.iq import IQReflection, logits_along
from stepagent.learning.judging import accuracy, calibration_error
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.models import hidden_states, read_trees, score_trees
from stepagent.ops import step_sums
from stepagent.trees.tree import pack_sequences, pack_step_pairs

GOOD, BAD = 5, 6  # the expert's action and the agent's, in hand-made cycles


@pytest.fixture
def args(tmp_path):
    def make(**options: Any) -> StepAgentConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "method": "inverse",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 2,
            "critic_epochs": 30,
            "discriminator_replay": 0,
            "cycles": 1,
            "seed": 3,
        }
        return StepAgentConfig(**defaults | options)

    return make


def hand_made(actions: list[list[int]], *, seed: int = 0) -> list[Comparison]:
    """Expert trajectories of one step per list, whose tried actions are the tokens in the list."""
    rng = np.random.default_rng(seed)
    comparisons = []
    for tried in actions:
        ids = [*rng.integers(10, 50, 4).tolist(), GOOD, END]
        branches = [[np.array([token, END], np.int32) for token in tried]]
        scores = np.full(2 * (1 + len(tried)), -1.0, np.float32)
        comparisons.append(
            Comparison(Trunk(ids, [(4, 6)]), branches, True, ref_logps=scores, old_logps=scores)
        )
    return comparisons


def table(comparisons: list[Comparison]) -> StepTable:
    return pack_with_steps(comparisons, 4096)[1]


# ------------------------------------------------------------------ the rows that are judged


def separate_rows(model, trunk: Trunk, branches) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after each action and before it, each in a sequence of its own."""
    after, before = [], []
    for (start, stop), tried in zip(trunk.action_spans, branches, strict=True):
        for action in (trunk.input_ids[start:stop], *tried):
            ids = torch.tensor([*trunk.input_ids[:start].tolist(), *map(int, action)])[None]
            hidden = hidden_states(model, input_ids=ids, use_cache=False)[0]
            after.append(hidden[-1])
            before.append(hidden[start - 1])
    return torch.stack(after), torch.stack(before)


BRANCHES = [
    # one token, the beginning of another branch, the expert's own, one twice, three tokens
    [[7], [7, 8, 2], [3, 4], [9, 2], [9, 2]],
    [],
    [[3], [11, 12, 13]],
]
TRUNK = Trunk([1, 20, 21, 3, 4, 22, 5, 2, 23, 3, 2], [(3, 5), (6, 8), (9, 11)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
@torch.no_grad()
def test_actions_and_states_are_judged_on_the_rows_of_their_own_sequences(name):
    model = tiny_model(name).double()
    branches = [[np.array(a) for a in step] for step in BRANCHES]
    other = Trunk([30, 31, 32, 33], [(1, 2), (3, 4)])  # actions of one token
    trees = [
        *pack_step_pairs([TRUNK], [branches]),
        *pack_step_pairs([other, TRUNK], [[[[9]], [[33], [8]]], branches]),
    ]
    rows = [[tree.action_rows(), tree.state_rows()] for tree in trees]
    after, logps = read_trees(model, trees, [action for action, _ in rows])
    before, _ = read_trees(model, trees, [state for _, state in rows])
    torch.testing.assert_close(logps, score_trees(model, trees))
    parts = [
        separate_rows(model, TRUNK, branches),
        separate_rows(model, other, [[[9]], [[33], [8]]]),
        separate_rows(model, TRUNK, branches),
    ]
    for actual, expected in zip((after, before), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.cat(expected), atol=1e-9, rtol=0)


def test_rows_of_a_prefix_tree_are_those_of_its_sequences():
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [9, 9, 9]]
    masks = [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1], [0, 1, 0]]
    (tree,) = pack_sequences(sequences, masks)
    assert [tree.input_ids[row] for row in tree.action_rows()] == [4, 5, 6, 9]
    assert [tree.position_ids[row] for row in tree.action_rows()] == [3, 3, 2, 1]
    assert [tree.input_ids[row] for row in tree.state_rows()] == [1, 3, 2, 9]


def test_an_action_without_tokens_cannot_be_judged():
    (tree,) = pack_step_pairs([Trunk([1, 2, 3], [(1, 3)])], [[[[]]]])
    for rows in (tree.action_rows, tree.state_rows):
        with pytest.raises(ValueError, match="step 1 must have at least one token, got none"):
            rows()


# ------------------------------------------------------------------ the critic


def test_a_critic_begins_undecided():
    policy = tiny_agent()
    critic = StepCritic(critic_body(policy, "own"), 3)
    trees = pack_comparisons(hand_made([[BAD], [GOOD]]), 4096)
    reading = critic.read(trees)
    logp_S = step_sums(score_trees(policy, trees), trees[0].step_offsets).detach()
    torch.testing.assert_close(critic.logits(reading, logp_S), torch.zeros(3, 4))
    assert critic.values(reading.state_SH).tolist() == [0.0] * 4


def test_a_known_expert_gives_the_best_logit():
    """With q = π_E and no head the logit is log π − log π_E, and D = π / (π + π_E)."""
    policy, expert = tiny_agent(), tiny_agent(seed=1)
    trees = pack_comparisons(hand_made([[BAD, GOOD, 7]]), 4096)
    with torch.no_grad():
        pi_S, expert_S = (
            step_sums(score_trees(m, trees), trees[0].step_offsets) for m in (policy, expert)
        )
        critic = StepCritic(expert, 1)
        D_S = torch.sigmoid(critic.logits(critic.read(trees), pi_S)[0])
    torch.testing.assert_close(D_S, pi_S.exp() / (pi_S.exp() + expert_S.exp()))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT, of transformers' names
@pytest.mark.parametrize("kind", ["own", "adapter", "frozen"])
def test_a_body_trains_what_it_says_and_never_the_policy(kind, args):
    policy = tiny_agent()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    reflection = InverseReflection(policy, args(discriminator_body=kind, critic_epochs=2))
    body = [name for name in reflection.critic.trained() if name.startswith("body.")]
    kinds = {"own": len(before), "frozen": 0}
    if kind == "adapter":
        assert body
        assert all("lora_" in name for name in body)
    else:
        assert len(body) == kinds[kind]
    started = {name: p.detach().clone() for name, p in reflection.critic.named_parameters()}
    reflection.prepare(hand_made([[BAD], [BAD, GOOD], [GOOD]]), 0)
    for name, parameter in reflection.critic.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, started[name]), name
        else:
            assert torch.equal(parameter, started[name]), name
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT, of transformers' names
def test_an_adapter_that_is_trained_already_is_where_the_discriminator_begins(args):
    peft = pytest.importorskip("peft")
    policy = peft.get_peft_model(
        tiny_agent(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    critic = InverseReflection(policy, args(discriminator_body="adapter")).critic
    trees = pack_comparisons(hand_made([[BAD], [BAD, GOOD]]), 4096)
    with torch.no_grad():
        policy_N = score_trees(policy, trees)
        assert torch.equal(score_trees(critic.body, trees), policy_N)
        with policy.disable_adapter():
            assert not torch.allclose(score_trees(policy, trees), policy_N, atol=1e-3)
    # The adapter is a copy, and what is frozen is shared.
    trained = {name for name, p in critic.body.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in policy.named_parameters() if p.requires_grad}
    own = dict(critic.body.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (own[name] is parameter) == (name not in trained)


def test_the_critic_comes_back_with_its_moments_and_names_what_is_missing(args, tmp_path):
    comparisons = hand_made([[BAD], [BAD, GOOD], [GOOD]])
    options = {"critic_epochs": 2, "discriminator_replay": 1, "samples": 1}
    first = InverseReflection(tiny_agent(), args(**options))
    first.prepare(comparisons, 0)
    first.save(tmp_path)
    second = InverseReflection(tiny_agent(), args(**options))
    second.load(tmp_path)
    for reflection in (first, second):
        reflection.prepare(comparisons, 1)
    for mine, other in zip(first.critic.parameters(), second.critic.parameters(), strict=True):
        assert torch.equal(mine, other)
    other = InverseReflection(tiny_agent(), args(**options, discriminators=2))
    with pytest.raises(ValueError, match=r"critic\.safetensors must hold the weights that"):
        other.load(tmp_path)
    (tmp_path / "critic_optimizer.pt").unlink()  # as in a checkpoint of before
    with pytest.raises(FileNotFoundError, match=r"critic_optimizer\.pt is missing"):
        second.load(tmp_path)


def test_frozen_weights_that_the_policy_does_not_train_are_shared_with_it():
    policy = tiny_agent()
    policy.get_input_embeddings().weight.requires_grad_(False)
    body = critic_body(policy, "frozen")
    assert body.get_input_embeddings().weight is policy.get_input_embeddings().weight
    assert body.model.norm.weight is not policy.model.norm.weight


def test_the_value_function_moves_no_body(args):
    critic = StepCritic(critic_body(tiny_agent(), "own"), 1)
    torch.nn.init.ones_(critic.value[2].weight)
    reading = critic.read(pack_comparisons(hand_made([[BAD]]), 4096))
    critic.values(reading.state_SH).sum().backward()
    assert all(p.grad is None for p in critic.body.parameters())
    assert critic.value[2].weight.grad is not None


# ------------------------------------------------------------------ rewards and advantages


@pytest.mark.parametrize("options", [{}, {"discriminators": 3}, {"discriminator_penalty": 0.01}])
def test_the_experts_action_earns_more_than_another(args, options):
    comparisons = hand_made([[BAD, GOOD, BAD, BAD], [GOOD, BAD, BAD, BAD], [BAD, BAD, BAD, GOOD]])
    reflection = InverseReflection(tiny_agent(), args(samples=4, **options))
    prepared, figures = reflection.prepare(comparisons, 0)
    for comparison in prepared:
        own, *tried = comparison.advantages.tolist()
        tokens = [int(branch[0]) for branch in comparison.branches[0]]
        assert own == 0.0  # the expert's
        best = max(zip(tried, tokens, strict=True))
        assert best[1] == GOOD
        assert all(a < best[0] for a, token in zip(tried, tokens, strict=True) if token == BAD)
    # right about the BAD ones, half right about a pair of the same: ¾ + ¼ · ½
    assert figures["discriminator_accuracy"] == pytest.approx(0.875)
    assert figures["discriminator_accuracy_unseen"] == pytest.approx(0.5)
    assert figures["discriminator_calibration_error"] < 0.15
    assert figures["discriminator_collapsed"] == 0.0


@pytest.mark.parametrize("baseline", ["value", "leave_one_out", "group"])
def test_advantages_are_the_references_of_the_discriminators_verdict(args, baseline):
    comparisons = hand_made([[BAD, GOOD, 7], [GOOD, BAD, 8]])
    reflection = InverseReflection(tiny_agent(), args(samples=3, baseline=baseline))
    prepared, _ = reflection.prepare(comparisons, 0)
    logits_ES, _, _ = reflection._judge(comparisons, table(comparisons))
    agent = torch.tensor([1, 2, 3, 5, 6, 7])
    raw = reference.inverse_step_reward(logits_ES[0, agent])
    rewards = (raw - raw.mean()) / raw.std(correction=0)
    expected = {
        "value": rewards,  # the value is 0 in the first cycle, and an action ends here
        "leave_one_out": reference.leave_one_out(rewards, torch.tensor([0, 0, 0, 1, 1, 1])),
        "group": reference.group_relative(rewards, torch.tensor([0, 0, 0, 1, 1, 1])),
    }[baseline]
    advantages = np.concatenate([c.advantages for c in prepared])[agent.numpy()]
    np.testing.assert_allclose(advantages, expected.numpy(), atol=1e-5)


def test_a_rollouts_steps_see_what_follows(args):
    """γ-discounted over the agent's trajectory, each trajectory for itself."""
    rng = np.random.default_rng(1)
    comparisons = []
    for answers in ([BAD, None, GOOD], [GOOD, BAD]):
        ids, spans, branches = [1], [], []
        for answer in answers:
            ids += [int(rng.integers(10, 50)), GOOD, END]
            spans.append((len(ids) - 2, len(ids)))
            branches.append([] if answer is None else [np.array([answer, END], np.int32)])
        scores = np.full(2 * (len(spans) + sum(map(len, branches))), -1.0, np.float32)
        comparisons.append(
            Comparison(Trunk(ids, spans), branches, expert_trunk=False, old_logps=scores)
        )
    reflection = InverseReflection(
        tiny_agent(), args(states="agent", gamma=0.5, gae_lambda=1.0, baseline="value")
    )
    prepared, _ = reflection.prepare(comparisons, 0)
    logits_ES, _, _ = reflection._judge(comparisons, table(comparisons))
    agent = torch.nonzero(~table(comparisons).expert_S).squeeze(1)
    raw = reference.inverse_step_reward(logits_ES[0, agent])
    rewards = (raw - raw.mean()) / raw.std(correction=0)
    expected, _ = reference.step_gae(
        rewards, torch.zeros(5), torch.tensor([0, 3, 5]), gamma=0.5, lam=1.0
    )
    advantages = torch.from_numpy(np.concatenate([c.advantages for c in prepared])).double()
    torch.testing.assert_close(advantages[agent], expected, atol=1e-5, rtol=0)
    # The expert's answers have none, and the steps are those of the trees.
    assert advantages[table(comparisons).expert_S].tolist() == [0.0] * 4


@pytest.mark.parametrize("form", ["agent", "expert", "difference"])
def test_several_discriminators_are_pessimistic_or_optimistic(args, form):
    logits_EA = torch.tensor([[0.0, -2.0, 3.0], [1.0, -1.0, -3.0]], dtype=torch.float64)
    rewards = {}
    for aggregate in ("pessimistic", "mean", "optimistic"):
        options = {"discriminators": 2, "reward_aggregate": aggregate, "reward_form": form}
        reflection = InverseReflection(tiny_agent(), args(**options))
        rewards[aggregate] = reflection._aggregated(reflection._rewards(logits_EA))
    each = torch.stack([reference.inverse_step_reward(x, form=form) for x in logits_EA])
    torch.testing.assert_close(rewards["pessimistic"], each.min(0).values)
    torch.testing.assert_close(rewards["mean"], each.mean(0))
    torch.testing.assert_close(rewards["optimistic"], each.max(0).values)


def spread_after(args, diversity: float) -> tuple[float, InverseReflection]:
    """Of the rewards of three discriminators, which have learnt one cycle."""
    options = {"samples": 1, "discriminators": 3, "discriminator_diversity": diversity}
    reflection = InverseReflection(tiny_agent(), args(**options, critic_epochs=3))
    _, figures = reflection.prepare(hand_made([[BAD], [BAD, GOOD], [GOOD, BAD]]), 0)
    return figures["discriminator_spread"], reflection


def test_diverse_discriminators_differ_and_the_spread_says_so(args):
    alike, _ = spread_after(args, 0.0)
    little, _ = spread_after(args, 0.3)
    much, reflection = spread_after(args, 1.0)
    assert alike < little < much
    unseen = hand_made([[BAD]])

    def apart(reflection: InverseReflection) -> float:
        return float(reflection._judge(unseen, table(unseen))[0].std(0).mean())

    options = {"samples": 1, "discriminators": 3}
    fresh = InverseReflection(tiny_agent(), args(**options, discriminator_diversity=1.0))
    assert apart(fresh) > 0.3  # nats, where nothing was learnt
    assert apart(reflection) > 0.3
    assert apart(InverseReflection(tiny_agent(), args(**options))) == 0.0


def test_one_discriminator_has_no_spread(args):
    _, figures = InverseReflection(tiny_agent(), args(samples=1)).prepare(hand_made([[BAD]]), 0)
    assert "discriminator_spread" not in figures


def test_prior_functions_are_fixed_and_of_one_size():
    critic = StepCritic(critic_body(tiny_agent(), "own"), 2, 1.0)
    assert not any("priors" in name for name in critic.trained())
    rows = torch.randn(4096, critic.value[0].in_features)
    found = torch.stack([prior(rows).squeeze(1) for prior in critic.priors])
    assert 0.4 < float(found.std()) < 1.5


def test_a_trajectory_of_before_keeps_its_weight_in_each_discriminator(args):
    options = {"samples": 1, "discriminators": 4, "discriminator_diversity": 1.0}
    reflection = InverseReflection(tiny_agent(), args(**options, discriminator_replay=2))
    first = reflection._bootstrap(3, 0)
    assert first.shape == (3, 4)
    reflection._remember(hand_made([[BAD]] * 3))
    second = reflection._bootstrap(2 + 3, 1)
    assert torch.equal(second[2:], first)
    reflection._remember(hand_made([[BAD]] * 2))
    third = reflection._bootstrap(1 + 5, 2)
    assert torch.equal(third[1:4], first)
    assert torch.equal(third[4:], second[:2])
    assert not torch.equal(first[:1], third[:1]) or not torch.equal(first[1:2], second[:1])
    whole = reflection._bootstrap(5 + 5, 2)[:5].double()
    assert whole.min() >= 0
    alike = InverseReflection(tiny_agent(), args(samples=1, discriminators=2))
    assert alike._bootstrap(2, 0).tolist() == [[1, 1], [1, 1]]


def test_a_weight_is_as_many_copies_of_a_pair(args):
    """The obvious twin: each discriminator's loss over its own pairs, one by one."""
    comparisons = hand_made([[BAD], [BAD, GOOD], [GOOD]])
    options = {"samples": 1, "discriminators": 2, "discriminator_diversity": 1.0}
    reflection = InverseReflection(tiny_agent(), args(**options))
    steps = table(comparisons)
    pairs = torch.cat([steps.expert_P, steps.agent_P])
    reading = reflection.critic.read(pack_comparisons(comparisons, 4096)).at(pairs)
    logp_K = reflection._logps(comparisons, steps)[pairs]
    weights = torch.tensor([[2, 0], [1, 0], [0, 0], [0, 3]])[: len(steps.expert_P)]
    loss = reflection._discriminator_loss(reading, logp_K, weights)
    expert_EP, agent_EP = reflection._verdicts(reading, logp_K).chunk(2, dim=1)
    eps = reflection._args.discriminator_smoothing
    slow = sum(
        weights[p, e]
        * reference.discriminator_loss(
            expert_EP[e, p : p + 1], agent_EP[e, p : p + 1], smoothing=eps
        )
        for e in range(2)
        for p in range(len(weights))
    ) / (2 * len(weights))
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    nothing = reflection._discriminator_loss(reading, logp_K, 0 * weights)
    nothing.backward()
    assert nothing.item() == 0.0


def test_a_run_of_diverse_discriminators_resumes(args, tmp_path):
    comparisons = hand_made([[BAD], [BAD, GOOD], [GOOD]])
    options = {"critic_epochs": 2, "samples": 1, "discriminators": 3}
    first, second = (
        InverseReflection(tiny_agent(), args(**options, discriminator_diversity=0.5))
        for _ in range(2)
    )
    first.prepare(comparisons, 0)
    first.save(tmp_path)
    second.load(tmp_path)
    for reflection in (first, second):
        reflection.prepare(comparisons, 1)
    for mine, other in zip(first.critic.parameters(), second.critic.parameters(), strict=True):
        assert torch.equal(mine, other)
    other = InverseReflection(tiny_agent(), args(**options))
    with pytest.raises(ValueError, match="was written with another model to begin with"):
        other.load(tmp_path)


def test_the_kl_to_a_reference_can_be_taken_from_the_rewards(args):
    comparisons = hand_made([[BAD, GOOD]])
    far = np.array([-1, -1, -4, -1, -1, -1], np.float32)  # BAD has become three nats rarer
    (moved,) = [Comparison(c.trunk, c.branches, True, c.ref_logps, far) for c in comparisons]
    reflection = InverseReflection(
        tiny_agent(), args(samples=2, kl_in="reward", kl_coef=0.5, kl_estimator="k1")
    )
    penalty = reflection._kl_penalty([moved], table([moved]), torch.tensor([1, 2]))
    assert penalty.tolist() == [-1.5, 0.0]


# ------------------------------------------------------------------ degenerate cycles


def test_a_cycle_without_disagreement_teaches_nothing(args):
    prepared, figures = InverseReflection(tiny_agent(), args()).prepare(
        hand_made([[GOOD], [GOOD]]), 0
    )
    assert [c.advantages.tolist() for c in prepared] == [[0.0, 0.0]] * 2
    assert figures["discriminator_accuracy"] == 0.5


def test_identical_action_sets_have_no_advantage_between_samples(args):
    """The same two actions, each as often from either side, are worth the same to leave-one-out."""
    options = {"samples": 2, "baseline": "leave_one_out"}
    prepared, _ = InverseReflection(tiny_agent(), args(**options)).prepare(
        hand_made([[GOOD, GOOD], [BAD, BAD]]), 0
    )
    for comparison in prepared:
        np.testing.assert_allclose(comparison.advantages, 0.0, atol=1e-5)


@pytest.mark.parametrize("expert_trunk", [True, False])
def test_one_side_alone_is_refused(args, expert_trunk):
    one = Comparison(Trunk([10, 11, GOOD, END], [(2, 4)]), [[]], expert_trunk)
    with pytest.raises(ValueError, match="cycle 4 has no step with an action of the expert and"):
        InverseReflection(tiny_agent(), args()).prepare([one], 4)


def test_a_critic_that_breaks_is_told(args):
    reflection = InverseReflection(tiny_agent(), args())
    with torch.no_grad():
        reflection.critic.value[2].bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="values of the critic must be finite"):
        reflection.prepare(hand_made([[BAD]]), 0)


def test_a_collapsed_discriminator_is_told(args, caplog):
    """The agent is always wrong: soon nothing separates one of its actions from another."""
    options = {"critic_epochs": 60, "critic_learning_rate": 1e-2, "discriminator_smoothing": 0.0}
    reflection = InverseReflection(tiny_agent(), args(**options))
    with caplog.at_level(logging.WARNING):
        _, figures = reflection.prepare(hand_made([[BAD]] * 4), 2)
    assert figures["discriminator_collapsed"] == 1.0
    assert "cycle 2: the discriminator has collapsed" in caplog.text
    caplog.clear()
    smooth = InverseReflection(tiny_agent(), args(critic_epochs=1))
    _, figures = smooth.prepare(hand_made([[BAD]] * 4), 0)
    assert figures["discriminator_collapsed"] == 0.0
    assert not caplog.text


def test_earlier_cycles_are_replayed_for_as_long_as_told(args):
    reflection = InverseReflection(tiny_agent(), args(discriminator_replay=2, critic_epochs=1))
    cycles = [hand_made([[BAD]] * n, seed=n) for n in (1, 2, 3)]
    for number, cycle in enumerate(cycles):
        reflection.prepare(cycle, number)
    kept = [c.trunk.input_ids.tolist() for c in reflection._replay]
    assert kept == [c.trunk.input_ids.tolist() for cycle in cycles[1:] for c in cycle]


def test_accuracy_and_calibration_of_known_logits():
    steps = table(hand_made([[BAD, BAD], [GOOD, BAD]]))
    # expert, BAD, BAD | expert, GOOD, BAD: right, right, wrong | undecided, undecided, right
    logits_ES = torch.tensor([[-1.0, 1.0, -1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    # pairs: (right, right) (right, wrong) (half, half) (half, right)
    assert accuracy(logits_ES, steps) == pytest.approx((1 + 0.5 + 0.5 + 0.75) / 4)
    sure = torch.tensor([[-50.0, 50.0, 50.0, -50.0, 50.0, 50.0]], dtype=torch.float64)
    assert calibration_error(sure, steps) == pytest.approx(0, abs=1e-9)
    assert calibration_error(-sure, steps) == pytest.approx(1, abs=1e-9)
    assert calibration_error(torch.zeros(1, 6), steps) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------ the IQ form


def trajectory(actions: list[int], first: int, answers: list[int] | None = None) -> Comparison:
    """A rollout of one-word actions, with the expert's answers; a demonstration without them."""
    ids, spans = [first], []
    for t, action in enumerate(actions):
        ids += [20 + t, action, END]
        spans.append((len(ids) - 2, len(ids)))
    if answers is None:
        return Comparison.demonstration(Trunk(ids, spans))
    tried = [[np.array([a, END], np.int32)] for a in answers]
    scores = np.full(4 * len(actions), -1.0, np.float32)
    return Comparison(Trunk(ids, spans), tried, False, ref_logps=scores, old_logps=scores)


SHOWN = [trajectory([GOOD, 7, GOOD], 10), trajectory([GOOD], 11)]
ROLLED = [trajectory([BAD, GOOD], 10, [GOOD, 7]), trajectory([8, BAD, BAD, 7], 12, [GOOD] * 4)]


def iq_reflection(args: StepAgentConfig) -> IQReflection:
    reflection = IQReflection(tiny_agent(), args, demonstrations=[c.trunk for c in SHOWN])
    torch.manual_seed(4)
    for head in reflection.critic.discriminators:
        torch.nn.init.normal_(head[2].weight)
    return reflection


def slow_q(reflection: IQReflection, comparison: Comparison) -> np.ndarray:
    """(E, T) of the trunk's actions, each read in a sequence of its own, in float64."""
    with torch.no_grad():
        rows, _ = separate_rows(
            reflection.critic.body, comparison.trunk, [[] for _ in comparison.branches]
        )
    found = []
    for head in reflection.critic.discriminators:
        inner, outer = ((m.weight.detach().double(), m.bias.detach().double()) for m in head[::2])
        x = rows.double().numpy() @ inner[0].T.numpy() + inner[1].numpy()
        found.append((x / (1 + np.exp(-x)) @ outer[0].T.numpy() + outer[1].numpy())[:, 0])
    return np.stack(found)


def test_an_iq_logit_is_what_is_left_of_q_after_the_next_step():
    q = torch.tensor([[1.0, 2.0, 4.0, -1.0, 3.0]])
    trunk = torch.tensor([0, 0, 1, 2, 2])
    assert logits_along(q, trunk, 0.5).tolist() == [[0.0, -2.0, -4.0, 2.5, -3.0]]
    assert logits_along(q, trunk, 0.0).tolist() == (-q).tolist()


def test_the_iq_loss_is_that_of_whole_trajectories(args):
    options = {"states": "agent", "reward_form": "iq", "gamma": 0.8, "discriminators": 2}
    options |= {"critic_epochs": 1, "critic_learning_rate": 1e-30, "discriminator_smoothing": 0.1}
    reflection = iq_reflection(args(per_device_train_batch_size=4, **options))
    loss = reflection._fit_discriminators(ROLLED, 0)
    sides: list[list[np.ndarray]] = [[], []]
    for side, comparisons in enumerate((SHOWN, ROLLED)):
        for comparison in comparisons:
            q = slow_q(reflection, comparison)
            after = np.concatenate([q[:, 1:], np.zeros((2, 1))], 1)
            sides[side].append(1 / (1 + np.exp(-(q - 0.8 * after))))  # P(expert)
    expert, agent = (np.concatenate(parts, 1) for parts in sides)
    expected = -(0.9 * np.log(expert) + 0.1 * np.log(1 - expert)).mean()
    expected -= (0.9 * np.log(1 - agent) + 0.1 * np.log(agent)).mean()
    assert loss == pytest.approx(expected, abs=1e-5)


def test_iq_advantages_are_q_of_the_agents_actions(args):
    """Not their sums along the rollout: Q holds what follows."""
    options = {"states": "agent", "reward_form": "iq", "discriminators": 2, "critic_epochs": 3}
    reflection = iq_reflection(args(reward_aggregate="mean", **options))
    prepared, figures = reflection.prepare(ROLLED, 0)
    q = np.concatenate([slow_q(reflection, c).mean(0) for c in ROLLED])
    found = np.concatenate([c.advantages for c in prepared])
    assert not found[1::2].any()  # the expert's answers
    np.testing.assert_allclose(found[::2], (q - q.mean()) / q.std(), atol=1e-4)
    assert figures["step_reward"] == pytest.approx(q.mean(), abs=1e-5)
    assert 0 <= figures["discriminator_accuracy"] <= 1
    # The next cycle's are less the value, which has learnt of Q.
    values = reflection._judge(ROLLED, table(ROLLED))[1]
    assert bool(values.any())


def test_iq_tells_demonstrations_from_rollouts(args):
    options = {"states": "agent", "reward_form": "iq", "critic_epochs": 20}
    reflection = iq_reflection(args(critic_learning_rate=1e-2, **options))
    _, figures = reflection.prepare(ROLLED, 0)
    assert figures["discriminator_accuracy"] == 1
    assert figures["discriminator_loss"] < 0.8


def test_the_iq_form_resumes_bit_for_bit(trainer, tmp_path):
    from test_trainer import LEVEL

    options = {"states": "agent", "env": LEVEL, "reward_form": "iq", "cycles": 2, "rollouts": 4}
    options |= {"max_steps_per_episode": 3, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(**options)
    whole.train()
    again = trainer(**options)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    critics = [made._method.reflection.critic.parameters() for made in (again, whole)]
    assert all(torch.equal(mine, other) for mine, other in zip(*critics, strict=True))


# ------------------------------------------------------------------ PPO in the trainer


@pytest.fixture
def trainer(args):
    from test_trainer import LEVEL

    from stepagent.acting.policies import ExpertPolicy
    from stepagent.acting.rollout import run_episodes

    episodes = sorted(
        run_episodes(LEVEL, ExpertPolicy(), range(20)), key=lambda episode: len(episode.actions)
    )
    trajectories = [episode.trajectory() for episode in episodes[:6]]

    def make(**options: Any) -> StepAgentTrainer:
        names = ("model", "ref_model", "env", "expert", "discriminator", "peft_config")
        mine = {name: options.pop(name) for name in names if name in options}
        config = args(**{"critic_epochs": 2, "learning_rate": 1e-2} | options)
        model = mine.pop("model", None) or tiny_agent()
        return StepAgentTrainer(model, config, trajectories, babyai_tokenizer(), **mine)

    return make


def test_the_first_ratio_is_one(trainer):
    """At the start of a cycle the loss is −mean A, to the rounding of the log-probs."""
    made = trainer(samples=2)
    comparisons, batch = first_batch(made)
    loss = made.compute_loss(made.model, batch)
    steps = table(comparisons)
    assert loss.item() == pytest.approx(
        -batch["advantages"][~steps.expert_S].mean().item(), abs=1e-5
    )
    assert made._means.values()["kl"] < 1e-5
    assert made._means.values()["clip_fraction"] == 0.0


@pytest.mark.parametrize("ratio", ["step", "token"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_ppo_on_trees_is_the_references_on_separate_sequences(trainer, ratio, kl):
    """Loss and gradients to 1e-5, away from the old policy and from the reference."""
    options = {"samples": 2, "ratio": ratio, "kl_estimator": kl, "kl_coef": 0.3, "clip": 0.1}
    made = trainer(ref_model=tiny_agent(seed=1), **options)
    comparisons, batch = first_batch(made)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    agent = torch.nonzero(~table(comparisons).expert_S).squeeze(1).tolist()
    lengths = table(comparisons).offsets.diff().tolist()
    results = []
    for slow in (False, True):
        made.model.zero_grad()
        if slow:
            parts = {"logps": logps_of(made.model, comparisons)}
            for name in ("old_logps", "ref_logps"):
                flat = torch.from_numpy(np.concatenate([getattr(c, name) for c in comparisons]))
                parts[name] = list(flat.split(lengths))
            chosen = {n: torch.cat([p[s] for s in agent]).double() for n, p in parts.items()}
            loss = reference.ppo_loss(
                chosen["logps"],
                chosen["old_logps"],
                batch["advantages"][agent],
                torch.tensor([0, *(lengths[s] for s in agent)]).cumsum(0),
                clip=0.1,
                ratio=ratio,
                ref_logps_N=chosen["ref_logps"],
                kl_coef=0.3,
                kl=kl,
            )
        else:
            loss = made.compute_loss(made.model, batch)
        loss.backward()
        results.append(
            (loss.item(), torch.cat([p.grad.flatten() for p in made.model.parameters()]))
        )
    (loss, grad), (slow_loss, slow_grad) = results
    assert loss == pytest.approx(slow_loss, abs=1e-5)
    assert float((grad - slow_grad).abs().max()) < 1e-5


def test_entropy_is_taken_from_the_loss(trainer):
    made = trainer(entropy_coef=0.1)
    comparisons, batch = first_batch(made)
    loss = made.compute_loss(made.model, batch).item()
    trees = pack_comparisons(comparisons, 4096)
    _, entropy_N = score_trees(made.model, trees, return_entropy=True)
    steps = table(comparisons)
    agent_N = (~steps.expert_S).repeat_interleave(steps.offsets.diff())
    mean_A = batch["advantages"][~steps.expert_S].mean().item()
    assert loss == pytest.approx(-mean_A - 0.1 * entropy_N[agent_N].mean().item(), abs=1e-5)


def test_a_policy_that_moved_too_far_learns_nothing_more_in_its_cycle(trainer):
    free = trainer(cycles=2, epochs_per_cycle=3)
    free.train()
    bound = trainer(cycles=2, epochs_per_cycle=3, target_kl=1e-4)
    bound.train()
    logs = [[e for e in t.state.log_history if "cycle" in e] for t in (free, bound)]
    assert all("stopped_early" not in entry for entry in logs[0])
    assert all(entry["stopped_early"] > 0 for entry in logs[1])
    assert logs[1][1]["kl"] < logs[0][1]["kl"]
    assert bound.state.global_step == free.state.global_step


def test_after_the_stop_no_weight_moves(trainer):
    made = trainer(target_kl=1e-9, weight_decay=0.1)
    made.begin_epoch(0)
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 1  # as the training loop sets it
    batch = made._collate(list(made.train_dataset.items)[:2])
    seen = []
    for _ in range(4):
        made.training_step(made.model, dict(batch))
        made.optimizer.step()
        made.optimizer.zero_grad()
        seen.append(torch.cat([p.detach().flatten().clone() for p in made.model.parameters()]))
    assert not torch.equal(seen[0], seen[1])  # the first is at the old policy, the second is far
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])


def test_a_discriminator_of_its_own_is_trained(trainer):
    judge = tiny_agent(seed=9)
    before = judge.get_input_embeddings().weight.detach().clone()
    made = trainer(discriminator=judge)
    made.train()
    assert not torch.equal(judge.get_input_embeddings().weight, before)


def test_the_verdict_is_logged_each_cycle(trainer):
    made = trainer(cycles=2)
    made.train()
    logged = [entry for entry in made.state.log_history if "cycle" in entry]
    assert len(logged) == 2
    for name in (
        *("discriminator_loss", "discriminator_accuracy", "discriminator_accuracy_unseen"),
        *("discriminator_calibration_error", "step_reward", "step_reward_std", "value_explained"),
        *("discriminator_collapsed", "kl", "clip_fraction", "agreement", "mean_loss"),
    ):
        assert all(math.isfinite(entry[name]) for entry in logged), name


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "group"}, "baseline='group' compares the samples of a state with each other"),
        ({"baseline": "leave_one_out", "samples": 1}, "got samples=1: raise it"),
        ({"baseline": "best"}, "baseline must be one of"),
        ({"discriminator_body": "large"}, "discriminator_body must be one of"),
        ({"discriminator_smoothing": 0.5}, r"discriminator_smoothing must be in \[0, 0.5\), got"),
        ({"discriminators": 0}, "discriminators must be a whole number >= 1, got 0"),
        ({"discriminator_diversity": 1.0}, "discriminator_diversity=1.0 needs discriminators >= 2"),
        (
            {
                "discriminator_diversity": 1.0,
                "discriminators": 2,
                "reward_form": "iq",
                "states": "agent",
            },
            "discriminator_diversity must be 0 with reward_form='iq'",
        ),
        ({"discriminator_diversity": -1.0}, "discriminator_diversity must be finite and >= 0"),
        ({"discriminator_replay": -1}, "discriminator_replay must be a whole number >= 0, got -1"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"target_kl": 0.0}, "target_kl must be finite and > 0, got 0.0"),
        ({"kl_estimator": "k1", "kl_coef": 0.1}, "kl_estimator='k1' has a gradient of mean 0"),
        ({"clip": math.nan}, "clip must be finite and > 0, got nan"),
        ({"reward_form": "iq"}, "reward_form='iq' needs states='agent', .* got states='expert'"),
    ],
)
def test_an_invalid_option_is_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        args(**options)


def test_what_would_not_be_used_is_refused(trainer, args):
    unset = {"critic_epochs": 10, "discriminator_replay": 1}
    with pytest.raises(ValueError, match="discriminator is given, but method='implicit' has none"):
        trainer(method="implicit", discriminator=tiny_agent(), **unset)
    with pytest.raises(ValueError, match="kl_in='reward' needs a ref_model"):
        trainer(kl_in="reward", kl_coef=0.1)


@pytest.mark.parametrize("method", ["dagger", "implicit", "inverse"])
def test_an_expert_that_never_answers_teaches_nothing(trainer, method):
    from test_trainer import LEVEL

    def mute(env: Any) -> str:
        raise ExpertUnavailable("no answer")

    unset = {} if method == "inverse" else {"critic_epochs": 10, "discriminator_replay": 1}
    made = trainer(
        **{"method": method, "states": "agent", "rollouts": 2, "max_steps_per_episode": 2},
        **{"env": LEVEL, "expert": mute, **unset},
    )
    with pytest.raises(ValueError, match=r"expert must answer .* no answer at any of 4"):
        made.train()


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT, of transformers' names
@pytest.mark.parametrize("kind", ["own", "adapter", "frozen"])
def test_a_policy_with_an_adapter_shares_its_base_with_the_critic(args, trainer, kind):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    made = trainer(discriminator_body=kind, peft_config=lora)
    policy = {id(p): p.detach().clone() for p in made.model.parameters()}
    critic = made._method.reflection.critic
    base = [p for p in critic.body.parameters() if id(p) in policy]
    assert sum(p.numel() for p in base) >= 0.9 * sum(p.numel() for p in tiny_agent().parameters())
    assert not any(p.requires_grad for p in base)
    learnt = {"own": "lora_", "adapter": "lora_", "frozen": "discriminators"}[kind]
    assert any(learnt in name for name in critic.trained())
    made.train()
    moved = [p for p in made.model.parameters() if not torch.equal(p, policy[id(p)])]
    assert moved
    assert all(p.requires_grad for p in moved)
