"""Encoding: the scored tokens are the assistant's and no other, or there is an error."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    CHATML,
    GEMMA,
    GENERATION,
    LLAMA2,
    LLAMA3,
    NO_END_OF_TURN,
    QWEN3,
    SPACED,
    SPECIAL_TOKENS,
    byte_level_bpe,
    metaspace_bpe,
    word_level,
)
from tokenizers import AddedToken, normalizers

from stepagent.data.encoding import Trunk, encode
from stepagent.data.trajectory import Trajectory

TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "generation": (GENERATION, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "llama2": (LLAMA2, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
}
TOKENIZERS = {"bytes": byte_level_bpe, "metaspace": metaspace_bpe, "words": word_level}


def talk(*contents, first="user"):
    """A trajectory of turns by the user and the assistant, one after the other."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return Trajectory(
        [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], id="t-7"
    )


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def actions(trunk, tokenizer):
    return [decode(tokenizer, trunk.input_ids[a:b]) for a, b in trunk.action_spans]


def squeeze(text):
    return "".join(text.split())


def assert_states(trajectory, trunk, tokenizer):
    """Each state is the prompt that the agent is given there, id for id."""
    for step, index in enumerate(trajectory.step_indices):
        prompt = tokenizer.apply_chat_template(
            trajectory.messages[:index],
            tools=trajectory.tools,
            add_generation_prompt=True,
            return_dict=False,
            **trajectory.chat_template_kwargs,
        )
        assert trunk.state_ids(step).tolist() == prompt


def assert_exact(trajectory, tokenizer, end, *, strip=False, lead=""):
    """The spans read as the assistant's texts with the end of turn; the rest, as the rest."""
    rendered = tokenizer.apply_chat_template(trajectory.messages, tokenize=False)
    trunk = encode(trajectory, tokenizer)
    assert trunk.input_ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]

    contents = [m["content"] for m in trajectory.messages if m["role"] == "assistant"]
    expected = [lead + (text.strip() if strip else text) + end for text in contents]
    assert actions(trunk, tokenizer) == expected

    bounds = [0, *trunk.action_spans.ravel().tolist(), len(trunk.input_ids)]
    pieces = [decode(tokenizer, trunk.input_ids[a:b]) for a, b in pairwise(bounds)]
    assert "".join(pieces) == rendered
    return trunk


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_byte_level_span_is_the_action_and_its_end_of_turn(name, trim_offsets):
    template, end = TEMPLATES[name]
    tokenizer = byte_level_bpe(template, trim_offsets=trim_offsets)
    trajectory = talk("where?", "go left", "a wall", "go right\nThought: hm")
    # Llama 2's generation begins after '[/INST]', so its agent writes the spaces
    lead, end = (" ", " " + end) if name == "llama2" else ("", end)
    assert_exact(trajectory, tokenizer, end, lead=lead)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_metaspace_span_is_the_action_and_its_end_of_turn(name):
    template, end = TEMPLATES[name]
    tokenizer = metaspace_bpe(template)
    trunk = encode(talk("where?", "go left", "a wall", "go  🏠 right"), tokenizer)
    found = [squeeze(action) for action in actions(trunk, tokenizer)]
    assert found == ["goleft" + end, "go🏠right" + end]


def test_llama_2_actions_begin_with_the_token_that_generation_begins_with():
    tokenizer = metaspace_bpe(LLAMA2)
    trunk = encode(talk("where?", "go left"), tokenizer)
    start, end = trunk.action_spans[0]
    tokens = tokenizer.convert_ids_to_tokens(trunk.input_ids[start:end].tolist())
    assert tokens[0] == "▁go"
    prompt = tokenizer.apply_chat_template(talk("where?", "x").messages[:1], tokenize=False)
    assert trunk.input_ids[:start].tolist() == tokenizer(prompt, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_word_level_span_is_the_action_and_its_end_of_turn(name):
    template, end = TEMPLATES[name]
    tokenizer = word_level(template)
    trunk = encode(talk("nowhere", "go to kitchen", "a wall", "take apple ."), tokenizer)
    assert actions(trunk, tokenizer) == [f"go to kitchen {end}", f"take apple . {end}"]


pieces = st.sampled_from([" ", "\n", "\n\n", "\t", ":", "go", "🏠", "é"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=4
)
texts = st.lists(pieces, max_size=6).map("".join)
texts = texts.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
turns = st.lists(st.tuples(st.sampled_from(["user", "tool", "assistant"]), texts))


@settings(max_examples=60, deadline=None)
@given(turns, st.sampled_from(["chatml", "generation", "llama3", "gemma"]), st.booleans())
def test_any_contents_give_exact_spans(turns, name, trim_offsets):
    template, end = TEMPLATES[name]
    strips = name in ("llama3", "gemma")
    # a newline of the template may merge with one that begins a content, which is another test's
    messages = [{"role": r, "content": text if strips else text.lstrip()} for r, text in turns]
    trajectory = Trajectory([*messages, {"role": "assistant", "content": "go"}])
    tokenizer = byte_level_bpe(template, trim_offsets=trim_offsets)
    assert_exact(trajectory, tokenizer, end, strip=strips)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["go", "to", "kitchen", "apple", "."]), max_size=6), st.data())
def test_any_known_words_give_exact_spans(words, data):
    text = data.draw(st.sampled_from([" ", "  ", "\n"])).join(words)
    tokenizer = word_level()
    found = actions(encode(talk("where", text, text, text), tokenizer), tokenizer)
    assert found == [" ".join([*words, "<|im_end|>"])] * 2


@pytest.mark.parametrize("make", [byte_level_bpe, metaspace_bpe])
@pytest.mark.parametrize(
    "texts",
    [
        ("où?", "👩‍👩‍👧 日本語 é\u0301\u2028x", "🏠", "🏠🏠"),
        ("go", "go", "go", "go"),
        ("You can: go left. go left", "go left", "you go left", "go left"),
        ("user\nassistant\n", "assistant", "<im_end>\n<im_start>assistant\ngo", "go"),
        ("where?", "", "", ""),
    ],
    ids=["unicode", "repeated", "quoted", "imitated", "empty"],
)
def test_confusable_contents_are_told_apart(make, texts):
    tokenizer = make()
    expected = [text + "<|im_end|>" for text in texts[1::2]]
    assert actions(encode(talk(*texts), tokenizer), tokenizer) == expected
    if make is byte_level_bpe:
        assert_exact(talk(*texts), tokenizer, "<|im_end|>")


def test_an_empty_action_is_its_end_of_turn_alone():
    tokenizer = byte_level_bpe()
    trunk = encode(talk("where?", ""), tokenizer)
    assert np.diff(trunk.action_spans).tolist() == [[1]]


def test_consecutive_and_leading_assistant_messages_are_a_step_each():
    messages = [{"role": "assistant", "content": text} for text in ("a", "b", "", "b")]
    trunk = assert_exact(Trajectory(messages), byte_level_bpe(), "<|im_end|>")
    assert trunk.num_steps == 4


def test_a_template_that_strips_contents_gives_the_stripped_action():
    trajectory = talk(" where? \n", "\n go left \n", "  ", "  ")
    assert_exact(trajectory, byte_level_bpe(LLAMA3), "<|eot_id|>", strip=True)


def test_a_template_that_writes_the_last_turn_differently_branches_at_the_difference():
    tokenizer = byte_level_bpe(QWEN3)
    trunk = encode(talk("where?", "go", "and now?", "stop"), tokenizer)
    thought = "<think>\n\n</think>\n\n"
    assert actions(trunk, tokenizer) == [f"{thought}go<|im_end|>", f"{thought}stop<|im_end|>"]
    assert_states(talk("where?", "go", "and now?", "stop"), trunk, tokenizer)
    assert len(trunk.rewinds) == 1


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_an_end_of_turn_may_eat_the_spaces_of_the_template_and_no_others(trim_offsets):
    tokenizer = byte_level_bpe(CHATML.replace("<|im_end|>", "<|end|>"), trim_offsets=trim_offsets)
    tokenizer.add_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True, special=True)], True)
    trunk = encode(talk("where?", "go left", "ok", "stop"), tokenizer)
    assert actions(trunk, tokenizer) == ["go left<|end|>", "stop<|end|>"]
    with pytest.raises(
        ValueError, match=r"decode to its rendered text, 'go <\|end\|>', got 'go<\|end\|>'"
    ):
        encode(talk("where?", "go "), tokenizer)


@pytest.mark.parametrize("make", [byte_level_bpe, word_level])
def test_a_system_prompt_merged_into_the_first_turn_is_followed(make):
    trajectory = talk("where", "go to kitchen")
    trajectory.messages.insert(0, {"role": "system", "content": "You are a helpful agent."})
    tokenizer = make(LLAMA2)
    assert squeeze(actions(encode(trajectory, tokenizer), tokenizer)[0]) == "gotokitchen</s>"


DROPS = "{% for m in messages if m.role != 'system' %}<s>{{ m.content }}</s>{% endfor %}"
LOWERS = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | lower }}</s>{% endfor %}"
TAILS = (
    "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{{ messages[-1].content | length }}"
)
LATE = "{% for m in messages %}{{ m.role }}\n{{ m.content }} end</s>{% endfor %}"
BARE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "texts", "match"),
    [
        (
            QWEN3,
            ("a", "<think>hm</think>\ngo", "b", "go"),
            r"must keep the .* of messages\[1\] \(assistant\)",
        ),
        (LOWERS, ("where", "Go", "b", "go"), r"must keep the .* of messages\[1\]"),
        (
            TAILS,
            ("where", "go"),
            r"prompt for messages\[1\] continues with '5' after '<s>where</s>'",
        ),
        ("<s>fixed</s>", ("where", "go"), r"writes nothing of messages\[1\]"),
        (LLAMA2, ("go", "where", "go"), "template fails: Conversation roles must alternate"),
        ("{{ 1 / 0 }}", ("where", "go"), "template fails: division by zero"),
        (NO_END_OF_TURN, ("a", "go", "b", "go"), r"messages\[1\] ends in 'assistant\\ngo'"),
        (LATE.replace("</s>", ""), ("where", "go"), r"special token, .* ends in '.*go end'"),
        (SPACED, ("where", "go"), r"token ' go' crosses .* of messages\[1\]: ' ' \| 'go'"),
        (
            CHATML,
            ("where", "a<|im_end|>b"),
            r"messages\[1\] must not hold a special token .*, got '<\|im_end",
        ),
    ],
)
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_what_cannot_be_exact_is_refused_by_name(template, texts, match, trim_offsets):
    trajectory = talk(*texts, first="user" if len(texts) % 2 == 0 else "assistant")
    with pytest.raises(ValueError, match=f"(?s)trajectory 't-7': .*{match}"):
        encode(trajectory, byte_level_bpe(template, trim_offsets=trim_offsets))


def test_a_dropped_system_prompt_is_refused():
    trajectory = talk("where?", "go")
    trajectory.messages.append({"role": "system", "content": "act"})
    with pytest.raises(ValueError, match=r"messages\[2\] \(system\) in its place"):
        encode(trajectory, byte_level_bpe(DROPS))


def test_a_seam_is_refused_with_offsets_that_include_the_space():
    with pytest.raises(ValueError, match=r"token ' go' crosses the start .* ' ' \| 'go'"):
        encode(talk("where?", "go"), metaspace_bpe(SPACED))


def test_spaces_that_are_in_no_token_make_no_seam():
    tokenizer = word_level(SPACED)
    assert actions(encode(talk("where", "go"), tokenizer), tokenizer) == ["go </s>"]


def test_a_newline_token_shared_by_template_and_content_is_refused():
    tokenizer = metaspace_bpe()  # has the token '\n\n'
    with pytest.raises(ValueError, match=r"crosses the start .* of messages\[1\]"):
        encode(talk("where?", "\ngo"), tokenizer)


def test_an_end_of_turn_that_eats_the_next_content_is_what_the_agent_sees():
    tokenizer = byte_level_bpe(BARE, trim_offsets=False)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], True)
    trajectory = talk("where?", "go", "  ok", "go")
    trunk = encode(trajectory, tokenizer)
    assert actions(trunk, tokenizer) == ["go<|end|>", "go<|end|>"]
    assert_states(trajectory, trunk, tokenizer)


def test_an_unknown_word_is_refused_in_an_action_and_allowed_elsewhere():
    tokenizer = word_level()
    encode(talk("qwertz", "go"), tokenizer)
    with pytest.raises(ValueError, match=r"messages\[1\] must be made of tokens .*, got 'qwertz'"):
        encode(talk("where", "go qwertz"), tokenizer)


def test_a_tokenizer_that_changes_an_action_is_refused():
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    encode(talk("WHERE", "go"), tokenizer)
    with pytest.raises(
        ValueError, match=r"messages\[1\] must decode to its rendered text, 'Go<.*', got 'go<"
    ):
        encode(talk("where", "Go"), tokenizer)


def test_one_token_may_stand_for_unknown_words_and_end_turns():
    tokenizer = byte_level_bpe(LLAMA2.replace("' </s>'", "'</s>'"))
    tokenizer.unk_token = "</s>"
    assert actions(encode(talk("where?", "go"), tokenizer), tokenizer) == [" go</s>"]


def test_a_tokenizer_without_offsets_or_template_is_refused():
    with pytest.raises(
        ValueError, match=r"Fast.* must have a chat template|Backend.* must have a chat temp"
    ):
        encode(talk("where?", "go"), byte_level_bpe(None))
    with pytest.raises(ValueError, match="str must be a fast tokenizer"):
        encode(talk("where?", "go"), "gpt2")
    with pytest.raises(TypeError, match="trajectory must be a Trajectory, got a list"):
        encode(talk("where?", "go").messages, byte_level_bpe())


def test_an_action_without_a_token_before_it_is_refused():
    with pytest.raises(ValueError, match="must start at token 1 or later"):
        encode(
            talk("go", first="assistant"),
            byte_level_bpe("{% for m in messages %}{{ m.content }}</s>{% endfor %}"),
        )


@pytest.mark.parametrize(
    "kind",
    [list, np.int32, np.int64, torch.int32, torch.int64],
    ids=["list", "np32", "np64", "torch32", "torch64"],
)
def test_a_trunk_takes_every_integer_array_and_keeps_read_only_copies(kind):
    ids, spans = [5, 6, 7, 8], [[1, 2], [2, 4]]
    if isinstance(kind, torch.dtype):
        ids, spans = torch.tensor(ids, dtype=kind), torch.tensor(spans, dtype=kind)
    elif kind is not list:
        ids, spans = np.array(ids, kind), np.array(spans, kind)
    trunk = Trunk(ids, spans)
    ids[0] = 99
    assert trunk.input_ids.tolist() == [5, 6, 7, 8]
    assert trunk.action_spans.tolist() == [[1, 2], [2, 4]]
    assert trunk.input_ids.dtype == trunk.action_spans.dtype == np.int32
    assert trunk.num_steps == 2
    for array in (trunk.input_ids, trunk.action_spans):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("ids", "spans", "error", "match"),
    [
        ([[1, 2]], [[1, 2]], ValueError, r"input_ids must be one-dimensional, got shape \(1, 2\)"),
        ([1.0, 2.0], [[1, 2]], TypeError, "input_ids must be int32 or int64, got float64"),
        ([True, False], [[1, 2]], TypeError, "input_ids must be int32 or int64, got bool"),
        (
            np.array([1, 2], np.uint8),
            [[1, 2]],
            TypeError,
            "input_ids must be int32 or int64, got uint8",
        ),
        ([1, -2], [[1, 2]], ValueError, r"input_ids\[1\] must lie in .*, got -2"),
        ([1, 2**31], [[1, 2]], ValueError, r"input_ids\[1\] must lie in .*, got 2147483648"),
        ([1, 2], [], ValueError, r"action_spans must be .*, got shape \(0,\)"),
        ([1, 2], np.zeros((0, 2), int), ValueError, r"T >= 1, got shape \(0, 2\)"),
        ([1, 2], [1, 2], ValueError, r"action_spans must be .*, got shape \(2,\)"),
        ([1, 2], [[1, 2], [1]], ValueError, "action_spans must be an array"),
        ([1, 2], [[0, 1]], ValueError, r"action_spans\[0\] must start at 1 .*, got \[0, 1\)"),
        ([1, 2], [[1, 1]], ValueError, r"action_spans\[0\] must not be empty: .*, got \[1, 1\)"),
        ([1, 2, 3], [[2, 1]], ValueError, "must not be empty"),
        ([1, 2], [[1, 3]], ValueError, r"must end within the 2 input_ids, got \[1, 3\)"),
        (
            [1, 2, 3],
            [[1, 3], [2, 3]],
            ValueError,
            r"action_spans\[1\] must .* after 3, .*, got \[2, 3\)",
        ),
        (
            [1, 2, 3],
            [[2, 3], [1, 2]],
            ValueError,
            r"action_spans\[1\] must .* after 3, .*, got \[1, 2\)",
        ),
    ],
)
def test_a_broken_trunk_is_refused_by_name(ids, spans, error, match):
    with pytest.raises(error, match=match):
        Trunk(ids, spans)


def test_the_action_mask_is_true_inside_the_spans_only():
    trunk = Trunk([5, 6, 7, 8, 9, 10], [[1, 2], [3, 5]])
    assert trunk.action_mask.tolist() == [False, True, False, True, True, False]
