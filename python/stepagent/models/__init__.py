"""Hugging Face decoders: from a token tree to hidden rows and log-probs.

``attention.py`` lays trees out and masks them, ``head.py`` computes log-probs inside the model's
own forward, ``forward.py`` and ``scoring.py`` score trees, ``support.py`` refuses models that they
would make wrong, ``routing.py`` balances experts, ``wrappers.py`` finds the model in what training
puts around it.
"""

from .attention import attention_masks
from .forward import evaluation_mode
from .head import LMHead, ModuleHead, hidden_states, lm_head
from .routing import auxiliary_weight, recorded_routing
from .scoring import read_trees, score_trees
from .support import check_fits, check_tree_support, position_limit
from .wrappers import text_config, unwrapped

__all__ = [
    "LMHead",
    "ModuleHead",
    "attention_masks",
    "auxiliary_weight",
    "check_fits",
    "check_tree_support",
    "evaluation_mode",
    "hidden_states",
    "lm_head",
    "position_limit",
    "read_trees",
    "recorded_routing",
    "score_trees",
    "text_config",
    "unwrapped",
]
