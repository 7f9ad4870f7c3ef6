"""The one form of a chat message in this package, and how the forms that others write become it.

    {"role", "content"}                  role one of ROLES, content a str
    + "reasoning_content"                the assistant's thoughts, a non-empty str
    + "tool_calls"                       its calls, non-empty: {"type": "function",
                                         "function": {"name": str, "arguments": dict}}
    + "loss": False                      an assistant's message that is state only, no step

Other keys stay as they are; one that is null is absent. What would be trained wrongly, were it
passed over, is refused by its name.
"""

from __future__ import annotations

import json
from typing import Any

from .strict_json import parse

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")

# An assistant's message is scored or it is not: names for that in other tools' files, and the
# tools. docs/data.md shows this table.
LOSS_FLAGS = {
    "loss": "AgentGym, AgentTuning, ms-swift, XTuner",
    "train": "axolotl",
    "training": "axolotl",
    "trainable": "tinker-cookbook",
    "weight": "OpenAI, Mistral, axolotl",
    "loss_weight": "weights of a message",
    "loss_scale": "ms-swift",
    "loss_mask": "verl",
    "step_loss_mask": "slime",
    "masked": "torchtune",
}
INVERTED_FLAGS = ("masked",)

# Keys that change what a message means and that no template writes.
REFUSED = {
    "prefix": "the beginning of a turn that the model is to continue has no end to be scored",
    "partial": "the beginning of a turn that the model is to continue has no end to be scored",
    "prefill": "the beginning of a turn that the model is to continue has no end to be scored",
    "train_detail": "parts of an action cannot be left out; give the whole message a loss flag",
    "training_detail": "parts of an action cannot be left out; give the whole message a loss flag",
    "refusal": "put what the model said into content",
    **dict.fromkeys(
        ("image", "images", "image_url", "video", "videos", "audio", "audios"),
        "only text can be scored here",
    ),
}


def is_plain(message: Any) -> bool:
    """Whether a message is a role and a text alone, as most are; `normalize` keeps it as it is."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(content := message.get("content")) is str
        and content.isascii()
    )


def normalize(name: str, message: Any) -> dict[str, Any]:
    """A message in the form above; the same object where it is so already.

    Args:
        name: What to call it in errors.
        message: A dict with ``role`` and ``content``, as OpenAI, Hugging Face and others write it.

    Returns:
        The message; what it was made from is not changed.

    Raises:
        TypeError: For a value of another type than its key allows.
        ValueError: For another role, no content, images, a call that is no call, and whatever
            else would be trained wrongly. Both name the message and the rule.
    """
    if not isinstance(message, dict):
        raise TypeError(f"{name} must be a dict, got a {type(message).__name__}")
    plain: dict[str, Any] = message
    if not (message.keys() == {"role", "content"} and isinstance(message["content"], str)):
        plain = _unfold(name, {key: value for key, value in message.items() if value is not None})
    if plain["role"] not in ROLES:
        raise ValueError(f"{name} role must be one of: {', '.join(ROLES)}, got {plain['role']!r}")
    for key in ("content", "reasoning_content"):
        if key in plain:
            _check_unicode(f"{name} has {key}", plain[key])
    return plain


def is_step(message: dict[str, Any]) -> bool:
    """Whether this is an assistant's message that is scored."""
    return message["role"] == "assistant" and bool(message.get("loss", True))


def _unfold(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """The form of a message that is more than a role and a text."""
    if "role" not in message:
        raise ValueError(f"{name} must have a 'role', got none")
    for key, reason in REFUSED.items():
        if message.get(key):
            raise ValueError(f"{name} must be without {key!r}: {reason}")
    message = {key: value for key, value in message.items() if key not in REFUSED}
    if message["role"] == "function":  # OpenAI's name for the tool until 2023
        message["role"] = "tool"
    assistant = message["role"] == "assistant"
    scored = _loss(name, message, assistant)
    calls = _calls(name, message)
    content, thoughts = _text(name, message.pop("content", None))
    reasoning = _reasoning(name, message, thoughts)
    if not assistant and (calls or reasoning):
        what = "tool_calls" if calls else "reasoning_content"
        raise ValueError(f"{name} has {what}, which must be an assistant's, got {message['role']}")
    if content is None and not (calls or reasoning):
        beside = " or tool_calls" if assistant else ""
        raise ValueError(f"{name} must have a text as 'content'{beside}, got none")
    plain: dict[str, Any] = {"role": message.pop("role"), "content": content or ""}
    if reasoning:
        plain["reasoning_content"] = reasoning
    if calls:
        plain["tool_calls"] = calls
    return {**plain, **message} if scored else {**plain, **message, "loss": False}


def _text(name: str, content: Any) -> tuple[str | None, str]:
    """The text of a content and the thoughts before it, which some write as its first parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise TypeError(
            f"{name} content must be a str, or a list of text parts, got a {type(content).__name__}"
        )
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(content):
        place = f"{name} content[{index}]"
        kind, value = _part(place, part)
        if kind in ("thinking", "reasoning"):
            if texts:
                raise ValueError(f"{place} must stand before the text, got a thought after it")
            thoughts.append(value)
        elif kind in TEXT_PARTS:
            texts.append(value)
        else:
            raise ValueError(f"{place} must be text, as only that is scored, got type {kind!r}")
    return "".join(texts), "".join(thoughts)


def _part(place: str, part: Any) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise TypeError(f"{place} must be a str or a dict, got a {type(part).__name__}")
    kind = str(part.get("type", "text"))
    if kind not in (*TEXT_PARTS, "thinking", "reasoning"):
        return kind, None
    value = part.get("text" if kind in TEXT_PARTS else kind)
    if not isinstance(value, str):
        raise TypeError(f"{place} of type {kind!r} must hold a str, got {value!r}")
    return kind, value


def _reasoning(name: str, message: dict[str, Any], thoughts: str) -> str:
    """The thoughts, under whichever of their names; what says it is taken out of the message."""
    found = {"content": thoughts} if thoughts else {}
    for key in REASONING:
        value = message.pop(key, "")
        if not isinstance(value, str):
            raise TypeError(f"{name} {key} must be a str, got a {type(value).__name__}")
        if value:
            found[key] = value
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{name} must have one text of thoughts, got different ones in {', '.join(found)}"
        )
    return next(iter(found.values()), "")


def _loss(name: str, message: dict[str, Any], assistant: bool) -> bool:
    """Whether the message may be scored; the flags that say so are taken out of it."""
    told = {key: message.pop(key) for key in LOSS_FLAGS if key in message}
    for key, value in told.items():
        if value not in (0, 1):  # True and False are 1 and 0
            raise ValueError(
                f"{name} {key} must be true or false, 1 or 0, as a step is scored whole or not at "
                f"all, got {value!r}"
            )
    scored = {key: bool(value) != (key in INVERTED_FLAGS) for key, value in told.items()}
    if len(set(scored.values())) > 1:
        raise ValueError(f"{name} must have loss flags that agree, got {told}")
    if not assistant and any(scored.values()):
        key = next(iter(scored))
        raise ValueError(
            f"{name} {key} must be absent or say no, as only assistant messages are scored, got "
            f"{told[key]!r} of role {message['role']}"
        )
    return not assistant or all(scored.values())


def _calls(name: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls in OpenAI's form; what says them is taken out of the message."""
    calls = message.pop("tool_calls", [])
    legacy = message.pop("function_call", None)
    if isinstance(calls, str) and calls:
        calls = _json(f"{name} tool_calls", calls)
    calls = calls or []
    if not isinstance(calls, list):
        raise TypeError(f"{name} tool_calls must be a list, got a {type(calls).__name__}")
    if calls and legacy:
        raise ValueError(f"{name} must have one of tool_calls and function_call, got both")
    calls = calls or ([legacy] if legacy else [])
    return [tool_call(f"{name} tool_calls[{i}]", call) for i, call in enumerate(calls)]


def tool_call(name: str, call: Any) -> dict[str, Any]:
    """A call in OpenAI's form with its arguments as a dict, from that or ``{"name", "arguments"}``.

    Raises:
        TypeError, ValueError: Naming the call, for one without a name or whose arguments are not
            an object, be it as JSON in a str.
    """
    if not isinstance(call, dict):
        raise TypeError(f"{name} must be a dict, got a {type(call).__name__}")
    outer = {key: value for key, value in call.items() if value is not None}
    if outer.setdefault("type", "function") != "function":
        raise ValueError(f"{name} type must be 'function', got {outer['type']!r}")
    inner = outer.pop("function", None)
    if inner is None:
        inner = {key: outer.pop(key) for key in ("name", "arguments") if key in outer}
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f"{name} must have a function with a name, got {call!r}")
    arguments = inner.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _json(f"{name} arguments", arguments)
    if arguments in (None, "") or isinstance(arguments, str):  # how some write: no arguments
        arguments = {}
    if not isinstance(arguments, dict):
        raise TypeError(f"{name} arguments must be an object, got {arguments!r}")
    _check_unicode(f"{name} has arguments", json.dumps(arguments, ensure_ascii=False))
    function = {**inner, "arguments": arguments}
    return {"type": "function", "function": function} | {
        key: value for key, value in outer.items() if key != "type"
    }


def _json(name: str, text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(
            f"{name} must be JSON, got {text!r}: {error}; where the model wrote the call so, keep "
            "it as text in content"
        ) from error


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no tokenizer can read
        raise ValueError(f"{name} that is not valid Unicode: {error}") from error
