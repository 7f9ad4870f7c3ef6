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
from importlib.util import find_spec
from typing import Any

# Where each public name is at home. A name is imported at its first use, and a module of the
# package too: so nothing of it, the command line's help included, waits for torch without need.
_HOMES = {
    ".acting.inspection": "inspect",
    ".acting.rollout": "Continuations continue_rollouts rollout_and_query",
    ".data.alignment": (
        "StepAlignment TokenAlignment align_steps align_tokens char_spans edit_distance token_spans"
    ),
    ".data.branch": "Branch",
    ".data.encoding": "Trunk encode",
    ".data.trajectory": "Trajectory load_trajectories save_trajectories",
    ".learning.advantages": "gigpo group_relative istar leave_one_out mt_grpo prime step_gae",
    ".learning.config": "StepAgentConfig",
    ".learning.losses": (
        "discriminator_loss implicit_step_loss inverse_step_reward outcome_loss ppo_loss"
    ),
    ".learning.trainer": "StepAgentTrainer",
    ".models": "check_tree_support score_trees",
    ".ops": (
        "linear_logprob_diff linear_logprobs logprob_diff step_pair_loss step_rewards "
        "step_sums token_logprobs"
    ),
    ".records.branches": "load_branches",
    ".trees.exports": "tree_kwargs trl_row",
    ".trees.packing": "balance pack_bins train_flops",
    ".trees.tree": "TokenTree pack_sequences pack_step_pairs",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name], __name__), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("stepagent")
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
