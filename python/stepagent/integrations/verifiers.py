"""verifiers' traces: token trees from their graph of messages, and credit back into it (0.4).

A trace is a ``verifiers.v1.Trace`` or the dict of one. Each branch of it that a model wrote in is
a trajectory; a message that branches share is scored in the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.traces import from_trace, sampled_nodes
from ..data.trunk import Trunk
from ..trees.tree import TokenTree, pack_sequences


def trace_trunks(trace: Any) -> list[Trunk]:
    """The branches of a trace as trunks, whose steps are the messages that a model wrote.

    Raises:
        ValueError: for a trace without token ids (one of an evaluation), and as
            `stepagent.load_trajectories` does.
    """
    branches = from_trace(_as_dict(trace))
    if any("token_ids" not in branch["meta"] for branch in branches):
        raise ValueError("the trace must have token_ids, as those of training do, got text alone")
    metas = [branch["meta"] for branch in branches]
    return [Trunk(meta["token_ids"], meta["action_spans"]) for meta in metas]


def trace_trees(traces: Sequence[Any], *, max_tokens: int | None = None) -> list[TokenTree]:
    """Token trees of traces, every shared beginning once.

    ``extras["logps"]`` has the log-probs of the sampled tokens, NaN where none were recorded.
    ``step_trunk`` counts the branches of all traces in order, as `trace_trunks` has them.

    Args:
        traces: with token ids.
        max_tokens: as in `stepagent.pack_sequences`.
    """
    trunks, logps = [], []
    for trace in traces:
        branches = from_trace(_as_dict(trace))
        for trunk, branch in zip(trace_trunks(trace), branches, strict=True):
            recorded = np.full(len(trunk.input_ids), np.nan, np.float32)
            if "logps" in branch["meta"]:
                recorded[trunk.action_mask] = np.concatenate(branch["meta"]["logps"])
            trunks.append(trunk)
            logps.append(recorded)
    return pack_sequences(
        [trunk.input_ids for trunk in trunks],
        [trunk.action_mask for trunk in trunks],
        max_tokens=max_tokens,
        extras={"logps": logps},
    )


def assign_step_advantages(trace: Any, advantages: Sequence[float]) -> None:
    """Write credit into a trace: ``node.advantages``, each step's at each of its sampled tokens.

    Args:
        trace: changed in place.
        advantages: one number a message that a model wrote, in the order of `trace_trunks`: the
            steps of the first branch, then those of the second that are not in it, …

    Raises:
        ValueError: for another number of advantages.
    """
    order = sampled_nodes(_as_dict(trace))
    if len(advantages) != len(order):
        raise ValueError(
            f"advantages must have {len(order)} numbers, one a message that a model wrote, got "
            f"{len(advantages)}"
        )
    nodes = trace["nodes"] if isinstance(trace, dict) else trace.nodes
    for index, value in zip(order, advantages, strict=True):
        node = nodes[index]
        if isinstance(node, dict):
            node["advantages"] = [float(value)] * sum(node["mask"])
        else:
            node.advantages = [float(value)] * sum(node.mask)


def _as_dict(trace: Any) -> dict[str, Any]:
    found: dict[str, Any] = trace if isinstance(trace, dict) else trace.model_dump(mode="json")
    return found
