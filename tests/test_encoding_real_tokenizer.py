"""Encoding on a real model's tokenizer, under the templates of real models.

STEPAGENT_TEST_TOKENIZER=FOLDER python -m pytest tests/test_encoding_real_tokenizer.py -m slow -s

FOLDER has a byte-level tokenizer, such as SmolLM2's, which is given each template's control tokens.
"""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
from conversations import FEATURES, TEMPLATES, conversation, with_template
from test_encoding_oracles import check, reason
from transformers import AutoTokenizer

from stepagent import Trajectory, encode

FOLDER = os.environ.get("STEPAGENT_TEST_TOKENIZER", "")
NAMES = [name for name in TEMPLATES if not name.endswith("_training")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="STEPAGENT_TEST_TOKENIZER names no folder"),
]


def test_states_are_prompts_and_scored_ids_read_as_what_the_agent_said():
    exact, refused, steps = Counter(), Counter(), 0
    for name in NAMES:
        tokenizer = with_template(AutoTokenizer.from_pretrained(FOLDER), name)
        for feature in FEATURES:
            for seed in range(4):
                fields = conversation(seed, feature)
                told = check(name, fields, tokenizer)  # the states are apply_chat_template's ids
                if told != "exact":
                    refused[reason(told)] += 1
                    continue
                exact[name] += 1
                steps += read_back(tokenizer, Trajectory(**fields))
    print(f"{sum(exact.values())} conversations under {len(exact)} templates, {steps} actions:")
    print("exact;", sum(refused.values()), "refused:", dict(refused.most_common()))
    assert len(exact) >= 10


def read_back(tokenizer, trajectory: Trajectory) -> int:
    """Require that the scored ids of each step decode to its text, thoughts and calls."""
    trunk = encode(trajectory, tokenizer)
    for (start, stop), index in zip(trunk.action_spans, trajectory.step_indices, strict=True):
        text = tokenizer.decode(trunk.input_ids[start:stop], clean_up_tokenization_spaces=False)
        message = trajectory.messages[index]
        calls = [call["function"] for call in message.get("tool_calls", [])]
        said = [message["content"].strip(), message.get("reasoning_content", "")]
        said += [call["name"] for call in calls]
        said += [value for call in calls for value in call["arguments"].values()]
        for part in said:
            spellings = {part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]}
            assert any(spelling in text for spelling in spellings), (part, text)
    return trunk.num_steps
