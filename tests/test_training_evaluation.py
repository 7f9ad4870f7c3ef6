"""Evaluation in training: what is measured, by which the best model is chosen, and what is read."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import LEVEL, TOKENIZER, InterruptAt, logps_of, pairs_of, weights
from tiny_models import END, generate, tiny_agent
from transformers import EarlyStoppingCallback

from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.data.branch import agreement
from stepagent.data.encoding import encode
from stepagent.data.trajectory import Trajectory
from stepagent.learning import loading
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import Comparison
from stepagent.learning.trainer import StepAgentTrainer

NAMES = (
    *("ref_model", "env", "callbacks", "eval_dataset", "compute_metrics", "optimizers"),
    "peft_config",
)


@pytest.fixture(scope="module")
def experts() -> list[Trajectory]:
    """The expert's, of which the tests learn from the first four and hold out the others."""
    episodes = run_episodes(LEVEL, ExpertPolicy(), range(20))
    shortest = sorted(episodes, key=lambda episode: len(episode.actions))[:7]
    return [episode.trajectory() for episode in shortest]


@pytest.fixture
def trainer(tmp_path, experts):
    def make(model=None, data=None, **options: Any) -> StepAgentTrainer:
        mine = {name: options.pop(name) for name in NAMES if name in options}
        mine = {"eval_dataset": experts[4:]} | mine
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 3e-3,
            "seed": 3,
            "cycles": 2,
        }
        args = StepAgentConfig(**defaults | options)
        data = experts[:4] if data is None else data
        return StepAgentTrainer(model or tiny_agent(), args, data, TOKENIZER, **mine)

    return make


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    """What is measured; not how long it took, nor where the run was."""
    told = ("_runtime", "_per_second", "epoch")
    return {name: value for name, value in metrics.items() if not name.endswith(told)}


def evaluations(made: StepAgentTrainer) -> list[dict[str, float]]:
    return [without_times(e) for e in made.state.log_history if "eval_runtime" in e]


# ------------------------------------------------------------------ values


def test_figures_are_those_of_separate_sequences_in_float64(trainer, experts):
    model, other = (tiny_agent(seed=seed, initializer_range=0.1) for seed in (0, 1))
    made = trainer(model, ref_model=other, beta=0.7, samples=2, sft_weight=0.3)
    metrics = made.evaluate()

    comparisons = made._evaluator._sets[""].comparisons
    ids = [c.trunk.input_ids.tolist() for c in comparisons]
    assert ids == [encode(t, TOKENIZER).input_ids.tolist() for t in experts[4:]]
    with torch.no_grad():
        policy, ref = (logps_of(deepcopy(m).double(), comparisons) for m in (model, other))
    rewards = [0.7 * (p - r).sum().item() for p, r in zip(policy, ref, strict=True)]
    pairs = pairs_of(comparisons)
    same = np.array([torch.equal(policy[e], policy[a]) for e, a in pairs])
    margins = np.array([rewards[e] - rewards[a] for e, a in pairs])
    nll = -torch.cat([policy[e] for e in dict(pairs)]).mean().item()
    tried = [generate_actions(model, c.trunk, 8) for c in comparisons]
    loss = np.logaddexp(0, -margins).mean() + 0.3 * nll
    expected = {
        "eval_loss": loss,
        "eval_nll": nll,
        "eval_reward_margin": margins.mean(),
        "eval_reward_accuracy": (margins > 0)[~same].mean(),
        "eval_expert_reward": np.mean([rewards[e] for e, _ in pairs]),
        "eval_agent_reward": np.mean([rewards[a] for _, a in pairs]),
        "eval_expert_logp": np.mean([policy[e].sum().item() for e in dict(pairs)]),
        "eval_agent_logp": np.mean([policy[a].sum().item() for _, a in pairs]),
        "eval_identical_pairs": same.mean(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_agreement"] == agreement([c.trunk for c in comparisons], tried)


def generate_actions(model, trunk, most: int) -> list[list[np.ndarray]]:
    """What `generate` writes greedily at each state."""
    return [
        [np.array(generate(model, trunk.input_ids[:start], most), dtype=np.int32)]
        for start, _ in trunk.action_spans
    ]


def test_the_greedy_actions_are_those_of_generate_and_reach_compute_metrics(trainer, experts):
    seen = []

    def measured(prediction):
        seen.append(prediction)
        return {"mine": np.mean([len(t) for t in prediction.label_ids]), "eval_own": 7}

    model = tiny_agent(initializer_range=0.1)
    made = trainer(
        model,
        method="sft",
        compute_metrics=measured,
        max_new_tokens=5,
        include_for_metrics=["loss", "inputs"],
    )
    metrics = made.evaluate()
    (prediction,) = seen
    trunks = [encode(t, TOKENIZER) for t in experts[4:]]
    for i, trunk in enumerate(trunks):
        actions = generate_actions(model, trunk, 5)
        written = [ids[:-1] if ids[-1] == END else ids for ((ids),) in actions]
        assert prediction.predictions[i] == [TOKENIZER.decode(ids) for ids in written]
        spoken = [m["content"] for m in experts[4 + i].messages if m["role"] == "assistant"]
        assert prediction.label_ids[i] == spoken
        assert np.array_equal(prediction.inputs[i].input_ids, trunk.input_ids)
        with torch.no_grad():
            logps = logps_of(deepcopy(model).double(), [Comparison.demonstration(trunk)])
        assert prediction.losses[i] == pytest.approx([-p.sum().item() for p in logps], rel=1e-5)
    assert metrics["eval_mine"] == np.mean([trunk.num_steps for trunk in trunks])
    assert metrics["eval_own"] == 7  # a name with the prefix keeps it
    nll = np.concatenate(prediction.losses).sum() / sum(
        int(np.diff(trunk.action_spans).sum()) for trunk in trunks
    )
    assert metrics["eval_loss"] == metrics["eval_nll"] == pytest.approx(nll, rel=1e-6)


def test_a_batch_size_changes_no_figure(trainer):
    found = [
        without_times(trainer(tiny_agent(), per_device_eval_batch_size=size).evaluate())
        for size in (1, 3)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_one_set_of_several_is_evaluated_by_its_name(trainer, experts):
    sets = {"short": experts[4:5], "long": experts[5:]}
    made = trainer(eval_dataset=sets)
    every = made.evaluate()
    assert {"eval_short_loss", "eval_long_loss", "eval_long_agreement"} <= every.keys()
    assert "eval_loss" not in every
    alone = without_times(made.evaluate("long"))
    assert alone["eval_loss"] == every["eval_long_loss"]
    assert alone["eval_nll"] == every["eval_long_nll"]
    # Others have no pairs of the cycle, so no rewards.
    others = without_times(made.evaluate(experts[5:]))
    expected = {name: alone[name] for name in ("eval_nll", "eval_agreement")}
    assert others == pytest.approx(expected, rel=1e-6)


def test_rewards_of_the_inverse_method_are_the_discriminators(trainer):
    made = trainer(method="inverse", critic_epochs=3, cycles=1)
    made.train()
    metrics = made.evaluate()
    held = made._evaluator._sets[""].comparisons
    from stepagent.learning.cycle import pack_with_steps

    _, steps = pack_with_steps(held, 4096)
    logits_ES, _, _ = made._method.reflection._judge(held, steps)
    rewards_S = np.logaddexp(0, -logits_ES[0].numpy())  # −log σ
    margins = rewards_S[steps.expert_P] - rewards_S[steps.agent_P]
    assert metrics["eval_reward_margin"] == pytest.approx(margins.mean(), rel=1e-5)
    differ = ~steps.same_P.numpy()
    assert metrics["eval_reward_accuracy"] == pytest.approx((margins > 0)[differ].mean())
    assert "eval_loss" not in metrics


def test_success_is_that_of_the_greedy_policys_episodes(trainer, experts):
    from stepagent.acting.policies import ModelPolicy

    model = tiny_agent(initializer_range=0.1)
    options = {"eval_episodes": 4, "eval_seed_start": 50, "max_steps_per_episode": 3}
    made = trainer(model, env=LEVEL, method="sft", num_train_epochs=30, **options)
    made.train()
    metrics = made.evaluate()
    policy = ModelPolicy(
        model, TOKENIZER, max_new_tokens=made._collector.max_new_tokens, eos_token_id=END
    )
    episodes = run_episodes(LEVEL, policy, range(50, 54), max_steps=3)
    assert metrics["eval_success_rate"] == np.mean([e.success for e in episodes])
    assert metrics["eval_crashed"] == 0
    assert metrics["eval_agreement"] > 0
    made.args.action_format = "react"  # in which these texts hold no action
    assert made.evaluate()["eval_agreement"] == 0
    alone = trainer(env=LEVEL, eval_dataset=None, eval_strategy="epoch", **options).evaluate()
    assert without_times(alone).keys() == {"eval_success_rate", "eval_crashed"}


def test_prediction_loss_only_samples_no_greedy_actions(trainer, monkeypatch):
    made = trainer(method="sft", prediction_loss_only=True, compute_metrics=lambda p: 1 / 0)
    monkeypatch.setattr(made._evaluator, "_acts", lambda *_: 1 / 0)
    assert without_times(made.evaluate()).keys() == {"eval_nll", "eval_loss"}


def test_experts_with_an_auxiliary_loss_are_evaluated_without_it(trainer):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    found = [
        trainer(tiny_agent("mixtral", **experts, output_router_logits=asked), method="sft")
        for asked in (False, True)
    ]
    plain, asked = (without_times(made.evaluate()) for made in found)
    assert plain == asked


def test_predict_gives_the_texts_and_metrics(trainer, experts):
    made = trainer(method="sft", compute_metrics=lambda p: {"n": len(p.predictions)})
    found = made.predict(experts[4:])
    assert found.metrics["test_n"] == len(found.predictions) == len(found.label_ids) == 3
    assert found.metrics["test_nll"] == made.evaluate()["eval_nll"]
    with pytest.raises(TypeError, match=r"test_dataset must be one dataset, got \['a', 'b'\]"):
        made.predict({"a": experts[:1], "b": experts[:1]})


# ------------------------------------------------------------------ in training

OFTEN = {"eval_strategy": "steps", "eval_steps": 1, "epochs_per_cycle": 2}


def test_evaluating_changes_nothing_that_is_learnt(trainer):
    plain = trainer(tiny_agent("gpt2"), eval_dataset=None, epochs_per_cycle=2)
    plain.train()
    watched = trainer(tiny_agent("gpt2"), **OFTEN)
    watched.train()
    assert torch.equal(weights(plain), weights(watched))
    found = evaluations(watched)
    assert [entry["step"] for entry in found] == list(range(1, 9))
    assert len({entry["eval_loss"] for entry in found}) == 8


def test_a_cycles_held_out_pairs_begin_at_the_reference(trainer):
    made = trainer(learning_rate=0.0, eval_on_start=True, **OFTEN)
    made.train()
    for entry in evaluations(made):
        assert entry["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert entry["eval_reward_margin"] == pytest.approx(0, abs=1e-5)


def with_best(folder: Path) -> dict[str, Any]:
    return OFTEN | {
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "nll",
        "output_dir": str(folder),
    }


def test_a_resumed_run_has_the_same_best_model_as_an_undisturbed_one(trainer, tmp_path):
    # At this rate the NLL first falls and then rises: the best is not the last.
    options = {"learning_rate": 2e-2, "ref_model": None, "samples": 2, "sft_weight": 0.5}
    whole = trainer(tiny_agent(), **with_best(tmp_path / "whole"), **options)
    whole.train()
    stopped = trainer(
        tiny_agent(), **with_best(tmp_path / "other"), **options, callbacks=[InterruptAt(6)]
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer(tiny_agent(), **with_best(tmp_path / "other"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert evaluations(resumed) == evaluations(whole)
    assert resumed.state.best_metric == whole.state.best_metric
    assert resumed.state.best_metric == min(e["eval_nll"] for e in evaluations(whole))
    names = [Path(t.state.best_model_checkpoint).name for t in (whole, resumed)]
    assert names[0] == names[1]
    assert torch.equal(weights(resumed), weights(whole))
    assert whole.evaluate()["eval_nll"] == whole.state.best_metric


def test_other_held_out_data_is_refused_on_resuming(trainer, tmp_path, experts):
    options = {"save_strategy": "steps", "save_steps": 1, "epochs_per_cycle": 2}
    trainer(**options).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    fewer = trainer(eval_dataset=experts[5:], epochs_per_cycle=2)
    with pytest.raises(ValueError, match=r'eval_dataset must be .* rows \{"": 3\}, got \{"": 2\}'):
        fewer.train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_without_held_out_pairs_resumes_without_rewards(trainer, tmp_path, caplog):
    saved = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "epochs_per_cycle": 2}
    trainer(eval_dataset=None, **saved).train()
    resumed = trainer(**OFTEN)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert "until the next cycle, evaluations are without rewards" in caplog.text
    found = evaluations(resumed)
    assert ["eval_reward_margin" in e for e in found] == [False] * 3 + [True] * 4


def test_early_stopping_stops_where_nothing_improves(trainer, tmp_path):
    made = trainer(
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **with_best(tmp_path / "best") | {"learning_rate": 0.0},
    )
    made.train()
    assert made.state.global_step == 3  # the first is the best; two do not improve it


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_finite_number_is_never_the_best(trainer, tmp_path, caplog, greater, bad):
    answers = iter([bad, 1.0, bad, 1.0])
    made = trainer(
        method="sft",
        num_train_epochs=2.0,
        compute_metrics=lambda _: {"mine": next(answers)},
        **with_best(tmp_path / "best")
        | {"metric_for_best_model": "mine", "greater_is_better": greater, "epochs_per_cycle": 1},
    )
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.state.best_metric == 1.0
    assert made.state.best_global_step == 2
    assert f"compute_metrics gave {bad} for 'mine'" in caplog.text
    assert f"eval_mine is {bad} in this evaluation" in caplog.text


def test_less_of_the_nll_is_better_unless_said_otherwise(tmp_path):
    def better(name: str, **options: Any) -> bool | None:
        return StepAgentConfig(
            output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=name, **options
        ).greater_is_better

    assert [better(name) for name in ("nll", "eval_nll", "eval_short_nll")] == [False] * 3
    assert better("loss") is False
    assert [better(name) for name in ("agreement", "success_rate")] == [True] * 2
    assert better("nll", greater_is_better=True) is True


def test_steps_log_what_cycles_log(trainer):
    made = trainer(logging_strategy="steps", logging_steps=1, ref_model=tiny_agent(seed=1))
    made.train()
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(steps) == 4
    names = {"expert_logp", "agent_logp", "expert_reward", "agent_reward", "expert_length"}
    for entry in steps:
        assert names | {"agent_length", "identical_pairs", "kl"} <= entry.keys()
    first = next(entry for entry in made.state.log_history if "cycle" in entry)
    both = [entry["agent_logp"] for entry in steps[:2]]
    assert min(both) <= first["agent_logp"] <= max(both)


def test_own_optimisers_are_used(trainer):
    model = tiny_agent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    made = trainer(model, optimizers=(optimizer, scheduler), cycles=1, learning_rate=0.0)
    made.train()
    assert made.optimizer.optimizer is optimizer
    assert not torch.equal(weights(made), before)


# ------------------------------------------------------------------ forms of a dataset


def rows(trajectories: list[Trajectory]) -> list[dict[str, Any]]:
    return [{"messages": t.messages} for t in trajectories]


@pytest.mark.parametrize("form", ["dataset", "iterable", "generator", "file", "torch", "tuple"])
def test_every_form_of_a_dataset_is_the_same_data(form, trainer, experts, tmp_path):
    from datasets import Dataset

    from stepagent.data.trajectory import save_trajectories

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return rows(experts)[index % 7]  # never raises IndexError

    save_trajectories(tmp_path / "rows.jsonl", experts[:4])
    data = {
        "dataset": lambda: Dataset.from_list(rows(experts[:4])),
        "iterable": lambda: Dataset.from_list(rows(experts[:4])).to_iterable_dataset(),
        "generator": lambda: (row for row in rows(experts[:4])),
        "file": lambda: str(tmp_path / "rows.jsonl"),
        "torch": Rows,
        "tuple": lambda: tuple(experts[:4]),
    }[form]
    made = trainer(data=data(), eval_dataset=data())
    expected = [encode(t, TOKENIZER).input_ids.tolist() for t in experts[:4]]
    for trunks in (made._trunks, made._evaluator._sets[""].trunks):
        assert [trunk.input_ids.tolist() for trunk in trunks] == expected


def test_splits_are_held_out_sets_and_no_training_data(trainer, experts):
    from datasets import Dataset, DatasetDict

    splits = DatasetDict(
        train=Dataset.from_list(rows(experts[:4])), test=Dataset.from_list(rows(experts[4:]))
    )
    with pytest.raises(TypeError, match=r"train_dataset must be one dataset, got a DatasetDict of"):
        trainer(data=splits)
    made = trainer(data=splits["train"], eval_dataset=splits)
    assert list(made._evaluator._sets) == ["train", "test"]


def test_a_stream_must_end(trainer, experts, monkeypatch):
    import itertools

    monkeypatch.setattr(loading, "MOST_STREAMED", 10)
    with pytest.raises(
        ValueError, match="train_dataset must end within 10 rows, got more of a cyc"
    ):
        trainer(data=itertools.cycle(experts))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (iter([]), ValueError, "eval_dataset must hold at least one"),
        (5, TypeError, "eval_dataset must be rows or a path, got int"),
        ({"a": []}, ValueError, r"eval_dataset\['a'\] must hold at least one"),
        ([{"text": "go"}], ValueError, r"eval_dataset\[0\]: the row must have 'messages'"),
        ({"messages": []}, TypeError, r"must be a list of rows, got a single row"),
    ],
)
def test_what_cannot_be_evaluated_is_named(trainer, data, error, message):
    with pytest.raises(error, match=message):
        trainer(eval_dataset=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_episodes": 2}, "eval_episodes=2 needs env"),
        ({"eval_dataset": None, "eval_strategy": "epoch"}, "needs an eval_dataset, or eval_epis"),
        ({"metric_for_best_model": "nnl"}, r"must be one of \['nll', 'agreement', .* got 'nnl'"),
        ({"metric_for_best_model": "loss"}, "such as 'nll', 'agreement' or .* got 'loss'"),
        ({"metric_for_best_model": "eval_kl"}, "by another reference or discriminator"),
        (
            {"metric_for_best_model": "reward_margin", "method": "inverse"},
            "by another reference or discriminator",
        ),
        ({"metric_for_best_model": "loss", "method": "inverse"}, "must be one of"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics must be False"),
        (
            {"states": "agent", "env": LEVEL, "eval_episodes": 2, "eval_seed_start": 7},
            "must leave out the seeds 0 to 7 of the rollouts in training, got 7",
        ),
        ({"max_tokens": 20}, "max_tokens must be at least .* got 20"),
    ],
)
def test_an_evaluation_that_would_be_wrong_is_refused_before_training(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**{"eval_strategy": "epoch"} | options)


def test_a_loss_of_one_fixed_reference_can_choose_the_best(trainer):
    trainer(eval_strategy="epoch", metric_for_best_model="loss", ref_model=tiny_agent(seed=1))
    trainer(eval_strategy="epoch", metric_for_best_model="loss", cycles=1)
    trainer(eval_strategy="epoch", metric_for_best_model="loss", method="sft")


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT, of transformers' names
def test_an_optimiser_of_other_parameters_is_refused(trainer):
    other = torch.optim.SGD(tiny_agent().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizers\[0\] must be of parameters that are trained"):
        trainer(optimizers=(other, None))
    peft = pytest.importorskip("peft")
    model = tiny_agent()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="got 0 of"):
        trainer(model, optimizers=(mine, None), peft_config=peft.LoraConfig(r=2))


@pytest.mark.parametrize(
    ("answer", "message"),
    [(3.0, "must return a dict, got float"), ({"x": "good"}, "must return numbers, got 'good'")],
)
def test_compute_metrics_must_return_numbers_by_name(trainer, answer, message):
    made = trainer(method="sft", compute_metrics=lambda _: answer)
    with pytest.raises(TypeError, match=message):
        made.evaluate()


def test_evaluate_without_anything_to_evaluate_is_an_error(trainer):
    with pytest.raises(ValueError, match="evaluate needs an eval_dataset"):
        trainer(eval_dataset=None).evaluate()
