"""StepAgent's implicit loss in a loop of plain PyTorch: a trajectory, what was tried, an optimiser.

python examples/plain_loop.py        # a tiny model from scratch, offline, in seconds
"""

import copy

import numpy as np
import torch

import stepagent as sa
from stepagent.tools.small_models import small_llama, word_tokenizer

STEPS = [  # what the expert saw and did, and what the agent would have done there
    ("go to the red ball . red ball 1 left", "turn left", "turn right"),
    ("red ball 3 ahead", "go forward", "turn left"),
    ("you are at the red ball", "stop", "go forward"),
]


def data():
    """The expert's trunk, the agent's actions at its steps, and a tokenizer of both."""

    def said(seen, done):
        return [{"role": "user", "content": seen}, {"role": "assistant", "content": done}]

    expert = sa.Trajectory([message for seen, done, _ in STEPS for message in said(seen, done)])
    tried = [sa.Trajectory(said("stop", text)) for *_, text in STEPS]
    tokenizer = word_tokenizer([expert, *tried])
    trunks = [sa.encode(trajectory, tokenizer) for trajectory in tried]
    actions = [trunk.input_ids[slice(*trunk.action_spans[0])] for trunk in trunks]
    return sa.encode(expert, tokenizer), [[action] for action in actions], tokenizer


def pairs_of(tree):
    """The expert's step and the agent's of each pair: branch 0 is the trunk's own action."""
    agent = np.flatnonzero(tree.step_branch > 0)
    return agent - tree.step_branch[agent], agent


def train(steps=5):
    trunk, branches, tokenizer = data()
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=32, layers=2)
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trees = sa.pack_step_pairs([trunk], [branches])
    expert, agent = pairs_of(trees[0])
    with torch.no_grad():
        ref_logps = sa.score_trees(reference, trees)
    losses = []
    for _ in range(steps):
        logps = sa.score_trees(model, trees)
        loss_P = sa.step_pair_loss(logps, ref_logps, trees[0].step_offsets, expert, agent, beta=1.0)
        optimizer.zero_grad()
        loss_P.mean().backward()
        optimizer.step()
        losses.append(loss_P.mean().item())
    return losses


if __name__ == "__main__":
    print(" ".join(f"{loss:.4f}" for loss in train()))
