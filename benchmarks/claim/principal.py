"""A principal that pays to change the rewards of an unknown bandit learner: MERMAIDE's claim.

    python benchmarks/claim/principal.py --seeds 20 --json benchmarks/results/principal.json

MERMAIDE (arXiv 2304.04668) in miniature. Ten arms, a learner of a kind that the principal has not
met, and a target arm that is not the best one. At each step the principal may intervene: the target
pays 1 more, all other arms 1 less. It sees which arms are pulled, and earns 1[target] − c for an
intervention. It is trained on other kinds of learners, then meets a new one: 0-shot, or after one
episode and one step of gradient on it (1-shot).

Four principals, a logistic policy each, trained by REINFORCE on equally many episodes:

    pooled           on all learners of the training kinds at once
    meta             Reptile (first order; the paper has MAML): adapt to one learner, go partly to
                     where that led
    pooled + model   the policy also sees what a model of the learner predicts: P(target next) as
    meta + model     things are, and how much an intervention changes it; a logistic model over
                     traces of pulls and interventions at three time scales (the paper: recurrent)

The paper claims: meta + model above meta alone and model alone, 0- and 1-shot. Learning rates were
chosen on seeds that are not among those reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

Array = NDArray[Any]
ARMS, STEPS, COST, BATCH = 10, 100, 0.3, 16
KINDS = ("epsilon-greedy", "UCB", "Thompson", "EXP3")
SPLITS = ((("epsilon-greedy", "UCB"), ("Thompson", "EXP3")), (("Thompson", "EXP3"), KINDS[:2]))
METHODS = ("pooled", "meta", "pooled + model", "meta + model")
DECAYS = np.array([0.5, 0.8, 0.95])
POLICY_RATE, MODEL_RATE, OUTER_RATE, GAMMA = 2.0, 0.3, 0.3, 1.0


@dataclass
class Learners:
    """N bandit learners, each with a kind, a knob in [0, 1] of how much it explores, and a bandit.

    They see rewards alone, the principal's included.
    """

    kind_N: Array
    knob_N: Array
    draws: np.random.Generator

    def __post_init__(self) -> None:
        shape = (len(self.kind_N), ARMS)
        self.means_NA = self.draws.random(shape)
        best_N = self.means_NA.argmax(1)
        self.target_N = (best_N + self.draws.integers(1, ARMS, len(best_N))) % ARMS
        self._pulls_NA, self._sums_NA, self._gains_NA = (np.zeros(shape) for _ in range(3))
        self._chances_NA = np.full(shape, 1 / ARMS)
        self._rows = np.arange(len(self.kind_N))

    def act(self, step: int) -> Array:
        """(N,) the arms that are pulled."""
        means_NA = self._sums_NA / np.maximum(self._pulls_NA, 1)
        knob_N1, noise_NA = self.knob_N[:, None], self.draws.standard_normal(means_NA.shape)
        greedy_NA = means_NA + 1e-6 * noise_NA
        explore_N = self.draws.random(len(means_NA)) < 0.02 + 0.3 * self.knob_N
        greedy_NA[explore_N] = noise_NA[explore_N]
        width_NA = np.sqrt(np.log(step + 1) / np.maximum(self._pulls_NA, 1e-2))
        sampled_NA = means_NA + (0.3 + knob_N1) * noise_NA / np.sqrt(self._pulls_NA + 1)
        share_N1 = 0.05 + 0.3 * knob_N1
        logits_NA = share_N1 / 3 * self._gains_NA  # K times EXP3's own: there are few steps
        odds_NA = np.exp(logits_NA - logits_NA.max(1, keepdims=True))
        self._chances_NA = (1 - share_N1) * odds_NA / odds_NA.sum(1, keepdims=True)
        self._chances_NA += share_N1 / ARMS
        gumbel_NA = -np.log(self.draws.exponential(size=means_NA.shape))
        scores = {
            "epsilon-greedy": greedy_NA,
            "UCB": means_NA + (0.3 + knob_N1) * width_NA + 1e-6 * noise_NA,
            "Thompson": sampled_NA,
            "EXP3": np.log(self._chances_NA) + gumbel_NA,
        }
        stacked = np.stack([scores[kind] for kind in KINDS])
        arm_N: Array = stacked[self.kind_N, self._rows].argmax(1)
        return arm_N

    def learn(self, arm_N: Array, bonus_N: Array) -> None:
        """See the reward of the arm that was pulled, with what the principal adds to it."""
        noise_N = 0.1 * self.draws.standard_normal(len(arm_N))
        sign_N = np.where(arm_N == self.target_N, 1.0, -1.0)
        reward_N = self.means_NA[self._rows, arm_N] + noise_N + sign_N * bonus_N
        self._pulls_NA[self._rows, arm_N] += 1
        self._sums_NA[self._rows, arm_N] += reward_N
        scaled_N = np.clip((reward_N + 1) / 3, 0, 1)
        self._gains_NA[self._rows, arm_N] += scaled_N / self._chances_NA[self._rows, arm_N]


class Traces:
    """What the principal has seen of N learners: fading traces of pulls and interventions."""

    def __init__(self, size: int) -> None:
        self._hit_ND, self._paid_ND, self._both_ND = (np.zeros((size, 3)) for _ in range(3))
        self._hits_N, self._paid_N = np.zeros(size), np.zeros(size)

    def see(self, hit_N: Array, paid_N: Array) -> None:
        for trace_ND, value_N in (
            (self._hit_ND, hit_N),
            (self._paid_ND, paid_N),
            (self._both_ND, hit_N * paid_N),
        ):
            trace_ND *= DECAYS
            trace_ND += (1 - DECAYS) * value_N[:, None]
        self._hits_N += hit_N
        self._paid_N += paid_N

    def policy(self, step: int) -> Array:
        """(N, F), of the policy."""
        ones = np.ones(len(self._hits_N))
        parts = (ones, ones * step / STEPS, self._hit_ND[:, 1], self._paid_ND[:, 1])
        return np.stack([*parts, self._hits_N / (step + 1), self._paid_N / (step + 1)], axis=1)

    def model(self, paid_N: Array) -> Array:
        """(N, G), of the model, if the principal now pays or not."""
        ones = np.ones((len(paid_N), 1))
        own = (ones, self._hit_ND, self._paid_ND, self._both_ND, paid_N[:, None])
        return np.concatenate([*own, paid_N[:, None] * self._hit_ND], axis=1)


POLICY, SEEN, MODEL = 6, 2, 14


def logistic(logit: Array) -> Array:
    p: Array = 1 / (1 + np.exp(-np.clip(logit, -30, 30)))
    return p


@dataclass
class Principal:
    """One logistic policy and one model for each of N learners; rows of a seed begin alike."""

    policy_NF: Array
    model_NG: Array
    uses_model: bool

    def copy(self) -> Principal:
        return Principal(self.policy_NF.copy(), self.model_NG.copy(), self.uses_model)

    def inputs(self, traces: Traces, step: int) -> Array:
        seen_NF = traces.policy(step)
        zero_N = np.zeros(len(seen_NF))
        if not self.uses_model:
            return np.concatenate([seen_NF, np.zeros((len(seen_NF), SEEN))], axis=1)
        idle_N, paid_N = (
            logistic((self.model_NG * traces.model(flag)).sum(1)) for flag in (zero_N, zero_N + 1)
        )
        return np.concatenate([seen_NF, np.stack([idle_N, paid_N - idle_N], axis=1)], axis=1)


@dataclass
class Rollout:
    """T steps of N learners: inputs, interventions, hits, and what the model reads."""

    input_TNF: Array
    chance_TN: Array
    paid_TN: Array
    hit_TN: Array
    model_TNG: Array

    @property
    def payoff_TN(self) -> Array:
        return self.hit_TN - COST * self.paid_TN


def play(principal: Principal | Callable[[int, Array], Array], learners: Learners) -> Rollout:
    """An episode with each learner; a function gives the chance of an intervention by itself."""
    size, draws = len(learners.kind_N), learners.draws
    traces, columns = Traces(size), []
    for step in range(STEPS):
        if isinstance(principal, Principal):
            input_NF = principal.inputs(traces, step)
            chance_N = logistic((principal.policy_NF * input_NF).sum(1))
        else:
            input_NF = np.zeros((size, POLICY + SEEN))
            chance_N = principal(step, np.zeros(size))
        paid_N = (draws.random(size) < chance_N).astype(float)
        model_NG = traces.model(paid_N)
        arm_N = learners.act(step)
        hit_N = (arm_N == learners.target_N).astype(float)
        learners.learn(arm_N, paid_N)
        traces.see(hit_N, paid_N)
        columns.append((input_NF, chance_N, paid_N, hit_N, model_NG))
    return Rollout(*(np.stack(column) for column in zip(*columns, strict=True)))


def gradients(rollout: Rollout, groups: int, baseline_TS: Array | None) -> tuple[Array, Array]:
    """Of REINFORCE and of the model's likelihood, a mean over each of the groups of learners."""
    togo_TN = np.zeros_like(rollout.payoff_TN)
    ahead_N = np.zeros(togo_TN.shape[1])
    for step in reversed(range(STEPS)):
        ahead_N = rollout.payoff_TN[step] + GAMMA * ahead_N
        togo_TN[step] = ahead_N
    togo_TSB = togo_TN.reshape(STEPS, groups, -1)
    mean_TS1 = togo_TSB.mean(2, keepdims=True) if baseline_TS is None else baseline_TS[:, :, None]
    advantage_TN = (togo_TSB - mean_TS1).reshape(STEPS, -1)
    push_TN = (rollout.paid_TN - rollout.chance_TN) * advantage_TN
    policy_NF = np.einsum("tn,tnf->nf", push_TN, rollout.input_TNF) / STEPS
    # The pull of a step follows what was paid before it: the model reads what is known there.
    before_TNG, next_TN = rollout.model_TNG[:-1], rollout.hit_TN[1:]
    return policy_NF, np.stack([before_TNG, next_TN[..., None] + 0 * before_TNG])


def step_of(principal: Principal, rollout: Rollout, groups: int, baseline: Array | None) -> None:
    """One step of gradient for each group: of the policy, and of the model where there is one."""
    policy_NF, (before_TNG, next_TNG) = gradients(rollout, groups, baseline)

    def by_group(value_NX: Array) -> Array:
        mean = value_NX.reshape(groups, -1, value_NX.shape[-1]).mean(1, keepdims=True)
        shape = (groups, len(value_NX) // groups, value_NX.shape[-1])
        return np.broadcast_to(mean, shape).reshape(value_NX.shape)

    slope_NF = by_group(policy_NF)
    size_N1 = np.linalg.norm(slope_NF, axis=1, keepdims=True)
    principal.policy_NF += POLICY_RATE * slope_NF / np.maximum(1, size_N1 / 0.3)
    if not principal.uses_model:
        return
    for _ in range(5):
        off_TN = next_TNG[..., 0] - logistic((before_TNG * principal.model_NG).sum(2))
        slope_NG = np.einsum("tn,tng->ng", off_TN, before_TNG) / STEPS
        principal.model_NG += MODEL_RATE * by_group(slope_NG)


def train(method: str, kinds: tuple[str, ...], seeds: int, first: int, rounds: int) -> Any:
    """(policy, model, baseline) of each seed, after ``rounds`` of two batches each."""
    draws, meta = np.random.default_rng(first), method.startswith("meta")
    size, known = seeds * BATCH, np.array([KINDS.index(kind) for kind in kinds])
    policy_SF, model_SG = np.zeros((seeds, POLICY + SEEN)), np.zeros((seeds, MODEL))
    baseline_TS = np.zeros((STEPS, seeds))
    for _ in range(rounds):
        rows = np.repeat(np.arange(seeds), BATCH)
        kind_N, knob_N = draws.choice(known, size), draws.random(size)
        if meta:  # one learner a seed, many bandits
            kind_N, knob_N = draws.choice(known, seeds)[rows], draws.random(seeds)[rows]
        inner = Principal(policy_SF[rows], model_SG[rows], "model" in method)
        for _ in range(2):
            rollout = play(inner, Learners(kind_N, knob_N, draws))
            step_of(inner, rollout, seeds, None)
            togo_TN = np.zeros_like(rollout.payoff_TN)
            ahead_N = np.zeros(size)
            for step in reversed(range(STEPS)):
                ahead_N = rollout.payoff_TN[step] + GAMMA * ahead_N
                togo_TN[step] = ahead_N
            baseline_TS += 0.1 * (togo_TN.reshape(STEPS, seeds, BATCH).mean(2) - baseline_TS)
        share = OUTER_RATE if meta else 1.0
        policy_SF += share * (inner.policy_NF[::BATCH] - policy_SF)
        model_SG += share * (inner.model_NG[::BATCH] - model_SG)
    return policy_SF, model_SG, baseline_TS


def measure(
    found: Any, method: str, kinds: tuple[str, ...], seeds: int, shots: int, first: int
) -> dict[str, list[float]]:
    """Of each seed over 64 learners of new kinds: payoff, target rate and interventions a step."""
    draws, per = np.random.default_rng(first + 1), 64
    policy_SF, model_SG, baseline_TS = found
    rows = np.repeat(np.arange(seeds), per)
    kind_N = draws.choice([KINDS.index(kind) for kind in kinds], len(rows))
    knob_N = draws.random(len(rows))
    principal = Principal(policy_SF[rows], model_SG[rows], "model" in method)
    for _ in range(shots):  # each learner has a principal of its own from here on
        rollout = play(principal, Learners(kind_N, knob_N, draws))
        step_of(principal, rollout, len(rows), baseline_TS[:, rows])
    return figures(play(principal, Learners(kind_N, knob_N, draws)), seeds)


def figures(rollout: Rollout, seeds: int) -> dict[str, list[float]]:
    parts = {"payoff": rollout.payoff_TN, "target": rollout.hit_TN, "paid": rollout.paid_TN}
    return {name: v.mean(0).reshape(seeds, -1).mean(1).tolist() for name, v in parts.items()}


def fixed(kinds: tuple[str, ...], seeds: int, first: int) -> dict[str, dict[str, list[float]]]:
    """What needs no learning: never, always, half of the time, the first 30 steps."""
    rules: dict[str, Callable[[int, Array], Array]] = {
        "never": lambda step, zero_N: zero_N,
        "always": lambda step, zero_N: zero_N + 1,
        "at random, half": lambda step, zero_N: zero_N + 0.5,
        "the first 30 steps": lambda step, zero_N: zero_N + (step < 30),
    }
    found = {}
    for name, rule in rules.items():
        draws = np.random.default_rng(first + 1)
        kind_N = draws.choice([KINDS.index(kind) for kind in kinds], seeds * 64)
        found[name] = figures(play(rule, Learners(kind_N, draws.random(seeds * 64), draws)), seeds)
    return found


def table(cells: list[dict[str, Any]]) -> str:
    """Means over seeds and both splits, and differences paired by seed."""
    from stepagent.evaluation import bootstrap

    lines = ["| principal | shots | payoff a step | target rate | interventions a step |"]
    lines.append("|---" * 5 + "|")
    names = dict.fromkeys((c["method"], c["shots"]) for c in cells)

    def values(method: str, shots: Any, name: str) -> Array:
        own = [c[name] for c in cells if (c["method"], c["shots"]) == (method, shots)]
        return np.array(own).mean(0)

    for method, shots in names:
        means = [
            f"{values(method, shots, name).mean():.3f}" for name in ("payoff", "target", "paid")
        ]
        lines.append(f"| {method} | {'' if shots is None else shots} | {' | '.join(means)} |")
    lines += [
        "",
        "| difference of payoff | shots | mean | 95 % interval over seeds |",
        "|---" * 4 + "|",
    ]
    pairs = [("meta + model", rival) for rival in METHODS[:3]]
    for better, rival in [*pairs, ("pooled + model", "pooled"), ("meta", "pooled")]:
        for shots in (0, 1):
            apart = values(better, shots, "payoff") - values(rival, shots, "payoff")
            interval = bootstrap(apart.tolist())
            lines.append(
                f"| {better} − {rival} | {shots} | {apart.mean():+.4f} "
                f"| {interval.low:+.4f} … {interval.high:+.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="of the random numbers")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    started, cells = time.monotonic(), []
    for known, new in SPLITS:
        for name, found in fixed(new, args.seeds, args.first).items():
            cells.append({"method": name, "shots": None, "new": new, **found})
        for method in METHODS:
            trained = train(method, known, args.seeds, args.first, args.rounds)
            for shots in (0, 1):
                found = measure(trained, method, new, args.seeds, shots, args.first)
                cells.append({"method": method, "shots": shots, "new": new, **found})
                print(
                    f"{time.monotonic() - started:.0f} s: {new}, {method}, {shots}-shot: "
                    f"{np.mean(found['payoff']):.3f}",
                    file=sys.stderr,
                    flush=True,
                )
    print(table(cells))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "cells": cells}) + "\n")
        args.json.with_suffix(".md").write_text(table(cells) + "\n")


if __name__ == "__main__":
    main()
