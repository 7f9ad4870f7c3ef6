"""Every option of transformers' TrainingArguments is honoured, or refused by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import trajectories
from tiny_models import babyai_tokenizer, tiny_agent
from transformers import TrainerCallback, TrainingArguments

from stepagent.learning import arguments
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.preflight import check_parallelism
from stepagent.learning.trainer import StepAgentTrainer

NAMES = {own.name for own in fields(TrainingArguments)}
# Not in the oldest transformers that the package takes.
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}
CHECKPOINTING = "activation_checkpointing" if NEWER <= NAMES else "gradient_checkpointing"
HOST = [name for names in arguments.HOST.values() for name in names]
DOC = Path(__file__).parents[1] / "docs/training.md"


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
            "method": "sft",
        }
        return StepAgentConfig(**defaults | options)

    return make


@pytest.fixture
def trainer(config):
    def make(callbacks: Any = None, **options: Any) -> StepAgentTrainer:
        return StepAgentTrainer(
            tiny_agent(),
            config(**options),
            trajectories(),
            babyai_tokenizer(),
            callbacks=callbacks,
        )

    return make


def weights(made: StepAgentTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def trained(made: StepAgentTrainer, **options: Any) -> torch.Tensor:
    made.train(**options)
    return weights(made)


# ------------------------------------------------------------------ the table


def test_every_option_is_in_one_class():
    classes = [*arguments.HONOURED, *arguments.REFUSED, *HOST]
    assert len(classes) == len(set(classes))
    unknown = NAMES - set(classes)
    assert not unknown, f"put {sorted(unknown)} into a class of learning/arguments.py"
    assert set(classes) - NAMES <= NEWER


def test_the_docs_have_the_table():
    text = DOC.read_text()
    assert arguments.table() in text, "write arguments.table() into docs/training.md"


def other_than(allowed: Any) -> Any:
    """A value that is not admitted where ``allowed`` is."""
    if isinstance(allowed, bool):
        return not allowed
    return allowed + 2 if isinstance(allowed, int | float) else "other"


@pytest.mark.parametrize("name", sorted(arguments.REFUSED.keys() & NAMES))
def test_what_is_not_followed_is_refused_by_name(config, name):
    rule = arguments.REFUSED[name]
    assert rule.admits(getattr(StepAgentConfig, name))  # the default
    value = other_than(rule.allowed[0])
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value!r}: "):
        config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("split_batches", True), ("dispatch_batches", True), ("use_seedable_sampler", False)],
)
def test_what_would_break_batches_of_trees_is_refused_by_name(config, name, value):
    with pytest.raises(ValueError, match=rf"accelerator_config\.{name} must be .*, got {value}"):
        config(accelerator_config={name: value})


def test_what_the_launcher_asks_for_is_refused_too():
    with pytest.raises(ValueError, match="parallelism_config must be None, got tp_size=2"):
        check_parallelism("tp_size=2")


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_an_order_by_length_is_refused(config, strategy):
    with pytest.raises(ValueError, match=f"train_sampling_strategy must be .*, got '{strategy}'"):
        config(train_sampling_strategy=strategy)


def test_schedule_free_optimizers_are_refused_with_cycles(config):
    with pytest.raises(ValueError, match="optim must not be schedule-free with cycles"):
        config(method="implicit", optim="schedule_free_adamw")
    config(optim="schedule_free_adamw")


def test_epochs_that_are_not_the_cycles_are_refused_even_where_they_are_the_default(config):
    with pytest.raises(ValueError, match=r"num_train_epochs=3 cannot be set .* = 1 × 1"):
        config(method="implicit", cycles=1, num_train_epochs=3)
    assert config(method="implicit", cycles=1).num_train_epochs == 1
    assert config(method="implicit", cycles=1, epochs_per_cycle=3).num_train_epochs == 3
    assert config(num_train_epochs=3).num_train_epochs == config().num_train_epochs == 3


# ------------------------------------------------------------------ what is honoured has an effect


def order_of(made: StepAgentTrainer, epoch: int) -> list[int]:
    made.begin_epoch(epoch)
    places = {id(trunk): place for place, trunk in enumerate(made._trunks)}
    return [places[id(item.trunk)] for item in made.train_dataset.items]


def test_data_seed_orders_the_data_and_nothing_else(trainer):
    orders = [order_of(trainer(**o), 0) for o in ({}, {"data_seed": 3}, {"data_seed": 4})]
    assert orders[0] == orders[1] != orders[2]
    drawn = []
    for seed in (None, 4):
        made = trainer(method="implicit", data_seed=seed)
        made.begin_epoch(0)
        drawn.append([[b.tolist() for s in c.branches for b in s] for c in made._comparisons])
    assert drawn[0] == drawn[1]


def test_sequential_is_the_datasets_order_in_every_epoch(trainer):
    made = trainer(train_sampling_strategy="sequential")
    assert [order_of(made, epoch) for epoch in (0, 1)] == [list(range(len(made._trunks)))] * 2


def test_max_steps_ends_supervised_training(trainer):
    made = trainer(max_steps=4)  # within its second epoch
    made.train()
    assert made.state.global_step == 4


def test_tokens_seen_are_those_of_the_trees(trainer):
    made = trainer(include_num_input_tokens_seen=True, num_train_epochs=2)
    made.train()
    assert made.state.num_input_tokens_seen == 2 * sum(len(t.input_ids) for t in made._trunks)


@pytest.mark.parametrize("method", ["sft", "implicit", "inverse"])
def test_checkpointing_of_activations_is_exact(trainer, method):
    options = {"method": method, "cycles": 1, "samples": 2}
    if method == "inverse":
        options["critic_epochs"] = 1
    plain, kept = trained(trainer(**options)), []
    for reentrant in (False, True):
        asked = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
        kept.append(trained(trainer(**options, **asked)))
    for found in kept:
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-7)


def test_noise_of_embeddings_is_in_supervised_training_alone(trainer, config):
    assert not torch.equal(trained(trainer()), trained(trainer(neftune_noise_alpha=5.0)))
    with pytest.raises(ValueError, match="neftune_noise_alpha must be None for method='implicit'"):
        config(method="implicit", neftune_noise_alpha=5.0)


def test_a_checkpoint_of_the_model_alone_has_no_cycle_and_says_so(trainer, tmp_path):
    options = {"method": "inverse", "samples": 2, "cycles": 2, "critic_epochs": 1}
    made = trainer(**options, save_strategy="epoch", save_only_model=True)
    made.train()
    folder = tmp_path / f"run/checkpoint-{made.steps_per_epoch}"
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names
    assert not names & {"cycle.safetensors", "critic.safetensors", "critic_optimizer.pt"}
    with pytest.raises(FileNotFoundError, match=r"cycle\.safetensors is missing"):
        trainer(**options).train(resume_from_checkpoint=str(folder))


class Asked(TrainerCallback):
    """What a SIGTERM does, after the first step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            callbacks = self.trainer.callback_handler.callbacks
            (jit,) = [callback for callback in callbacks if hasattr(callback, "jit_manager")]
            jit.jit_manager.is_checkpoint_requested = True


@pytest.mark.parametrize("method", ["sft", "implicit"])
def test_a_checkpoint_on_sigterm_resumes_bit_for_bit(trainer, tmp_path, method):
    options = {"method": method, "cycles": 2, "output_dir": str(tmp_path / method)}
    undisturbed = trainer(**options)
    undisturbed.train()
    asked = Asked()
    asked.trainer = made = trainer([asked], **options, enable_jit_checkpoint=True)
    made.train()
    assert made.state.global_step < undisturbed.state.global_step
    resumed = trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / method / "checkpoint-1"))
    assert torch.equal(weights(resumed), weights(undisturbed))


@pytest.mark.parametrize("ignored", [False, True])
def test_ignore_data_skip_begins_the_epoch_again(trainer, ignored):
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    made = trainer(**options)
    made.train()
    resumed = trainer(**options, ignore_data_skip=ignored)
    own, batches = resumed.data_collator, []
    resumed.data_collator = lambda items: batches.append(items) or own(items)
    resumed.train(resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-1")
    first = 0 if ignored else 2  # a step is two trajectories
    assert batches[0][0] is resumed.train_dataset.items[first]
