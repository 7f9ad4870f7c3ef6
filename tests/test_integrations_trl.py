"""TRL's trainers with StepAgent's objectives, in TRL itself, against float64 row by row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stepagent as sa
from stepagent.tools.small_models import small_llama, word_tokenizer

pytest.importorskip("trl", reason="the adapters of TRL are tested where TRL is installed")

pytestmark = [
    pytest.mark.slow,  # to import TRL alone takes ten seconds
    # TRL 1.16 uses what transformers 5.23 warns of.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning"),
]

BETA = 0.5
ACTIONS = ("turn left", "turn right", "go forward", "pick up the key")


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(first: int, turns: int) -> list[dict[str, str]]:
    """Turns of an agent that follows ``ACTIONS`` from the ``first`` on."""
    said: list[dict[str, str]] = []
    for turn in range(turns):
        said.append(message("user", f"room {first % 3} and key {turn % 2}"))
        said.append(message("assistant", ACTIONS[(first + turn) % len(ACTIONS)]))
    return said


EXPERTS = [sa.Trajectory(conversation(i, turns)) for i, turns in enumerate((3, 4, 2, 3))]
TOKENIZER = word_tokenizer([*EXPERTS, *[sa.Trajectory(conversation(k, 4)) for k in range(4)]])


def models() -> tuple[Any, Any]:
    """A policy that has left its reference, the same each time."""
    torch.manual_seed(0)
    reference = small_llama(TOKENIZER, hidden_size=32, layers=2)
    policy = copy.deepcopy(reference)
    for parameter in policy.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return policy, reference


def options(folder: Path, **given: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **given,
    }


def logp(model: Any, state: list[int], action: list[int]) -> Tensor:
    """In float64, of one action after one state, by the model's own logits."""
    ids = torch.tensor([[*state, *action]])
    logits_LV = model(input_ids=ids, use_cache=False).logits[0, len(state) - 1 : -1]
    return logits_LV.log_softmax(-1)[range(len(action)), action].sum()


def pair_loss(policy: Any, reference: Any, pairs: list[Any]) -> float:
    """Mean −log σ(r_E − r_A); a side is a list of (state, action)."""

    def reward(side: list[tuple[list[int], list[int]]]) -> Tensor:
        return BETA * sum(
            (logp(policy, *at) - logp(reference, *at) for at in side), torch.zeros(())
        )

    policy, reference = (copy.deepcopy(model).double().eval() for model in (policy, reference))
    with torch.no_grad():
        margins = torch.stack([reward(expert) - reward(agent) for expert, agent in pairs])
    return float(-torch.nn.functional.logsigmoid(margins).mean())


def acted(messages: list[dict[str, str]], first: int = 0) -> list[tuple[list[int], list[int]]]:
    """(state, action) of each of the assistant's turns from the step ``first`` on."""
    trunk = sa.encode(sa.Trajectory(messages), TOKENIZER)
    ids = trunk.input_ids.tolist()
    return [(ids[:start], ids[start:stop]) for start, stop in trunk.action_spans[first:].tolist()]


# -------------------------------------------------------------------------------- padded rows


def rows(turns: int) -> list[dict[str, Any]]:
    """Pairs whose sides have so many turns of the agent, after the same first observation."""
    return [
        {
            "prompt": [observation],
            "chosen": conversation(i, turns)[1:],
            "rejected": [message("assistant", ACTIONS[i - 1]), *conversation(i + 1, turns)[2:]],
        }
        for i in range(4)
        for observation in conversation(i, 1)[:1]
    ]


def dpo(trainer_class: type, folder: Path, data: list[dict[str, Any]], **given: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig

    given = {"beta": BETA, "per_device_train_batch_size": len(data), "max_length": None, **given}
    policy, reference = models()
    return trainer_class(
        policy,
        reference,
        DPOConfig(**options(folder, **given)),
        train_dataset=Dataset.from_list(data),
        processing_class=TOKENIZER,
    )


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [step[name] for step in trainer.state.log_history if name in step]


@pytest.mark.parametrize("turns", [1, 3])
def test_step_dpo_has_the_float64_loss_of_what_the_assistant_said(
    tmp_path: Path, turns: int
) -> None:
    from stepagent.integrations.trl import StepDPOTrainer

    data = rows(turns)
    sides = [[acted([*row["prompt"], *row[k]]) for k in ("chosen", "rejected")] for row in data]
    trainer = dpo(StepDPOTrainer, tmp_path, data)
    expected = pair_loss(*models(), sides)
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 2
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[1] < losses[0]


def test_step_dpo_is_trls_dpo_where_a_completion_is_one_action(tmp_path: Path) -> None:
    from trl import DPOTrainer

    from stepagent.integrations.trl import StepDPOTrainer

    ours, theirs = (dpo(each, tmp_path, rows(1)) for each in (StepDPOTrainer, DPOTrainer))
    losses, gradients = [], []
    for trainer in (ours, theirs):
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, gradient in gradients[1].items():
        error = (gradients[0][name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"{name}: {error}"
    metrics, expected = ours._metrics["train"], theirs._metrics["train"]
    left_out = {"logits/chosen", "logits/rejected", "mean_token_accuracy"}
    assert set(metrics) == set(expected) - left_out
    for name, values in metrics.items():
        assert values == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def test_observations_inside_a_completion_are_no_part_of_the_loss(tmp_path: Path) -> None:
    """TRL's own loss counts them, so the two differ."""
    from trl import DPOTrainer

    from stepagent.integrations.trl import StepDPOTrainer

    ours, theirs = (dpo(each, tmp_path, rows(3)) for each in (StepDPOTrainer, DPOTrainer))
    batch, other = (next(iter(trainer.get_train_dataloader())) for trainer in (ours, theirs))
    observed = (other["completion_mask"] - batch["completion_mask"]).bool()
    own = batch["input_ids"][batch["completion_mask"].bool()].tolist()
    words = set(TOKENIZER.convert_ids_to_tokens(batch["input_ids"][observed].tolist()))
    assert words == {"<obs>", "room", "and", "key", "<act>", "0", "1", "2"}
    assert not set(TOKENIZER.convert_ids_to_tokens(own)) & {"<obs>", "<act>", "room"}


@pytest.mark.parametrize(
    "given", [{"loss_type": "ipo"}, {"ld_alpha": 0.5}, {"f_divergence_type": "forward_kl"}]
)
def test_another_loss_is_refused_by_name(tmp_path: Path, given: dict[str, Any]) -> None:
    from stepagent.integrations.trl import StepDPOTrainer

    with pytest.raises(ValueError, match=next(iter(given))):
        dpo(StepDPOTrainer, tmp_path, rows(1), **given)


def test_an_action_that_max_length_would_cut_is_refused(tmp_path: Path) -> None:
    from stepagent.integrations.trl import StepDPOTrainer

    trainer = dpo(StepDPOTrainer, tmp_path, rows(3), max_length=20)
    with pytest.raises(ValueError, match="max_length must be at least"):
        trainer.train()


def test_with_an_adapter_the_policy_without_it_is_the_reference(tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig

    from stepagent.integrations.trl import StepDPOTrainer, TreeDPOTrainer, tree_rows

    for trainer_class, data in ((StepDPOTrainer, rows(1)), (TreeDPOTrainer, tree_rows(*tried()))):
        trainer = trainer_class(
            models()[0],
            args=DPOConfig(**options(tmp_path, max_length=None, learning_rate=1e-2)),
            train_dataset=Dataset.from_list(data),
            processing_class=TOKENIZER,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        trainer.train()
        losses = logged(trainer)
        assert losses[0] == pytest.approx(0.693147, abs=1e-5), "an adapter begins as nothing"
        assert losses[1] != pytest.approx(losses[0], abs=1e-5)


# ------------------------------------------------------------------------------- token trees


def tried() -> tuple[list[sa.Trunk], list[list[list[list[int]]]]]:
    """Experts, and one or two actions tried at each step."""
    trunks = [sa.encode(expert, TOKENIZER) for expert in EXPERTS]
    actions = [acted(conversation(k, 1))[0][1] for k in range(len(ACTIONS))]

    def at(place: int, count: int) -> list[list[int]]:
        return [actions[(place + k) % len(actions)] for k in range(1, 1 + count)]

    steps = [range(trunk.num_steps) for trunk in trunks]
    return trunks, [[at(i + t, 1 + t % 2) for t in each] for i, each in enumerate(steps)]


def tree_pairs() -> list[Any]:
    pairs = []
    for trunk, steps in zip(*tried(), strict=True):
        ids = trunk.input_ids.tolist()
        for (start, stop), actions in zip(trunk.action_spans.tolist(), steps, strict=True):
            state = ids[:start]
            pairs += [([(state, ids[start:stop])], [(state, action)]) for action in actions]
    return pairs


def test_tree_dpo_has_the_float64_loss_of_its_pairs(tmp_path: Path) -> None:
    from stepagent.integrations.trl import TreeDPOTrainer, tree_rows

    trainer = dpo(TreeDPOTrainer, tmp_path, tree_rows(*tried()))
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(pair_loss(*models(), tree_pairs()), abs=1e-5)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert logged(trainer, "rewards/margins")[1] > logged(trainer, "rewards/margins")[0]


def test_a_tree_loss_does_not_depend_on_how_a_step_is_cut_into_batches(tmp_path: Path) -> None:
    """The trees have different numbers of pairs: a mean of means would be another number."""
    from stepagent.integrations.trl import TreeDPOTrainer, tree_rows

    found = []
    for size in (4, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = dpo(TreeDPOTrainer, tmp_path, tree_rows(*tried()), **cut)
        trainer.train()
        found.append(
            (logged(trainer), torch.cat([p.flatten() for p in trainer.model.parameters()]))
        )
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


def test_rows_that_are_no_trees_are_refused(tmp_path: Path) -> None:
    from stepagent.integrations.trl import TreeDPOTrainer

    with pytest.raises(ValueError, match="tree_rows"):
        dpo(TreeDPOTrainer, tmp_path, rows(1))


# ------------------------------------------------------------------------- credit to each step

# Two prompts, two rollouts of each: (action, observation, action) with a number a step.
STEPS = [[1.0, 0.0], [0.0, 0.5], [0.25, 0.75], [1.0, 1.0]]
OUTCOMES = [1.0, 0.0, 0.0, 1.0]


def rolled(row: int) -> tuple[list[int], list[int]]:
    """Completion ids and the mask of what the policy wrote; rows differ in length."""
    act, end = (TOKENIZER.convert_tokens_to_ids(word) for word in ("turn", "<end>"))
    seen = TOKENIZER.convert_tokens_to_ids("room")
    return [act] * (1 + row) + [end, seen, seen, act, end], [1] * (2 + row) + [0, 0, 1, 1]


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    completions = [rolled(b) for b in range(len(prompts))]
    return {
        "prompt_ids": [[3, 4, 5]] * len(prompts),
        "completion_ids": [ids for ids, _ in completions],
        "logprobs": [[0.0] * len(ids) for ids, _ in completions],
        "env_mask": [mask for _, mask in completions],
        "step_rewards": STEPS,
    }


def outcome(completions: list[Any], **_: Any) -> list[float]:
    return OUTCOMES


def grpo(folder: Path, **given: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig

    from stepagent.integrations.trl import StepGRPOTrainer

    args = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 16,
        "loss_type": "grpo",
        "beta": 0.0,
        "shuffle_dataset": False,
    }
    trainer = {"rollout_func": rollout} | {k: given.pop(k) for k in ("rollout_func",) if k in given}
    return StepGRPOTrainer(
        models()[0],
        outcome,
        GRPOConfig(**options(folder, **{**args, **given})),
        train_dataset=Dataset.from_list([{"prompt": "room 0"}, {"prompt": "room 1"}]),
        processing_class=TOKENIZER,
        **trainer,
    )


def expected_advantages() -> list[list[float]]:
    """(B, tokens) in float64: the outcome's and the step's, each relative to its group."""
    values = []
    for b in range(4):
        group = [2 * (b // 2), 2 * (b // 2) + 1]
        outcomes = torch.tensor([OUTCOMES[j] for j in group], dtype=torch.float64)
        steps = torch.tensor([r for j in group for r in STEPS[j]], dtype=torch.float64)
        own = (OUTCOMES[b] - outcomes.mean()) / (outcomes.std() + 1e-4)
        credit = [(r - steps.mean()) / steps.std() for r in STEPS[b]]
        first = [float(own + credit[0])] * (2 + b)
        values.append([*first, 0.0, 0.0, *[float(own + credit[1])] * 2])
    return values


def test_grpo_gives_each_step_its_own_advantage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = grpo(tmp_path)
    seen = []
    scored = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(scored(inputs)) or seen[-1]
    trainer.train()
    out, expected = seen[0], expected_advantages()
    order = [[len(rolled(b)[0]) for b in range(4)].index(n) for n in out["completion_mask"].sum(1)]
    for row, b in zip(out["advantages"].double(), order, strict=True):
        padded = [*expected[b], *[0.0] * (len(row) - len(expected[b]))]
        torch.testing.assert_close(
            row, torch.tensor(padded, dtype=torch.float64), atol=1e-5, rtol=0
        )
    # At the first step the ratio is 1: the loss is −mean over rows of the mean advantage.
    means = [sum(row) / sum(rolled(b)[1]) for b, row in enumerate(expected)]
    losses = logged(trainer)
    assert losses[0] == pytest.approx(-sum(means) / 4, abs=1e-5)
    assert len(losses) == 2
    assert logged(trainer, "step_reward") == pytest.approx([sum(map(sum, STEPS)) / 8] * 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rollout_func": None}, "rollout_func must"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions must be False"),
    ],
)
def test_grpo_without_steps_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with pytest.raises(ValueError, match=said):
        grpo(tmp_path, **given)


def test_step_rewards_that_do_not_fit_the_steps_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def short(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {**rollout(prompts, trainer), "step_rewards": [[1.0]] * len(prompts)}

    with pytest.raises(ValueError, match=r"step_rewards\[0\] must have 2 numbers"):
        grpo(tmp_path, rollout_func=short).train()
