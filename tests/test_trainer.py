"""Training: cycles of inspect → reflect on transformers' Trainer."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import END, babyai_tokenizer, separate_logprobs, tiny_agent
from transformers import TrainerCallback, TrainingArguments

from stepagent import envs, reference
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.data.branch import agreement
from stepagent.data.encoding import Trunk, encode
from stepagent.data.trajectory import Trajectory
from stepagent.envs import ExpertUnavailable
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import (
    Comparison,
    StepTable,
    load_comparisons,
    naive_tokens,
    pack_comparisons,
    save_comparisons,
    split_by_trunk,
    unique_tokens,
)
from stepagent.learning.preflight import check_sharding
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.models import score_trees

LEVEL = "babyai:GoToLocalS6N2"
TOKENIZER = babyai_tokenizer()


@pytest.fixture(scope="module")
def trajectories() -> list[Trajectory]:
    """Six of the expert's, the shortest of the first seeds."""
    episodes = run_episodes(LEVEL, ExpertPolicy(), range(20))
    shortest = sorted(episodes, key=lambda episode: len(episode.actions))[:6]
    return [episode.trajectory() for episode in shortest]


@pytest.fixture
def config(tmp_path):
    def make(**options: Any) -> StepAgentConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "seed": 3,
            "cycles": 2,
        }
        return StepAgentConfig(**defaults | options)

    return make


@pytest.fixture
def trainer(config, trajectories):
    def make(model=None, data=None, **options: Any) -> StepAgentTrainer:
        names = ("ref_model", "peft_config", "env", "expert", "callbacks", "discriminator")
        mine = {name: options.pop(name) for name in names if name in options}
        return StepAgentTrainer(
            model or tiny_agent(), config(**options), data or trajectories, TOKENIZER, **mine
        )

    return make


def cycles_of(trainer: StepAgentTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "cycle" in entry]


def first_batch(trainer: StepAgentTrainer) -> tuple[list[Comparison], dict[str, Any]]:
    """All comparisons of the first cycle as one batch."""
    trainer.begin_epoch(0)
    comparisons = list(trainer.train_dataset.items)
    return comparisons, trainer._collate(comparisons)


def grads(model: torch.nn.Module) -> torch.Tensor:
    flat = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(flat)


def logps_of(model: torch.nn.Module, comparisons: list[Comparison]) -> list[torch.Tensor]:
    """One vector an action, scored in a sequence of its own, in the order of StepTable."""
    trunks, branches = [c.trunk for c in comparisons], [c.branches for c in comparisons]
    lengths = [
        len(action)
        for c in comparisons
        for (start, stop), step in zip(c.trunk.action_spans, c.branches, strict=True)
        for action in (c.trunk.input_ids[start:stop], *step)
    ]
    return list(separate_logprobs(model, trunks, branches).split(lengths))


def pairs_of(comparisons: list[Comparison]) -> list[tuple[int, int]]:
    """(expert's action, agent's action) of every pair, as places in `logps_of`."""
    pairs, place = [], 0
    for c in comparisons:
        for step in c.branches:
            for k in range(len(step)):
                pair = (place, place + 1 + k)
                pairs.append(pair if c.expert_trunk else pair[::-1])
            place += 1 + len(step)
    return pairs


def slow_implicit_loss(model, ref_model, comparisons, beta):
    policy = logps_of(model, comparisons)
    with torch.no_grad():
        ref = logps_of(ref_model, comparisons)
    rewards = [
        reference.step_rewards(p, r, np.array([0, len(p)]), beta=beta)[0]
        for p, r in zip(policy, ref, strict=True)
    ]
    expert, agent = zip(*((rewards[e], rewards[a]) for e, a in pairs_of(comparisons)), strict=True)
    return reference.implicit_step_loss(torch.stack(expert), torch.stack(agent)).mean()


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("states", ["expert", "agent"])
def test_at_the_reference_the_loss_is_log_2_and_its_gradient_the_slow_one(trainer, states):
    options = {"states": "agent", "env": LEVEL, "max_steps_per_episode": 5, "rollouts": 3}
    model = tiny_agent()
    made = trainer(model, beta=0.7, **(options if states == "agent" else {"samples": 2}))
    comparisons, batch = first_batch(made)
    assert all(c.expert_trunk == (states == "expert") for c in comparisons)

    loss = made.compute_loss(model, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    fast = grads(model)
    slow_implicit_loss(model, deepcopy(model), comparisons, beta=0.7).backward()
    slow = grads(model)
    assert slow.norm() > 0.1
    assert (fast - slow).norm() <= 1e-4 * slow.norm()


@pytest.mark.parametrize("states", ["expert", "agent"])
def test_away_from_the_reference_loss_and_gradient_are_the_slow_ones(trainer, states):
    options = {"states": "agent", "env": LEVEL, "max_steps_per_episode": 5, "rollouts": 3}
    # An agent so unsure that rewards stay near 0, where the loss has not saturated.
    model, other = (tiny_agent(seed=seed, initializer_range=0.1) for seed in (0, 1))
    made = trainer(model, ref_model=other, **(options if states == "agent" else {}))
    comparisons, batch = first_batch(made)
    loss = made.compute_loss(model, batch)
    loss.backward()
    fast = grads(model)
    expected = slow_implicit_loss(model, other, comparisons, beta=1.0)
    expected.backward()
    slow = grads(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(loss.item() - math.log(2)) > 0.01
    assert (fast - slow).norm() <= 1e-4 * slow.norm()


def test_identical_pairs_have_loss_log_2_and_no_gradient_at_all(trainer):
    model = tiny_agent()
    made = trainer(model, ref_model=tiny_agent(seed=5))
    own = [
        Comparison(t, [[t.input_ids[a:b]] for a, b in t.action_spans], expert_trunk=True)
        for t in made._trunks
    ]
    loss = made.compute_loss(model, made._collate(made._with_scores(own)))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert not grads(model).any()
    assert agreement_of(own) == 1.0


def test_sft_weight_adds_the_experts_mean_nll(trainer):
    model = tiny_agent()
    made = trainer(model, sft_weight=0.25)
    comparisons, batch = first_batch(made)
    experts = {e for e, _ in pairs_of(comparisons)}
    nll = -torch.cat([logps_of(model, comparisons)[place] for place in experts]).mean()
    loss = made.compute_loss(model, batch)
    assert loss.item() == pytest.approx(math.log(2) + 0.25 * nll.item(), rel=1e-5)


def test_a_batch_without_pairs_has_a_connected_zero_loss(trainer):
    asked = []

    def terse(env):
        asked.append(env)
        if len(asked) > 1:
            raise ExpertUnavailable("no answer")
        return "forward"

    model = tiny_agent()
    made = trainer(
        model, states="agent", env=LEVEL, expert=terse, rollouts=2, max_steps_per_episode=2
    )
    made.begin_epoch(0)
    (silent,) = [c for c in made._comparisons if not any(c.branches)]
    batch = made._collate([silent])
    loss = made.compute_loss(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert not grads(model).any()


# ------------------------------------------------------------------ sft and dagger


def test_sft_lowers_the_nll(trainer):
    model = tiny_agent(initializer_range=0.1)
    made = trainer(model, method="sft", num_train_epochs=15)
    comparisons = [Comparison.demonstration(trunk) for trunk in made._trunks]

    def nll() -> float:
        with torch.no_grad():
            return -score_trees(model, pack_comparisons(comparisons, 4096)).mean().item()

    before = nll()
    made.train()
    assert nll() < 0.5 * before
    assert cycles_of(made) == []


def test_sft_loss_is_the_mean_over_the_batchs_action_tokens(trainer):
    model = tiny_agent()
    made = trainer(model, method="sft")
    comparisons, batch = first_batch(made)
    nll = -torch.cat(logps_of(model, comparisons)).mean()
    assert made.compute_loss(model, batch).item() == pytest.approx(nll.item(), rel=1e-5)


def test_dagger_learns_the_experts_answers_at_the_states_of_all_cycles(trainer):
    model = tiny_agent()
    made = trainer(
        model, method="sft", states="agent", env=LEVEL, rollouts=4, max_steps_per_episode=3
    )
    sizes = []
    begin = made.begin_epoch

    def noted(epoch: int) -> None:
        begin(epoch)
        sizes.append((len(made._comparisons), len(made.train_dataset.items)))

    made.begin_epoch = noted
    made.train()
    demonstrations = len(made._trunks)
    assert sizes == [(demonstrations + 4, 4), (demonstrations + 8, 4)]
    fresh = made._comparisons[demonstrations:]
    assert all(not c.expert_trunk for c in fresh)
    batch = made._collate(fresh)
    experts = [logps_of(model, fresh)[e] for e, _ in pairs_of(fresh)]
    expected = -torch.cat(experts).mean().item()
    assert made.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)

    logged = cycles_of(made)
    assert [entry["cycle"] for entry in logged] == [0, 1]
    assert logged[1]["agreement"] == agreement_of(fresh[4:])
    assert logged[1]["tokens_unique"] == unique_tokens(fresh[4:], 4096)
    assert "kl" not in logged[0]


# ------------------------------------------------------------------ what a cycle logs


def agreement_of(comparisons):
    return agreement([c.trunk for c in comparisons], [c.branches for c in comparisons])


def hand_made() -> Comparison:
    """u o₁ [a₁] o₂ [a₂ a₂'] with one sample equal to a₁, one of three tokens in place of a₂."""
    trunk = Trunk([7, 8, 9, 10, 11, 12, 13], [(2, 3), (5, 7)])
    return Comparison(trunk, [[np.array([9])], [np.array([20, 21, END])]], expert_trunk=True)


def test_tokens_and_agreement_of_a_hand_made_cycle():
    (made, doubled) = (hand_made(), [hand_made(), hand_made()])
    assert agreement_of([made]) == 0.5
    # Seven of the trunk, three of the branch that differs.
    assert unique_tokens([made], 100) == 10
    # Step 1: the prefix of 2 twice, 1 + 1 tokens; step 2: the prefix of 5 twice, 2 + 3 tokens.
    assert naive_tokens([made]) == (2 * 2 + 1 + 1) + (2 * 5 + 2 + 3)
    assert (unique_tokens(doubled, 100), naive_tokens(doubled)) == (20, 42)
    demonstration = Comparison.demonstration(made.trunk)
    assert math.isnan(agreement_of([demonstration]))
    assert naive_tokens([demonstration]) == 0


def test_the_figures_of_a_cycle_are_those_of_separate_sequences(trainer):
    model, other = tiny_agent(), tiny_agent(seed=1)
    made = trainer(
        model,
        ref_model=other,
        beta=0.5,
        learning_rate=0.0,  # the policy stays what it is
        cycles=1,
        epochs_per_cycle=2,
        samples=2,
    )
    made.train()
    comparisons = made._comparisons
    policy, ref = (logps_of(m, comparisons) for m in (model, other))
    ratio = [(p - r).sum().item() for p, r in zip(policy, ref, strict=True)]
    pairs = pairs_of(comparisons)
    margins = np.array([0.5 * (ratio[e] - ratio[a]) for e, a in pairs])
    differ = np.array([not torch.equal(policy[e], policy[a]) for e, a in pairs])

    (logged,) = cycles_of(made)
    assert logged["agreement"] == agreement_of(comparisons) == 1 - differ.mean()
    assert logged["reward_margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert logged["reward_accuracy"] == pytest.approx((margins > 0)[differ].mean())
    assert logged["kl"] == pytest.approx(-np.mean([ratio[a] for _, a in pairs]), rel=1e-4)
    assert logged["tokens_unique"] == unique_tokens(comparisons, 4096)
    assert logged["tokens_naive"] == naive_tokens(comparisons)
    assert logged["epoch"] == 2
    # The mean over batches: its pairs are not as many in each, so only about the mean over pairs.
    losses = np.logaddexp(0, -margins)
    assert losses.min() < logged["mean_loss"] < losses.max()


def test_every_cycle_is_logged_once(trainer):
    made = trainer(cycles=3, epochs_per_cycle=2)
    made.train()
    assert [entry["cycle"] for entry in cycles_of(made)] == [0, 1, 2]
    assert [entry["epoch"] for entry in cycles_of(made)] == [2, 4, 6]
    assert made.state.global_step == 6 * 3


@pytest.mark.parametrize("fixed", [False, True])
def test_the_reference_is_reset_each_cycle_unless_one_is_given(trainer, fixed):
    model = tiny_agent()
    made = trainer(
        model,
        ref_model=deepcopy(model) if fixed else None,
        cycles=3,
        per_device_train_batch_size=6,  # one step a cycle: all it sees is the policy it began with
    )
    made.train()
    losses = [entry["mean_loss"] for entry in cycles_of(made)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    at_reset = [loss == pytest.approx(math.log(2), abs=1e-5) for loss in losses]
    assert at_reset == [True, not fixed, not fixed]


def test_implicit_cycles_raise_the_agreement(trainer):
    made = trainer(tiny_agent(initializer_range=0.1), cycles=12, samples=4, learning_rate=1e-2)
    made.train()
    logged = cycles_of(made)
    assert logged[0]["agreement"] < 0.05
    assert np.mean([entry["agreement"] for entry in logged[-3:]]) > 0.2
    assert np.mean([entry["reward_accuracy"] for entry in logged]) > 0.5


def test_inspection_keeps_to_its_budget(trainer):
    made = trainer(inspect_batch_tokens=30, cycles=1)
    forwards = []
    made.model.register_forward_pre_hook(
        lambda _model, _args, inputs: forwards.append(inputs["input_ids"].numel()),
        with_kwargs=True,
    )
    made._collector.collect(made.model, 0, sharded=False)
    assert max(forwards) == 30
    assert max(len(trunk.input_ids) for trunk in made._trunks) > 30


def test_agent_states_come_from_rollouts_in_the_environment(trainer):
    asked = []

    def expert(env):
        asked.append(env.name)
        return env.expert_action()

    made = trainer(
        states="agent",
        env=LEVEL,
        expert=expert,
        rollouts=3,
        rollout_seed_start=50,
        max_steps_per_episode=4,
    )
    made.train()
    assert set(asked) == {LEVEL}
    assert len(asked) == 2 * 3 * 4  # cycles, rollouts, steps
    seen = [TOKENIZER.decode(c.trunk.input_ids) for c in made._comparisons]
    for text, seed in zip(seen, (53, 54, 55), strict=True):  # the second cycle's
        assert text.startswith(f"<|im_start|> user {envs.make(LEVEL).reset(seed)[0]} <|im_end|>")
    assert [entry["cycle"] for entry in cycles_of(made)] == [0, 1]


# ------------------------------------------------------------------ checkpoints


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


RUNS = {
    # Dropout, so that the random state of torch has to come back too.
    "implicit": {"name": "gpt2", "samples": 2},
    "agent": {"states": "agent", "env": LEVEL, "rollouts": 6, "max_steps_per_episode": 3},
    "inverse": {
        "method": "inverse",
        "states": "agent",
        "env": LEVEL,
        "rollouts": 6,
        "max_steps_per_episode": 3,
        "discriminators": 2,
        "discriminator_replay": 1,
        "critic_epochs": 2,
    },
    "dagger": {
        "method": "sft",
        "states": "agent",
        "env": LEVEL,
        "rollouts": 6,
        "max_steps_per_episode": 3,
    },
}
DROPOUT = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, trajectories):
    """Runs of 2 cycles × 2 epochs × 3 steps, with a checkpoint after every step; made once."""
    runs = {}

    def make(kind: str, folder: Path, **mine: Any) -> StepAgentTrainer:
        options = dict(RUNS[kind])
        name = options.pop("name", "llama")
        model = tiny_agent(name, **(DROPOUT if name == "gpt2" else {}))
        env = options.pop("env", None)
        args = StepAgentConfig(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=1,
            logging_strategy="no",
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            cycles=2,
            epochs_per_cycle=2,
            seed=3,
            **options,
        )
        return StepAgentTrainer(model, args, trajectories, TOKENIZER, env=env, **mine)

    def run(kind: str) -> tuple[StepAgentTrainer, Any]:
        if kind not in runs:
            torch.manual_seed(0)
            runs[kind] = make(kind, tmp_path_factory.mktemp(kind))
            runs[kind].train()
        return runs[kind], make

    return run


def weights(trainer: StepAgentTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


SLOW_STEPS = [
    pytest.param("implicit", 3, marks=pytest.mark.slow),  # an epoch's end within a cycle
    pytest.param("implicit", 8, marks=pytest.mark.slow),
    pytest.param("implicit", 12, marks=pytest.mark.slow),  # the end of the run
    pytest.param("dagger", 4, marks=pytest.mark.slow),
    pytest.param("agent", 6, marks=pytest.mark.slow),
    pytest.param("inverse", 9, marks=pytest.mark.slow),  # an epoch's end within the second cycle
]


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *(("implicit", 2), ("implicit", 6), ("agent", 4), ("dagger", 6)),
        *(("inverse", 4), ("inverse", 6)),  # within the first cycle, and at its end
        *SLOW_STEPS,
    ],
)
def test_a_resumed_run_ends_as_an_undisturbed_one_bit_for_bit(kind, step, undisturbed, tmp_path):
    whole, make = undisturbed(kind)
    resumed = make(kind, tmp_path)
    torch.manual_seed(99)  # whatever came before
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert torch.equal(weights(resumed), weights(whole))
    assert cycles_of(resumed) == cycles_of(whole)
    assert len(cycles_of(whole)) == 2


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_interrupted_run_resumes_from_its_last_checkpoint(strategy, undisturbed, tmp_path):
    whole, make = undisturbed("implicit")
    torch.manual_seed(0)
    stopped = make("implicit", tmp_path, callbacks=[InterruptAt(8)])
    stopped.args.save_strategy = strategy
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make("implicit", tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert cycles_of(resumed) == cycles_of(whole)


def test_training_again_starts_again(trainer):
    made = trainer(learning_rate=0.0)
    made.train()
    first = cycles_of(made)
    made.train()
    assert cycles_of(made) == first


def test_a_checkpoint_without_its_cycle_is_named(undisturbed, tmp_path):
    whole, make = undisturbed("implicit")
    broken = tmp_path / "checkpoint-2"
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-2", broken)
    (broken / "cycle.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2/cycle\.safetensors is missing"):
        make("implicit", tmp_path / "new").train(resume_from_checkpoint=str(broken))


def test_a_checkpoint_of_another_batch_is_refused(undisturbed, trainer):
    whole, _ = undisturbed("implicit")
    made = trainer(tiny_agent("gpt2"), per_device_train_batch_size=1, epochs_per_cycle=2, samples=2)
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    with pytest.raises(ValueError, match=r"accumulation_steps × processes must be 2 .*, got 1"):
        made.train(resume_from_checkpoint=checkpoint)


def test_checkpoints_hold_no_pickled_weights(undisturbed):
    whole, _ = undisturbed("implicit")
    names = {path.name for path in Path(whole.args.output_dir, "checkpoint-2").iterdir()}
    assert {"model.safetensors", "cycle.safetensors", "trainer_state.json"} <= names
    assert "pytorch_model.bin" not in names


def test_a_cycle_comes_back_from_its_file_as_it_was(tmp_path):
    empty = Comparison(Trunk([1, 2, 3], [(1, 2)]), [[np.zeros(0, np.int32)]], expert_trunk=False)
    scored = Comparison(*vars_of(hand_made()), np.array([-1.5, -2.5], np.float32))
    kept = [scored, Comparison.demonstration(empty.trunk), empty]
    progress = {"cycle": 3, "log": {"agreement": float("nan")}, "means": {"kl": [0.5, 2]}}
    save_comparisons(tmp_path / "cycle", kept, progress)
    back, told = load_comparisons(tmp_path / "cycle")
    assert json.dumps(told) == json.dumps(progress)
    for old, new in zip(kept, back, strict=True):
        assert new.trunk.input_ids.tolist() == old.trunk.input_ids.tolist()
        assert new.trunk.action_spans.tolist() == old.trunk.action_spans.tolist()
        assert [[b.tolist() for b in s] for s in new.branches] == [
            [b.tolist() for b in s] for s in old.branches
        ]
        assert new.expert_trunk == old.expert_trunk
        assert new.ref_logps.tolist() == old.ref_logps.tolist()


def vars_of(comparison: Comparison) -> tuple[Trunk, list, bool]:
    return comparison.trunk, comparison.branches, comparison.expert_trunk


# ------------------------------------------------------------------ steps of a batch


def test_a_table_says_which_steps_are_compared():
    """Trunk 0 is the expert's with 1 and 2 samples, trunk 1 the agent's with an answer and none."""
    expert = Comparison(
        Trunk([1, 2, 3, 4, 5], [(1, 2), (3, 5)]),
        [[np.array([2])], [np.array([9]), np.array([4, 5])]],
        expert_trunk=True,
    )
    agent = Comparison(Trunk([1, 2, 3, 4], [(1, 2), (3, 4)]), [[np.array([7, 8])], []], False)
    for limit in (100, 6):  # one tree, and one for each
        trees = pack_comparisons([expert, agent], limit)
        table = StepTable.of(trees, torch.tensor([True, True, False, False]))
        # Steps: 0 a₁ | 1 â₁ = a₁ | 2 a₂ | 3 â₂ | 4 â₂' = a₂ || 5 â₁ | 6 a₁ | 7 â₂
        assert table.offsets.tolist() == [0, 1, 2, 4, 5, 7, 8, 10, 11]
        assert table.expert_P.tolist() == [0, 2, 2, 6]
        assert table.agent_P.tolist() == [1, 3, 4, 5]
        assert table.same_P.tolist() == [True, False, True, False]
        assert torch.nonzero(table.expert_S).flatten().tolist() == [0, 2, 6]
        values = torch.arange(11.0)
        expected = -values[[0, 2, 3, 8, 9]].mean()
        assert table.expert_nll(values, table.counts().expert_tokens) == expected
        parts = split_by_trunk(values.numpy(), trees)
        assert [part.tolist() for part in parts] == [list(range(7)), [7, 8, 9, 10]]


# ------------------------------------------------------------------ with the rest of the world


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT, of transformers' names
def test_an_adapter_alone_is_trained_saved_and_resumed(trainer, tmp_path):
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    base = deepcopy(tiny_agent().state_dict())
    options = {"peft_config": lora, "save_strategy": "steps", "save_steps": 1}
    torch.manual_seed(0)  # the adapter's start is of the run's seed, not of this one
    made = trainer(**options)
    starts = [trainer(peft_config=lora, seed=seed).model.state_dict() for seed in (3, 4)]
    same = [torch.equal(v, starts[0][n]) for n, v in made.model.state_dict().items()]
    assert all(same)
    assert not all(torch.equal(v, starts[1][n]) for n, v in starts[0].items())
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    changed = 0
    for name, value in made.model.named_parameters():
        if "lora_" in name:
            changed += bool(value.any()) and "lora_B" in name
        else:
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, base[key])
    assert changed == 4

    trees = pack_comparisons([Comparison.demonstration(t) for t in made._trunks], 4096)
    loaded = PeftModel.from_pretrained(tiny_agent(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(score_trees(loaded, trees), score_trees(made.model.eval(), trees))

    resumed = trainer(**options)
    resumed.train(resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-2")
    assert torch.equal(weights(resumed), weights(made))
    assert cycles_of(resumed) == cycles_of(made)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "sft", "num_train_epochs": 2.0},
        {"method": "implicit", "cycles": 2, "sft_weight": 0.5},
        {"method": "inverse", "cycles": 1, "critic_epochs": 1, "ratio": "token", "entropy_coef": 1},
    ],
    ids=lambda method: method["method"],
)
def test_a_step_is_one_however_it_is_cut_into_batches(trainer, trajectories, method):
    uneven = [Trajectory(trajectories[0].messages * n) for n in (1, 2, 3, 5)]

    def trained(size: int, accumulated: int) -> tuple[torch.Tensor, list[float]]:
        made = trainer(
            data=uneven,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_strategy="steps",
            logging_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            # The critic's batches are not accumulated: it learns nothing here.
            **method | ({"critic_learning_rate": 1e-30} if method["method"] == "inverse" else {}),
        )
        made.train()
        logs = made.state.log_history
        losses = [entry["loss"] for entry in logs if "loss" in entry]
        return weights(made), [*losses, *(entry["mean_loss"] for entry in cycles_of(made))]

    start = torch.cat([p.detach().flatten() for p in tiny_agent().parameters()])
    (large, whole), (small, parts) = trained(4, 1), trained(1, 4)
    assert (large - start).norm() > 1e-3
    assert (large - small).norm() < 1e-3 * (large - start).norm()
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("option", ["bf16", "activation_checkpointing"])
def test_mixed_precision_and_checkpointing_train(trainer, option):
    made = trainer(**{option: True}, cycles=1)
    made.train()
    assert math.isfinite(cycles_of(made)[0]["mean_loss"])


@pytest.mark.parametrize("own_reference", [True, False])
def test_mixed_precision_scores_policy_and_reference_alike(trainer, own_reference):
    """Scored in float32, the same tokens' log-probs would differ five times as much and more.

    Not in nothing: some processors round bfloat16 products by the shape of the batch.
    """
    made = trainer(bf16=True, ref_model=None if own_reference else tiny_agent())
    _, batch = first_batch(made)
    with torch.no_grad():
        logps_N, _ = made._scorer.logps(made.model, batch["trees"])
        wide_N = score_trees(made.model, batch["trees"])
    apart, precision = ((logps_N - x).abs().mean() for x in (batch["ref_logps"], wide_N))
    assert float(precision) > 5 * float(apart)


def test_figures_go_where_report_to_says(trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer(report_to=["tensorboard"]).train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    figures = {"agreement", "mean_loss", "reward_margin", "reward_accuracy", "kl"}
    figures |= {"identical_pairs", "identical_actions"}
    assert figures | {"tokens_unique", "tokens_naive"} <= tags
    assert len(events.Scalars("train/agreement")) == 2


def test_rows_of_a_dataset_are_trajectories_too(trainer, trajectories):
    from datasets import Dataset

    rows = Dataset.from_list([{"messages": t.messages, "score": 1.0} for t in trajectories])
    made = trainer(data=rows)
    expected = [encode(t, TOKENIZER).input_ids.tolist() for t in trajectories]
    assert [t.input_ids.tolist() for t in made._trunks] == expected
    made.train()


def test_a_model_can_be_named_by_its_folder(trainer, tmp_path):
    model = tiny_agent()
    model.save_pretrained(tmp_path / "model")
    made = trainer(str(tmp_path / "model"), cycles=1)
    assert all(
        torch.equal(a, b) for a, b in zip(made.model.parameters(), model.parameters(), strict=True)
    )


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "dpo"},
            "method must be one of .*inverse, .*or module:Class .*, got 'dpo'",
        ),
        ({"states": "mine"}, r"states must be one of \('expert', 'agent', 'mixed'\), got 'mine'"),
        ({"cycles": 0}, "cycles must be a whole number >= 1, got 0"),
        ({"cycles": 1.5}, r"cycles must be a whole number >= 1, got 1\.5"),
        ({"epochs_per_cycle": 0}, "epochs_per_cycle must be a whole number >= 1, got 0"),
        ({"samples": -1}, "samples must be a whole number >= 1, got -1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number >= 1, got 0"),
        ({"inspect_batch_tokens": 0}, "inspect_batch_tokens must be a whole number >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got 0"),
        ({"rollouts": 0}, "rollouts must be a whole number >= 1, got 0"),
        ({"max_steps_per_episode": 0}, "max_steps_per_episode must be a whole number >= 1"),
        ({"beta": 0.0}, r"beta must be finite and > 0, got 0\.0"),
        ({"beta": float("nan")}, "beta must be finite and > 0, got nan"),
        ({"beta": float("inf")}, "beta must be finite and > 0, got inf"),
        ({"sft_weight": -0.1}, r"sft_weight must be finite and >= 0, got -0\.1"),
        ({"sft_weight": float("nan")}, "sft_weight must be finite and >= 0, got nan"),
        ({"temperature": -1.0}, r"temperature must be finite and >= 0, got -1\.0"),
        ({"temperature": float("inf")}, "temperature must be finite and >= 0, got inf"),
        ({"states": "agent", "samples": 2}, "one action per state, got samples=2"),
        ({"rollouts": 5}, "rollouts=5 needs states='agent'"),
        ({"max_steps": 10}, "max_steps=10 cannot be combined with cycles"),
        ({"num_train_epochs": 7}, "num_train_epochs=7 cannot be set with cycles"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers must be 0, got 2"),
    ],
)
def test_an_invalid_option_is_named(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_an_unknown_option_is_an_error(config):
    with pytest.raises(TypeError, match="unexpected keyword argument 'samlpes'"):
        config(samlpes=3)


def test_cycles_set_the_epochs(config):
    assert config(cycles=3, epochs_per_cycle=4).num_train_epochs == 12
    assert config(cycles=3, epochs_per_cycle=4, num_train_epochs=12).num_train_epochs == 12
    assert config(method="sft", num_train_epochs=7).num_train_epochs == 7
    assert config(method="sft", max_steps=7).max_steps == 7


def test_arguments_must_be_a_step_agent_config(trajectories, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(TypeError, match="args must be a StepAgentConfig, got TrainingArguments"):
        StepAgentTrainer(tiny_agent(), args, trajectories, TOKENIZER)


def test_an_empty_dataset_is_an_error(config):
    with pytest.raises(
        ValueError, match="train_dataset must hold at least one trajectory, got none"
    ):
        StepAgentTrainer(tiny_agent(), config(), [], TOKENIZER)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "go"}, r"train_dataset\[6\]: the row must have 'messages'"),
        ({"messages": [{"role": "user", "content": "red"}]}, r"train_dataset\[6\]: .*assistant"),
        (
            {
                "messages": [
                    {"role": "user", "content": "red"},
                    {"role": "assistant", "content": "fly"},
                ]
            },
            r"train_dataset\[6\]: .*'fly'",
        ),
    ],
)
def test_a_row_that_is_no_trajectory_is_named(trainer, trajectories, row, message):
    with pytest.raises(ValueError, match=message):
        trainer(data=[*trajectories, row])


def test_agent_states_need_an_environment(trainer):
    with pytest.raises(ValueError, match="states='agent' needs env"):
        trainer(states="agent")


def test_what_does_not_fit_is_refused_before_any_work(trainer, trajectories):
    trunks = [encode(t, TOKENIZER) for t in trajectories]
    trunk = max(trunks, key=lambda trunk: len(trunk.input_ids))
    longest = len(trunk.input_ids)
    with pytest.raises(ValueError, match=rf"max_tokens must be .*\[\d\] has {longest} tokens, got"):
        trainer(method="sft", max_tokens=longest - 1)
    trainer(method="sft", max_tokens=longest)
    # Cycles also need room for the agent's actions, whatever it will say: 3 samples of 2 tokens.
    room = longest + 3 * 2 * trunk.num_steps
    with pytest.raises(
        ValueError, match=f"max_tokens must be at least {room}, as .* sampled actions, got"
    ):
        trainer(samples=3, max_tokens=room - 1)
    trainer(samples=3, max_tokens=room)
    with pytest.raises(ValueError, match=r"train_dataset\[0\] must fit .*, got \d+ positions"):
        trainer(tiny_agent(max_position_embeddings=16))


def test_a_reference_that_would_not_be_used_is_refused(trainer):
    model = tiny_agent()
    with pytest.raises(ValueError, match="method='sft' has no reference"):
        trainer(method="sft", ref_model=model)
    with pytest.raises(ValueError, match="ref_model must be another object than model"):
        trainer(model, ref_model=model)


@pytest.mark.parametrize("method", ["sft", "implicit"])
def test_nan_in_the_model_stops_training(trainer, method):
    model = tiny_agent()
    made = trainer(model, method=method, logging_strategy="steps", logging_steps=1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        made.train()


def test_nan_that_comes_up_in_training_stops_it(trainer):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            with torch.no_grad():
                model.model.norm.weight[0] = float("nan")

    made = trainer(callbacks=[Break()], logging_nan_inf_filter=True)
    with pytest.raises(FloatingPointError, match="the loss must be finite, got NaN"):
        made.train()
    assert made.state.global_step == 1


def test_a_model_that_a_tree_would_make_wrong_is_refused(trainer):
    mpt = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024}
    with pytest.raises(ValueError, match="MptForCausalLM cannot be computed exactly"):
        trainer(tiny_agent("mpt", **mpt))
    with pytest.raises(ValueError, match="MptForCausalLM cannot be computed exactly"):
        trainer(ref_model=tiny_agent("mpt", **mpt))


def test_one_process_for_many_gpus_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(StepAgentConfig, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match="one process cannot train on 4 GPUs"):
        trainer()


def test_examples_have_no_outputs(trainer):
    made = trainer()
    _, batch = first_batch(made)
    with pytest.raises(ValueError, match="no per-example outputs"):
        made.compute_loss(made.model, batch, return_outputs=True)


def test_kinds_of_sharding_that_cannot_work_are_refused_by_name(trainer, monkeypatch):
    fsdp1, zero3 = SimpleNamespace(fsdp_version=1), SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match=r"fsdp_version is 1, .* set fsdp_version: 2"):
        check_sharding(fsdp1, None)
    with pytest.raises(ValueError, match=r"ZeRO-3 is not supported: .* Shard with FSDP2"):
        check_sharding(None, zero3)
    check_sharding(SimpleNamespace(fsdp_version=2), SimpleNamespace(zero_stage=2))
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading must be false"):
        trainer()
