"""Episodes in worker processes and Monte-Carlo continuations, in real environments that crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import hostile_envs
import numpy as np
import pytest
import torch
from hostile_envs import LEVEL, Odd, Restless, Steered, Traced, Unmakeable, hostile
from tiny_models import END, babyai_tokenizer, generate, tiny_agent

import stepagent as sa
from stepagent.acting.policies import ExpertPolicy, ModelPolicy, RandomPolicy
from stepagent.acting.rollout import Episode, own_expert, rollout_and_query, run_episodes
from stepagent.envs.pool import EnvCrash, LocalPool, WorkerPool, open_pool
from stepagent.evaluation import success_rate

SEEDS = [3, 1, 4, 15, 9]
LONG = [8, 5, 27, 15, 28]  # the expert needs five steps or more
NEW = 4


def model_policy(model: Any = None, **options: Any) -> ModelPolicy:
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": END, "temperature": 1.0}
    return ModelPolicy(model or talker(), babyai_tokenizer(), **defaults | options)


def talker(**options: Any) -> Any:
    """An untrained agent that says the words of real actions, and mostly ends them."""
    model = tiny_agent("phi", initializer_range=0.05, **options)
    words = babyai_tokenizer().convert_tokens_to_ids(["left", "right", "forward"])
    with torch.no_grad():
        model.lm_head.bias[words] = 10.0
        model.lm_head.bias[END] = 10.0
    return model


def plain(episode: Episode) -> dict[str, Any]:
    """All but the log-probs, which are rounded as the batch has it."""
    fields = {n: value for n, value in vars(episode).items() if n not in ("trunk", "logps")}
    trunk = episode.trunk
    return fields | ({} if trunk is None else {"ids": trunk.input_ids.tolist()})


def demonstrations(seeds: list[int], **options: Any) -> list[sa.Trajectory]:
    return [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), seeds, **options)]


# ------------------------------------------------------------------ workers


@pytest.mark.parametrize("batch_size", [64, 3])
def test_any_number_of_workers_gives_the_same_episodes(batch_size):
    policies = [
        (Steered, model_policy(tiny_agent())),
        (LEVEL, RandomPolicy()),
        (LEVEL, ExpertPolicy()),
    ]
    for env, policy in policies:
        here, one, two, many = (
            run_episodes(
                env,
                policy,
                SEEDS,
                expert=lambda env: env.expert_action(),
                max_steps=8,
                batch_size=batch_size,
                workers=workers,
            )
            for workers in (0, 1, 2, 9)
        )
        assert [episode.seed for episode in here] == SEEDS
        assert all(episode.expert_actions for episode in here)
        for episodes in (one, two, many):
            assert [plain(e) for e in episodes] == [plain(e) for e in here]


def test_an_environment_in_a_worker_says_what_it_would_say_here():
    with open_pool(hostile_envs.plain, 1, 60.0) as pool:
        there, here = pool.env(5), hostile_envs.plain()
        assert there.reset(3) == here.reset(3)
        assert (there.name, there.actions) == (here.name, here.actions)
        assert (there.max_steps, there.expert_action()) == (here.max_steps, here.expert_action())
        assert there.step("left") == here.step("left")


DEEDS = {
    "exits": "step ended its process (exit code 3)",
    "is killed": "step ended its process (exit code -9)",
    "hangs": "step took more than 10 s",
    "raises": "step raised KeyError: 'lost my map'",
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "deed", [pytest.param(d, marks=[pytest.mark.slow] * (d == "hangs")) for d in DEEDS]
)
def test_a_crash_marks_its_episode_and_changes_no_other(deed, workers):
    whole = run_episodes(LEVEL, ExpertPolicy(), LONG)
    with pytest.warns(RuntimeWarning, match=r"1 of 5 episodes crashed.*seed 27: step"):
        episodes = run_episodes(
            hostile(deed, 27), ExpertPolicy(), LONG, workers=workers, timeout=10.0
        )
    for episode, unharmed in zip(episodes, whole, strict=True):
        if episode.seed != 27:
            assert plain(episode) == plain(unharmed)
            continue
        assert episode.crashed == DEEDS[deed]
        assert (episode.success, episode.rewards, episode.trunk) == (False, [0.0], None)
        assert episode.actions == unharmed.actions[:1]
        assert len(episode.observations) == len(episode.valid) == len(episode.progress) == 1
        trajectory = episode.trajectory()
        assert trajectory.reward is None
        assert trajectory.meta["crashed"] == DEEDS[deed]
    assert success_rate(episodes) == 1.0


def test_an_environment_that_raises_is_marked_in_this_process_too():
    found = []
    for workers in (0, 1):
        with pytest.warns(RuntimeWarning, match="2 of 5 episodes crashed"):
            found.append(
                run_episodes(hostile("raises", 1, 15), RandomPolicy(), SEEDS, workers=workers)
            )
    assert [plain(e) for e in found[0]] == [plain(e) for e in found[1]]
    assert [e.seed for e in found[0] if e.crashed] == [1, 15]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crash_in_reset_leaves_an_episode_without_steps(workers):
    with pytest.warns(RuntimeWarning, match="reset raised KeyError"):
        episodes = run_episodes(
            hostile("raises", 3, at=0), model_policy(), SEEDS, workers=workers, max_steps=3
        )
    assert [e.crashed is None for e in episodes] == [False, True, True, True, True]
    assert episodes[0].actions == []
    assert all(e.trunk.num_steps == len(e.actions) for e in episodes[1:])


def test_a_crash_while_the_expert_is_asked_is_the_environments():
    with pytest.warns(RuntimeWarning, match="1 of 5"):
        asked = run_episodes(
            hostile("dies when asked", 5),
            RandomPolicy(),
            LONG,
            expert=lambda env: env.expert_action(),
            workers=2,
            max_steps=6,
        )
    with pytest.warns(RuntimeWarning, match="1 of 5"):
        obeyed = run_episodes(hostile("dies when asked", 5), ExpertPolicy(), LONG, workers=2)
    for episodes, length in ((asked, 6), (obeyed, 99)):
        assert episodes[1].crashed == "expert_action ended its process (exit code 3)"
        assert len(episodes[1].actions) == 2
        whole = [e for e in episodes if e.seed != 5]
        assert all(e.crashed is None and 2 <= len(e.actions) <= length for e in whole)
    assert [len(e.expert_actions) for e in asked] == [len(e.actions) for e in asked]
    assert all(e.success for e in obeyed if e.seed != 5)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_environments_that_crash_in_one_round_of_asking_are_all_marked(workers):
    env = hostile("dies when asked", 5, 27, 15)
    options = {"expert": own_expert, "max_steps": 6}
    for policy in (RandomPolicy(), ExpertPolicy()):
        whole = run_episodes(LEVEL, policy, LONG, **options)
        with pytest.warns(RuntimeWarning, match="3 of 5 episodes crashed"):
            episodes = run_episodes(env, policy, LONG, workers=workers, **options)
        for episode, unharmed in zip(episodes, whole, strict=True):
            if episode.seed in (8, 28):
                assert plain(episode) == plain(unharmed)
                continue
            assert episode.crashed == "expert_action ended its process (exit code 3)"
            assert episode.actions == unharmed.actions[:2]
            assert episode.expert_actions == unharmed.expert_actions[:2]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("expert", [own_expert, lambda env: env.expert_action()])
def test_an_expert_without_an_answer_is_recorded_as_none(workers, expert):
    env = hostile("does not know", 0)
    options = {"max_steps": 2, "workers": workers}
    (episode,) = run_episodes(env, RandomPolicy(), [0], expert=expert, **options)
    assert episode.expert_actions == [None, None]
    first, second = run_episodes(env, ExpertPolicy(), [0, 3], **options)
    assert (first.gave_up, first.actions, first.crashed) == (True, [], None)
    assert (second.gave_up, len(second.actions)) == (False, 2)


def test_other_errors_of_an_expert_come_back_from_a_worker():
    with pytest.raises(RuntimeError, match="Unpicklable: this and that"):
        run_episodes(Odd, ExpertPolicy(), [0], workers=1)
    with (
        open_pool(hostile_envs.plain, 1, 60.0) as pool,
        pytest.raises(RuntimeError, match="needs a running episode") as caught,
    ):
        pool.env(0).expert_action()
    assert "in a worker process" in caught.value.__notes__[0]


def test_a_neighbour_that_cannot_be_replayed_is_marked_too():
    with pytest.warns(RuntimeWarning, match="2 of 2"):
        first, second = run_episodes(Restless, ExpertPolicy(), [8, 27], workers=1)
    assert first.crashed == "step ended its process (exit code 3)"
    assert second.crashed.startswith("was lost with the process of another one")


def test_chance_draws_nothing_for_a_round_in_which_an_environment_is_lost():
    """Seed 8 ends its process after its neighbour's step, which the next question will tell."""
    seeds, options = [5, 27, 3, 8], {"max_steps": 8, "workers": 2}
    with pytest.warns(RuntimeWarning, match="2 of 4"):
        episodes = run_episodes(Restless, RandomPolicy(), seeds, **options)
    assert [e.crashed is not None for e in episodes] == [False, True, False, True]
    assert len(episodes[1].actions) == 3
    whole = run_episodes(LEVEL, RandomPolicy(), seeds, **options)
    assert [e.actions for e in episodes[::2]] == [e.actions for e in whole[::2]]


def test_many_crashes_in_a_row_are_an_error():
    seeds = list(range(12))
    with pytest.raises(RuntimeError, match=r"10 episodes in a row crashed, the last with seed 9"):
        run_episodes(hostile("raises", *seeds, at=1), ExpertPolicy(), seeds, batch_size=5)
    bad = [seed for seed in seeds if seed != 5]
    with pytest.warns(RuntimeWarning, match="11 of 12 episodes crashed"):
        run_episodes(hostile("raises", *bad, at=1), ExpertPolicy(), seeds, batch_size=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_cannot_be_made_is_an_error(workers):
    with pytest.raises(FileNotFoundError, match="no map here"):
        run_episodes(Unmakeable, ExpertPolicy(), SEEDS, workers=workers)


def test_an_environment_that_cannot_be_sent_is_named():
    with pytest.raises(TypeError, match=r"a worker process cannot be sent <function .*lambda"):
        run_episodes(lambda: None, ExpertPolicy(), SEEDS, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must be a whole number >= 0, got -1"),
        ({"workers": 1.5}, r"workers must be a whole number >= 0, got 1\.5"),
        ({"timeout": 0}, "timeout must be > 0 seconds, got 0"),
        ({"timeout": float("nan")}, "timeout must be > 0 seconds, got nan"),
    ],
)
def test_the_options_of_workers_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        run_episodes(LEVEL, ExpertPolicy(), SEEDS, **options)


def test_workers_close_their_environments_and_end(tmp_path):
    run_episodes(partial(Traced, tmp_path), ExpertPolicy(), SEEDS, workers=2)
    traces = [path for path in tmp_path.iterdir() if not path.suffix]
    assert len(traces) == 2
    for trace in traces:
        assert int(trace.name) != os.getpid()
        assert trace.with_suffix(".closed").exists()
        assert not running(int(trace.name))


SCRIPT = """
import sys
from functools import partial
from pathlib import Path

from hostile_envs import Sleepy
from stepagent.policies import ExpertPolicy
from stepagent.rollout import run_episodes

if __name__ == "__main__":
    run_episodes(partial(Sleepy, Path(sys.argv[1])), ExpertPolicy(), range(2), workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_workers_that_hang_die_with_their_parent(tmp_path, signal_):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    traces = tmp_path / "traces"
    traces.mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(script), str(traces)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert eventually(lambda: len(list(traces.glob("*.asleep"))) == 2, 120)
    workers = [int(path.stem) for path in traces.glob("*.asleep")]
    assert all(running(pid) for pid in workers)
    # As a terminal does: Ctrl-C reaches the whole group.
    os.killpg(process.pid, signal_) if signal_ == signal.SIGINT else process.kill()
    _, errors = process.communicate(timeout=60)
    if signal_ == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors
        assert "KeyboardInterrupt" in errors
    assert eventually(lambda: not any(running(pid) for pid in workers), 30)


def running(pid: int) -> bool:
    """Whether a process does anything yet: it exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(holds: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(holds())


def test_rollout_and_query_leaves_out_what_crashed():
    options = {
        "tokenizer": babyai_tokenizer(),
        "max_new_tokens": NEW,
        "eos_token_id": END,
        "max_steps": 4,
    }
    model = talker()
    trunks, branches = rollout_and_query(model, LEVEL, seeds=[3, 4], **options)
    with pytest.warns(RuntimeWarning, match="1 of 3 episodes crashed"):
        found, answers = rollout_and_query(
            model, hostile("exits", 1), seeds=[3, 1, 4], workers=2, **options
        )
    assert [t.input_ids.tolist() for t in found] == [t.input_ids.tolist() for t in trunks]
    assert str(answers) == str(branches)
    with (
        pytest.warns(RuntimeWarning, match="1 of 1"),
        pytest.raises(RuntimeError, match="all 1 rollouts crashed: step ended its process"),
    ):
        rollout_and_query(model, hostile("exits", 1), seeds=[1], workers=1, **options)


def test_a_rate_needs_an_episode_that_ended():
    with pytest.raises(ValueError, match="an episode must have ended, got 1 that crashed"):
        success_rate([Episode("fake", 0, crashed="hung")])


# ------------------------------------------------------------------ the pools themselves


def random_rounds(pool: LocalPool | WorkerPool, places: int) -> list[Any]:
    """Rounds of calls to some places at a time, episodes begun and ended as they come."""
    rng, over, heard = np.random.default_rng(0), [True] * places, []
    for _ in range(25):
        calls: list[Any] = []
        for place in rng.permutation(places)[: rng.integers(1, places + 1)].tolist():
            if over[place]:
                calls.append((place, "reset", (int(rng.integers(4)),)))
            else:
                calls.append((place, "step", (str(rng.choice(["left", "forward", "jump"])),)))
        for (place, *_), answer in zip(calls, pool.call(calls), strict=True):
            crashed = isinstance(answer, EnvCrash)
            over[place] = crashed or (len(answer) == 5 and (answer[2] or answer[3]))
            heard.append((place, "crash" if crashed else answer))
    return heard


@pytest.mark.parametrize("deed", ["raises", "exits"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_pool_of_workers_is_the_pool_in_this_process(workers, deed):
    """Whatever crashes beside it, an environment answers as it would alone."""
    here = random_rounds(LocalPool(hostile("raises", 1, 2, at=1)), 5)
    with open_pool(hostile(deed, 1, 2, at=1), workers, 60.0) as pool:
        assert random_rounds(pool, 5) == here
    assert 2 < sum(answer == "crash" for _, answer in here) < len(here) / 2


# ------------------------------------------------------------------ continuations


@pytest.mark.parametrize("workers", [0, 2])
def test_the_value_of_the_experts_steps_is_its_success(workers):
    trajectories = demonstrations(SEEDS)
    for one, trajectory in zip(
        sa.continue_rollouts(ExpertPolicy(), LEVEL, trajectories, samples=2, workers=workers),
        trajectories,
        strict=True,
    ):
        assert [len(step) for step in one.episodes] == [2] * trajectory.num_steps
        assert all(episode.success for step in one.episodes for episode in step)
        assert one.values.tolist() == [trajectory.reward] * trajectory.num_steps
        assert one.standard_errors.tolist() == [0.0] * trajectory.num_steps


def test_values_are_means_of_final_rewards_with_their_standard_errors():
    (trajectory,) = demonstrations([3])
    (one,) = sa.continue_rollouts(RandomPolicy(), LEVEL, [trajectory], samples=6, max_steps=30)
    rewards = np.array([[e.trajectory().reward for e in step] for step in one.episodes])
    assert np.ptp(rewards[:-1]) > 0
    np.testing.assert_allclose(one.values, rewards.mean(axis=1))
    squares = ((rewards - rewards.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    np.testing.assert_allclose(one.standard_errors, (squares / 5 / 6) ** 0.5)
    assert one.values[-1] == pytest.approx(trajectory.reward), (
        "the environment's own at the last step"
    )


def test_continuations_are_the_same_for_any_workers_and_batch_and_differ_by_sample():
    policy, trajectories = model_policy(seed=5), demonstrations([3, 1])

    def rolled(env: Any = Steered, **options: Any) -> list[Any]:
        found = sa.continue_rollouts(policy, env, trajectories, samples=2, **options)
        return [[[plain(e) for e in step] for step in one.episodes] for one in found]

    here = rolled()
    for options in ({"workers": 1}, {"workers": 2}, {"batch_size": 3}):
        assert rolled(**options) == here
    first, second = (step[n]["ids"] for step in here[0][:1] for n in range(2))
    assert first != second
    again = sa.continue_rollouts(model_policy(seed=6), Steered, trajectories, samples=2)
    assert plain(again[0].episodes[0][0])["ids"] != first


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_greedy_continuations_are_what_generate_writes_after_the_trajectory(name):
    """In every architecture: the shared prefill of the trajectory changes no token."""
    model, tokenizer = tiny_agent(name, seed=1), babyai_tokenizer()
    trajectories = demonstrations([15, 27])
    policy = model_policy(model, temperature=0.0)
    found = sa.continue_rollouts(policy, Steered, trajectories, samples=1, batch_size=4)
    checked = 0
    for one, trajectory in zip(found, trajectories, strict=True):
        whole = sa.encode(trajectory, tokenizer)
        for t, (episode,) in enumerate(one.episodes):
            stop = whole.action_spans[t, 1]
            assert episode.trunk.input_ids[:stop].tolist() == whole.input_ids[:stop].tolist()
            assert episode.trunk.num_steps == len(episode.actions)
            assert episode.trunk.action_spans[: t + 1].tolist() == (
                whole.action_spans[: t + 1].tolist()
            )
            for start, end in episode.trunk.action_spans[t + 1 :]:
                ids = episode.trunk.input_ids
                assert ids[start:end].tolist() == generate(model, ids[:start], NEW)
                checked += 1
    assert checked > 20


def test_continuations_pack_into_fewer_tokens_with_the_same_actions():
    trajectories = demonstrations([3, 1])
    found = sa.continue_rollouts(
        model_policy(), LEVEL, trajectories, samples=3, max_steps=len(trajectories[0].messages)
    )
    trunks = [e.trunk for one in found for step in one.episodes for e in step]
    (tree,) = sa.pack_sequences([t.input_ids for t in trunks], [t.action_mask for t in trunks])
    assert len(tree.input_ids) < sum(len(t.input_ids) for t in trunks) / 2
    actions = [t.input_ids[a:b].tolist() for t in trunks for a, b in t.action_spans]
    packed = np.split(tree.labels, tree.step_offsets[1:-1])
    # A run of the mask is an action: observations stand between them.
    assert [labels.tolist() for labels in packed] == actions


def test_a_trajectory_that_was_cut_is_continued_after_its_last_action():
    (trajectory,) = demonstrations([3], max_steps=2)
    assert trajectory.reward == 0
    (one,) = sa.continue_rollouts(ExpertPolicy(), LEVEL, [trajectory], samples=1)
    assert one.values.min() > 0
    assert all(len(step[0].actions) > 2 for step in one.episodes)
    assert np.isnan(one.standard_errors).all()
    (ended,) = sa.continue_rollouts(model_policy(), LEVEL, [trajectory], samples=1, max_steps=1)
    assert [step[0].trunk.num_steps for step in ended.episodes] == [1, 2]


def test_a_crashed_continuation_has_no_part_in_the_value():
    (trajectory,) = demonstrations([3])
    assert trajectory.num_steps > 2
    with pytest.warns(RuntimeWarning, match="crashed"):
        (one,) = sa.continue_rollouts(
            ExpertPolicy(), hostile("exits", 3, at=trajectory.num_steps), [trajectory], workers=2,
            samples=1,
        )  # fmt: skip
    assert np.isnan(one.values).all()
    with pytest.warns(RuntimeWarning, match="crashed"):
        (one,) = sa.continue_rollouts(
            RandomPolicy(), SometimesRaises, [trajectory], samples=8, max_steps=20
        )
    crashed = np.array([[e.crashed is not None for e in step] for step in one.episodes])
    assert crashed.any()
    for step, value in zip(one.episodes, one.values, strict=True):
        rewards = [sum(e.rewards) for e in step if e.crashed is None]
        assert value == pytest.approx(np.mean(rewards)) if rewards else np.isnan(value)


class SometimesRaises(hostile_envs.BabyAITextEnv):
    """Breaks when the fifth action is to drop what the agent does not hold."""

    def __init__(self) -> None:
        super().__init__(hostile_envs.level_id("GoToLocalS6N2"))

    def reset(self, seed: int) -> Any:
        self._taken = 0
        return super().reset(seed)

    def step(self, action: str) -> Any:
        self._taken += 1
        if action == "drop" and self._taken == 5:
            raise OSError("nothing to drop")
        return super().step(action)


def edited(trajectory: sa.Trajectory, index: int, content: str) -> sa.Trajectory:
    messages = [dict(message) for message in trajectory.messages]
    messages[index]["content"] = content
    return sa.Trajectory(messages, trajectory.reward, trajectory.id, dict(trajectory.meta))


def test_a_replay_that_takes_another_course_is_named():
    trajectories = demonstrations([3, 8])
    wrong = edited(trajectories[1], 4, "nothing")
    with pytest.raises(
        ValueError,
        match=rf"trajectories\[1\] \('{LEVEL}/8'\), step 2: replayed with seed 8, the environment "
        r"shows '.*', but the trajectory has 'nothing'",
    ):
        sa.continue_rollouts(ExpertPolicy(), LEVEL, [trajectories[0], wrong], samples=1)
    longer = sa.Trajectory(
        trajectories[0].messages + trajectories[0].messages[:2], meta=trajectories[0].meta
    )
    with pytest.raises(ValueError, match=r"step \d+: replayed, the episode of seed 3 is over"):
        sa.continue_rollouts(ExpertPolicy(), LEVEL, [longer], samples=1, workers=1)


def test_trajectories_that_cannot_be_replayed_are_named():
    (good,) = demonstrations([3])
    cases = [
        (
            sa.Trajectory(good.messages, id="x"),
            r"trajectories\[0\] \('x'\) must have .* meta\['seed'\], got None",
        ),
        (
            sa.Trajectory([{"role": "system", "content": "act"}, *good.messages], meta=good.meta),
            r"must have user and assistant in turn, .*, got \['system', ",
        ),
    ]
    for trajectory, message in cases:
        with pytest.raises(ValueError, match=message):
            sa.continue_rollouts(ExpertPolicy(), LEVEL, [trajectory])
    with pytest.raises(ValueError, match="samples must be a whole number >= 1, got 0"):
        sa.continue_rollouts(ExpertPolicy(), LEVEL, [good], samples=0)
    assert sa.continue_rollouts(ExpertPolicy(), LEVEL, []) == []


def test_a_policy_that_does_not_end_its_turns_as_the_template_does_is_refused():
    with pytest.raises(ValueError, match=r"ends a turn by token 2, .*eos_token_id is \[5\]"):
        sa.continue_rollouts(model_policy(eos_token_id=5), LEVEL, demonstrations([3]), samples=1)


def test_a_trajectory_longer_than_the_model_is_named():
    policy = model_policy(talker(max_position_embeddings=60))
    with pytest.raises(ValueError, match=rf"trajectory '{LEVEL}/3' must fit .*, got \d+ positions"):
        sa.continue_rollouts(policy, LEVEL, demonstrations([3]), samples=1)
