"""Objectives: pure functions of tensors.

P pairs of one expert action and one agent action at the same state.
"""

import torch.nn.functional as F
from torch import Tensor

from stepagent.checks import check_floats, check_pair


def implicit_step_loss(expert_rewards_P: Tensor, agent_rewards_P: Tensor) -> Tensor:
    """Prefer the expert's action at each step: loss_p = −log σ(r_E − r_A) (arXiv 2411.03817).

    Args:
        expert_rewards_P, agent_rewards_P: (P,) implicit rewards of the two actions, as from
            `step_rewards`, the same float dtype.

    Returns:
        loss_P in nats, in the dtype of the rewards; exact for differences of any size.

    Raises:
        TypeError: rewards that are not float tensors of one dtype.
        ValueError: two shapes, or a shape that is not (P,).
    """
    pair = [("expert_rewards_P", expert_rewards_P), ("agent_rewards_P", agent_rewards_P)]
    check_floats(*((name, rewards_P, 1) for name, rewards_P in pair))
    check_pair(*pair[0], *pair[1])
    return -F.logsigmoid(expert_rewards_P - agent_rewards_P)
