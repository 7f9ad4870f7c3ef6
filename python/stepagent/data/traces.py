"""verifiers' Trace: a graph of messages with the token ids that were sampled.

A node holds what its message adds to the sequence, ``token_ids``, with ``mask`` True where the
model sampled them and ``logprobs`` of those. Each way from a root to a leaf is a trajectory, whose
``meta`` keeps them as the records of this package do: ``token_ids``, ``action_spans``, ``logps``.
The trace of an evaluation has no token ids: its branches are plain conversations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def from_trace(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a `Trajectory` for each branch of a trace that has something to score.

    A message that several branches share is scored in the first and state in the others; so are,
    everywhere, messages that no model sampled. A failed compaction is no branch, as in verifiers.

    Raises:
        TypeError, ValueError: Naming the node, for a graph that is none, and for lengths of
            token_ids, mask and logprobs that do not fit together.
    """
    nodes = trace["nodes"]
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise TypeError("nodes must be a list of objects, as in a Trace of verifiers")
    nodes = [{k: v for k, v in node.items() if v is not None} for node in nodes]
    for index, node in enumerate(nodes):
        _check_node(f"nodes[{index}]", node, index)
    seen: set[int] = set()
    branches = [_branch(trace, nodes, path, seen) for path in _paths(nodes)]
    found = [branch for branch in branches if branch is not None]
    if not found:
        raise ValueError("the trace must have a message that a model sampled, got none")
    if len(found) > 1:
        for number, branch in enumerate(found):
            branch["id"] = f"{branch['id']}/{number}"
    return found


def sampled_nodes(trace: dict[str, Any]) -> list[int]:
    """The nodes whose tokens `from_trace` scores, in its order: branch by branch."""
    nodes = [{k: v for k, v in node.items() if v is not None} for node in trace["nodes"]]
    order: list[int] = []
    seen: set[int] = set()
    for path in _paths(nodes):
        order += [i for i in path if any(nodes[i].get("mask", ())) and i not in seen]
        seen.update(path)
    return order


def _check_node(name: str, node: dict[str, Any], index: int) -> None:
    parent = node.get("parent")
    if parent is not None and not (type(parent) is int and 0 <= parent < index):
        raise ValueError(f"{name} parent must be an earlier node, got {parent!r}")
    if not isinstance(node.get("message"), dict):
        raise TypeError(f"{name} message must be an object, got none")
    ids, mask = node.get("token_ids", []), node.get("mask", [])
    if len(ids) != len(mask):
        raise ValueError(f"{name} mask must be as long as token_ids, {len(ids)}, got {len(mask)}")
    if any(mask) and not node.get("sampled"):
        raise ValueError(
            f"{name} sampled must be true where tokens are, got {node.get('sampled')!r}"
        )
    if any(mask) and node["message"].get("role") != "assistant":
        raise ValueError(f"{name} must be an assistant's where tokens are sampled")
    logprobs = node.get("logprobs", [])
    if logprobs and len(logprobs) != sum(mask):
        raise ValueError(
            f"{name} must have {sum(mask)} logprobs, as sampled tokens, got {len(logprobs)}"
        )
    if sum(a != b for a, b in zip([False, *mask], [*mask, False], strict=True)) > 2:
        raise ValueError(f"{name} sampled tokens must be one run, got gaps")


def _paths(nodes: list[dict[str, Any]]) -> Iterator[list[int]]:
    """From a root to each leaf, as verifiers has its branches, in the order of leaves."""
    parents = {node.get("parent") for node in nodes}
    links = [(i, link) for i, node in enumerate(nodes) for link in node.get("semantic_parents", [])]
    accepted = {link.get("node") for _, link in links if link.get("type") == "compaction"}
    attempts = {i for i, link in links if link.get("type") == "compaction_attempt"}
    for leaf in range(len(nodes)):
        if leaf in parents or (leaf in attempts and leaf not in accepted):
            continue
        path: list[int] = []
        node: int | None = leaf
        while node is not None:
            path.append(node)
            node = nodes[node].get("parent")
        yield path[::-1]


def _branch(
    trace: dict[str, Any], nodes: list[dict[str, Any]], path: list[int], seen: set[int]
) -> dict[str, Any] | None:
    tokens = any(nodes[index].get("token_ids") for index in path)
    messages: list[dict[str, Any]] = []
    token_ids: list[int] = []
    scored = 0
    spans: list[list[int]] = []
    logps: list[list[float]] = []
    for index in path:
        node = nodes[index]
        message, mask = dict(node["message"]), node.get("mask", [])
        if message.get("role") == "assistant" and message.get("content") is None:
            message["content"] = ""
        if (any(mask) if tokens else node.get("sampled")) and index not in seen:
            scored += 1
            if tokens:
                start = len(token_ids) + mask.index(True)
                spans.append([start, start + sum(mask)])
                logps.append(node.get("logprobs", []))
        elif message.get("role") == "assistant":
            message["loss"] = False
        messages.append(message)
        token_ids += node.get("token_ids", [])
    seen.update(path)
    if not scored:
        return None
    meta: dict[str, Any] = {}
    if tokens:
        _check_whole(nodes, path)
        meta = {"token_ids": token_ids, "action_spans": spans}
    if spans and all(logps):
        meta["logps"] = logps
    return {
        "messages": messages,
        "tools": [_tool(tool) for tool in nodes[path[0]].get("tools", [])] or None,
        "reward": _reward(trace.get("rewards") or {}),
        "id": trace.get("id"),
        "meta": {**meta, **{k: trace[k] for k in ("rewards", "metrics", "info") if trace.get(k)}},
    }


def _check_whole(nodes: list[dict[str, Any]], path: list[int]) -> None:
    for index in path:
        if not nodes[index].get("token_ids"):
            raise ValueError(
                f"nodes[{index}] must have token_ids, as other nodes of its branch do, got none"
            )


def _reward(rewards: dict[str, Any]) -> float | None:
    """The weighted sum, as verifiers has it; None where there is none or a part was not scored."""
    if not rewards or any(reward is None for reward in rewards.values()):
        return None
    return float(sum(reward["score"] * reward.get("weight", 1.0) for reward in rewards.values()))


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}
