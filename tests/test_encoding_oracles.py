"""Encoding against transformers' prompts and assistant masks, under the templates of real models.

`python tests/test_encoding_oracles.py 20000` runs as many conversations and writes the table of
docs/encoding.md, which the test here keeps.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from conversations import FEATURES, TEMPLATES, TRAINING, conversation, tokenizer_of

from stepagent import Trajectory, encode

DOCS = Path(__file__).parents[1] / "docs" / "encoding.md"
BEGIN, END = "<!-- table: made by tests/test_encoding_oracles.py -->\n", "<!-- end of the table -->"


def check(name: str, fields: dict, tokenizer=None) -> str:
    """ "exact", or the reason of the refusal; AssertionError where anything differs in silence."""
    tokenizer, trajectory = tokenizer or tokenizer_of(name), Trajectory(**fields)
    try:
        trunk = encode(trajectory, tokenizer)
    except ValueError as error:
        return str(error)
    for step, index in enumerate(trajectory.step_indices):
        start, stop = trunk.action_spans[step]
        state, action = trunk.state_ids(step).tolist(), trunk.input_ids[start:stop].tolist()
        assert state == ids(tokenizer, trajectory, index, add_generation_prompt=True), name
        written = ids(tokenizer, trajectory, index + 1)
        if name.startswith("gptoss") and written[: len(state)] != state:
            # A final answer takes the thoughts of calls out of what is before it, not of its state.
            assert written[-len(action) :] == action, name
            continue
        assert written[: len(state) + len(action)] == state + action, name
        rest = tokenizer.decode(written[len(state) + len(action) :])
        assert rest.strip() in ("", *tokenizer.all_special_tokens), (name, rest)
        if name in TRAINING:
            assert_mask(name, tokenizer, trajectory, index, state, action)
    return "exact"


def ids(tokenizer, trajectory, count, **options):
    return tokenizer.apply_chat_template(
        trajectory.messages[:count],
        tools=trajectory.tools,
        return_dict=False,
        **options,
    )


def assert_mask(name, tokenizer, trajectory, index, state, action):
    """What transformers marks of the newest message, after its prompt, is the action.

    TRL's marks differ in three ways, all of which are counted: they begin after a header that the
    prompt does not have, so that the agent must write it; they leave out the token at which an
    agent stops to have its call answered (both Gemma's); they have the token that closes a whole
    conversation (Phi 3's).
    """
    marked = tokenizer.apply_chat_template(
        trajectory.messages[: index + 1],
        tools=trajectory.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = list(zip(marked["input_ids"], marked["assistant_masks"], strict=True))[len(state) :]
    theirs = [token for token, scored in pairs if scored]
    if tokenizer.decode(theirs).rstrip() == tokenizer.decode(action).rstrip():
        return
    broken = set(tokenizer("🏠").input_ids)  # transformers' marks lack a character's further bytes
    theirs, ours = (
        tokenizer.decode([token for token in tokens if token not in broken]).rstrip()
        for tokens in (theirs, action)
    )
    explained = {
        ours: "has the first byte of a character alone",
        ours + "\n" + tokenizer.eos_token: "closes the conversation",
        ours.removeprefix("<|turn>model\n"): "begins after a header",
        ours.removesuffix("<|tool_response>"): "leaves out the stop before an answer",
    }
    assert theirs in explained, (name, ours, theirs)
    DIFFERENCES[name, explained[theirs]] += 1


DIFFERENCES: Counter = Counter()
REASONS = {
    "must end an assistant's turn": "writes no end of the turn",
    "continues with": "prompts otherwise than it writes",
    "the chat template fails": "the template raises",
    "changes nothing": "leaves a field out",
    "tools are given": "does not write tools",
    "must write the content": "leaves an observation out",
    "crosses the start": "a token crosses the prompt's end",
    "the chat template must keep": "changes a content",
    "writes nothing of": "leaves a message out",
}


def reason(refusal: str) -> str:
    return next((short for part, short in REASONS.items() if part in refusal), refusal)


def cell(name: str, feature: str) -> str:
    found = Counter(
        "exact" if (told := check(name, conversation(seed, feature))) == "exact" else reason(told)
        for seed in range(6)
    )
    return "; ".join(word for word, _ in found.most_common())


def table() -> str:
    names = [name for name in TEMPLATES if not name.endswith("_training")]
    lines = [" | ".join(("template", *FEATURES)), " | ".join(["---"] * (len(FEATURES) + 1))]
    lines += [" | ".join((name, *(cell(name, feature) for feature in FEATURES))) for name in names]
    return "".join(f"| {line} |\n" for line in lines)


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_templates_do():
    written = re.search(f"{re.escape(BEGIN)}(.*){re.escape(END)}", DOCS.read_text(), re.DOTALL)
    assert written is not None
    assert written[1].strip() == table().strip()


@pytest.mark.parametrize("name", TRAINING)
def test_random_conversations_are_exact_or_refused(name):
    for seed in range(1000, 1005):
        check(name, conversation(seed))


def main(count: int) -> None:
    found = Counter()
    names = list(TEMPLATES)
    for seed in range(count):
        told = check(names[seed % len(names)], conversation(seed))
        found["exact" if told == "exact" else reason(told)] += 1
    print(count, dict(found.most_common()), dict(DIFFERENCES))
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    DOCS.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(int(sys.argv[1]))
