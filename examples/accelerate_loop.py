"""The loop of plain_loop.py under Accelerate: DDP or FSDP2 by `accelerate launch`, nothing else.

python examples/accelerate_loop.py                      # one process
accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py
"""

import copy

import torch
from accelerate import Accelerator
from plain_loop import data, pairs_of

import stepagent as sa
from stepagent.tools.small_models import small_llama


def train(steps=5, accelerator=None):
    accelerator = accelerator or Accelerator()
    trunk, branches, tokenizer = data()
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=32, layers=2)
    reference = copy.deepcopy(model).eval().to(accelerator.device)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    trees = sa.pack_step_pairs([trunk], [branches])  # each process would take its own trajectories
    expert, agent = pairs_of(trees[0])
    with torch.no_grad():
        ref_logps = sa.score_trees(reference, trees)
    losses = []
    for _ in range(steps):
        logps = sa.score_trees(model, trees)  # the outermost module: its hooks see the forward
        loss_P = sa.step_pair_loss(logps, ref_logps, trees[0].step_offsets, expert, agent, beta=1.0)
        optimizer.zero_grad()
        accelerator.backward(loss_P.mean())
        optimizer.step()
        losses.append(accelerator.gather(loss_P.detach()).mean().item())
    return losses


if __name__ == "__main__":
    print(" ".join(f"{loss:.4f}" for loss in train()))
