"""Log-probs of acted tokens, and their sums, rewards and advantages over steps.

One file for each op: its public function, what it computes, its custom operator with fake and
autograd. Every op is torch, or on CUDA Triton (``stepagent.kernels``) where there is a kernel.
"""

from stepagent.ops.gae import step_gae as step_gae
from stepagent.ops.linear import linear_logprobs as linear_logprobs
from stepagent.ops.linear_diff import linear_logprob_diff as linear_logprob_diff
from stepagent.ops.pairs import step_pair_loss as step_pair_loss
from stepagent.ops.rewards import step_rewards as step_rewards
from stepagent.ops.sums import step_sums as step_sums
from stepagent.ops.token_diff import logprob_diff as logprob_diff
from stepagent.ops.tokens import token_logprobs as token_logprobs
