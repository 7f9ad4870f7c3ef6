"""Rows as other tools write them, as the fields of trajectories.

Its keys say what a row is: ``messages`` (this package, OpenAI, Hugging Face), ``conversations``
(ShareGPT and who follows it: LLaMA-Factory, axolotl, ETO, AgentGym), ``prompt`` and ``completion``
(TRL), ``nodes`` (verifiers' Trace). docs/data.md has the table of what is read and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .messages import ROLES, tool_call
from .strict_json import parse
from .traces import from_trace

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "developer": "developer",
}
CALLERS = ("function_call", "tool_call")
"""Who is an assistant whose text is its call, as JSON."""

# Columns that would change what is trained, and that nothing here can follow.
_PAIR = "it makes a pair of preferences; a trajectory is one of the two, as messages"
_MEDIA = "only text can be scored here"
_REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "rejected_conversations"), _PAIR),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    "documents": "give it in chat_template_kwargs",
    "enable_thinking": "give it in chat_template_kwargs",
    "continue_final_message": "a turn without an end cannot be scored",
}
# Columns that say for all messages what is trained; what is done here anyway is no contradiction.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "train_on_inputs": (False,),
    "train_on_input": (False,),
    "train_on_prompt": (False,),
    "train_on_eos": ("turn", "all"),
    "train_on_eot": ("turn", "all"),
    "roles_to_train": (["assistant"], ["gpt"], ["gpt", "assistant"], ["assistant", "gpt"]),
    "mask": ("User", "user", "human"),  # NeMo's: the speaker who is left out
    "weight": (1,),
    "loss_weight": (1,),
    "loss_scale": (1, "default"),
}
_ROLES = frozenset(ROLES)
_HINTS = {
    "chosen": f"for a row of chosen and rejected: {_PAIR}",
    "instruction": "an Alpaca row has no steps; write it as messages",
    "role": "this is a single message; a row holds a whole conversation",
    "segments": "axolotl's segments have no messages; write them as such, with a loss flag",
    "text": "a text alone does not say who said what",
}


def fields_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of the `Trajectory` objects that a row holds: one, or a Trace's branches.

    Args:
        row: A JSON object, or a row of a dataset; it is not changed.

    Raises:
        TypeError, ValueError: Naming the key and the rule; messages themselves are checked by
            `Trajectory`.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"a trajectory must be a JSON object, got a {type(row).__name__}")
    rest = {key: value for key, value in row.items() if value is not None}
    if "nodes" in rest and not {"messages", "conversations"} & rest.keys():
        return from_trace(rest)
    for key in _REFUSED.keys() & rest.keys():
        if rest[key] and ("messages" in rest or "conversations" in rest):
            raise ValueError(f"the row must be without {key!r}: {_REFUSED[key]}")
    messages, sharegpt = _conversation(rest)
    messages = _with_system(messages, rest.pop("system", ""))
    messages = _apply_settings(messages, rest)
    names = [name for name in ("id", "item_id") if name in rest]  # AgentGym's is item_id
    known = {
        "messages": messages,
        "id": _identity(rest.pop(names[0])) if names else None,
        "tools": _tools(rest),
        "chat_template_kwargs": _decoded("chat_template_kwargs", rest, {}),
    }
    return [known | _reward_and_meta(rest, sharegpt)]


def _conversation(rest: dict[str, Any]) -> tuple[list[Any], bool]:
    """The messages, taken out of the row, and whether they are ShareGPT's."""
    found = [key for key in ("messages", "conversations") if key in rest]
    if len(found) == 2:
        raise ValueError("the row must have one of 'messages' and 'conversations', got both")
    if not found and {"prompt", "completion"} <= rest.keys():
        return _prompt_completion(rest.pop("prompt"), rest.pop("completion")), False
    if not found:
        hint = next((f": {hint}" for key, hint in _HINTS.items() if key in rest), "")
        raise ValueError(
            "the row must have 'messages' or 'conversations', got the keys "
            f"{sorted(map(str, rest))}{hint}"
        )
    (key,) = found
    turns = _decoded(key, rest, [])
    if not isinstance(turns, list):
        raise TypeError(f"{key} must be a list of turns, got a {type(turns).__name__}")
    if key == "messages" and _have_roles(turns):
        return turns, False
    return [_turn(f"{key}[{i}]", turn) for i, turn in enumerate(turns)], key == "conversations"


def _have_roles(turns: list[Any]) -> bool:
    """Whether they are messages already; `_turn` would give each back, at some cost."""
    try:
        return {turn["role"] for turn in turns} <= _ROLES
    except (TypeError, KeyError):
        return False


def _prompt_completion(prompt: Any, completion: Any) -> list[Any]:
    """TRL's: what the prompt holds is state only."""
    for name, turns in (("prompt", prompt), ("completion", completion)):
        if not isinstance(turns, list):
            raise TypeError(f"{name} must be a list of messages, got a {type(turns).__name__}")
    state = [
        {**turn, "loss": False}
        if isinstance(turn, dict) and turn.get("role") == "assistant"
        else turn
        for turn in prompt
    ]
    return [*state, *completion]


def _turn(name: str, turn: Any) -> Any:
    """A turn as a message; one with a role is one already, and checked by `Trajectory`."""
    if isinstance(turn, dict) and turn.get("role") is not None:
        if turn.get("from") is not None and turn.get("value") is not None:
            raise ValueError(f"{name} must have one of 'from' and 'role', got both")
        if turn["role"] in CALLERS:  # ms-swift's
            return _caller(name, {**turn, "role": "assistant"}, turn.get("content"))
        if turn["role"] in ("tool_response", "function_response", "observation"):
            return {**turn, "role": "tool"}
        return turn
    if name.startswith("messages") and not (isinstance(turn, dict) and "from" in turn):
        return turn
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ValueError(f"{name} must be an object with 'from' and 'value', got {turn!r}")
    rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
    speaker, value = rest.pop("from"), rest.pop("value")
    if turn.get("content") is not None:
        raise ValueError(f"{name} must have one of 'value' and 'content', got both")
    if speaker in CALLERS:
        return _caller(name, {"role": "assistant", **rest}, value)
    if speaker not in SPEAKERS:
        allowed = ", ".join((*SPEAKERS, *CALLERS))
        raise ValueError(f"{name} must be from one of: {allowed}, got {speaker!r}")
    return {"role": SPEAKERS[speaker], "content": value, **rest}


def _caller(name: str, message: dict[str, Any], text: Any) -> dict[str, Any]:
    """A message whose text is a call, or a list of calls, as JSON, perhaps after its thoughts."""
    if isinstance(text, str):
        if text.lstrip().startswith("<think>") and "</think>" in text:
            thoughts, _, text = text.lstrip()[len("<think>") :].partition("</think>")
            message = {**message, "reasoning_content": thoughts.strip()}
        try:
            text = parse(text)
        except ValueError as error:
            raise ValueError(f"{name} must be a call as JSON, got {text!r}: {error}") from error
    calls = text if isinstance(text, list) else [text]
    if not calls:
        raise ValueError(f"{name} must hold at least one call, got {text!r}")
    calls = [tool_call(f"{name} call {i}", call) for i, call in enumerate(calls)]
    return {**message, "content": "", "tool_calls": calls}


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    """The system column is the first message."""
    if not isinstance(system, str):
        raise TypeError(f"system must be a str, got {system!r}")
    if not system:
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") in ("system", "developer"):
        if first.get("content") != system:
            raise ValueError(
                "the 'system' column must agree with the system message, got another text"
            )
        return messages
    return [{"role": "system", "content": system}, *messages]


def _apply_settings(messages: list[Any], rest: dict[str, Any]) -> list[Any]:
    """What columns say of the loss of all messages; such columns are taken out of the row."""
    for key in _SETTINGS.keys() & rest.keys():
        value, allowed = rest.pop(key), _SETTINGS[key]
        if value not in allowed:
            raise ValueError(
                f"{key} must be absent or {allowed[0]!r}, got {value!r}: every assistant message "
                "is scored, its end included, unless it has a loss flag"
            )
    history = rest.pop("mask_history", False)
    if not isinstance(history, bool):
        raise TypeError(f"mask_history must be true or false, got {history!r}")
    if not history:
        return messages
    said = [turn.get("role") if isinstance(turn, dict) else None for turn in messages]
    if "assistant" not in said:
        return messages
    last = len(said) - 1 - said[::-1].index("assistant")
    return [
        {**turn, "loss": False} if role == "assistant" and i < last else turn
        for i, (role, turn) in enumerate(zip(said, messages, strict=True))
    ]


def _identity(id: Any) -> Any:
    """An id as a str; a whole number becomes one."""
    whole = isinstance(id, int) or (isinstance(id, float) and id.is_integer())
    return str(int(id)) if whole and not isinstance(id, bool) else id


def _tools(rest: dict[str, Any]) -> Any:
    """The tools in OpenAI's form; the columns that say them are taken out of the row."""
    tools = _decoded("tools", rest, [])
    functions = _decoded("functions", rest, [])  # OpenAI's name until 2023
    if tools and functions:
        raise ValueError("the row must have one of 'tools' and 'functions', got both")
    tools = tools or functions
    if not isinstance(tools, list):
        raise TypeError(f"tools must be a list, got a {type(tools).__name__}")
    bare = [isinstance(tool, dict) and "name" in tool and "function" not in tool for tool in tools]
    wrapped = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        if is_bare
        else tool
        for tool, is_bare in zip(tools, bare, strict=True)
    ]
    return wrapped or None


def _decoded(key: str, rest: dict[str, Any], empty: Any) -> Any:
    """A column that some write as JSON in a str, taken out of the row."""
    value = rest.pop(key, empty)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return empty
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{key} must be JSON, got {value!r}: {error}") from error


def _reward_and_meta(rest: dict[str, Any], sharegpt: bool) -> dict[str, Any]:
    """The reward where a row says it by that name, and all else as meta."""
    meta = rest.pop("meta", {})
    if not isinstance(meta, dict):
        raise TypeError(f"meta must be a dict, got {meta!r}")
    reward = rest.pop("reward", None)
    meta = dict(meta)
    if sharegpt and meta.get("reward") is not None:  # a rollout of ETO's
        if reward is not None and reward != meta["reward"]:
            raise ValueError(
                f"reward must agree with that in meta, {meta['reward']!r}, got {reward!r}"
            )
        reward = meta["reward"]
    if sharegpt:
        meta.pop("reward", None)
    for key, value in rest.items():
        if key in meta and meta[key] != value:
            raise ValueError(f"{key!r} of the row must agree with that in meta, got {value!r}")
        meta[key] = value
    return {"reward": reward, "meta": meta}
