"""tinker's and verifiers' own classes with the adapters (tinker 0.38, verifiers 0.4).

pip install -r tests/hosts/others.txt
pytest tests/test_integrations_peers.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_integrations import MASK, trace
from tiny_models import tiny_model
from torch import Tensor

from stepagent.integrations import tinker as adapter
from stepagent.integrations import verifiers as graphs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the hosts' own warnings

PROMPT = 3


def rows() -> Tensor:
    """(4, 11) ids, of which 8 follow the prompt; the expert's and the agent's in turn."""
    return torch.cat([torch.full((4, PROMPT), 5), torch.arange(32).reshape(4, 8) % 90 + 3], 1)


def target_logprobs(model: Any, ids: Tensor) -> Tensor:
    """(4, 10) of the token after each."""
    logits = model(input_ids=ids[:, :-1]).logits
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


def test_two_steps_of_tinkers_custom_loss_are_those_of_float64() -> None:
    """The client's part is tinker's; the server is a model here, whose loss is Σ −weight · logp."""
    types = pytest.importorskip("tinker", reason="tinker is not installed").types
    from tinker.lib.public_interfaces.training_client import TrainingClient

    ids = rows()
    mask = torch.cat([torch.zeros(4, PROMPT - 1, dtype=torch.long), MASK], 1)
    model = tiny_model("llama")
    reference = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.no_grad():
        ref = target_logprobs(reference, ids)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(ids[b, :-1].tolist()),
            loss_fn_inputs={
                "target_tokens": ids[b, 1:],
                "mask": mask[b].float(),
                "ref_logprobs": ref[b].float(),
            },
        )
        for b in range(4)
    ]
    losses = []
    for _ in range(3):
        logps = target_logprobs(model, ids)
        outputs = [
            {"logprobs": types.TensorData.from_torch(row.detach().contiguous())} for row in logps
        ]
        forward = types.ForwardBackwardOutput(
            loss_fn_output_type="ArrayRecord", loss_fn_outputs=outputs, metrics={}
        )
        found = TrainingClient._compute_custom_loss(data, adapter.implicit_pairs(beta=0.3), forward)
        exact = copy.deepcopy(model).double()
        exact.zero_grad()
        exact_logps = target_logprobs(exact, ids)
        rewards = 0.3 * ((exact_logps - ref) * mask).sum(1)
        right = -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        right.backward()
        assert found.loss_sum == pytest.approx(right.item(), abs=1e-5)
        weights = torch.stack([d.loss_fn_inputs["weights"].to_torch() for d in found.data])
        optimizer.zero_grad()
        (-logps * weights).sum().backward()
        for mine, its in zip(model.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.double(), its.grad, atol=1e-5, rtol=1e-3)
        optimizer.step()
        losses.append(right.item())
    assert losses[2] < losses[0]


def test_a_trace_of_verifiers_is_a_tree_and_takes_credit() -> None:
    vf = pytest.importorskip("verifiers.v1.graph", reason="verifiers is not installed")
    nodes = [vf.MessageNode.model_validate(node) for node in trace()["nodes"]]
    real = Nodes(nodes)
    (tree,) = graphs.trace_trees([real])
    (expected,) = graphs.trace_trees([trace()])
    assert tree.input_ids.tolist() == expected.input_ids.tolist()
    graphs.assign_step_advantages(real, [1.0, -2.0, 3.0])
    assert [node.advantages for node in nodes] == [None, [1.0] * 2, None, [-2.0] * 2, [3.0]]
    for node in nodes:
        assert node.advantages is None or len(node.advantages) == sum(node.mask)


class Nodes:
    """What is read of a Trace, which verifiers builds from a task and its server."""

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes

    def model_dump(self, mode: str) -> dict[str, Any]:
        return {"id": "t", "nodes": [node.model_dump(mode=mode) for node in self.nodes]}
