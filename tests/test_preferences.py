"""ETO's and IPR's files and IPR's rule, against cases worked by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hostile_envs import LEVEL, hostile
from test_rollouts import model_policy

import stepagent as sa
from stepagent.acting.exploring import explore
from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.preferences import (
    PREAMBLES,
    ExpertStep,
    Exploration,
    Judged,
    PreferencePair,
    Thresholds,
    ipr_pairs,
    ipr_preference,
    load_expert_steps,
    load_explorations,
    load_pairs,
    load_rollouts,
    load_samples,
    monte_carlo_rewards,
    save_expert_steps,
    save_explorations,
    save_pairs,
    save_rollouts,
    save_samples,
)

SEEDS = {"12": 3, "7": 1, "40": 8}


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def preamble(task: str = "webshop") -> list[dict[str, Any]]:
    return [says("user", "do it"), says("assistant", "OK")] * (PREAMBLES[task] // 2)


def rollouts(**options: Any) -> list[Any]:
    return run_episodes(LEVEL, RandomPolicy(), list(SEEDS.values()), max_steps=6, **options)


def turns(*texts: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [says(roles[i % 2], text) for i, text in enumerate(texts)]


# ------------------------------------------------------------------ ETO's rollouts


def test_rollouts_come_back_with_their_seeds_and_rewards(tmp_path):
    episodes = rollouts()
    paths = save_rollouts(tmp_path, episodes, task="webshop", seeds=SEEDS, preamble=preamble())
    assert [path.name for path in paths] == ["12.json", "7.json", "40.json"]
    found = load_rollouts(tmp_path, task="webshop", seeds=SEEDS)
    assert [one.id for one in found] == ["12", "40", "7"], "in the order of the names"
    by_seed = {episode.seed: episode for episode in episodes}
    for one in found:
        episode = by_seed[one.meta["seed"]]
        assert SEEDS[one.id] == episode.seed
        assert one.messages == episode.trajectory().messages
        assert one.reward == sum(episode.rewards)
        assert one.meta["last_observation"] == episode.last_observation
        assert "success" not in one.meta
    again = sa.continue_rollouts(ExpertPolicy(), LEVEL, found, samples=1)
    assert len(again) == 3, "they can be replayed"


def test_a_rollout_is_written_as_the_scripts_read_it(tmp_path):
    episode = rollouts()[0]
    save_rollouts(tmp_path, [episode], task="sciworld", seeds=SEEDS, preamble=preamble("sciworld"))
    row = json.loads((tmp_path / "12.json").read_text())
    keys = ["steps", "reward", "finished", "success", "terminate_reason", "error"]
    assert list(row["meta"]) == keys
    assert row["meta"]["steps"] == 6
    speakers = [turn["from"] for turn in row["conversations"]]
    assert speakers == ["human", "gpt"] * (8 + 6) + ["human"]
    assert row["conversations"][16]["value"] == episode.observations[0]


def test_the_reward_is_read_and_never_the_flag(tmp_path):
    rows = {"12": (True, 0.25), "7": (False, 1.0), "40": (True, None)}
    for id, (success, reward) in rows.items():
        meta = {"steps": 1, "finished": True, "terminate_reason": "success", "error": None}
        meta |= {"success": success, "reward": reward}
        told = [*preamble(), says("user", "shop"), says("assistant", "Action: click[buy]")]
        conversations = [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in told
        ]
        path = tmp_path / f"{id}.json"
        path.write_text(json.dumps({"meta": meta, "conversations": conversations}))
    found = load_rollouts(tmp_path, task="webshop", seeds=SEEDS)
    assert {one.id: one.reward for one in found} == {"12": 0.25, "7": 1.0, "40": None}


def test_alfworlds_id_is_the_folder_of_its_game(tmp_path):
    games = {"json_2.1.1/train/look-1/trial_A": 3, "json_2.1.1/train/look-1/trial_B": 1}
    episodes = run_episodes(LEVEL, ExpertPolicy(), [3, 1])
    options: dict[str, Any] = {"task": "alfworld", "seeds": games}
    save_rollouts(tmp_path, episodes, preamble=preamble("alfworld"), **options)
    row = json.loads((tmp_path / "trial_A.json").read_text())
    assert row["meta"]["error"].split("/")[-2] == "trial_A", "where ETO's script looks"
    row["meta"]["reward"] = True
    (tmp_path / "trial_A.json").write_text(json.dumps(row))
    found = load_rollouts(tmp_path, **options)
    assert [(one.id, one.meta["seed"]) for one in found] == [("trial_A", 3), ("trial_B", 1)]
    assert found[0].reward == 1.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda row: row.pop("meta"), "no 'meta'"),
        (lambda row: row["meta"].pop("reward"), "no 'reward'"),
        (lambda row: row["meta"].update(reward="1"), "must be a number"),
        (lambda row: row.update(conversations=row["conversations"][:11]), "after the 10"),
        (lambda row: row["conversations"].pop(12), "after the 10"),
        (lambda row: row["conversations"][3].update({"from": "bot"}), r"conversations\[3\]"),
    ],
)
def test_what_is_no_rollout_is_named_and_others_are_read(change, why, tmp_path):
    save_rollouts(tmp_path, rollouts(), task="webshop", seeds=SEEDS, preamble=preamble())
    row = json.loads((tmp_path / "7.json").read_text())
    change(row)
    (tmp_path / "7.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=why):
        load_rollouts(tmp_path, task="webshop", seeds=SEEDS)
    with pytest.warns(UserWarning, match=why):
        found = load_rollouts(tmp_path, task="webshop", seeds=SEEDS, on_error="skip")
    assert [one.id for one in found] == ["12", "40"]


def test_ids_and_seeds_that_the_table_does_not_relate_are_refused(tmp_path):
    episodes = rollouts()
    options: dict[str, Any] = {"task": "webshop", "preamble": preamble()}
    with pytest.raises(ValueError, match="one id of the table"):
        save_rollouts(tmp_path, episodes, seeds={"12": 3}, **options)
    with pytest.raises(ValueError, match=r"\['12', '13'\]"):
        save_rollouts(tmp_path, episodes, seeds={**SEEDS, "13": 3}, **options)
    with pytest.raises(ValueError, match=r"without '\.'"):
        save_rollouts(tmp_path, episodes, seeds={"a.b": 3}, **options)
    with pytest.raises(ValueError, match="preamble must be 10 messages"):
        save_rollouts(tmp_path, episodes, seeds=SEEDS, task="webshop", preamble=[])
    assert not list(tmp_path.iterdir())
    save_rollouts(tmp_path, episodes, seeds=SEEDS, **options)
    with pytest.raises(ValueError, match=r"40\.json: id '40' must have a seed"):
        load_rollouts(tmp_path, task="webshop", seeds={"12": 3, "7": 1})
    table = tmp_path.parent / "seeds.json"
    table.write_text(json.dumps(SEEDS))
    assert len(load_rollouts(tmp_path, task="webshop", seeds=table)) == 3
    for bad in ({"12": "3"}, {"12": True}):
        with pytest.raises(ValueError, match="whole number"):
            load_rollouts(tmp_path, task="webshop", seeds=bad)
    with pytest.raises(ValueError, match="task must be one of"):
        load_rollouts(tmp_path, task="babyai", seeds=SEEDS)
    with pytest.raises(FileNotFoundError, match="must hold rollouts"):
        load_rollouts(tmp_path / "none", task="webshop", seeds=SEEDS)


def test_an_episode_that_crashed_is_not_written(tmp_path):
    with pytest.warns(RuntimeWarning, match="crashed"):
        episodes = run_episodes(hostile("raises", 1, at=1), RandomPolicy(), [3, 1, 8], max_steps=4)
    with pytest.warns(RuntimeWarning, match="1 of 3 episodes crashed"):
        save_rollouts(tmp_path, episodes, task="webshop", seeds=SEEDS, preamble=preamble())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12.json", "40.json"]


# ------------------------------------------------------------------ pairs


def test_pairs_come_back_and_are_written_in_turns(tmp_path):
    pair = PreferencePair(
        "120",
        turns("go", "OK", "room"),
        turns("a", first="assistant"),
        turns("b", "o", "c", first="assistant"),
    )
    save_pairs(tmp_path / "pairs.json", [pair])
    (row,) = json.loads((tmp_path / "pairs.json").read_text())
    assert row["rejected"] == [
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "o"},
        {"from": "gpt", "value": "c"},
    ]
    assert load_pairs(tmp_path / "pairs.json") == [pair]
    row["id"] = 120
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    assert load_pairs(tmp_path / "pairs.json") == [pair], "IPR's ids are numbers"


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_a_side_that_does_not_end_with_an_action_is_refused(part):
    parts = {"prompt": turns("o"), "chosen": turns("a", first="assistant")}
    parts["rejected"] = parts["chosen"]
    bad = parts[part] * 2
    with pytest.raises(ValueError, match=f"pair 'x': {part} must be turns"):
        PreferencePair("x", **parts | {part: bad})
    with pytest.raises(ValueError, match=f"pair 'x': {part} must be turns"):
        PreferencePair("x", **parts | {part: []})


# ------------------------------------------------------------------ IPR's rule


@pytest.mark.parametrize(
    ("agent", "expert", "side"),
    [
        ((0.0, 0), (1.0, 0), "expert"),
        ((1.0, 0), (0.4, 0), "agent"),
        ((0.5, 9), (0.5, 0), None),  # a tie, whatever the steps say
        ((0.9, 0), (1.0, 9), None),  # 0.1 is not more than the threshold of 0.125
        ((0.75, 0), (1.0, 9), "expert"),
        ((float("nan"), 0), (1.0, 0), None),
    ],
)
def test_outcome_pairs_by_hand(agent, expert, side):
    limits = Thresholds(trajectory=0.125, step=0.125)
    assert ipr_preference(0, Judged(*agent, 3), Judged(*expert, 5), limits) == side


@pytest.mark.parametrize(
    ("agent", "expert", "side"),
    [
        ((0.0, 0.25), (1.0, 0.75), "expert"),  # both worse
        ((1.0, 0.75), (0.0, 0.25), "agent"),  # both better
        ((0.0, 0.75), (1.0, 0.25), None),  # in opposite directions
        ((1.0, 0.25), (0.0, 0.75), None),
        ((0.0, 0.5), (1.0, 0.5), None),  # the step's are equal
        ((1.0, 0.0), (1.0, 1.0), None),  # the trajectories' are
        ((0.0, 0.5), (1.0, 0.625), None),  # by no more than the step's threshold
        ((0.0, 0.5), (1.0, 0.75), "expert"),
        ((0.875, 0.0), (1.0, 1.0), None),  # by no more than the trajectory's
        ((0.75, 0.0), (1.0, 1.0), "expert"),
        ((float("nan"), 0.0), (1.0, 1.0), None),
        ((0.0, float("nan")), (1.0, 1.0), None),
    ],
)
def test_step_pairs_by_hand(agent, expert, side):
    limits = Thresholds(trajectory=0.125, step=0.125)
    assert ipr_preference(2, Judged(*agent, 3), Judged(*expert, 3), limits) == side


@pytest.mark.parametrize(
    ("lengths", "shorter_wins", "side"),
    [((3, 5), True, "agent"), ((5, 5), True, None), ((6, 5), True, None), ((3, 5), False, None)],
)
def test_in_alfworld_a_shorter_agent_needs_no_better_outcome(lengths, shorter_wins, side):
    limits = Thresholds(shorter_wins=shorter_wins)
    agent, expert = Judged(1.0, 0.8, lengths[0]), Judged(1.0, 0.4, lengths[1])
    assert ipr_preference(1, agent, expert, limits) == side
    assert ipr_preference(0, agent, expert, limits) is None, "whole trajectories have no exception"
    worse = Judged(1.0, 0.2, lengths[0])
    assert ipr_preference(1, worse, expert, limits) is None


# ------------------------------------------------------------------ IPR's files


def exploration(step: int, final: float, *actions: str, id: str = "12") -> Exploration:
    """Of a task whose observations are o0, o1, …"""
    messages = []
    for i, action in enumerate(actions):
        messages += [says("user", f"o{i}"), says("assistant", action)]
    messages.append(says("user", "over"))
    own = 0.0 if step < len(actions) - 1 else final
    return Exploration(id, step, actions[step], own, messages[: 2 * step + 3], messages, final)


def expert_steps(reward: float, values: list[float], *actions: str) -> dict[Any, ExpertStep]:
    messages = exploration(0, reward, *actions).agent_conversations[:-1]
    return {
        ("12", t): ExpertStep(reward, messages, messages[: 2 * t + 2], value)
        for t, value in enumerate(values)
    }


def test_step_rewards_are_exact_means_and_the_environments_after_the_last_step():
    made = [exploration(1, 0.5, "e0", "a", "b"), exploration(1, 0.7, "e0", "a", id="3")]
    samples = [[exploration(1, reward, "e0", "a", "x", "y")] for reward in (1.0, 0.25, 0.0)]
    assert monte_carlo_rewards(made, samples) == [(1.0 + 0.25 + 0.0) / 3, 0.7]
    assert monte_carlo_rewards(made, []) == [0.0, 0.7]
    with pytest.raises(ValueError, match="agree in agent_step_reward"):
        monte_carlo_rewards(made, [*samples, [exploration(1, 1.0, "e0", "a")]])


def test_pairs_are_whole_trajectories_then_suffixes_by_hand():
    expert = expert_steps(1.0, [0.5, 0.6, 1.0], "e0", "e1", "e2")
    made = [
        exploration(1, 0.0, "e0", "a1", "a2"),
        exploration(0, 0.0, "a0", "a1"),
        exploration(2, 0.0, "e0", "e1", "a2", "a3"),
    ]
    start = turns("go", "OK")
    outcome, step = ipr_pairs(made, [0.2, 0.0, 1.0], expert, instruction=start)
    assert outcome == PreferencePair(
        "120",
        [*start, says("user", "o0")],
        turns("e0", "o1", "e1", "o2", "e2", first="assistant"),
        turns("a0", "o1", "a1", first="assistant"),
    )
    assert step == PreferencePair(
        "121",
        [*start, *turns("o0", "e0", "o1")],
        turns("e1", "o2", "e2", first="assistant"),
        turns("a1", "o2", "a2", first="assistant"),
    )
    (better,) = ipr_pairs(
        [exploration(1, 1.0, "e0", "a1")],
        [0.9],
        expert_steps(0.2, [0.1, 0.3], "e0", "e1"),
    )
    assert better.chosen == turns("a1", first="assistant")
    assert better.rejected == turns("e1", first="assistant")
    shorter = Thresholds(shorter_wins=True)
    won = [exploration(1, 1.0, "e0", "a1")], [0.9]
    assert ipr_pairs(*won, expert) == []
    assert [pair.id for pair in ipr_pairs(*won, expert, shorter)] == ["121"]
    empty = [exploration(1, 0.0, "e0", " ", "a2")]
    assert ipr_pairs(empty, [0.0], expert) == []
    with pytest.raises(ValueError, match="step 7 of id '12'"):
        ipr_pairs([exploration(7, 0.0, *"abcdefgh")], [0.0], expert)


def test_ipr_files_of_real_rollouts_come_back(tmp_path):
    demonstrations = [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), [3, 8])]
    episodes = explore(model_policy(temperature=0.0), LEVEL, demonstrations, max_steps=9)
    made = [
        Exploration.of(episode, t, seeds=SEEDS)
        for steps in episodes
        for t, episode in enumerate(steps)
    ]
    options: dict[str, Any] = {"task": "webshop", "preamble": preamble()}
    save_explorations(tmp_path / "webshop_traj_0.json", made[:3], **options)
    save_explorations(tmp_path / "webshop_traj_1.json", made[3:], **options)
    assert load_explorations(tmp_path, task="webshop") == made
    row = json.loads((tmp_path / "webshop_traj_0.json").read_text())[0]
    assert isinstance(row["id"], int)
    assert "game_file" not in row
    assert row["agent_conversations"][10] == says("user", episodes[0][0].observations[0])
    assert row["agent_conversations"][-1]["role"] == "user", "which IPR's script takes off"
    save_samples(tmp_path / "samples", [made, made[:2]], **options)
    assert load_samples(tmp_path / "samples", task="webshop") == [made, made[:2]]

    steps = expert_steps(1.0, [0.5, 0.25], "e0", "e1")
    save_expert_steps(tmp_path / "sft_data.json", steps, instruction=turns("go", "OK"))
    rows = json.loads((tmp_path / "sft_data.json").read_text())
    assert list(rows) == ["12_0", "12_1"]
    assert [turn["from"] for turn in rows["12_1"]["gpt_step_conversations"]] == ["human", "gpt"] * 3
    assert load_expert_steps(tmp_path / "sft_data.json") == steps
    rows["12_2"] = rows.pop("12_1")
    (tmp_path / "sft_data.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="3 first actions"):
        load_expert_steps(tmp_path / "sft_data.json")
    with pytest.raises(ValueError, match="whole number in IPR's files"):
        save_explorations(tmp_path / "x.json", [exploration(0, 1.0, "a", id="game-1")], **options)


# ------------------------------------------------------------------ exploration


def test_exploration_takes_the_experts_course_up_to_a_step_and_its_own_from_there():
    demonstrations = [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), [8, 3])]
    policy = model_policy(temperature=0.0)
    found = explore(policy, LEVEL, demonstrations, max_steps=9)
    own = run_episodes(LEVEL, policy, [8, 3], max_steps=9)
    for trajectory, whole, episodes in zip(demonstrations, own, found, strict=True):
        assert len(episodes) == trajectory.num_steps
        expert = [m["content"] for m in trajectory.messages[1::2]]
        assert episodes[0].actions == whole.actions
        for t, episode in enumerate(episodes):
            assert episode.actions[:t] == expert[:t]
            (branch,) = sa.inspect(
                policy._model,
                [sa.encode(trajectory, policy._tokenizer)],
                max_new_tokens=4,
                temperature=0.0,
                eos_token_id=2,
            )
            start, stop = episode.trunk.action_spans[t]
            ids = episode.trunk.input_ids[start:stop].tolist()
            assert ids == branch[t][0].token_ids.tolist(), "what inspection finds at its state"


def test_chosen_steps_alone_are_continued_as_among_all():
    trajectories = [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), [8, 3])]
    options: dict[str, Any] = {"samples": 2, "max_steps": 9}
    all_steps = sa.continue_rollouts(model_policy(), LEVEL, trajectories, **options)
    some = sa.continue_rollouts(model_policy(), LEVEL, trajectories, steps=[[2, 0], []], **options)
    assert some[0].values.tolist() == all_steps[0].values[[2, 0]].tolist()
    assert some[1].values.shape == (0,)
    second = sa.continue_rollouts(
        model_policy(), LEVEL, trajectories[1:], steps=[[1]], places=[1], **options
    )
    actions = [[e.actions for e in step] for step in second[0].episodes]
    assert actions == [[e.actions for e in all_steps[1].episodes[1]]]
    with pytest.raises(ValueError, match=r"steps must be in \[0, \d\), got -1"):
        sa.continue_rollouts(model_policy(), LEVEL, trajectories, steps=[[-1], []])
    with pytest.raises(ValueError, match="steps for each of the 2"):
        sa.continue_rollouts(model_policy(), LEVEL, trajectories, steps=[[0]])
    assert np.isfinite(some[0].values).all()
