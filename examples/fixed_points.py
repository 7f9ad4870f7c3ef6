"""Where each form of StepAgent comes to rest when the policy cannot be the expert.

    python examples/fixed_points.py [seeds]

One state of the expert, all expectations exact. An action is a text of five letters out of four;
the policy only knows the letter before (a bigram), so that it cannot hold several phrasings apart;
the expert has K of them. "valid" is the probability of any of the expert's texts at temperature 1,
"phrasings" the number of them that are in use: exp of their entropy.

It answers one question: at the expert's own states, what does training against the agent's samples
give that supervised training does not? docs/convergence.md has the laws; tests/test_fixed_points.py
holds this file to them. Equations: `stepagent.reference`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LETTERS, LENGTH = 4, 5
TEXTS = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))  # (A, length)
BEFORE = torch.cat([torch.zeros(len(TEXTS), 1, dtype=torch.long), TEXTS[:, :-1]], dim=1)


def untrained() -> Tensor:
    """Logits of the uniform policy: (length, letters before, letters)."""
    return torch.zeros(LENGTH, LETTERS, LETTERS, dtype=torch.float64)


def log_policy(logits: Tensor) -> Tensor:
    """(A,) log π of every text."""
    steps = logits.log_softmax(-1)
    return torch.stack([steps[i, BEFORE[:, i], TEXTS[:, i]] for i in range(LENGTH)]).sum(0)


def random_expert(phrasings: int, seed: int) -> Tensor:
    """(A,) π_E: this many texts, each with a share of its own."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.zeros(len(TEXTS), dtype=torch.float64)
    chosen = torch.randperm(len(TEXTS), generator=generator)[:phrasings]
    shares = 0.2 + torch.rand(phrasings, generator=generator, dtype=torch.float64)
    expert[chosen] = shares / shares.sum()
    return expert


def greedy(logits: Tensor) -> Tensor:
    """(A,) all probability on the text of the likeliest letters."""
    text, letter = 0, 0
    for i in range(LENGTH):
        letter = int(logits[i, letter].argmax())
        text = text * LETTERS + letter
    return torch.nn.functional.one_hot(torch.tensor(text), len(TEXTS)).double()


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """(A,) the policy's texts drawn letter by letter at this temperature; 0 is greedy."""
    return log_policy(logits / temperature).exp() if temperature else greedy(logits)


# -- losses: of logits, exact ----------------------------------------------------------------------


def sft_loss(logits: Tensor, expert: Tensor) -> Tensor:
    """−E_{a ~ π_E} log π(a)."""
    return -(expert * log_policy(logits)).sum()


def implicit_loss(
    logits: Tensor, expert: Tensor, reference: Tensor, negatives: Tensor, beta: float = 1.0
) -> Tensor:
    """−E log σ(r(a_E) − r(â)), r = β (log π − log π_ref), over a_E ~ π_E and â ~ ``negatives``."""
    rewards = beta * (log_policy(logits) - log_policy(reference))
    own, other = expert.nonzero().squeeze(1), negatives.nonzero().squeeze(1)
    margins = rewards[own, None] - rewards[other]
    return -(expert[own, None] * negatives[other] * logsigmoid(margins)).sum()


def inverse_rewards(policy: Tensor, expert: Tensor, form: str) -> Tensor:
    """(A,) of the best discriminator D* = π / (π + π_E): −log D*, or log (1 − D*)/D*."""
    if form == "agent":
        return torch.log1p(expert / policy)
    return torch.log((expert + 1e-6) / policy)


def inverse_loss(logits: Tensor, reference: Tensor, rewards: Tensor, tau: float = 1.0) -> Tensor:
    """−E_π[r] + τ KL(π ‖ π_ref)."""
    log_pi = log_policy(logits)
    return (log_pi.exp() * (tau * (log_pi - log_policy(reference)) - rewards)).sum()


# -- training --------------------------------------------------------------------------------------


def descend(
    logits: Tensor, loss: Callable[[Tensor], Tensor], updates: int, learning_rate: float
) -> Tensor:
    """The logits after this many updates of Adam."""
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    for _ in range(updates):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
    return logits.detach()


def supervised(expert: Tensor, updates: int = 1500) -> Tensor:
    """SFT from the uniform policy."""
    return descend(untrained(), lambda x: sft_loss(x, expert), updates, 0.05)


def implicit(
    logits: Tensor, expert: Tensor, cycles: int = 6, temperature: float = 1.0, updates: int = 150
) -> Tensor:
    """Cycles of the implicit form: the reference is each cycle's first policy."""
    for _ in range(cycles):
        reference, negatives = logits, at_temperature(logits, temperature)
        logits = descend(
            reference,
            lambda x, r=reference, n=negatives: implicit_loss(x, expert, r, n),
            updates,
            0.01,
        )
    return logits


def inverse(
    logits: Tensor, expert: Tensor, form: str = "agent", cycles: int = 12, updates: int = 150
) -> Tensor:
    """Cycles of the inverse form with the best discriminator."""
    for _ in range(cycles):
        reference = logits
        rewards = inverse_rewards(log_policy(reference).exp(), expert, form)
        logits = descend(
            reference, lambda x, r=reference, v=rewards: inverse_loss(x, r, v), updates, 0.01
        )
    return logits


# -- measures --------------------------------------------------------------------------------------


def valid(logits: Tensor, expert: Tensor) -> float:
    """The probability of any of the expert's texts."""
    return float(log_policy(logits).exp()[expert > 0].sum())


def phrasings_in_use(logits: Tensor, expert: Tensor) -> float:
    """exp of the entropy among the expert's texts."""
    shares = log_policy(logits).exp()[expert > 0]
    return float(torch.distributions.Categorical(shares).entropy().exp())


def jensen_shannon(logits: Tensor, expert: Tensor) -> Tensor:
    """JS(π ‖ π_E) in nats."""
    log_pi = log_policy(logits)
    middle = (log_pi.exp() + expert) / 2
    taken = expert > 0
    to_expert = (expert[taken] * (expert[taken] / middle[taken]).log()).sum()
    return ((log_pi.exp() * (log_pi - middle.log())).sum() + to_expert) / 2


def arms(expert: Tensor) -> dict[str, Tensor]:
    """Each way to learn from this expert, by the name that the table gives it."""
    early, converged = supervised(expert, 25), supervised(expert)
    return {
        "SFT, 25 updates": early,
        "SFT, converged": converged,
        "implicit, from 25 updates": implicit(early, expert),
        "implicit, from converged": implicit(converged, expert),
        "implicit, negatives at T = 0.5": implicit(converged, expert, temperature=0.5),
        "implicit, greedy negatives": implicit(converged, expert, temperature=0.0),
        "inverse, −log D": inverse(converged, expert),
        "inverse, log (1 − D)/D": inverse(converged, expert, form="difference"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", type=int, nargs="?", default=3)
    seeds = range(parser.parse_args().seeds)
    for count in (1, 4, 12):
        results: dict[str, list[tuple[float, float]]] = {}
        for seed in seeds:
            expert = random_expert(count, seed)
            for name, logits in arms(expert).items():
                measured = (valid(logits, expert), phrasings_in_use(logits, expert))
                results.setdefault(name, []).append(measured)
        print(f"\nK = {count}, {len(seeds)} seeds       valid (sd)      phrasings")
        for name, values in results.items():
            rates, used = zip(*values, strict=True)
            spread = stdev(rates) if len(rates) > 1 else 0.0
            print(f"  {name:32} {mean(rates):.3f} ({spread:.3f})   {mean(used):.1f}", flush=True)


if __name__ == "__main__":
    main()
