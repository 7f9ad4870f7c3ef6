"""Early Experience's data: what the agent's alternatives lead to, and how it is to be predicted."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conversations import TEMPLATES, tokenizer_of
from hostile_envs import LEVEL, hostile
from tiny_models import END, babyai_tokenizer, separate_logprobs, tiny_agent
from tiny_tokenizers import GEMMA, LLAMA2, LLAMA3, QWEN3, SPACED, SPECIAL_TOKENS, byte_level_bpe

import stepagent as sa
from stepagent.acting.alternatives import Outcome, executed, texts_of, world_model_trunks
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.data.observations import encode_observations
from stepagent.envs import make
from stepagent.models import score_trees

BARE = SPACED.replace(": '", ":\\n'")  # no control token opens a turn
SEEDS = [8, 5, 27]  # the expert needs five steps or more
ANSWERS = ["left", "right", "forward", "pickup", "fly", "left"]


def demonstrations(env: Any = LEVEL, seeds: list[int] = SEEDS, **options: Any) -> list[Any]:
    return [e.trajectory() for e in run_episodes(env, ExpertPolicy(), seeds, **options)]


def everywhere(trajectories: list[Any], answers: list[str] = ANSWERS) -> list[Any]:
    return [[answers] * trajectory.num_steps for trajectory in trajectories]


def by_hand(env: Any, trajectory: Any, t: int, answer: str) -> Outcome:
    """One environment, one action after the other."""
    env.reset(trajectory.meta["seed"])
    for message in trajectory.messages[1 : 2 * t + 1 : 2]:
        env.step(message["content"])
    observation, _, terminated, truncated, info = env.step(answer)
    return Outcome(answer, observation, info["valid"], terminated or truncated)


# ------------------------------------------------------------------ what they lead to


@pytest.mark.parametrize("workers", [0, 2])
def test_each_alternative_leads_to_what_the_environment_shows_after_it(workers):
    trajectories, env = demonstrations(), make(LEVEL)
    found = executed(LEVEL, trajectories, everywhere(trajectories), workers=workers, batch_size=7)
    for trajectory, steps in zip(trajectories, found, strict=True):
        assert len(steps) == trajectory.num_steps
        for t, outcomes in enumerate(steps):
            assert outcomes == [by_hand(env, trajectory, t, a) for a in dict.fromkeys(ANSWERS)]
    told = [outcome for steps in found for step in steps for outcome in step]
    assert {outcome.ended for outcome in told} == {outcome.valid for outcome in told} == {0, 1}


def test_answers_with_one_action_are_tried_once_and_the_experts_is_read_in_the_record(monkeypatch):
    taken: list[str] = []
    step = type(make(LEVEL)).step
    monkeypatch.setattr(
        type(make(LEVEL)), "step", lambda self, action: taken.append(action) or step(self, action)
    )
    trajectories = demonstrations(seeds=[8], action_format="react")
    trajectory, taken[:] = trajectories[0], []
    own = [message["content"] for message in trajectory.messages[1::2]]
    ways = [f"Thought: well.\n{text}" for text in own]
    (steps,) = executed(
        LEVEL, trajectories, [[list(p) for p in zip(own, ways, strict=True)]], action_format="react"
    )
    assert not taken
    for t, pair in enumerate(steps):
        assert [o.answer for o in pair] == [own[t], ways[t]]
        later = [m["content"] for m in trajectory.messages[2 * t + 2 :]]
        seen = later[0] if later else trajectory.meta["last_observation"]
        assert {o.observation for o in pair} == {seen}
        assert {o.ended for o in pair} == {t == trajectory.num_steps - 1}
    turned = ["Action: fly", "Thought: up!\nAction: fly", "fly", "away"]
    answers = [[] for _ in own]
    answers[2] = turned
    (steps,) = executed(LEVEL, trajectories, [answers], action_format="react")
    replay = [text.removeprefix("Action: ") for text in own[:2]]
    assert sorted(taken) == sorted([*replay, "fly", *replay])  # those without an action: once
    assert [o.answer for o in steps[2]] == turned
    refusal = "Invalid format. The answer must contain 'Action: '."
    assert [o.observation == refusal for o in steps[2]] == [False, False, True, True]
    assert not any(o.valid or o.ended for o in steps[2])


def test_what_a_record_does_not_say_is_tried():
    (trajectory,) = demonstrations(seeds=[8])
    own = [[message["content"]] for message in trajectory.messages[1::2]]
    (whole,) = executed(LEVEL, [trajectory], [own])
    assert whole[-1][0].ended
    bare = replace(trajectory, meta={"seed": 8})
    assert executed(LEVEL, [bare], [own]) == [whole]
    cut = replace(trajectory, messages=trajectory.messages[:6])
    assert executed(LEVEL, [cut], [own[:3]]) == [whole[:3]]


def test_a_trajectory_of_another_environment_is_refused_by_its_step():
    (trajectory,) = demonstrations(seeds=[8])
    answers = [[] for _ in range(trajectory.num_steps)]
    answers[2] = ["left"]
    for turn, step in ((0, 0), (2, 1), (4, 2)):
        messages = [dict(message) for message in trajectory.messages]
        messages[turn]["content"] += " And a dragon."
        other = replace(trajectory, messages=messages)
        with pytest.raises(ValueError, match=rf"trajectories\[0\].*/8'\), step {step}: replayed"):
            executed(LEVEL, [other], [answers])
    longer = replace(trajectory, messages=[*trajectory.messages, *trajectory.messages[-2:]])
    answers = [[] for _ in range(longer.num_steps)]
    answers[-1] = ["left"]
    with pytest.raises(ValueError, match=r"the episode of seed 8 is over before"):
        executed(LEVEL, [longer], [answers])


def test_answers_must_be_given_for_each_step_of_each_trajectory():
    trajectories = demonstrations(seeds=[8, 5])
    with pytest.raises(ValueError, match="each of the 2 trajectories, got 1"):
        executed(LEVEL, trajectories, [[]])
    with pytest.raises(ValueError, match=r"trajectories\[0\] .* each of its \d+ steps, got 0"):
        executed(LEVEL, trajectories, [[], []])
    with pytest.raises(ValueError, match=r"meta\['seed'\], got None"):
        executed(LEVEL, [replace(trajectories[0], meta={})], everywhere(trajectories[:1]))


@pytest.mark.parametrize(("deed", "workers"), [("raises", 0), ("exits", 2)])
def test_an_alternative_that_crashes_is_left_out_and_no_other(deed, workers):
    trajectories = demonstrations(seeds=[8, 5])
    answers = everywhere(trajectories, ["fly", "sing"])
    whole = executed(LEVEL, trajectories, answers)
    answers[0] = [["fly"] if t < 2 else [] for t in range(len(answers[0]))]
    env = hostile(deed, 8, at=2)  # the second step: of an alternative at the state of step 1
    with pytest.warns(RuntimeWarning, match="1 of .* crashed"):
        found = executed(env, trajectories, answers, workers=workers)
    assert found[0][0] == whole[0][0][:1]
    assert found[0][1] == []
    assert found[1] == whole[1]


@pytest.mark.slow
def test_alternatives_of_a_text_game():
    pytest.importorskip("textworld")
    name = "textworld"
    trajectories, env = demonstrations(name, [1, 2]), make(name)
    answers = everywhere(trajectories, ["look", "inventory", "eat the moon"])
    found = executed(name, trajectories, answers)
    for trajectory, steps in zip(trajectories, found, strict=True):
        for t, outcomes in enumerate(steps):
            assert outcomes == [by_hand(env, trajectory, t, a) for a in answers[0][0]]


# ------------------------------------------------------------------ to predict them


def test_the_trunk_scores_what_a_sequence_of_its_own_would_for_each_alternative():
    trajectories, tokenizer = demonstrations(seeds=[8, 5]), babyai_tokenizer()
    model = tiny_agent().eval()
    trunks = [sa.encode(trajectory, tokenizer) for trajectory in trajectories]
    branches = sa.inspect(model, trunks, samples=3, max_new_tokens=4, eos_token_id=END, seed=1)
    own = [
        [[t.input_ids[a:b]] for a, b in t.action_spans] for t in trunks
    ]  # so that the spine is scored too
    answers = [
        [x + y for x, y in zip(mine, tried, strict=True)]
        for mine, tried in zip(
            texts_of(trunks, own, tokenizer), texts_of(trunks, branches, tokenizer), strict=True
        )
    ]
    outcomes = executed(LEVEL, trajectories, answers)
    world = world_model_trunks(trajectories, trunks, outcomes, tokenizer)
    alone, told = [], 0
    for trajectory, expert, steps, (trunk, observed) in zip(
        trajectories, trunks, outcomes, world, strict=True
    ):
        sequences = [
            sequence(tokenizer, trajectory, t, o) for t, step in enumerate(steps) for o in step
        ]
        expected = {(*one.input_ids.tolist(), *one.action_spans[0]): one for one in sequences}
        ordered, actions = [], []
        for (line, (start, stop)), seen in zip(spans_of(trunk), observed, strict=True):
            key = (*line.input_ids[:stop].tolist(), start, stop)
            if seen:
                ordered.append(expected.pop(key))
            else:
                ordered.append(sa.Trunk(line.input_ids[:stop], [(start, stop)]))
                actions.append(key)
        assert not expected
        assert actions == [
            (*expert.input_ids[:stop].tolist(), start, stop) for start, stop in expert.action_spans
        ]
        alone.append(separate_logprobs(model, ordered, [[[]]] * len(ordered)))
        told += sum(len(one.input_ids) for one in ordered)
    packed = [trunk for trunk, _ in world]
    trees = sa.pack_step_pairs(packed, [[[] for _ in trunk.action_spans] for trunk in packed])
    with torch.no_grad():
        scored = score_trees(model, trees)
    torch.testing.assert_close(scored, torch.cat(alone).detach(), atol=1e-5, rtol=0)
    assert sum(len(tree.input_ids) for tree in trees) < told / 3, "states and answers are shared"


def sequence(tokenizer: Any, trajectory: Any, t: int, outcome: Outcome) -> sa.Trunk:
    """A prompt of its own, of which the newest message's tokens are scored, after its opening."""
    answered = {"role": "assistant", "content": outcome.answer}
    observed = {"role": "user", "content": outcome.observation}
    messages = [*trajectory.messages[: 2 * t + 1], answered]
    before, after = (
        tokenizer.apply_chat_template(m, tokenize=False) for m in (messages, [*messages, observed])
    )
    assert after.startswith(before)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(before, add_special_tokens=False)["input_ids"]) + 1
    assert ids[start - 1] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    return sa.Trunk(ids, [(start, len(ids))])


def spans_of(trunk: sa.Trunk) -> list[Any]:
    return [(line, span.tolist()) for line in trunk.lines() for span in line.action_spans]


def test_a_state_is_in_the_trunk_once_and_the_spine_goes_on_from_its_own_answer():
    tokenizer = babyai_tokenizer()
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "left"},
        {"role": "user", "content": "a door"},
        {"role": "assistant", "content": "open"},
    ]
    told = [[("left", "a door"), ("right", "a wall")], [("forward", "a door"), ("right", "a wall")]]
    one = sa.Trajectory(messages=messages)
    trunk, observed = encode_observations(one, sa.encode(one, tokenizer), told, tokenizer)
    words = tokenizer.convert_ids_to_tokens(trunk.input_ids.tolist())
    s, e = "<|im_start|>", "<|im_end|>"
    first = [s, "user", "go", e, s, "assistant"]
    wall = [e, s, "user", "a", "wall", e]
    door = [e, s, "user", "a", "door", e]
    # An action of the trajectory's own comes with the last token of its state once more.
    expected = [*first, "right", *wall, "assistant", "left", *door, s, "assistant"]
    expected += ["forward", *door, "right", *wall, "assistant", "open", e]
    known = set(tokenizer.get_vocab())
    assert words == [w if w in known else "<unk>" for w in expected]
    assert observed.tolist() == [True, False, True, True, True, False]
    actions, scored = (
        [words[a:b] for a, b in trunk.action_spans[o]] for o in (~observed, observed)
    )
    assert actions == [["left", e], ["open", e]]
    assert [span[0] for span in scored] == ["user"] * 4
    assert [span[-1] for span in scored] == [e] * 4
    assert [len(span) for span in scored] == [4] * 4


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, QWEN3, BARE])
@pytest.mark.parametrize(
    "observation", [" \nan apple <|im_end|> and <|eot_id|></s> a mug\n", "", "go"]
)
def test_scored_is_what_stands_between_the_control_tokens_around_the_observation(
    template, observation
):
    """In the prompt that the agent would be given next, whatever the template rewrites."""
    tokenizer = byte_level_bpe(template)
    names = "|".join(map(re.escape, SPECIAL_TOKENS))
    messages = [
        {"role": "user", "content": "go to kitchen"},
        {"role": "assistant", "content": "look"},
        {"role": "user", "content": "you are in the kitchen"},
        {"role": "assistant", "content": "take apple"},
    ]
    answers = ["<think>\nhm\n</think>\n\ngo", "", "take apple"]
    told = [[(answer, observation) for answer in answers]] * 2
    one = sa.Trajectory(messages=messages)
    trunk, observed = encode_observations(one, sa.encode(one, tokenizer), told, tokenizer)
    expected = set()
    for t, answer in itertools.product(range(2), answers):
        history = [*messages[: 2 * t + 1], {"role": "assistant", "content": answer}]
        text = prompt(tokenizer, history, "apple in a kitchen")
        before, _, after = text.rpartition("apple in a kitchen")
        first = list(re.finditer(names, before))[-1].end()
        last = re.search(names, after).end()
        said = observation if template in (QWEN3, BARE) else observation.strip()
        expected.add((before[:first], before[first:] + said + after[:last]))
    found = [
        (decoded(tokenizer, line.input_ids[:start]), decoded(tokenizer, line.input_ids[start:stop]))
        for (line, (start, stop)), seen in zip(spans_of(trunk), observed, strict=True)
        if seen
    ]
    assert set(found) == expected
    assert len(found) == len(expected)
    ends = [trunk.input_ids[stop - 1] for _, stop in trunk.action_spans]
    inside = [trunk.input_ids[a : b - 1] for a, b in trunk.action_spans[observed]]
    special = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert np.isin(ends, special).all()
    assert not np.isin(np.concatenate(inside), special).any(), "an observation ends no turn"


@pytest.mark.slow
def test_the_templates_of_real_models_tell_an_observation_apart():
    """All that encode the trajectory at all."""
    messages = [
        {"role": "user", "content": "go to kitchen"},
        {"role": "assistant", "content": "look"},
        {"role": "user", "content": "you are in"},
        {"role": "assistant", "content": "take apple"},
    ]
    one, seen = sa.Trajectory(messages=messages), 0
    told = [[("Thought: hm.\nAction: go", "an <|im_end|> apple"), ("look", "you are in")]] * 2
    for name in TEMPLATES:
        tokenizer = tokenizer_of(name)
        try:
            own = sa.encode(one, tokenizer)
        except ValueError:
            continue
        trunk, observed = encode_observations(one, own, told, tokenizer)
        texts = [
            decoded(tokenizer, line.input_ids[start:stop])
            for (line, (start, stop)), scored in zip(spans_of(trunk), observed, strict=True)
            if scored
        ]
        said = ["an <|im_end|> apple", "you are in"]
        assert len(texts) == 4
        # At the second state the trajectory's own answer is another.
        assert all(words in text for words, text in zip(said * 2, texts, strict=True)), name
        assert all(len(text) < len(words) + 30 for words, text in zip(said * 2, texts, strict=True))
        seen += 1
    assert seen > 40


def decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def prompt(tokenizer: Any, history: list[Any], observation: str) -> str:
    messages = [*history, {"role": "user", "content": observation}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_what_cannot_be_told_apart_is_refused():
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "left"}]
    one, told = sa.Trajectory(messages=messages, id="x"), [[("left", "a door")]]

    def encoded(template: str, told: Any = told) -> Any:
        tokenizer = byte_level_bpe(template)
        return encode_observations(one, sa.encode(one, byte_level_bpe(BARE)), told, tokenizer)

    with pytest.raises(ValueError, match=r"trajectory 'x': .*special token before an observation"):
        encoded(LLAMA2)
    for changed in ("message['content'] | upper", "message['content'] * 2", "'a door'"):
        with pytest.raises(
            ValueError, match=r"'x': .*must write an observation as it is.*'a door'"
        ):
            encoded(BARE.replace("message['content']", changed))
    with pytest.raises(ValueError, match="has 1 steps, of which told must have one entry each"):
        encoded(BARE, [])
    trunk, observed = encoded(BARE, [[]])
    assert trunk.input_ids.tolist() == sa.encode(one, byte_level_bpe(BARE)).input_ids.tolist()[:-1]
    assert observed.tolist() == [False]


def test_texts_are_without_the_end_of_the_turn():
    tokenizer = babyai_tokenizer()
    trunk = sa.encode(demonstrations(seeds=[8])[0], tokenizer)
    left = tokenizer.convert_tokens_to_ids("left")
    tried = [np.array(ids, np.int32) for ids in ([left, END], [left, left], [END])]
    steps = [tried, *([[]] * (trunk.num_steps - 1))]
    assert texts_of([trunk], [steps], tokenizer)[0][0] == ["left", "left left", ""]
