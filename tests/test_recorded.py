"""Records that hold what was sampled: their ids are used as they are, or refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tiny_tokenizers import CHATML, GEMMA, LLAMA2, byte_level_bpe, metaspace_bpe, word_level
from tokenizers import normalizers
from transformers import AutoTokenizer

from stepagent import Trajectory, encode, load_trajectories, save_trajectories
from stepagent.records.episodes import Episode

MADE = "made_with"


def sampled(tokenizer, *, end=True):
    """A dialogue as a rollout grows it: actions in tokens that no tokenizer would choose."""
    messages, ids, spans, actions = [], [], [], ["go to kitchen", "take apple"]
    for observation, action in zip(["You see a mug.", "On the table."], actions, strict=True):
        messages.append({"role": "user", "content": observation})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        seen = tokenizer.decode(ids)
        ids += tokenizer(text[len(seen) :], add_special_tokens=False).input_ids
        start = len(ids)
        for character in action:
            ids += tokenizer(character, add_special_tokens=False).input_ids
        if end:
            ids += [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        spans.append([start, len(ids)])
        messages.append({"role": "assistant", "content": action})
    return Trajectory(messages, id="t", meta={"token_ids": ids, "action_spans": spans})


def test_recorded_ids_are_used_as_sampled_also_after_a_file(tmp_path):
    tokenizer = byte_level_bpe(CHATML)
    record = sampled(tokenizer)
    save_trajectories(tmp_path / "records.jsonl", [record])
    (loaded,) = load_trajectories(tmp_path / "records.jsonl")
    for trajectory in (record, loaded):
        trunk = encode(trajectory, tokenizer)
        assert trunk.input_ids.tolist() == record.meta["token_ids"]
        assert trunk.action_spans.tolist() == record.meta["action_spans"]
    anew = encode(Trajectory(record.messages), tokenizer)
    assert len(anew.input_ids) < len(trunk.input_ids)  # so the test can fail


def test_an_action_that_was_cut_short_gets_no_end_token():
    tokenizer = byte_level_bpe(CHATML)
    record = sampled(tokenizer)
    start, stop = record.meta["action_spans"][-1]
    record.meta["token_ids"] = record.meta["token_ids"][: stop - 3]
    record.meta["action_spans"][-1] = [start, stop - 3]
    record.messages[-1]["content"] = "take app"
    trunk = encode(record, tokenizer)
    assert tokenizer.decode(trunk.input_ids[start:]) == "take app"


def test_a_loss_flag_takes_the_span_of_its_message():
    tokenizer = byte_level_bpe(CHATML)
    record = sampled(tokenizer)
    off = [{**m, "loss": False} if i == 1 else m for i, m in enumerate(record.messages)]
    trunk = encode(Trajectory(off, meta=record.meta), tokenizer)
    assert trunk.action_spans.tolist() == record.meta["action_spans"][1:]
    alone = {**record.meta, "action_spans": record.meta["action_spans"][1:]}
    assert encode(Trajectory(off, meta=alone), tokenizer).action_spans.tolist() == (
        trunk.action_spans.tolist()
    )


@pytest.mark.parametrize(
    ("tokenizer", "match"),
    [
        (byte_level_bpe(GEMMA), "but the chat template writes '<bos><start_of_turn>user"),
        (metaspace_bpe(CHATML), "made with another tokenizer, template or tools; use the model"),
        (word_level(CHATML), "is none of the tokenizer's|made with another tokenizer"),
        (byte_level_bpe(CHATML.replace("message['role']", "message['role'] | upper")), "template"),
    ],
)
def test_a_record_of_another_tokenizer_or_template_is_refused(tokenizer, match):
    with pytest.raises(ValueError, match=f"(?s)trajectory 't': .*({match})"):
        encode(sampled(byte_level_bpe(CHATML)), tokenizer)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_message_that_was_changed_since_is_refused(index):
    record = sampled(byte_level_bpe(CHATML))
    messages = copy.deepcopy(record.messages)
    messages[index]["content"] += " now"
    match = "the recorded tokens (of messages|before the first action)"
    with pytest.raises(ValueError, match=match):
        encode(Trajectory(messages, meta=record.meta), byte_level_bpe(CHATML))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"action_spans": [[9, 12]]},
            "action_spans in meta must be one for each of the 2 .*, got 1",
        ),
        ({"action_spans": []}, "must be"),
        ({"token_ids": ["a"]}, "token_ids|input_ids"),
        ({"token_ids": []}, "must"),
    ],
)
def test_a_record_that_does_not_fit_its_messages_is_refused(change, match):
    record = sampled(byte_level_bpe(CHATML))
    broken = Trajectory(record.messages, id="t", meta=record.meta | change)
    with pytest.raises((TypeError, ValueError), match=match):
        encode(broken, byte_level_bpe(CHATML))


def test_a_date_that_the_template_writes_is_that_of_the_record():
    dated = "{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' -}}" + CHATML
    then = byte_level_bpe(dated.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"))
    record = sampled(then)
    trunk = encode(record, byte_level_bpe(dated))
    assert trunk.input_ids.tolist() == record.meta["token_ids"]


def test_thoughts_and_calls_must_be_in_the_recorded_tokens():
    tokenizer = byte_level_bpe(CHATML)
    record = sampled(tokenizer)
    call = {"type": "function", "function": {"name": "take", "arguments": {"what": "apple"}}}
    last = {"role": "assistant", "content": "", "tool_calls": [call]}
    trunk = encode(Trajectory([*record.messages[:3], last], meta=record.meta), tokenizer)
    assert trunk.input_ids.tolist() == record.meta["token_ids"]
    for wrong in (
        {**last, "reasoning_content": "the apple is red"},
        {**last, "tool_calls": [{"function": {"name": "open", "arguments": {}}}]},
    ):
        with pytest.raises(ValueError, match=r"messages\[3\] read as"):
            encode(Trajectory([*record.messages[:3], wrong], meta=record.meta), tokenizer)


def test_a_tokenizer_that_drops_spaces_when_decoding_reads_its_own_records():
    tokenizer = metaspace_bpe(LLAMA2)
    plain = encode(
        Trajectory([{"role": "user", "content": "go?"}, {"role": "assistant", "content": "go"}]),
        tokenizer,
    )
    meta = {
        "token_ids": plain.input_ids.tolist(),
        "action_spans": plain.action_spans.tolist(),
    }
    messages = [{"role": "user", "content": "go?"}, {"role": "assistant", "content": "go"}]
    again = encode(Trajectory(messages, meta=meta), tokenizer)
    assert np.array_equal(again.input_ids, plain.input_ids)


def test_what_a_rollout_records_is_what_is_trained(tmp_path):
    pytest.importorskip("minigrid")
    from tiny_models import END, babyai_tokenizer, tiny_agent

    from stepagent.acting.policies import ModelPolicy
    from stepagent.acting.rollout import run_episodes

    tokenizer = babyai_tokenizer()
    policy = ModelPolicy(tiny_agent(), tokenizer, max_new_tokens=4, eos_token_id=END)
    episodes = run_episodes("babyai:GoToLocalS6N2", policy, [3, 1, 4], max_steps=3)
    save_trajectories(tmp_path / "e.jsonl", [episode.trajectory() for episode in episodes])
    for episode, trajectory in zip(episodes, load_trajectories(tmp_path / "e.jsonl"), strict=True):
        trunk = encode(trajectory, tokenizer)
        assert np.array_equal(trunk.input_ids, episode.trunk.input_ids)
        assert np.array_equal(trunk.action_spans, episode.trunk.action_spans)


# ------------------------------------------------------------------ what a record says of itself


def rolled_out(template):
    """The record of a rollout of a tiny model under a template, with its tokenizer."""
    from tiny_models import tiny_model

    from stepagent.acting.policies import ModelPolicy
    from stepagent.acting.rollout import run_episodes

    tokenizer = byte_level_bpe(template)
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy = ModelPolicy(model, tokenizer, max_new_tokens=5, eos_token_id=end)
    (episode,) = run_episodes(Rooms, policy, [0])
    return episode.trajectory(), tokenizer


class Rooms:
    """Four rooms, whatever is done."""

    name, max_steps, actions = "rooms", 4, ()

    def reset(self, seed):
        self._steps = 0
        return "You are in room 0.", {"valid": True, "success": False, "progress": 0.0}

    def step(self, action):
        self._steps += 1
        info = {"valid": True, "success": False, "progress": 0.0}
        return f"You are in room {self._steps}.", 0.0, False, self._steps >= 4, info

    def expert_action(self):
        return "go"

    def close(self):
        pass


# What an agent says is written in capitals once it is history.
LOUD = CHATML.replace(
    "message['content'] +",
    "(message['content'] if loop.last or message['role'] == 'user' else 'then') +",
)


def test_a_rollout_says_what_its_ids_were_made_with_and_another_is_refused_by_name():
    record, tokenizer = rolled_out(CHATML)
    assert record.meta["made_with"].keys() == {"tokenizer", "chat_template"}
    assert Episode.of(record).trajectory().meta == record.meta
    assert encode(record, tokenizer).input_ids.tolist() == record.meta["token_ids"]
    same_text = byte_level_bpe(CHATML + "{#- the same text -#}")
    with pytest.raises(ValueError, match="they were made with another chat_template; use the mod"):
        encode(record, same_text)
    other = byte_level_bpe(CHATML)
    other.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ValueError, match="they were made with another tokenizer; use the model"):
        encode(record, other)
    old = Trajectory(record.messages, meta={k: v for k, v in record.meta.items() if k != MADE})
    for reader in (same_text, other):  # an old record is read where it decodes alike
        assert encode(old, reader).input_ids.tolist() == record.meta["token_ids"]


def test_a_copy_from_disk_and_a_token_for_padding_are_the_same_tokenizer(tmp_path):
    record, tokenizer = rolled_out(CHATML)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.add_special_tokens({"pad_token": "<pad>"})
    loaded(["a", "a b c"], padding=True, truncation=True, max_length=5)
    assert encode(record, loaded).input_ids.tolist() == record.meta["token_ids"]


def test_every_state_of_a_record_with_rewinds_is_compared_with_its_own_prompt():
    record, tokenizer = rolled_out(LOUD)
    trunk = encode(record, tokenizer)
    assert len(trunk.rewinds) == 3
    assert trunk.input_ids.tolist() == record.meta["token_ids"]
    ids, then = record.meta["token_ids"], tokenizer("then").input_ids
    place = next(i for i in range(len(ids)) if ids[i : i + len(then)] == then)
    changed = [*ids[:place], *reversed(then), *ids[place + len(then) :]]
    with pytest.raises(ValueError, match=r"recorded tokens before messages\[3\] read as"):
        encode(with_meta(record, token_ids=changed), tokenizer)  # no message, no action is another
    for depth in (1, 2, 3):
        rewinds = [list(pair) for pair in record.meta["rewinds"]]
        rewinds[-1][1] -= depth
        match = r"before messages\[7\] (read as|must be those of the prompt)"
        with pytest.raises(ValueError, match=match):
            encode(with_meta(record, rewinds=rewinds), tokenizer)


def with_meta(record, **changes):
    return Trajectory(record.messages, meta=record.meta | changes)


def test_a_record_with_a_clock_is_read_another_day():
    dated = "{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' -}}" + CHATML
    record, tokenizer = rolled_out(dated)
    assert record.chat_template_kwargs.keys() == {"strftime_now"}
    assert encode(record, tokenizer).input_ids.tolist() == record.meta["token_ids"]
