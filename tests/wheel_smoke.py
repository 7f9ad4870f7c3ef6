"""An installed wheel works: trees from the C++ core, then an op, a gradient and an alignment.

    python -I tests/wheel_smoke.py

Needs the wheel, torch, numpy and lazy_loader, no test runner and no compiler; `-I` keeps the source
tree out of the way. Exit code 1 and an AssertionError where something is wrong.
"""

from __future__ import annotations

import math
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

import stepagent as sa


def from_the_wheel() -> None:
    """Everything of the package, the extension and the kernels lie where wheels are installed."""
    import stepagent._core as core

    kernels = find_spec("stepagent.kernels.token_logprobs")
    assert kernels is not None
    assert kernels.origin is not None
    site = Path(sysconfig.get_path("platlib")).resolve()
    for file in (sa.__file__, core.__file__, kernels.origin):
        assert Path(file).resolve().is_relative_to(site), f"{file} must be in {site}"
    assert (Path(sa.__file__).parent / "py.typed").exists()
    assert "triton" not in sys.modules, "`import stepagent` must not load triton"


def trees() -> None:
    (tree,) = sa.pack_step_pairs([sa.Trunk([5, 6, 7], [(1, 3)])], [[[[8]]]])
    assert tree.input_ids.tolist() == [5, 8, 6, 7]
    assert tree.subtree_end.tolist() == [4, 2, 4, 4]


def ops() -> None:
    """Equal logits of V tokens give each log 1/V, and the gradient one-hot − 1/V."""
    labels, eye = torch.tensor([0, 1, 3]), torch.eye(4)
    hidden = torch.zeros(3, 4, requires_grad=True)
    logps = sa.linear_logprobs(hidden, eye, labels)
    assert torch.allclose(logps, torch.full((3,), -math.log(4)))
    loss = sa.implicit_step_loss(logps[:1], logps[1:2])
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-6)
    logps.sum().backward()
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad, eye[labels] - 0.25)


def core() -> None:
    assert sa.edit_distance([1, 2, 3], [1, 3]) == 1
    assert sorted(map(sorted, sa.pack_bins([3, 2, 1], 3))) == [[0], [1, 2]]


if __name__ == "__main__":
    for check in (from_the_wheel, trees, ops, core):
        check()
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        # An extension that does not allow to go without the lock would turn it on again.
        core_alone = "import sys, stepagent._core; sys.exit(sys._is_gil_enabled())"
        assert subprocess.run([sys.executable, "-I", "-c", core_alone]).returncode == 0
    print(f"stepagent {sa.__version__} works on Python {sys.version.split()[0]}")
