"""Step-wise rewards for LLM agents, at the price of one forward pass.

Data: :class:`Trajectory`, :func:`encode`, :func:`pack_step_pairs`, :func:`pack_sequences`,
:func:`pack_bins`, :func:`balance`. Alignment: :func:`align_tokens`, :func:`align_steps`,
:func:`edit_distance`. Ops: :func:`linear_logprobs`, :func:`linear_logprob_diff`,
:func:`token_logprobs`, :func:`logprob_diff`, :func:`step_sums`, :func:`step_rewards`. Objectives:
:func:`implicit_step_loss`, :func:`step_pair_loss`, :func:`discriminator_loss`,
:func:`inverse_step_reward`, :func:`ppo_loss`, :func:`outcome_loss`. Advantages: :func:`step_gae`,
:func:`leave_one_out`, :func:`group_relative`, :func:`gigpo`, :func:`istar`, :func:`prime`,
:func:`mt_grpo`. Inspection:
:func:`inspect`, :func:`load_branches`, :func:`rollout_and_query`, :func:`continue_rollouts`.
Training: ``StepAgentConfig``, ``StepAgentTrainer``. See docs/api.md.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import Any

# The modules that come with the package: `stepagent.policies` needs no import of its own.
from . import episodes as episodes
from . import policies as policies
from . import rollout as rollout
from . import server_policies as server_policies
from .acting.inspection import inspect
from .acting.rollout import Continuations, continue_rollouts, rollout_and_query
from .data.alignment import (
    StepAlignment,
    TokenAlignment,
    align_steps,
    align_tokens,
    char_spans,
    edit_distance,
    token_spans,
)
from .data.branch import Branch
from .data.encoding import Trunk, encode
from .data.trajectory import Trajectory, as_trajectory, load_trajectories, save_trajectories
from .learning.advantages import (
    gigpo,
    group_relative,
    istar,
    leave_one_out,
    mt_grpo,
    prime,
    step_gae,
)
from .learning.losses import (
    discriminator_loss,
    implicit_step_loss,
    inverse_step_reward,
    outcome_loss,
    ppo_loss,
)
from .models import check_tree_support, score_trees
from .ops import (
    linear_logprob_diff,
    linear_logprobs,
    logprob_diff,
    step_pair_loss,
    step_rewards,
    step_sums,
    token_logprobs,
)
from .records.branches import load_branches
from .trees.exports import tree_kwargs, trl_row
from .trees.packing import balance, pack_bins, train_flops
from .trees.tree import TokenTree, pack_sequences, pack_step_pairs

__version__ = _version("stepagent")

__all__ = [
    "Branch",
    "Continuations",
    "StepAgentConfig",
    "StepAgentTrainer",
    "StepAlignment",
    "TokenAlignment",
    "TokenTree",
    "Trajectory",
    "Trunk",
    "align_steps",
    "align_tokens",
    "as_trajectory",
    "balance",
    "char_spans",
    "check_tree_support",
    "continue_rollouts",
    "discriminator_loss",
    "edit_distance",
    "encode",
    "gigpo",
    "group_relative",
    "implicit_step_loss",
    "inspect",
    "inverse_step_reward",
    "istar",
    "leave_one_out",
    "linear_logprob_diff",
    "linear_logprobs",
    "load_branches",
    "load_trajectories",
    "logprob_diff",
    "mt_grpo",
    "outcome_loss",
    "pack_bins",
    "pack_sequences",
    "pack_step_pairs",
    "ppo_loss",
    "prime",
    "rollout_and_query",
    "save_trajectories",
    "score_trees",
    "step_gae",
    "step_pair_loss",
    "step_rewards",
    "step_sums",
    "token_logprobs",
    "token_spans",
    "train_flops",
    "tree_kwargs",
    "trl_row",
]

# Importing transformers' Trainer is slow and can load triton, so these wait for their first use.
_LAZY = {"StepAgentConfig": ".learning.config", "StepAgentTrainer": ".learning.trainer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
