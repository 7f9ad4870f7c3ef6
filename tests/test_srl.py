"""SRL: an action earns its likeness to the expert's, compared with the other samples of a state."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_ranks import trajectories
from test_trainer import cycles_of, first_batch, grads, logps_of
from tiny_models import babyai_tokenizer, tiny_agent
from tiny_tokenizers import byte_level_bpe

from stepagent.data.trunk import Trunk
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import Comparison
from stepagent.learning.methods.method import Run
from stepagent.learning.methods.srl import SRL, likeness
from stepagent.learning.trainer import StepAgentTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_gradients


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def make(**options: Any) -> StepAgentConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "method": "srl",
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
    return StepAgentTrainer(tiny_agent().double(), args, rows, babyai_tokenizer(), **others)


# ------------------------------------------------------------------ the likeness of two actions


def slow_likeness(a: str, b: str) -> float:
    """Ratcliff and Obershelp: the longest block in common, then what is left and right of it."""

    def matched(a: str, b: str) -> int:
        size, i, j = max(
            ((n, -i, -j) for i in range(len(a)) for j in range(len(b)) for n in common(a, b, i, j)),
            default=(0, 0, 0),
        )
        i, j = -i, -j
        if not size:
            return 0
        return size + matched(a[:i], b[:j]) + matched(a[i + size :], b[j + size :])

    def common(a: str, b: str, i: int, j: int) -> range:
        n = 0
        while i + n < len(a) and j + n < len(b) and a[i + n] == b[j + n]:
            n += 1
        return range(1, n + 1)

    return 2 * matched(a, b) / (len(a) + len(b)) if a or b else 1.0


def test_likeness_is_twice_the_matched_characters_over_both_lengths():
    assert likeness("go north", "go north") == 1
    assert likeness("abcd", "bcde") == 2 * 3 / 8
    assert likeness("take apple", "take knife") == 2 * 6 / 20  # "take " and the e at the end
    assert likeness("", "go") == 0
    assert likeness(None, "go") == -1
    rng = np.random.default_rng(0)
    for _ in range(40):
        a, b = ("".join(rng.choice([*"abc "], rng.integers(0, 12))) for _ in "ab")
        assert likeness(a, b) == slow_likeness(a, b)


def test_frequent_characters_of_a_long_action_count():
    """difflib's heuristic would leave out what is frequent in 200 characters and more."""
    assert likeness("ab" * 150, "ab" * 120) == 2 * 240 / 540


# ------------------------------------------------------------------ rewards and advantages

TOKENIZER = byte_level_bpe()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def written(text: str, *, ends: bool = True) -> np.ndarray:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return np.array([*ids, *([END] if ends else [])], np.int32)


def at_states(*states: tuple[str, list[str]]) -> Comparison:
    """The expert's text at each state, and what the agent tried there."""
    ids, spans = written("look", ends=False), []
    for text, _ in states:
        action = written(text)
        spans.append((len(ids), len(ids) + len(action)))
        ids = np.concatenate([ids, action, written("You see", ends=False)])
    tried = [[written(text) for text in texts] for _, texts in states]
    return Comparison(Trunk(ids, spans), tried, expert_trunk=True)


def method_at(args: StepAgentConfig, *comparisons: Comparison) -> SRL:
    method = SRL(args)
    trunks = [c.trunk for c in comparisons]
    method.start(Run(tiny_agent(), TOKENIZER, [], trunks))
    return method


EXPERT = "Thought: it is there.\nAction: go to kitchen"
FIRST = at_states(
    (
        EXPERT,
        [
            "Thought: why not?\nAction: go to kitchen",  # the thought is free
            "Action: go to chicken",
            "Thought: it is there. go to kitchen",  # no action
        ],
    ),
    (EXPERT, ["Action: look"] * 3),
)
SECOND = at_states(("Action: take apple", ["Action: take knife", "apple", "knife"]))
REWARDS = [
    [1.0, slow_likeness("go to chicken", "go to kitchen"), -1.0],
    [slow_likeness("look", "go to kitchen")] * 3,
    [2 * 6 / 20, -1.0, -1.0],
]


def test_rewards_are_of_the_parsed_actions(config):
    method = method_at(config(action_format="react"), FIRST, SECOND)
    assert method.rewards(FIRST) + method.rewards(SECOND) == REWARDS


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_advantages_compare_the_samples_of_a_state(config, baseline):
    args = config(action_format="react", baseline=baseline, samples=3)
    prepared, figures = method_at(args, FIRST, SECOND).reflect([FIRST, SECOND], [], 0)
    expected = []
    for state in map(np.array, REWARDS):
        if np.ptp(state) == 0:
            own = np.zeros(3)
        elif baseline == "group":
            own = (state - state.mean()) / state.std(ddof=1)
        else:
            own = np.array([r - np.delete(state, k).mean() for k, r in enumerate(state)])
        expected.append(np.concatenate([[0.0], own]))
    assert [len(c.advantages) for c in prepared] == [8, 4]
    found = np.concatenate([c.advantages for c in prepared])
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6)
    assert not found[4:8].any()  # all samples alike: nothing to learn there
    flat = np.concatenate(REWARDS)
    assert figures["srl_flat_states"] == pytest.approx(1 / 3)
    assert figures["srl_without_action"] == pytest.approx(3 / 9)
    assert figures["step_reward"] == pytest.approx(flat.mean())
    assert figures["step_reward_std"] == pytest.approx(flat.std())


def test_four_samples_are_compared_unless_told(config):
    args = config()
    assert (args.samples, args.baseline, args.states) == (4, "group", "expert")


# ------------------------------------------------------------------ the loss, in the trainer


def slow_loss(made: StepAgentTrainer, comparisons: list[Comparison], **options: float):
    """PPO from separate sequences and difflib's likeness, everything in float64."""
    logps = logps_of(made.model, comparisons)
    decode = babyai_tokenizer().decode
    losses, nll, place = [], [], 0
    for c in comparisons:
        ends, at = np.cumsum([len(ids) for ids in steps_of(c)])[:-1], 0
        old, ref = (np.split(x.astype(float), ends) for x in (c.old_logps, c.ref_logps))
        for (start, stop), tried in zip(c.trunk.action_spans, c.branches, strict=True):
            texts = [decode(ids[ids != 2]) for ids in (c.trunk.input_ids[start:stop], *tried)]
            rewards = np.array([slow_likeness(text, texts[0]) for text in texts[1:]])
            spread = rewards.std(ddof=1)
            nll.append(-logps[place])
            for k, reward in enumerate(rewards, 1):
                advantage = (reward - rewards.mean()) / spread if np.ptp(rewards) else 0.0
                new = logps[place + k]
                ratio = (new.sum() - old[at + k].sum()).exp()
                bound = ratio.clamp(1 - options["clip"], 1 + options["clip"])
                d = new - torch.from_numpy(ref[at + k])
                kl = ((-d).exp() - 1 + d).sum()
                losses.append(
                    options["kl_coef"] * kl - torch.minimum(ratio * advantage, bound * advantage)
                )
            place, at = place + 1 + len(tried), at + 1 + len(tried)
    return torch.stack(losses).mean() + options["sft_weight"] * torch.cat(nll).mean()


def steps_of(c: Comparison) -> list[Any]:
    return [
        ids
        for (start, stop), tried in zip(c.trunk.action_spans, c.branches, strict=True)
        for ids in (c.trunk.input_ids[start:stop], *tried)
    ]


def test_the_loss_is_ppos_on_separate_sequences(config):
    """Loss and gradients, away from the old policy and from the reference."""
    options = {"clip": 0.1, "kl_coef": 0.3, "sft_weight": 0.2}
    made = trainer(config(samples=3, **options), ref_model=tiny_agent(seed=1).double())
    comparisons, batch = first_batch(made)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = []
    for loss in (
        made.compute_loss(made.model, batch),
        slow_loss(made, comparisons, **options),
    ):
        loss.backward()
        found.append((loss.item(), grads(made.model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)
    assert 0 < made._means.values()["clip_fraction"] < 1


def test_a_step_has_one_gradient_however_it_is_cut(tmp_path, monkeypatch):
    options = {"cycles": 1, "samples": 2, "sft_weight": 0.3, "kl_coef": 0.1}
    monkeypatch.setitem(step_gradients.METHODS, "srl", options)
    cuts = [step_gradients.gradient(("srl", cut, 1, "fp32"), tmp_path) for cut in ("8×1", "1×8")]
    assert float((cuts[1] - cuts[0]).norm() / cuts[0].norm()) < 1e-5


def test_a_run_resumes_bit_for_bit(config, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    options |= {"samples": 2, "max_new_tokens": 3}
    whole = trainer(config(**options))
    whole.train()
    assert whole.state.global_step == 6
    again = trainer(config(**options))
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_actions_become_more_like_the_experts(config):
    options = {"cycles": 6, "samples": 8, "learning_rate": 3e-2, "per_device_train_batch_size": 1}
    made = trainer(config(max_new_tokens=2, **options), trajectories()[:2])
    made.train()
    rewards = [cycle["step_reward"] for cycle in cycles_of(made)]
    assert rewards[-1] > rewards[0] + 0.05, rewards


def test_held_out_actions_are_measured(config):
    made = trainer(config(cycles=1), eval_dataset=trajectories()[:2])
    made.train()
    metrics = made.evaluate()
    (held,) = made._evaluator._sets.values()
    rewards = [r for c in held.comparisons for state in made._method.rewards(c) for r in state]
    assert metrics["eval_step_reward"] == pytest.approx(np.mean(rewards))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, .* with method='srl', got 1"),
        ({"states": "agent"}, "states must be 'expert': elsewhere a state has one .* got 'agent'"),
        ({"temperature": 0.0}, "temperature must be > 0: .* got 0.0"),
        (
            {"baseline": "value"},
            r"baseline must be one of \['group', 'leave_one_out'\], .*'value'",
        ),
        ({"kl_in": "reward", "kl_coef": 0.1}, "kl_in must be 'loss': .* got 'reward'"),
        (
            {"gamma": 0.5},
            "gamma is an option of method='inverse' or 'gigpo' or 'ppo', got gamma=0.5 with",
        ),
        ({"beta": 2.0}, "beta is an option of method='implicit'"),
    ],
)
def test_what_it_cannot_do_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_an_experts_action_that_cannot_be_read_is_refused(config):
    unread = at_states(("Action: look", []), ("go to kitchen", []))
    message = (
        r"the expert's action at step 1 of train_dataset\[0\] must be one that "
        "action_format='react' reads, got 'go to kitchen'"
    )
    with pytest.raises(ValueError, match=message):
        method_at(config(action_format="react"), unread)
