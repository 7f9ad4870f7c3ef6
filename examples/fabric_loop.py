"""The loop of plain_loop.py under Lightning Fabric (lightning-fabric 2.6).

python examples/fabric_loop.py
"""

import copy

import torch
from lightning_fabric import Fabric
from plain_loop import data, pairs_of

import stepagent as sa
from stepagent.tools.small_models import small_llama


def train(steps=5):
    fabric = Fabric(accelerator="cpu", devices=1)
    trunk, branches, tokenizer = data()
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=32, layers=2)
    reference = copy.deepcopy(model).eval().to(fabric.device)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    trees = sa.pack_step_pairs([trunk], [branches])
    expert, agent = pairs_of(trees[0])
    with torch.no_grad():
        ref_logps = sa.score_trees(reference, trees)
    losses = []
    for _ in range(steps):
        logps = sa.score_trees(model, trees)
        loss_P = sa.step_pair_loss(logps, ref_logps, trees[0].step_offsets, expert, agent, beta=1.0)
        optimizer.zero_grad()
        fabric.backward(loss_P.mean())
        optimizer.step()
        losses.append(loss_P.mean().item())
    return losses


if __name__ == "__main__":
    print(" ".join(f"{loss:.4f}" for loss in train()))
