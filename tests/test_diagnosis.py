"""A diagnosis: worked out by hand on a ledge, and with real models in BabyAI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from completions_server import ModelServer
from ledge import Expertless, Ledge
from tiny_models import babyai_tokenizer, generate, tiny_agent

from stepagent import Trajectory, encode, save_trajectories
from stepagent.acting.lockstep import Options
from stepagent.cli import main
from stepagent.data.actions import FORMATS
from stepagent.evaluation import (
    Departure,
    Diagnosis,
    ExpertStates,
    GreedyEpisodes,
    Interval,
    diagnose,
    rate_interval,
    share_interval,
)
from stepagent.evaluation.diagnosis import first_departure, greedy_episodes
from stepagent.policies import ExpertPolicy, ModelPolicy
from stepagent.rollout import run_episodes

pytest.importorskip("minigrid")

ENV = "babyai:GoToLocalS6N2"
OPTIONS = Options(None, None, 64, 0, None)
HELD_OUT = range(40, 46)


class Scripted:
    """Does what is written for its seed; the last of it again and again."""

    name = "scripted"
    exact = True

    def __init__(self, scripts: dict[int, str]) -> None:
        self._scripts = scripts

    def begin(self, seeds: Sequence[int]) -> None:
        self._left = [self._scripts[seed].split() for seed in seeds]

    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str]:
        return [left.pop(0) if len(left) > 1 else left[0] for left in self._left]

    def keep(self, rows: Sequence[int]) -> None:
        self._left = [self._left[row] for row in rows]


# ------------------------------------------------------------------ in an environment


def test_each_failure_is_prevented_mended_both_or_neither_as_worked_out_by_hand():
    scripts = {
        0: "on",  # succeeds, never departs
        1: "on back",  # fails; mendable: two steps taken, three to go, three left
        2: "on jump",  # fails at once: never mendable
        3: "on rest rest jump",  # the first departure is mendable, whatever came later
        4: "on rest on",  # departs, and succeeds
        5: "on",  # as the expert, who fails too: neither
        6: "leap rest",  # the expert would have failed from the start, and succeeds from here
        7: "rest",  # fails; nine steps are too many from here too: neither
    }
    found = greedy_episodes(Ledge, Scripted(scripts), range(8), OPTIONS)
    assert found.departures == (
        Departure(1, 1, "back", "on", preventable=True, mendable=True),
        Departure(2, 1, "jump", "on", preventable=True, mendable=False),
        Departure(3, 1, "rest", "on", preventable=True, mendable=True),
        Departure(6, 0, "leap", "on", preventable=False, mendable=True),
        Departure(7, 0, "rest", "on", preventable=False, mendable=False),
    )
    assert (found.episodes, found.crashed, found.failures) == (8, 0, 6)
    assert (found.preventable, found.mendable, found.beyond) == (3, 3, 2)
    assert found.success == rate_interval([1, 0, 0, 0, 1, 0, 0, 0])
    assert found.expert_success == rate_interval([1, 1, 1, 1, 1, 0, 0, 0])
    assert found.expert_steps == 3
    assert found.departed == rate_interval([0, 1, 1, 1, 1, 0, 1, 1])
    assert found.recovered == rate_interval([0, 0, 0, 1, 0, 0])
    assert found.mendable_share == rate_interval([1, 0, 1, 0, 1, 0])
    assert found.valid.mean == 1


def test_what_is_no_action_is_a_departure_and_can_be_mended():
    (one,) = greedy_episodes(Ledge, Scripted({0: "fly"}), [0], OPTIONS).departures
    assert one == Departure(0, 0, "fly", "on", preventable=True, mendable=True)


class Talking(Scripted):
    """Thinks aloud after a first message, and says one action of two."""

    exact = False
    system = "Think aloud."

    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str]:
        said = super().act(observations, envs)
        return [f"Thought: {a}?" + ("\nAction: on" if a == "on" else "") for a in said]


def test_a_thought_without_an_action_is_a_departure_and_the_expert_goes_on_from_there():
    options = replace(OPTIONS, action_format=FORMATS["react"])
    found = greedy_episodes(Ledge, Talking({0: "on hm", 1: "on"}), [0, 1], options)
    assert found.departures == (Departure(0, 1, None, "on", preventable=True, mendable=True),)
    assert found.success.mean == 0.5
    assert found.valid.mean == (1 + 3) / (5 + 3)


@pytest.mark.parametrize("max_steps", [3, 4])
def test_a_departure_is_final_where_the_steps_do_not_suffice(max_steps):
    """One step is lost, and three are needed."""
    options = replace(OPTIONS, max_steps=max_steps)
    found = greedy_episodes(Ledge, Scripted({0: "rest"}), [0], options)
    assert found.preventable == 1
    assert found.mendable == (max_steps == 4)


def test_the_expert_never_departs_from_itself():
    found = greedy_episodes(ENV, ExpertPolicy(), range(4), OPTIONS)
    assert found.success == found.expert_success == rate_interval([1] * 4)
    assert found.departed.mean == found.failures == found.mendable == 0
    assert found.recovered is found.mendable_share is None
    assert found.departures == ()


def test_a_turn_too_many_can_be_mended_in_babyai():
    """Turning on the spot loses nothing, and the expert turns back."""
    found = greedy_episodes(ENV, Scripted(dict.fromkeys(range(4), "left")), range(4), OPTIONS)
    assert found.failures == found.preventable == found.mendable == len(found.departures) >= 1


def test_an_expert_without_an_answer_is_no_departure():
    (episode,) = run_episodes(Ledge, Scripted({0: "back"}), [0], expert=lambda env: "back")
    assert first_departure(episode) is None
    episode.expert_actions[1] = None
    episode.expert_actions[3] = "on"
    assert first_departure(episode) == 3


def test_an_environment_without_an_expert_is_refused_by_name():
    with pytest.raises(ValueError, match="env must have an expert, got ledge:expertless, whose"):
        greedy_episodes(Expertless, Scripted({0: "on", 1: "on"}), [0, 1], OPTIONS)


@pytest.mark.filterwarnings("ignore:.*crashed and have no outcome:RuntimeWarning")
@pytest.mark.parametrize("crashing", ["on", "back", "rest"])
def test_a_seed_that_crashes_anywhere_is_left_out(crashing):
    """In the expert's episode, in the agent's, and where the expert goes on after the agent."""

    class Crashing(Ledge):
        def reset(self, seed):
            self._done, self._bad = [], seed == 1
            return super().reset(seed)

        def step(self, action):
            self._done.append(action)
            ended = {"on": ["on"], "back": ["back"], "rest": ["rest", "on"]}[crashing]
            if self._bad and self._done == ended:
                raise OSError("gone")
            return super().step(action)

    scripts = {0: "rest back", 1: "rest back" if crashing == "rest" else "back"}
    found = greedy_episodes(Crashing, Scripted(scripts), [0, 1], OPTIONS)
    assert (found.episodes, found.crashed) == (1, 1)
    assert [departure.seed for departure in found.departures] == [0]


# ------------------------------------------------------------------ at the expert's states


@pytest.fixture(scope="module")
def agent():
    return tiny_agent(), babyai_tokenizer()


def shown(seeds: Sequence[int]) -> list[str]:
    """The first observations of these seeds."""
    return [e.observations[0] for e in run_episodes(ENV, ExpertPolicy(), seeds)]


def answered(agent: Any, observations: Sequence[str], change: Any = str) -> list[Any]:
    """Trajectories of one step whose action is the agent's own greedy one, changed."""
    model, tokenizer = agent
    trunks = []
    for observation in observations:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": observation}], add_generation_prompt=True
        )["input_ids"]
        text = tokenizer.decode([i for i in generate(model, prompt, 3) if i != 2])
        turn = [{"role": "assistant", "content": change(text)}]
        messages = [{"role": "user", "content": observation}, *turn]
        trunks.append(encode(Trajectory(messages=messages), tokenizer))
    return trunks


def found_at(agent: Any, trunks: Sequence[Any], **options: Any) -> ExpertStates:
    model, tokenizer = agent
    options = {"max_new_tokens": 3, "samples": 2, **options}
    found = diagnose(model, trunks, tokenizer=tokenizer, **options)
    assert found.episodes is None
    return found.expert_states


def test_an_agent_that_is_its_expert_agrees_everywhere(agent):
    found = found_at(agent, answered(agent, shown(HELD_OUT)))
    assert found.greedy == share_interval([1] * 6, [1] * 6)
    assert found.greedy.mean == found.readable.mean == 1
    assert found.sampled.mean < 1
    assert (found.trajectories, found.steps, found.unread, found.samples) == (6, 6, 0, 2)


def test_agreement_is_that_of_the_action_whatever_was_thought(agent):
    trunks = answered(agent, shown(HELD_OUT), lambda text: f"go to the {text}")
    assert found_at(agent, trunks).greedy.mean == 0
    assert found_at(agent, trunks, action_format=last_word).greedy.mean == 1


def last_word(text: str) -> str:
    if not text:
        raise ValueError("nothing")
    return text.split()[-1]


def test_agreement_is_what_generate_and_the_format_give_step_by_step(agent):
    """Of the expert's episodes and of the agent's own, which the agent ended in its own way."""
    model, tokenizer = agent
    policy = ModelPolicy(model, tokenizer, max_new_tokens=3, eos_token_id=2)
    episodes = run_episodes(ENV, ExpertPolicy(), HELD_OUT)
    episodes += run_episodes(ENV, policy, HELD_OUT, max_steps=2)
    trunks = [encode(replace(e, trunk=None, logps=[]).trajectory(), tokenizer) for e in episodes]
    same, whole = [], []
    for trunk in trunks:
        texts = [
            [tokenizer.decode([i for i in ids if i != 2]).strip() for ids in pair]
            for start, stop in trunk.action_spans
            for pair in [(generate(model, trunk.input_ids[:start], 3), trunk.input_ids[start:stop])]
        ]
        same.append(sum(len(set(pair)) == 1 for pair in texts))
        whole.append(len(texts))
    found = found_at(agent, trunks)
    assert found.greedy == share_interval(same, whole)
    assert 0 < found.greedy.mean < 1


def only_short(text: str) -> str:
    if len(text.split()) != 2:
        raise ValueError("not two words")
    return text


def test_an_answer_without_an_action_is_counted_and_agrees_with_none(agent):
    observations = shown(HELD_OUT)
    own = answered(agent, observations)
    texts = [agent[1].decode(t.input_ids[slice(*t.action_spans[0])][:-1]) for t in own]
    short = [len(text.split()) == 2 for text in texts]
    assert 0 < sum(short) < len(short)
    trunks = answered(agent, observations, lambda text: " ".join(text.split()[:2]))
    found = found_at(agent, trunks, action_format=only_short)
    assert found.readable.mean == found.greedy.mean == sum(short) / 6


def test_a_step_of_the_expert_without_an_action_is_left_out_and_counted(agent):
    trunks = answered(agent, shown(HELD_OUT))
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "up"}]
    trunks.append(encode(Trajectory(messages=messages), agent[1]))

    def but_up(text: str) -> str:
        if text == "up":
            raise ValueError("no action")
        return text

    found = found_at(agent, trunks, action_format=but_up)
    assert (found.trajectories, found.steps, found.unread) == (6, 6, 1)
    assert found.greedy.mean == 1


def test_both_parts_come_together(agent):
    model, tokenizer = agent
    trunks = answered(agent, shown(HELD_OUT))
    found = diagnose(
        model,
        trunks,
        tokenizer=tokenizer,
        env=ENV,
        seeds=range(3),
        max_steps=4,
        samples=1,
        max_new_tokens=3,
    )
    assert found.episodes.environment == ENV
    assert found.episodes.episodes == 3
    assert found.expected_departures == 0  # by an agreement of 1, with another expert
    assert json.loads(json.dumps(found.as_dict()))["episodes"]["failures"] == 3
    assert found.as_text().endswith(f"{found.verdict}\n{found.recommendation}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": ENV}, "env and seeds must be given together, got env='babyai"),
        ({"seeds": [1]}, "env and seeds must be given together, got env=None"),
        ({"env": Expertless, "seeds": [1]}, "env must have an expert, got ledge:expertless"),
        ({"samples": 0}, "samples must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        (
            {"action_format": "react"},
            "trunks must hold actions in the action format 'react', got 6",
        ),
        ({"action_format": "prose"}, "action_format must be one of plain"),
    ],
)
def test_wrong_input_of_a_diagnosis_is_named(agent, options, message):
    with pytest.raises(ValueError, match=message):
        found_at(agent, answered(agent, shown(HELD_OUT)), **options)


def test_a_diagnosis_needs_a_trajectory(agent):
    with pytest.raises(ValueError, match="trunks must hold at least one, got none"):
        found_at(agent, [])


# ------------------------------------------------------------------ intervals, words


def test_a_share_of_groups_is_that_of_all_their_steps():
    found = share_interval([1, 9], [2, 10])
    assert found.mean == 10 / 12
    assert found.low <= 1 / 2 < 9 / 10 <= found.high


def test_a_share_that_all_groups_agree_on_has_wilsons_bound_of_their_number():
    for agree in (0, 1):
        found = share_interval([3 * agree, 5 * agree, agree], [3, 5, 1])
        rate = rate_interval([agree] * 3)
        assert (found.low, found.high) == pytest.approx((rate.low, rate.high))
    assert share_interval([3], [4]) == Interval(0.75, None, None)


def test_a_share_over_groups_is_less_certain_than_over_their_steps():
    """100 steps, alike within each of ten episodes."""
    grouped = share_interval([10] * 5 + [0] * 5, [10] * 10)
    assert grouped.low < rate_interval([1] * 50 + [0] * 50).low


@pytest.mark.parametrize(
    ("counts", "totals", "message"),
    [
        ([], [], "counts must be a non-empty list"),
        ([1], [1, 2], "totals must have length 1, got 2"),
        ([3], [2], "counts must lie in"),
        ([-1], [2], "counts must lie in"),
        ([0], [0], "counts must lie in"),
    ],
)
def test_wrong_groups_are_named(counts, totals, message):
    with pytest.raises(ValueError, match=message):
        share_interval(counts, totals)


def case(
    *, greedy: float = 0.75, readable: float = 1.0, counts: tuple[int, ...] | None = None
) -> Diagnosis:
    """counts: failures of ten episodes, and of these those prevented, mended and beyond."""
    share = rate_interval([1, 0])
    sure = Interval(readable, None, None)
    states = ExpertStates(2, 8, 0, 4, replace(share, mean=greedy), share, sure, sure)
    if counts is None:
        return Diagnosis(states, None)
    failures, prevented, mended, beyond = counts
    parts = {"preventable": prevented, "mendable": mended, "beyond": beyond}
    whole = {"expert_steps": 2.0, "valid": share_interval([1], [1]), "departed": share}
    whole |= {"success": share, "expert_success": share, "departures": ()}
    rest = {"recovered": share, "failures": failures, "mendable_share": share}
    return Diagnosis(states, GreedyEpisodes("ledge:walk", 10, crashed=0, **whole, **parts, **rest))


@pytest.mark.parametrize(
    ("given", "verdict", "recommendation"),
    [
        ({}, "can gain at most the 25.0% of their steps", "From trajectories alone"),
        ({"counts": (0, 0, 0, 0)}, "Nothing can be gained here", "Look for episodes"),
        (
            {"counts": (4, 4, 3, 0)},
            "at most 40.0 points of success, and that only if the agent never departed; now it "
            "does not act as the expert at 25.0% of the held-out steps. 3 of 4 failures, 30.0 p",
            "train at the agent's own states",
        ),
        ({"counts": (4, 4, 1, 0)}, "1 of 4 failures, 10.0 points", "lost with the departure"),
        ({"counts": (4, 0, 0, 4)}, "at most 0.0 points", "prevented or mended none"),
        ({"counts": (4, 4, 4, 0), "readable": 0.8}, "4 of 4 failures", "only 80.0% of its answers"),
        ({"readable": 0.8}, "can gain at most the 25.0%", "only 80.0% of its answers"),
    ],
)
def test_the_verdict_and_the_recommendation_follow_the_figures(given, verdict, recommendation):
    found = case(**given)
    assert verdict in found.verdict
    assert recommendation in found.recommendation


def test_departures_are_expected_by_agreement_and_length():
    assert case(greedy=0.5, counts=(4, 4, 3, 0)).expected_departures == 1 - 0.5**2
    assert case().expected_departures is None


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, agent: Any) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis")
    for part in agent:
        part.save_pretrained(folder / "model")
    episodes = run_episodes(ENV, ExpertPolicy(), HELD_OUT)
    save_trajectories(folder / "held.jsonl", [episode.trajectory() for episode in episodes])
    return folder


def invoke(folder: Path, *options: object) -> Result:
    chosen = {"--model": folder / "model", "--data": folder / "held.jsonl"}
    given = [part for pair in chosen.items() if pair[0] not in options for part in pair]
    return CliRunner().invoke(main, ["diagnose", *map(str, [*given, *options])])


def test_the_command_reports_as_json_and_as_text(folder):
    environment = ("--env", ENV, "--episodes", 2, "--seed-start", 7, "--max-steps", 3)
    result = invoke(folder, *environment, "--samples", 2, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["expert_states"]["trajectories"] == len(HELD_OUT)
    assert report["expert_states"]["samples"] == 2
    assert [departure["seed"] for departure in report["episodes"]["departures"]] == [7, 8]
    text = invoke(folder, *environment, "--samples", 2).stdout
    assert "in babyai:GoToLocalS6N2: 2 greedy episodes" in text
    assert text.endswith(f"{report['verdict']}\n{report['recommendation']}\n")


def test_without_an_environment_only_the_experts_states_are_told(folder):
    report = json.loads(invoke(folder, "--json").stdout)
    assert report["episodes"] is None
    assert "cannot be said without an environment" in report["verdict"]


def test_an_agent_behind_a_server_is_diagnosed_as_in_a_folder(folder, agent, tmp_path):
    lines = (folder / "held.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:2]))
    few = ("--data", tmp_path / "two.jsonl", "--samples", 1, "--json")
    local = json.loads(invoke(folder, *few).stdout)["expert_states"]
    with ModelServer(agent[0]) as server:
        options = ("--model", server.url, "--tokenizer", folder / "model", *few)
        result = invoke(folder, *options)
    assert result.exit_code == 0, result.output
    served = json.loads(result.stdout)["expert_states"]
    assert (served["greedy"], served["readable"]) == (local["greedy"], local["readable"])


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (("--model", "nowhere"), 2, "'nowhere' is neither a model's folder nor its name on the"),
        (("--model", "http://localhost:1"), 2, "--model URL needs --tokenizer"),
        (("--served-model", "m"), 2, "--served-model is of no use with --model"),
        (("--episodes", "3"), 2, "--episodes is of no use without --env"),
        (("--step-timeout", "3"), 2, "--step-timeout is of no use without --env"),
        (("--env", "chess"), 1, "environment must be one of"),
        (("--env", "ledge:Expertless", "--episodes", 2), 1, "env must have an expert, got ledge"),
        (("--action-format", "react"), 1, "must hold actions in the action format 'react'"),
        (("--samples", "0"), 2, "'--samples'"),
    ],
)
def test_wrong_options_of_the_command_are_named(folder, options, exit_code, message):
    result = invoke(folder, *options)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert message in result.stderr.rstrip("\n").split("\n")[-1]


def test_empty_data_and_a_tokenizer_without_a_template_are_named(folder, agent, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    result = invoke(folder, "--data", tmp_path / "empty.jsonl")
    assert result.exit_code == 1
    assert "empty.jsonl" in result.stderr
    tokenizer = babyai_tokenizer()
    tokenizer.chat_template = None
    agent[0].save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = invoke(folder, "--model", tmp_path / "model")
    assert result.exit_code == 1
    assert "must have a chat template, it has none" in result.stderr
