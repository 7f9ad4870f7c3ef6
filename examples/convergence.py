"""Does the agent's action distribution converge to the expert's? Tabular policies say when.

StepAgent's claim (arXiv 2411.03817), put to the test where everything can be computed: one state, V
actions, a policy that is a softmax of V logits, an expert π_E, a cycle minimised exactly.

* implicit, reference reset each cycle, minimised fully:  π' ∝ π · (π_E / π)^{1/β}.
  The error of log π is multiplied by 1 − 1/β: it converges for β > ½, at once for β = 1.
* implicit, few gradient steps a cycle: each is β / 2 of a step of supervised learning, and
  converges for small β too.
* inverse, the best discriminator D* = π / (π + π_E), KL-regularised improvement:
  π' ∝ π · exp(r / τ). With the paper's r = −log D* it is π · (1 + π_E / π)^{1/τ}: (π + π_E) / 2 for
  τ = 1; near the expert the error shrinks by 1 − 1/(2τ), so it converges for τ > ¼. With
  r = log π_E − log π (the difference form) it is the implicit law, with τ for β.

    python examples/convergence.py                 # writes convergence.png and .json, in seconds
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import stepagent as sa

Policy = Tensor  # (V,) float64 log-probabilities


def random_policies(seed: int, actions: int = 5) -> tuple[Policy, Policy]:
    """A policy and an expert; both give every action some probability."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, actions, generator=g, dtype=torch.float64).log_softmax(1))


def total_variation(log_p: Policy, log_q: Policy) -> float:
    """TV = ½ Σ |p − q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum().item()


# ------------------------------------------------------------------ the implicit form


def implicit_cycle(log_pi: Policy, log_expert: Policy, beta: float) -> Policy:
    """π' ∝ π · (π_E / π)^{1/β}, the minimiser of `implicit_loss`."""
    return (log_pi + (log_expert - log_pi) / beta).log_softmax(0)


def implicit_loss(logits: Tensor, log_pi: Policy, log_expert: Policy, beta: float) -> Tensor:
    """E −log σ(r(a_E) − r(â)) over a_E ~ π_E and â ~ π, every pair of actions weighed exactly."""
    actions = len(log_pi)
    one_token_each = torch.arange(actions + 1)
    rewards = sa.step_rewards(logits.log_softmax(0), log_pi, one_token_each, beta=beta)
    expert, agent = torch.meshgrid(torch.arange(actions), torch.arange(actions), indexing="ij")
    weights = (log_expert[:, None] + log_pi[None, :]).exp()
    loss = sa.implicit_step_loss(rewards[expert.flatten()], rewards[agent.flatten()])
    return (weights.flatten() * loss).sum()


def implicit_hessian(logits: Tensor, log_pi: Policy, log_expert: Policy, beta: float) -> Tensor:
    """β² Σ_ab w_ab σ(m) σ(−m) (e_a − e_b)(e_a − e_b)ᵀ, with the margin m = r_a − r_b of a pair."""
    rewards = beta * (logits - log_pi)
    margins = rewards[:, None] - rewards[None, :]
    curvature = torch.sigmoid(margins) * torch.sigmoid(-margins)
    pairs = beta**2 * (log_expert[:, None] + log_pi[None, :]).exp() * curvature
    pairs = pairs + pairs.T
    return torch.diag(pairs.sum(1)) - pairs


def solve_implicit(log_pi: Policy, log_expert: Policy, beta: float) -> Policy:
    """The cycle's loss minimised by Newton's method with backtracking; it is convex."""

    def loss(logits: Tensor) -> Tensor:
        return implicit_loss(logits, log_pi, log_expert, beta)

    logits = log_pi.clone()
    for _ in range(100):
        gradient = torch.autograd.functional.jacobian(loss, logits)
        if gradient.abs().max() < 1e-14:
            break
        # A shift of all logits changes nothing: the Hessian has one direction of 0.
        hessian = implicit_hessian(logits, log_pi, log_expert, beta)
        step = torch.linalg.pinv(hessian, hermitian=True) @ gradient
        size = 1.0
        while loss(logits - size * step) > loss(logits) and size > 1e-6:
            size /= 2
        logits = logits - size * step
    return logits.log_softmax(0)


def descend_implicit(
    log_pi: Policy, log_expert: Policy, beta: float, *, updates: int, learning_rate: float
) -> Policy:
    """A cycle of so many gradient steps."""
    logits = log_pi.clone()
    for _ in range(updates):
        gradient = torch.autograd.functional.jacobian(
            lambda x: implicit_loss(x, log_pi, log_expert, beta), logits
        )
        logits = logits - learning_rate * gradient
    return logits.log_softmax(0)


# ------------------------------------------------------------------ the inverse form


def inverse_cycle(
    log_pi: Policy, log_expert: Policy, temperature: float, form: str = "agent"
) -> Policy:
    """π' ∝ π · exp(r / τ) for the best discriminator, whose logit is log π − log π_E."""
    rewards = sa.inverse_step_reward(log_pi - log_expert, form=form)
    return (log_pi + rewards / temperature).log_softmax(0)


# ------------------------------------------------------------------ curves


def curve(cycle, seed: int, cycles: int) -> list[float]:
    """Total variation to the expert before the first cycle and after each."""
    log_pi, log_expert = random_policies(seed)
    distances = [total_variation(log_pi, log_expert)]
    for _ in range(cycles):
        log_pi = cycle(log_pi, log_expert)
        distances.append(total_variation(log_pi, log_expert))
    return distances


CASES = {
    **{
        f"implicit, β = {beta}, solved": lambda p, e, beta=beta: implicit_cycle(p, e, beta)
        for beta in (0.3, 0.45, 0.6, 1.0, 2.0)
    },
    "implicit, β = 0.1, four updates": lambda p, e: descend_implicit(
        p, e, 0.1, updates=4, learning_rate=10.0
    ),
    **{
        f"inverse, τ = {tau}": lambda p, e, tau=tau: inverse_cycle(p, e, tau)
        for tau in (0.2, 0.5, 1.0, 2.0)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("convergence"))
    args = parser.parse_args()
    curves = {
        name: [curve(cycle, seed, args.cycles) for seed in range(args.seeds)]
        for name, cycle in CASES.items()
    }
    args.output.with_suffix(".json").write_text(json.dumps(curves))
    plot(curves, args.output.with_suffix(".png"))
    for name, runs in curves.items():
        last = torch.tensor([run[-1] for run in runs])
        print(f"{name:32} TV after {args.cycles} cycles: {last.min():.2g} … {last.max():.2g}")
    print(f"Wrote {args.output}.json and {args.output}.png")


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """The median over seeds, cycle by cycle, and the range around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, form in zip(figure.subplots(1, 2, sharey=True), ("implicit", "inverse"), strict=True):
        for name, runs in curves.items():
            if not name.startswith(form):
                continue
            distances = torch.tensor(runs).clamp(min=1e-12)
            x = range(distances.shape[1])
            (line,) = axes.plot(x, distances.median(0).values, label=name.removeprefix(f"{form}, "))
            low, high = distances.min(0).values, distances.max(0).values
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set(title=form, xlabel="cycle", yscale="log", ylim=(1e-6, 1.5))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    figure.axes[0].set_ylabel("total variation to the expert")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
