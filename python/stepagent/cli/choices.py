"""What some options may be: names at home in modules that load torch, which help must not.

A test holds them to those modules.
"""

SUITES = ("tiny", "cpu", "gpu")
OPS = (
    "token_logprobs",
    "logprob_diff",
    "linear_logprobs",
    "linear_logprobs_frozen",
    "step_rewards",
    "linear_logprob_diff",
)
PROVIDERS = (
    "stepagent",
    "stepagent-kept",
    "stepagent-again",
    "stepagent-invariant",
    "stepagent-graphed",
    "torch",
    "torch-fp32",
    "torch-scored",
    "torch-compile",
    "trl",
    "trl-scored",
    "liger-scaled-ce",
    "liger-flce",
    "verl",
)
TREE_ATTENTION = ("eager", "flex_attention", "sdpa")
