"""A budget for the expert: which states are worth its answer, and what the answers cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_states import (  # noqa: F401  the fixtures
    LEVEL,
    ROLLOUTS,
    TOKENIZER,
    demonstrations,
    same,
    trainer,
)
from tiny_models import tiny_agent

from stepagent.acting.asking import most_worth
from stepagent.acting.rollout import rollout_and_query
from stepagent.askers import (
    Asker,
    RandomAsker,
    UnsureAsker,
    WorthAsker,
    load_asker,
    save_asker,
)
from stepagent.data.trunk import Trunk
from stepagent.envs import ExpertUnavailable
from stepagent.records.episodes import Episode

MODEL = tiny_agent(initializer_range=0.1)


class Counted:
    """The environment's own expert, asked under a count; silent at some states."""

    def __init__(self, silent: int = 0) -> None:
        self.questions, self._silent = 0, silent

    def __call__(self, env: Any) -> str:
        self.questions += 1
        if self._silent and self.questions % self._silent == 0:
            raise ExpertUnavailable("none here")
        return str(env.expert_action())


def queried(expert: Any = None, **options: Any) -> tuple[list[Trunk], list[list[list[Any]]]]:
    defaults: dict[str, Any] = {"seeds": range(5), "max_new_tokens": 3, "max_steps": 6, "seed": 11}
    return rollout_and_query(MODEL, LEVEL, expert, tokenizer=TOKENIZER, **defaults | options)


def answers(branches: list[list[list[Any]]]) -> list[list[int]]:
    return [[t for t, step in enumerate(steps) if step] for steps in branches]


def told(
    logps: list[float],
    observations: list[str],
    expert: list[str | None],
    *,
    seed: int = 0,
    success: bool = False,
) -> Episode:
    T = len(logps)
    return Episode(
        "env",
        seed,
        observations=observations,
        actions=["a"] * T,
        valid=[True] * T,
        expert_actions=expert,
        logps=[np.array([logp], np.float32) for logp in logps],
        trunk=Trunk([1] * (2 * T + 1), [(2 * t + 1, 2 * t + 2) for t in range(T)]),
        success=success,
    )


def many(count: int, seed: int) -> list[Episode]:
    """Two steps each: unsure where it is right, and sure where it is wrong, in a state seen
    before."""
    draws = np.random.default_rng(seed)
    made = []
    for place in range(count):
        low, high = -draws.uniform(1.0, 2.0), -draws.uniform(0.05, 0.2)
        names = [f"{seed}.{place}", f"{seed}.{place}"]
        made.append(told([low, high], names, ["a", "b"], seed=place))
    return made


# ------------------------------------------------------------------ what a budget costs


@pytest.mark.parametrize("ask", ["always", "unsure", "random", "worth", WorthAsker()])
def test_no_more_answers_are_asked_for_than_the_budget_has(ask):
    expert = Counted()
    trunks, branches = queried(expert, ask=ask, budget=7)
    assert sum(map(len, answers(branches))) == expert.questions == 7
    whole_trunks, whole = queried()
    for trunk, other in zip(trunks, whole_trunks, strict=True):
        assert trunk.input_ids.tolist() == other.input_ids.tolist()
    for steps, other in zip(branches, whole, strict=True):
        pairs = zip(steps, other, strict=True)
        assert all(not step or step[0].tolist() == full[0].tolist() for step, full in pairs)


def test_a_budget_for_everything_is_asking_always():
    _, whole = queried()
    for ask in ("always", "unsure", "random", "worth"):
        _, branches = queried(ask=ask, budget=10**6)
        assert answers(branches) == answers(whole)


def test_always_asks_in_order_while_the_budget_lasts():
    trunks, branches = queried(ask="always", budget=8)
    assert trunks[0].num_steps == 6
    assert answers(branches) == [[0, 1, 2, 3, 4, 5], [0, 1], [], [], []]


def test_chance_is_of_the_seed():
    first, again, other = (answers(queried(ask="random", budget=9, seed=s)[1]) for s in (1, 1, 2))
    assert first == again != other


def test_an_asker_of_ones_own_chooses():
    class Last(Asker):
        def worth(self, episodes):
            return [np.arange(len(e.actions), dtype=float) for e in episodes]

    assert answers(queried(ask=Last(), budget=5)[1]) == [[5]] * 5


class Wrong(Asker):
    def __init__(self, given):
        self._given = given

    def worth(self, episodes):
        return self._given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be a whole number >= 1, got 0"),
        ({"budget": 2.5}, r"budget must be a whole number >= 1, got 2\.5"),
        ({"ask": "unsure"}, "ask='unsure' must have a budget of answers, got None"),
        ({"ask": "rarely", "budget": 3}, "ask must be one of .* or an Asker, got 'rarely'"),
        ({"budget": 3, "teacher_share": 0.5}, r"teacher_share must be 0 with a budget, got 0\.5"),
        ({"budget": 3, "ask": Wrong([])}, "must give an array for each of 5 episodes, got 0"),
        ({"budget": 3, "ask": Wrong([np.zeros(2)] * 5)}, "for each of the 6 steps of .*/0, got"),
        ({"budget": 3, "ask": Wrong([np.full(6, np.nan)] * 5)}, "a finite number for each of"),
        ({"budget": 3, "ask": Asker()}, r"Asker must have worth\(episodes\)"),
    ],
)
def test_what_cannot_be_asked_by_is_refused(options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        queried(**options)


# ------------------------------------------------------------------ what is learnt from answers


def test_before_any_answer_worth_is_being_unsure():
    episodes = [
        told(list(-np.random.default_rng(i).uniform(0.01, 3, 4)), [f"{i}{t}" for t in range(4)], [])
        for i in range(6)
    ]
    for count in (1, 5, 12):
        expected = most_worth(UnsureAsker(), episodes, count)
        assert most_worth(WorthAsker(), episodes, count) == expected


def test_answers_teach_where_the_agent_is_sure_and_wrong():
    asker, fresh = WorthAsker(), many(10, seed=9)
    steps = [[0, 1]] * 40
    assert most_worth(asker, fresh, 10) == [[0]] * 10
    asker.learn(many(40, seed=1), steps)
    assert all(asker.differs(e)[1] > 0.9 and asker.differs(e)[0] < 0.1 for e in fresh)
    # In a sure repetition, which is worth half as it was seen before, an answer is worth more.
    assert most_worth(asker, fresh, 10) == [[1]] * 10


def test_like_states_are_remembered():
    asker = WorthAsker()
    # As unlikely everywhere: only what was answered at the same observation can tell.
    taught = [
        told([-0.7], [f"o{place % 2}"], ["a" if place % 2 else "b"], seed=place)
        for place in range(20)
    ]
    for _ in range(3):
        asker.learn(taught, [[0]] * 20)
    wrong, right = (float(asker.differs(told([-0.7], [name], []))[0]) for name in ("o0", "o1"))
    assert wrong > 0.8
    assert right < 0.2


def test_the_same_question_twice_is_worth_half():
    asker = WorthAsker()
    once, twice = told([-1.0], ["o"], []), told([-1.0], ["o"], [], seed=1)
    (first,), (second,) = asker.worth([once, twice])
    assert second == pytest.approx(first / 2)


def test_the_fit_is_the_least_of_its_objective():
    """The obvious twin: the same sum, minimised by torch."""
    draws = np.random.default_rng(0)
    rows = np.concatenate([np.ones((30, 1)), draws.normal(size=(30, 7))], axis=1) * 2
    labels = (draws.random(30) < 0.4).astype(float)
    asker = WorthAsker()
    asker._fit(rows, labels)
    before = torch.tensor([0.0, -1.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    weights = before.clone().requires_grad_()
    slow = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def objective():
        slow.zero_grad()
        logits = torch.tensor(rows) @ weights
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.tensor(labels), reduction="sum"
        )
        loss = loss + 0.5 * (weights - before).square().sum()
        loss.backward()
        return loss

    slow.step(objective)
    np.testing.assert_allclose(asker.state()["mean"], weights.detach().numpy(), atol=1e-5)
    curve = torch.autograd.functional.hessian(
        lambda w: (
            torch.nn.functional.softplus(torch.tensor(rows) @ w).sum() + 0.5 * w.square().sum()
        ),
        weights.detach(),
    )
    np.testing.assert_allclose(asker.state()["precision"], curve.numpy(), rtol=1e-4, atol=1e-4)


def test_a_perfect_separation_stays_finite():
    asker = WorthAsker()
    for seed in range(30):
        asker.learn(many(40, seed=seed), [[0, 1]] * 40)
    assert all(np.isfinite(values).all() for values in asker.state().values())


def test_no_answer_teaches_nothing():
    asker, before = WorthAsker(), WorthAsker().state()
    asker.learn([told([-1.0], ["o"], [None])], [[0]])
    asker.learn([told([-1.0], ["o"], [])], [[]])
    for name, values in asker.state().items():
        np.testing.assert_array_equal(values, before[name])


def test_what_one_learner_taught_is_there_for_the_next(tmp_path):
    taught, path = WorthAsker(), tmp_path / "asker.safetensors"
    taught.learn(many(40, seed=1), [[0, 1]] * 40)
    save_asker(taught, path, answers=80)
    fresh = WorthAsker()
    assert load_asker(fresh, path) == {"answers": 80}
    for episode in many(5, seed=7):
        np.testing.assert_array_equal(fresh.differs(episode), taught.differs(episode))


def test_another_askers_file_is_refused(tmp_path):
    path = tmp_path / "asker.safetensors"
    with pytest.raises(FileNotFoundError, match="must be a file that an asker was saved in"):
        load_asker(WorthAsker(), path)
    save_asker(RandomAsker(), path)
    with pytest.raises(ValueError, match="must hold a WorthAsker, got RandomAsker"):
        load_asker(WorthAsker(), path)
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="must hold a WorthAsker, got no asker"):
        load_asker(WorthAsker(), path)
    state = WorthAsker().state() | {"mean": np.zeros(3)}
    save_file(state, path, metadata={"asker": "WorthAsker"})
    with pytest.raises(ValueError, match=r"must have 'mean' of shape \(8,\), got shape \(3,\)"):
        load_asker(WorthAsker(), path)


# ------------------------------------------------------------------ in training


def test_a_run_spends_its_budget_evenly_and_says_what_is_left(trainer):  # noqa: F811
    expert = Counted()
    options = {"method": "sft", "states": "agent", "cycles": 3, "expert": expert, **ROLLOUTS}
    made = trainer(MODEL, ask="worth", ask_budget=10, **options)
    made.train()
    logged = [entry for entry in made.state.log_history if "cycle" in entry]
    assert [entry["expert_answers"] for entry in logged] == [4, 3, 3]
    assert [entry["ask_budget_left"] for entry in logged] == [6, 3, 0]
    assert expert.questions == 10


def test_a_question_without_an_answer_costs_none(trainer):  # noqa: F811
    expert = Counted(silent=2)
    options = {"method": "sft", "states": "agent", "cycles": 2, "expert": expert, **ROLLOUTS}
    made = trainer(MODEL, ask="unsure", ask_budget=8, **options)
    made.train()
    logged = [entry for entry in made.state.log_history if "cycle" in entry]
    assert [entry["expert_answers"] for entry in logged] == [2, 3]  # 4 and 6 questions
    assert logged[-1]["ask_budget_left"] == 3
    assert expert.questions == 10


def test_a_run_begins_anew_where_it_is_trained_again(trainer):  # noqa: F811
    options = {"method": "sft", "states": "agent", "learning_rate": 0.0, **ROLLOUTS}
    made = trainer(ask="worth", ask_budget=8, **options)
    made.train()
    first = made.asker.state()
    made.train()
    assert [e["ask_budget_left"] for e in made.state.log_history if "cycle" in e] == [4, 0]
    assert all(np.array_equal(values, first[name]) for name, values in made.asker.state().items())


@pytest.mark.parametrize("method", ["sft", "implicit"])
def test_a_resumed_run_asks_as_an_undisturbed_one(trainer, method):  # noqa: F811
    options = {
        "method": method,
        "states": "agent",
        "ask": "worth",
        "ask_budget": 11,
        "cycles": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        **ROLLOUTS,
    }
    whole = trainer(**options)
    whole.train()
    again = trainer(folder="again", **options)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert all(same(a, b) for a, b in zip(whole._comparisons, again._comparisons, strict=True))
    left = [
        [e["ask_budget_left"] for e in made.state.log_history if "cycle" in e]
        for made in (whole, again)
    ]
    assert left[0] == left[1]
    for name, values in whole.asker.state().items():
        np.testing.assert_array_equal(again.asker.state()[name], values)
    left_by = f"{whole.args.output_dir}/checkpoint-3/asker.safetensors"
    taught = trainer(folder="next", ask_from=left_by, **options)
    assert taught.asker.state()["asked"].sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ask_budget": 9}, "ask_budget=9 needs states='agent' or 'mixed', got 'expert'"),
        ({"states": "agent", "ask_budget": 0}, "ask_budget must be a whole number >= 1, got 0"),
        ({"states": "agent", "ask_budget": 1}, "for each of the 2 cycles, got 1"),
        (
            {"states": "agent", "ask_budget": 9, "teacher_share": 0.5},
            r"teacher_share must be 0 with an ask_budget, got 0\.5",
        ),
        ({"states": "agent", "ask_from": "x"}, "ask_from='x' needs ask='worth', got 'always'"),
        ({"states": "agent", "asker": WorthAsker()}, "asker is given, but ask='always'"),
    ],
)
def test_a_budget_that_would_not_be_kept_is_refused(trainer, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        trainer(env=LEVEL, **options)
