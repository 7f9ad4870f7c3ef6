"""Evolve: a guideline climbs at Blackjack by paired acceptance, and what changes nothing stays out.

    python benchmarks/claim/evolve.py --output runs/evolve    # resumes

Searches: from the empty guideline, which is random play, by a proposer that adds, changes or drops
one rule at random. Each has its own proposals and its own seeds; one search is the unit. The
guidelines on the accepted path play 4,000 hands that decided nothing.

Nulls: proposals that are no better, in many short searches. "Same play" rewords the guideline.
"Other coins" plays as well and otherwise: hands without a rule are decided by a coin, and each
guideline has its own; "rarely" where one hand in fifty is such. Bets are differences of mean 0
that are not as likely as their negatives, of which the test knows nothing: a rare gain of 9 for a
stake of 1, and a rare loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.evaluation import bootstrap_runs, mean_interval, rate_interval
from stepagent.evaluation.sign_flips import sign_flip_interval
from stepagent.evolve import Caps, Evolved, Request, evolve
from stepagent.evolve.blackjack import Follower, follow, mutation, read_rules

HELD_OUT = 4000
APART = 10_000_000  # seeds of one search, and of the references
COINS = "# coin "
# All but soft hands against 5 and 6, of which there is one in fifty.
RARE = """\
Against 2 to ace: stand on hard 16 or more.
Against 2 to 4: stand on soft 18 or more.
Against 7 to ace: stand on soft 18 or more."""


class Mutator:
    """Adds, changes or drops a rule; its draws depend on the search and the proposal."""

    def __init__(self, seed: int) -> None:
        self.name, self._seed = f"mutation {seed}", seed

    def __call__(self, request: Request) -> str:
        rng = np.random.default_rng((self._seed, request.number))
        return mutation(read_rules(request.guideline), rng)


def search(folder: Path, seed: int, episodes: int, proposals: int) -> Evolved:
    """From random play, on seeds of its own."""
    return evolve(
        "blackjack",
        follow,
        "",
        Mutator(seed),
        folder / f"search-{seed}",
        episodes=episodes,
        held_out=HELD_OUT,
        children=proposals,
        caps=Caps(depth=proposals, proposals=proposals),
        seed_start=seed * APART,
        label=f"search {seed}",
    )


def told_search(found: Evolved) -> dict[str, Any]:
    """What a table and a picture need of it."""
    return {
        "episodes": found.episodes,
        "proposals": len(found.proposals) - 1,
        "guideline": found.guideline.split("\n"),
        "path": [
            {
                "number": one.number,
                "text": one.text,
                "difference": None if one.difference is None else vars(one.difference),
                "held_out": np.mean(one.payoffs),
                "held_out_gain": vars(gain) if (gain := found.held_out(one.number, 0)) else None,
            }
            for one in found.path
        ],
        "steps_up": [
            found.held_out(b.number, a.number).mean  # type: ignore[union-attr]
            for a, b in zip(found.path, found.path[1:], strict=False)
        ],
        "gains": np.subtract(found.path[-1].payoffs, found.path[0].payoffs).tolist(),
        "last": list(found.path[-1].payoffs),
    }


# ------------------------------------------------------------------------------------------ nulls


def coin_follower(guideline: str) -> Follower:
    """Its coin is the remark's."""
    coins = [line.removeprefix(COINS) for line in guideline.split("\n") if line.startswith(COINS)]
    return Follower(read_rules(guideline), seed=int(coins[-1]) if coins else 0)


def rewritten(request: Request) -> str:
    """The same rules, and a remark."""
    return f"{request.guideline}\n# reading {request.number}"


def other_coin(request: Request) -> str:
    """The same rules, and another coin."""
    return f"{request.guideline}\n{COINS}{request.number}"


@dataclass(frozen=True)
class Null:
    guideline: str
    propose: Callable[[Request], str]
    searches: int


NULLS = {
    "same play": Null(RARE, rewritten, 10),
    "other coins": Null("", other_coin, 60),
    "other coins, rarely": Null(RARE, other_coin, 60),
}
NULL_EPISODES, NULL_PROPOSALS = 200, 5


def null_searches(folder: Path, name: str, scale: float) -> dict[str, Any]:
    """How many of the proposals of many searches were accepted."""
    null, judged, accepted, differing = NULLS[name], 0, 0, []
    for seed in range(max(1, int(null.searches * scale))):
        found = evolve(
            "blackjack",
            coin_follower,
            null.guideline,
            null.propose,
            folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
            episodes=NULL_EPISODES,
            held_out=0,
            children=NULL_PROPOSALS,
            caps=Caps(proposals=NULL_PROPOSALS),
            seed_start=seed * APART,
        )
        children = [one for one in found.proposals[1:] if one.judged]
        judged += len(children)
        accepted += sum(one.accepted for one in children)
        differing += [one.difference.mean for one in children if one.difference is not None]
    rate = vars(rate_interval([True] * accepted + [False] * (judged - accepted)))
    return {
        "judged": judged,
        "accepted": accepted,
        "rate": rate,
        "differing": float(np.mean(np.array(differing) != 0)),
    }


def bets(gain: float, pairs: int, trials: int) -> dict[str, Any]:
    """Acceptances of differences of mean 0: ``gain`` with probability 1/(1 + |gain|), else ∓1."""
    rng = np.random.default_rng(0)
    won = rng.random((trials, pairs)) < 1 / (1 + abs(gain))
    differences = np.where(won, gain, -np.sign(gain))
    lows = [sign_flip_interval(row).low for row in differences]
    accepted = [low is not None and low > 0 for low in lows]
    return {"judged": trials, "accepted": sum(accepted), "rate": vars(rate_interval(accepted))}


# ----------------------------------------------------------------------------------------- results


def references(hands: int) -> dict[str, Any]:
    """Random play and the basic strategy, on seeds of their own."""
    found = {}
    for policy in (RandomPolicy(), ExpertPolicy()):
        seeds = range(99 * APART, 99 * APART + hands)
        paid = [sum(one.rewards) for one in run_episodes("blackjack", policy, seeds)]
        found[policy.name] = vars(mean_interval(paid, bounds=(-1.0, 1.0)))
    return found


def written(interval: dict[str, float | None], spec: str = "+.3f") -> str:
    """A mean with its ends."""
    ends = [interval["low"], interval["high"]]
    if None in ends:
        return f"{interval['mean']:{spec}}"
    return f"{interval['mean']:{spec}} ({ends[0]:{spec}} … {ends[1]:{spec}})"


def table(result: dict[str, Any]) -> str:
    """For people."""
    found, nulls = result["searches"], result["nulls"]
    lines = [
        f"Payoff a hand, {result['hands']:,} hands: random play "
        f"{written(result['references']['random'])}, the basic strategy "
        f"{written(result['references']['expert'])}.",
        "",
        f"{len(found)} searches of {found[0]['proposals']} proposals, {result['episodes']:,} pairs "
        f"of hands each; held out, {HELD_OUT:,} hands:",
        "",
        "| search | accepted | first guideline | last | last − first | steps up, of all |",
        "|---|---|---|---|---|---|",
    ]
    for seed, one in enumerate(found):
        first, last = one["path"][0], one["path"][-1]
        gain = written(last["held_out_gain"]) if last["held_out_gain"] else "0"
        up = sum(step > 0 for step in one["steps_up"])
        lines.append(
            f"| {seed} | {len(one['path']) - 1} | {first['held_out']:+.3f} | "
            f"{last['held_out']:+.3f} | {gain} | {up} of {len(one['steps_up'])} |"
        )
    lines += [
        "",
        f"Over searches: last − first {written(result['gain'])}, last {written(result['last'])}.",
        "",
        "| proposals that are no better | judged | accepted | share |",
        "|---|---|---|---|",
    ]
    for name, null in nulls.items():
        lines.append(
            f"| {name} | {null['judged']} | {null['accepted']} | {written(null['rate'], '.1%')} |"
        )
    return "\n".join(lines)


def picture(path: Path, result: dict[str, Any]) -> None:
    """The accepted paths: held-out payoff by proposal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for seed, one in enumerate(result["searches"]):
        xs = [step["number"] for step in one["path"]] + [one["proposals"]]
        ys = [step["held_out"] for step in one["path"]]
        axes.step(xs, [*ys, ys[-1]], where="post", linewidth=1.4, label=f"search {seed}")
        axes.plot(xs[:-1], ys, "o", markersize=3.5, color=axes.lines[-1].get_color())
    for name, label in (("expert", "basic strategy"), ("random", "random play")):
        level = result["references"][name]["mean"]
        axes.axhline(level, color="0.4", linewidth=0.9, linestyle="--")
        axes.annotate(label, (axes.get_xlim()[1], level), (-4, 4), textcoords="offset points",
                      ha="right", color="0.3", fontsize=9)  # fmt: skip
    axes.set_xlabel("proposal")
    axes.set_ylabel("payoff a hand, held out")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=144)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; what was done before is read."""
    found = [
        told_search(search(args.output, seed, args.episodes, args.proposals))
        for seed in range(args.searches)
    ]
    nulls: dict[str, Any] = {
        name: null_searches(args.output, name, args.null_scale) for name in NULLS
    }
    for gain, name in ((9.0, "a bet of 1 on 9"), (-9.0, "a bet of 9 on 1")):
        for pairs in (200, 1000):
            trials = int(1000 * args.null_scale) or 2
            nulls[f"{name}, {pairs} pairs"] = bets(gain, pairs, trials)

    def over(values: Sequence[list[float]]) -> dict[str, float | None]:
        runs = bootstrap_runs(values)
        return {"mean": runs.mean, "low": runs.low, "high": runs.high}

    result = {
        "environment": environment(),
        "episodes": args.episodes,
        "hands": args.hands,
        "references": references(args.hands),
        "gain": over([one["gains"] for one in found]),
        "last": over([one["last"] for one in found]),
        "searches": found,
        "nulls": nulls,
    }
    for one in found:
        del one["gains"], one["last"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--searches", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=1200, help="pairs of a comparison")
    parser.add_argument("--proposals", type=int, default=80, help="of each search")
    parser.add_argument("--hands", type=int, default=40_000, help="of random play and the strategy")
    parser.add_argument("--null-scale", type=float, default=1.0, help="of the nulls' number")
    parser.add_argument("--output", type=Path, default=Path("runs/evolve"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    parser.add_argument("--picture", type=Path, help="draw the accepted paths")
    args = parser.parse_args()
    result = measure(args)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
        args.json.with_suffix(".md").write_text(table(result).strip() + "\n")
    if args.picture:
        picture(args.picture, result)


if __name__ == "__main__":
    main()
