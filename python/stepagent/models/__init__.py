"""Hugging Face decoders: from a token tree to hidden rows and log-probs.

``attention.py`` lays trees out and masks them, ``head.py`` computes log-probs inside the model's
own forward, ``scoring.py`` scores trees and refuses models that they would make wrong,
``wrappers.py`` finds the model in what training puts around it.
"""

from .attention import attention_masks
from .head import LMHead, hidden_states, lm_head
from .scoring import (
    check_fits,
    check_tree_support,
    evaluation_mode,
    position_limit,
    read_trees,
    score_trees,
)
from .wrappers import text_config, unwrapped

__all__ = [
    "LMHead",
    "attention_masks",
    "check_fits",
    "check_tree_support",
    "evaluation_mode",
    "hidden_states",
    "lm_head",
    "position_limit",
    "read_trees",
    "score_trees",
    "text_config",
    "unwrapped",
]
