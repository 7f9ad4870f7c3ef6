"""Random conversations of agents and the chat templates of real models, to test encoding."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import tiny_tokenizers
import trl

TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
TRAINING = [name for name in TEMPLATES if name.endswith("_training")]

FEATURES = ("plain", "system", "calls", "parallel calls", "thoughts", "thoughts and calls", "tools")
_CONTROL = re.compile(
    r"<[|｜][^<>{}'\"\s]+?[|｜]?>|<[^<>{}'\"\s|]+[|｜]>|\[/?[A-Z_]+\]|</?s>|<(?:start|end)_of_turn>"
    r"|<bos>|<eos>|<end_of_utterance>"
)
_TEXTS = (
    "Where is the key?",
    "go north\nthen look",
    "  two  spaces ",
    "é 日本語 🏠",
    'price: 3 < 4 & "quoted" \\ {x}',
    "Action: open box",
    '{"t": 3}',
    "assistant",
)
_NAMES = ("search", "open_box", "move")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"To {name}.",
            "parameters": {
                "type": "object",
                "properties": {"q": {"type": "string", "description": "what"}},
                "required": ["q"],
            },
        },
    }
    for name in _NAMES
]


@cache
def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with a model's chat template and its control tokens."""
    return with_template(tiny_tokenizers.byte_level_bpe(None, trim_offsets=False), name)


def with_template(tokenizer: Any, name: str) -> Any:
    """The tokenizer itself, with a model's chat template and its control tokens."""
    source = tokenizer.chat_template = TEMPLATES[name]
    tokens = sorted(set(_CONTROL.findall(source)) | {"<tool_call>", "</tool_call>"})
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


def conversation(seed: int, feature: str | None = None) -> dict[str, Any]:
    """The fields of a random trajectory; of one feature, or of any."""
    rng = random.Random(seed)
    feature = feature or rng.choice(FEATURES)
    messages: list[dict[str, Any]] = []
    if feature == "system" or (feature != "plain" and rng.random() < 0.3):
        messages.append({"role": "system", "content": _text(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": _text(rng)})
        if feature in ("calls", "parallel calls", "thoughts and calls", "tools"):
            count = 2 if feature == "parallel calls" else 1
            calls = [_call(rng) for _ in range(count)]
            content = _text(rng) if rng.random() < 0.3 else ""
            message = {"role": "assistant", "content": content, "tool_calls": calls}
            if feature == "thoughts and calls":
                message["reasoning_content"] = _text(rng).strip()
            messages.append(message)
            for call in calls:
                name = call["function"]["name"]
                messages.append({"role": "tool", "name": name, "content": _text(rng)})
        final = {"role": "assistant", "content": _text(rng).strip()}
        if feature in ("thoughts", "thoughts and calls"):
            final["reasoning_content"] = _text(rng).strip()
        messages.append(final)
    return {"messages": messages, "tools": TOOLS if feature == "tools" else None}


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(_TEXTS) for _ in range(rng.randint(1, 2)))


def _call(rng: random.Random) -> dict[str, Any]:
    function = {"name": rng.choice(_NAMES), "arguments": {"q": rng.choice(("key", "a b", "é"))}}
    return {"type": "function", "function": function}
