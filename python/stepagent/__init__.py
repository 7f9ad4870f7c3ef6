"""Step-wise rewards for LLM agents, at the price of one forward pass.

Data: :class:`Trajectory`, :func:`encode`, :func:`pack_step_pairs`. Ops: :func:`linear_logprobs`,
:func:`linear_logprob_diff`, :func:`token_logprobs`, :func:`logprob_diff`, :func:`step_sums`,
:func:`step_rewards`. Objective: :func:`implicit_step_loss`. Inspection: :func:`inspect`,
:func:`rollout_and_query`. Training: ``StepAgentConfig``, ``StepAgentTrainer``. See docs/api.md.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import Any

from .encoding import Trunk, encode
from .inspection import Branch, inspect
from .losses import implicit_step_loss
from .models import check_tree_support, score_trees
from .ops import (
    linear_logprob_diff,
    linear_logprobs,
    logprob_diff,
    step_rewards,
    step_sums,
    token_logprobs,
)
from .rollout import rollout_and_query
from .trajectory import Trajectory, load_trajectories, save_trajectories
from .tree import TokenTree, pack_step_pairs

__version__ = _version("stepagent")

__all__ = [
    "Branch",
    "StepAgentConfig",
    "StepAgentTrainer",
    "TokenTree",
    "Trajectory",
    "Trunk",
    "check_tree_support",
    "encode",
    "implicit_step_loss",
    "inspect",
    "linear_logprob_diff",
    "linear_logprobs",
    "load_trajectories",
    "logprob_diff",
    "pack_step_pairs",
    "rollout_and_query",
    "save_trajectories",
    "score_trees",
    "step_rewards",
    "step_sums",
    "token_logprobs",
]

# Importing transformers' Trainer is slow and can load triton, so these wait for their first use.
_LAZY = {"StepAgentConfig": ".config", "StepAgentTrainer": ".trainer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
