"""The README's words hold: its example of the ops runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from stepagent import Trunk, pack_step_pairs, score_trees

README = Path(__file__).parents[1] / "README.md"


def test_the_five_line_example_gives_a_gradient() -> None:
    (example,) = re.findall(r"```python\n(.*?pack_step_pairs.*?)```", README.read_text(), re.S)
    model = tiny_model("llama")
    trunk = Trunk([5, 6, 7, 8, 9, 10], [(2, 3), (4, 6)])
    branches = [[[11]], [[12, 13]]]
    with torch.no_grad():
        ref_logps = score_trees(model, pack_step_pairs([trunk], [branches]))
    scope = {"model": model, "trunk": trunk, "branches": branches, "ref_logps": ref_logps}
    exec(example, scope)
    loss = scope["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.item() == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
