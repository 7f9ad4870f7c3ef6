"""Thought and action apart: where an action stands, which steps are one, what losses and D read."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import separate_logprobs, tiny_model
from tiny_tokenizers import byte_level_bpe, metaspace_bpe

from stepagent import reference
from stepagent.data.actions import FORMATS, ActionFormat, action_format
from stepagent.data.actions import call_text as call
from stepagent.data.encoding import encode
from stepagent.data.ends import ends_of
from stepagent.data.trajectory import Trajectory
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import (
    PARTS,
    Comparison,
    load_comparisons,
    pack_with_steps,
    save_comparisons,
)
from stepagent.learning.figures import reward_figures, sides
from stepagent.learning.inverse import InverseReflection
from stepagent.learning.methods import method_of
from stepagent.learning.methods.method import Batch
from stepagent.learning.parts import StepParts
from stepagent.learning.trainer import StepAgentTrainer

TOKENIZER = byte_level_bpe()
EAST, WEST = "Thought: the apple is east.\nAction: go east", "Thought: go east?\nAction: go west"
MUSED = "Thought: I look, then go west.\nAction: go east"
LOST = "Thought: the apple is east."


# ------------------------------------------------------------------ where an action stands


CALL = '{"name": "go", "arguments": {"to": "x"}}'
BOTH = '{"thought": "east", "action": "'
ACT = '<tool_call>\n{"name": "act", "arguments": {"action": "'


@pytest.mark.parametrize(
    ("name", "before", "action", "after"),
    [
        ("react", "Thought: go east?\nAction: ", "go east", ""),
        ("react", "Action: `", "east", "`.\nThought: east"),
        ("react", "<think>Action: a</think>\n\nAction: ", "a", ""),
        ("react", "Action:\n```\n", "go", "\n```"),
        ("react", "Action: ", "go", "\nObservation: you go\nAction: go"),
        ("json", BOTH, "east", '"}'),
        ("json", '{"action": " ', "east", ' ", "thought": "east"}'),
        ("json", '{"action": "a", "action": "', "a", '"}'),
        ("json", 'Say "a": {"action": "', 'say \\"a\\"', '"}'),
        ("json", '{"action": "', "caf\\u00e9", '"}'),
        ("tool_call", ACT, "go", '"}}\n</tool_call>'),
        ("tool_call", "go\n<tool_call>\n", CALL, "\n</tool_call>"),
        ("tool_call", "<think>go x</think> ", CALL, " go x"),
    ],
)
def test_an_action_stands_where_it_is_read(name, before, action, after):
    place = FORMATS[name].located(before + action + after)
    assert place == (len(before), len(before) + len(action))


WORDS = st.text(st.sampled_from("ab \"'\\`.é{}:\n"), max_size=12)


@given(st.sampled_from(["react", "json", "tool_call"]), WORDS, WORDS, st.booleans())
def test_no_action_of_the_formats_is_lost(name, thought, action, ascii_only):
    """Whatever is read stands somewhere, and another word there is what would be read."""
    texts = {
        "react": f"Thought: {thought}\nAction: {action}",
        "json": json.dumps({"thought": thought, "action": action}, ensure_ascii=ascii_only),
        "tool_call": thought + call("act", {"action": action}),
    }
    form, text = FORMATS[name], texts[name]
    place = form.located(text)
    assert (place is None) == (form.parse(text).action is None)
    if place:
        start, stop = place
        assert form.parse(text[:start] + "zebra" + text[stop:]).action == "zebra"


def test_an_action_that_stands_nowhere_is_refused_by_name():
    form = action_format(lambda text: ("left", "right")[int(text)])
    with pytest.raises(ValueError, match=r"must read an action that stands in the text, got 'left' "
                                         r"of '0': take scored_part='all'"):  # fmt: skip
        form.located("0")
    # The word is in the text, but it is not what is read.
    numbered = ActionFormat("numbered", lambda text: ("left", "right")[int(text[-1])])
    with pytest.raises(ValueError, match="stands in the text"):
        numbered.located("left or right? 0")


# ------------------------------------------------------------------ which tokens are the action


def trajectory(*texts: str, task: str = "Find the apple.") -> Trajectory:
    messages = [{"role": "user", "content": task}]
    for text in texts:
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    return Trajectory(messages=messages[:-1])


def written(text: str, tokenizer=TOKENIZER) -> np.ndarray:
    trunk = encode(trajectory(text), tokenizer)
    start, stop = trunk.action_spans[0]
    return trunk.input_ids[start:stop]


def parts_of(name="react", part="all", tokenizer=TOKENIZER) -> StepParts:
    ends = ends_of([encode(trajectory("x"), tokenizer)])
    return StepParts(FORMATS[name], tokenizer, ends, part)


def slow_mask(text: str, start: int, stop: int, tokenizer) -> np.ndarray:
    """By the offsets of the tokenizer's own encoding of the conversation, and the turn's end."""
    shown = tokenizer.apply_chat_template(trajectory(text).messages, tokenize=False)
    found = tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True)
    before, ids = shown.index(text), written(text, tokenizer)
    turn = [n for n, (a, b) in enumerate(found["offset_mapping"]) if b > before]
    turn = turn[: len(ids)]
    assert [found["input_ids"][n] for n in turn] == ids.tolist()
    places = [found["offset_mapping"][n] for n in turn[:-1]]
    return np.array([a < before + stop and b > before + start for a, b in places] + [True])


@pytest.mark.parametrize("action", ["go east", "take the 🍎 apple", "é", "east\n\nObservation: x"])
@pytest.mark.parametrize("thought", ["the apple is east.", "🍎🍎 go east é"])
@pytest.mark.parametrize("make", [byte_level_bpe, metaspace_bpe])
def test_the_tokens_of_an_action_are_those_with_a_character_of_it(make, thought, action):
    tokenizer = make(trim_offsets=False) if make is byte_level_bpe else make()
    text = f"Thought: {thought}\nAction: {action}"
    ids = written(text, tokenizer)
    start = text.index("Action: ") + len("Action: ")
    stop = start + len(action.split("\n")[0])
    mask = parts_of("react", "action", tokenizer).counted(ids)
    assert mask.tolist() == slow_mask(text, start, stop, tokenizer).tolist()
    assert mask.sum() > 1
    assert (parts_of("react", "thought", tokenizer).counted(ids) == ~mask).all()


def test_of_a_step_without_an_action_all_is_the_action_and_nothing_the_thought():
    ids = written(LOST)
    assert parts_of(part="action").counted(ids).all()
    assert not parts_of(part="thought").counted(ids).any()


def test_a_step_that_was_cut_off_has_no_end_to_count():
    ids = written(EAST)[:-1]
    mask = parts_of(part="action").counted(ids)
    assert TOKENIZER.decode(ids[mask]).strip() == "go east"
    assert parts_of(part="action").counted(np.zeros(0, np.int32)).shape == (0,)


# ------------------------------------------------------------------ which steps are the same


def compared(own: list[str], tried: list[list[str]], parts: StepParts, **fields) -> Comparison:
    branches = [[written(text) for text in step] for step in tried]
    trunk = encode(trajectory(*own), TOKENIZER)
    return parts.told([Comparison(trunk, branches, expert_trunk=True, **fields)])[0]


TRIED = [[EAST, MUSED, WEST, LOST], [MUSED, LOST]]


def test_steps_with_one_action_are_the_same_whatever_they_think():
    one = compared([EAST, WEST], TRIED, parts_of())
    assert one.action_ids.tolist() == [0, 0, 0, 1, -1, 1, 0, -1]
    _, steps = pack_with_steps([one], 4096)
    assert steps.same_P.tolist() == [True, True, False, False, False, False]
    rewards_S = torch.arange(8.0)
    figures = reward_figures(rewards_S, steps)
    assert len(figures["reward_accuracy"]) == 4  # of the pairs that differ
    assert sides(torch.zeros(len(steps.expert_S.repeat_interleave(steps.offsets.diff()))), steps)[
        "identical_pairs"
    ].mean() == pytest.approx(2 / 6)


def test_a_step_without_an_action_equals_the_same_tokens_alone():
    one = compared([LOST], [[LOST, "Thought: it is east.", EAST]], parts_of())
    assert pack_with_steps([one], 4096)[1].same_P.tolist() == [True, False, False]


def test_in_the_plain_format_steps_are_compared_by_their_tokens():
    given = Comparison(encode(trajectory(EAST), TOKENIZER), [[written(MUSED)]], expert_trunk=True)
    (one,) = parts_of("plain").told([given])
    assert one is given
    _, steps = pack_with_steps([one], 4096)
    assert (steps.same_P.tolist(), steps.counted_N) == ([False], None)


def test_comparisons_that_know_their_actions_share_a_batch_with_those_that_do_not():
    told = compared([EAST, WEST], TRIED, parts_of(part="action"))
    bare = Comparison(told.trunk, told.branches, expert_trunk=True)
    _, steps = pack_with_steps([bare, told], 4096)
    assert steps.same_P.tolist() == [True, *[False] * 5, True, True, *[False] * 4]
    assert steps.counted_N.sum() == sum(map(len, bare.step_tokens())) + told.counted.sum()


def test_what_is_known_of_actions_survives_the_file_and_old_files_are_read(tmp_path):
    given = [
        compared([EAST, WEST], TRIED, parts_of(part="action")),
        compared([EAST], [[]], parts_of()),
    ]
    path = tmp_path / "cycle.safetensors"
    save_comparisons(path, given, {"cycle": 1})
    for one, back in zip(given, load_comparisons(path)[0], strict=True):
        for name in PARTS:
            assert np.array_equal(getattr(one, name), getattr(back, name))
            assert getattr(one, name).dtype == getattr(back, name).dtype
    old = {n: a for n, a in load_file(path).items() if not n.startswith(PARTS)}
    save_file(old, path, metadata={"progress": "{}"})
    assert all(len(getattr(c, name)) == 0 for c in load_comparisons(path)[0] for name in PARTS)


# ------------------------------------------------------------------ losses


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=len(TOKENIZER), max_position_embeddings=1024)


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
            "learning_rate": 2e-3,
            "seed": 3,
            "action_format": "react",
            "cycles": 2,
        }
        return StepAgentConfig(**defaults | options)

    return make


def of_action(text: str) -> np.ndarray:
    """(n,) by hand: from the token in which the action begins to the end of the turn."""
    start = text.index("Action: ") + len("Action: ") if "Action: " in text else 0
    return slow_mask(text, start, len(text), byte_level_bpe(trim_offsets=False))


def by_hand(model, own: list[str], tried: list[list[str]], part: str) -> list[torch.Tensor]:
    """The log-probs that count of each step, each in a forward of its own."""
    trunk = encode(trajectory(*own), TOKENIZER)
    branches = [[written(text) for text in step] for step in tried]
    texts = [text for one, step in zip(own, tried, strict=True) for text in (one, *step)]
    masks = [of_action(text) for text in texts]
    logps = separate_logprobs(model, [trunk], [branches]).split([len(m) for m in masks])
    return [
        v[torch.from_numpy(m if part == "action" else ~m)]
        for v, m in zip(logps, masks, strict=True)
    ]


def batch_of(one: Comparison, logps: torch.Tensor, scores: dict[str, torch.Tensor]) -> Batch:
    _, steps = pack_with_steps([one], 4096)
    scores = {"advantages": torch.zeros(0), "old_logps": torch.zeros(0)} | scores
    return Batch.of(logps, None, scores, steps, steps.counts())


@pytest.mark.parametrize("part", ["action", "thought"])
def test_the_implicit_loss_covers_exactly_the_tokens_of_a_part(config, model, part):
    policy, old = deepcopy(model).double(), tiny_model(
        "llama", seed=1, vocab_size=len(TOKENIZER), max_position_embeddings=1024
    ).double()  # fmt: skip
    own, tried = [EAST, WEST], TRIED
    one = compared(own, tried, parts_of(part=part))
    logps, refs = (separate_logprobs(m, [one.trunk], [one.branches]) for m in (policy, old))
    args = config(scored_part=part, beta=0.7, sft_weight=0.3)
    found, figures = method_of(args).loss(batch_of(one, logps, {"ref_logps": refs}))

    rewards = [
        0.7 * (p.sum() - r.sum())
        for p, r in zip(
            by_hand(policy, own, tried, part), by_hand(old, own, tried, part), strict=True
        )
    ]
    pairs = [(0, 1), (0, 2), (0, 3), (0, 4), (5, 6), (5, 7)]
    slow = reference.implicit_step_loss(
        torch.stack([rewards[e] for e, _ in pairs]), torch.stack([rewards[a] for _, a in pairs])
    ).mean()
    expert = torch.cat([by_hand(policy, own, tried, part)[s] for s in (0, 5)])
    slow = slow - 0.3 * expert.mean()
    assert torch.allclose(found, slow, rtol=1e-12)
    assert figures["expert_length"].tolist() == [
        (of_action(text) if part == "action" else ~of_action(text)).sum() for text in own
    ]


def test_the_parts_of_the_nll_add_up(config, model):
    policy = deepcopy(model).double()
    sums = {}
    for part in ("all", "action", "thought"):
        one = parts_of(part=part).told(
            [Comparison.demonstration(encode(trajectory(EAST, WEST), TOKENIZER))]
        )[0]
        logps = separate_logprobs(policy, [one.trunk], [one.branches])
        batch = batch_of(one, logps, {"ref_logps": torch.zeros(0)})
        loss, _ = method_of(config(scored_part=part, method="sft")).loss(batch)
        sums[part] = loss * batch.total.expert_tokens
    assert torch.allclose(sums["all"], sums["action"] + sums["thought"], rtol=1e-12)
    assert sums["action"] < sums["all"]


def test_ppo_s_ratios_are_of_the_action_s_tokens(config, model):
    policy = deepcopy(model).double()
    own, tried = [EAST], [[MUSED, LOST]]
    one = compared(own, tried, parts_of(part="action"))
    logps = separate_logprobs(policy, [one.trunk], [one.branches])
    old = logps.detach() - 0.01
    advantages = torch.tensor([0.0, 1.5, -2.0], dtype=torch.float64)
    scores = {"ref_logps": old, "old_logps": old, "advantages": advantages}
    args = config(method="inverse", scored_part="action", clip=9.0)
    found, _ = method_of(args).loss(batch_of(one, logps, scores))
    counts = [of_action(MUSED).sum(), of_action(LOST).sum()]
    slow = -np.mean([np.exp(0.01 * n) * a for n, a in zip(counts, [1.5, -2.0], strict=True)])
    assert found.item() == pytest.approx(slow, rel=1e-9)


def test_the_trainer_s_loss_leaves_the_thought_out(config, model):
    rows = [trajectory(EAST, WEST)]
    args = config(method="sft", scored_part="action")
    made = StepAgentTrainer(deepcopy(model), args, rows, TOKENIZER)
    made.begin_epoch(0)
    batch = made._collate(list(made.train_dataset.items))
    loss = made.compute_loss(made.model, batch)
    logps = torch.cat(by_hand(model, [EAST, WEST], [[], []], "action"))
    assert loss.item() == pytest.approx(-logps.mean().item(), rel=1e-5)


# ------------------------------------------------------------------ what a discriminator reads


def judged(model, args, one: Comparison) -> torch.Tensor:
    reflection = InverseReflection(model, args, parts=parts_of())
    with torch.no_grad():
        for head in reflection.critic.discriminators:
            torch.nn.init.normal_(head[2].weight, generator=torch.Generator().manual_seed(5))
    tokens = sum(map(len, one.step_tokens()))
    one = replace(one, old_logps=np.full(tokens, -1, np.float32))
    return reflection._judge([one], pack_with_steps([one], 4096)[1])[0][0]


def test_a_discriminator_s_logits_do_not_change_with_the_thought(config, model):
    args = config(method="inverse")
    logits = judged(model, args, compared([EAST], [[EAST, MUSED, WEST, LOST]], parts_of()))
    assert logits[0] == logits[1] == logits[2]  # go east, however it came to it
    assert len(set(logits.tolist())) == 3
    other = "Thought: hm.\nAction: go east"
    again = judged(model, args, compared([other], [[other, EAST, WEST, LOST]], parts_of()))
    assert torch.allclose(again, logits, rtol=0, atol=1e-6)


def test_a_discriminator_reads_state_and_action_as_in_a_sequence_of_its_own(config, model):
    """The slow way: the state, and then the action alone as the format writes it."""
    from stepagent.models import hidden_states

    args = config(method="inverse")
    one = compared([EAST, WEST], [[WEST], [LOST]], parts_of())
    reflection = InverseReflection(model, args, parts=parts_of())
    seen = reflection._seen([one])
    reading = reflection._read(seen)
    alone = ["Action: go east", "Action: go west", "Action: go west", LOST]
    for s, (text, t) in enumerate(zip(alone, (0, 0, 1, 1), strict=True)):
        state = one.trunk.input_ids[: one.trunk.action_spans[t, 0]]
        ids = torch.tensor([*state.tolist(), *TOKENIZER.encode(text), parts_of().ends[0]])[None]
        row = hidden_states(reflection.critic.body, input_ids=ids, use_cache=False)[0, -1]
        assert torch.allclose(reading.action_SH[s], row, atol=1e-4)
        before = hidden_states(reflection.critic.body, input_ids=ids, use_cache=False)[
            0, len(state) - 1
        ]
        assert torch.allclose(reading.state_SH[s], before, atol=1e-4)


def scored(model, one: Comparison) -> Comparison:
    with torch.no_grad():
        logps = separate_logprobs(model, [one.trunk], [one.branches]).numpy()
    return replace(one, ref_logps=logps, old_logps=logps)


def test_where_all_actions_are_the_expert_s_nothing_is_to_correct(config, model):
    args = config(method="inverse", critic_epochs=1)
    reflection = InverseReflection(model, args, parts=parts_of())
    ((same,), _) = reflection.prepare(
        [scored(model, compared([EAST], [[EAST, MUSED]], parts_of()))], 0
    )
    assert not same.advantages.any()
    ((other,), _) = reflection.prepare(
        [scored(model, compared([EAST], [[MUSED, WEST]], parts_of()))], 1
    )
    assert other.advantages[1:].any()


def test_a_discriminator_cannot_learn_the_style_of_thoughts(config, model):
    """Sides that differ in the thought alone stay even, where whole texts are told apart."""
    styles = [
        "Thought: hm, so I think.\nAction: go east",
        "Thought: well, I guess.\nAction: go east",
    ]
    cycle = [scored(model, compared([styles[0]], [[styles[1]]], parts_of())) for _ in range(2)]
    args = config(method="inverse", critic_epochs=20, critic_learning_rate=1e-3)
    apart = InverseReflection(model, args, parts=parts_of()).prepare(cycle, 0)[1]
    whole = InverseReflection(model, args).prepare(cycle, 0)[1]
    assert (apart["discriminator_accuracy"], whole["discriminator_accuracy"]) == (0.5, 1.0)
    assert apart["discriminator_loss"] == pytest.approx(2 * np.log(2), abs=1e-3)


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def learnt(model, tmp_path_factory):
    """A model that writes thought and action."""
    args = StepAgentConfig(
        output_dir=str(tmp_path_factory.mktemp("sft")), use_cpu=True, report_to=[], seed=1,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", method="sft",
        num_train_epochs=80, learning_rate=1e-2, per_device_train_batch_size=4,
    )  # fmt: skip
    made = StepAgentTrainer(deepcopy(model), args, ROWS, TOKENIZER)
    made.train()
    return made.model


ROWS = [trajectory(a, b) for a in (EAST, WEST) for b in (WEST, MUSED)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["implicit", "inverse"])
def test_a_run_on_actions_resumes_as_if_it_had_not_stopped(config, learnt, tmp_path, method):
    options = {"method": method, "scored_part": "action", "samples": 2, "save_strategy": "steps"}
    if method == "inverse":
        options["critic_epochs"] = 2

    def make(folder):
        args = config(**options, save_steps=1, output_dir=str(tmp_path / folder))
        return StepAgentTrainer(deepcopy(learnt), args, ROWS, TOKENIZER, eval_dataset=ROWS[:1])

    whole = make("whole")
    whole.train()
    cycles = [entry for entry in whole.state.log_history if "cycle" in entry]
    assert all(0 < entry["identical_pairs"] < 1 for entry in cycles)
    assert all(entry["identical_pairs"] >= entry["identical_actions"] for entry in cycles)
    for step in (1, 3):
        again = make(f"again{step}")
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
        metrics = [made.evaluate() for made in (whole, again)]
        for name, value in metrics[0].items():
            assert metrics[1][name] == value or name.endswith(("runtime", "per_second"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dagger", "implicit", "inverse"])
def test_at_the_agent_s_states_the_expert_s_answers_count_as_actions(config, model, method):
    """The agent writes no action here: all of its text counts, of the answers the action alone."""
    options = {"states": "agent", "rollouts": 2, "max_steps_per_episode": 2, "cycles": 1}
    if method == "inverse":
        options["critic_epochs"] = 1
    args = config(method=method, scored_part="action", max_new_tokens=6, **options)
    made = StepAgentTrainer(deepcopy(model), args, ROWS, TOKENIZER, env="babyai:GoToLocalS6N2")
    made.train()
    for one in made._comparisons[-2:]:
        steps = one.step_tokens()
        of_steps = np.split(one.counted, np.cumsum([*map(len, steps)])[:-1])
        for ids, number, mask in zip(steps, one.action_ids, of_steps, strict=True):
            said = TOKENIZER.decode(ids[mask][:-1] if number >= 0 else ids[mask]).strip()
            whole = TOKENIZER.decode(ids).strip()
            assert said == whole if number < 0 else whole == f"Action: {said}<|im_end|>"
        assert (one.action_ids >= 0).any()


# ------------------------------------------------------------------ bad input


def test_a_part_of_plain_texts_is_refused(config):
    with pytest.raises(ValueError, match=r"scored_part='action' needs an action_format that tells "
                                         r"thought from action, got 'plain'"):  # fmt: skip
        config(scored_part="action", action_format="plain")
    with pytest.raises(ValueError, match="scored_part must be one of"):
        config(scored_part="actions")


def test_thoughts_without_an_action_are_refused_before_any_work(config, model):
    good, bad = trajectory(EAST), trajectory(EAST, LOST)
    message = (
        r"must hold an action in action_format='react', "
        r"got 'Thought: the apple is east\.' \(no action\)"
    )
    args = config(method="sft")
    with pytest.raises(ValueError, match=r"train_dataset\[1\], step 1, " + message):
        StepAgentTrainer(model, args, [good, bad], TOKENIZER)
    with pytest.raises(ValueError, match=r"eval_dataset\[0\], step 1, " + message):
        StepAgentTrainer(model, args, [good], TOKENIZER, eval_dataset=[bad])
