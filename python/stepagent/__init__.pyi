from .config import StepAgentConfig as StepAgentConfig
from .encoding import Trunk as Trunk
from .encoding import encode as encode
from .exports import tree_kwargs as tree_kwargs
from .exports import trl_row as trl_row
from .inspection import Branch as Branch
from .inspection import inspect as inspect
from .losses import implicit_step_loss as implicit_step_loss
from .models import check_tree_support as check_tree_support
from .models import score_trees as score_trees
from .ops import linear_logprobs as linear_logprobs
from .ops import logprob_diff as logprob_diff
from .ops import step_rewards as step_rewards
from .ops import step_sums as step_sums
from .ops import token_logprobs as token_logprobs
from .packing import balance as balance
from .packing import pack_bins as pack_bins
from .packing import train_flops as train_flops
from .rollout import rollout_and_query as rollout_and_query
from .trainer import StepAgentTrainer as StepAgentTrainer
from .trajectory import Trajectory as Trajectory
from .trajectory import load_trajectories as load_trajectories
from .trajectory import save_trajectories as save_trajectories
from .tree import TokenTree as TokenTree
from .tree import pack_sequences as pack_sequences
from .tree import pack_step_pairs as pack_step_pairs

__version__: str
__all__: list[str]
