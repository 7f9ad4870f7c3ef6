"""What of stepagent works on this machine, which path each op takes, and why."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from ..models.attention import TREE_ATTENTION, choose_mask
from ..optional import EXTRAS

_OPS = (
    "linear_logprobs",
    "linear_logprob_diff",
    "token_logprobs",
    "logprob_diff",
    "step_sums",
    "step_rewards",
    "step_pair_loss",
    "step_gae",
)


def diagnose() -> dict[str, Any]:
    """The state of the machine, as JSON can hold it."""
    triton = _probe("triton")
    return {
        "stepagent": version("stepagent"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _torch(),
        "triton": triton,
        "transformers": version("transformers"),
        "core": _probe("stepagent._core"),
        "tree_masks": _tree_masks(),
        "ops": {op: _path(triton["error"]) for op in _OPS},
        "extras": {extra: _extra(extra) for extra in EXTRAS},
    }


def describe(report: dict[str, Any]) -> str:
    """The report of `diagnose` for a person."""
    machine, triton, core = report["torch"], report["triton"], report["core"]
    masks = report["tree_masks"].items()
    ops, extras = report["ops"].items(), report["extras"].items()
    rows = [
        ("stepagent", report["stepagent"]),
        ("python", f"{report['python']} on {report['platform']}"),
        ("torch", f"{machine['version']}, CUDA {machine['cuda'] or 'not in this build'}"),
        ("devices", ", ".join(machine["devices"]) or "CPU only"),
        ("triton", triton["error"] or triton["version"]),
        ("transformers", report["transformers"]),
        ("C++ core", core["error"] or f"loads from {core['path']}"),
        *((name, f"{mask['mask']} masks for trees: {mask['why']}") for name, mask in masks),
        *((op, f"{path['path']}: {path['why']}") for op, path in ops),
        *((f"[{extra}]", found["install"] or "installed") for extra, found in extras),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _torch() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def _tree_masks() -> dict[str, dict[str, str]]:
    """What trees get in a model loaded with each ``attn_implementation``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choices = {name: choose_mask(name, device) for name in TREE_ATTENTION}
    return {name: {"mask": choice.kind, "why": choice.why} for name, choice in choices.items()}


def _probe(name: str) -> dict[str, str | None]:
    """Version and path of a module, or why it cannot be imported."""
    try:
        module = import_module(name)
    except Exception as error:  # a broken install may raise anything, and is to be reported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"version": None, "path": None, "error": f"not importable: {reason}"}
    return {"version": getattr(module, "__version__", None), "path": module.__file__, "error": None}


def _path(triton_error: str | None) -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"path": "torch", "why": "torch sees no CUDA device"}
    if find_spec("triton") is None:
        return {"path": "torch", "why": "triton is not installed"}
    if triton_error is not None:
        return {"path": "triton", "why": f"but it will fail, triton is {triton_error}"}
    return {
        "path": "triton",
        "why": "CUDA tensors, forward and backward; float64 and CPU tensors: torch",
    }


def _extra(extra: str) -> dict[str, Any]:
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    install = f"pip install 'stepagent[{extra}]'" if missing else None
    return {"installed": not missing, "missing": missing, "install": install}
