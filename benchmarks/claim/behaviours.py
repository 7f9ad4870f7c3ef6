"""Behaviours: are five policies told apart, is a switch found, and what do two levels add?

    python benchmarks/claim/behaviours.py --seeds 3 --output runs/behaviours    # resumes

**Mixture.** A model is fitted on episodes of five policies without their labels. The figure is the
adjusted Rand index (ARI) of clusters and policies on held-out episodes, and of the clusters of two
seeds of the model with each other. Beside it stand k-means on the same latents, and two ceilings
that know the labels of the episodes fitted on: a logistic regression on the latents, and one policy
for each label, a logistic regression of the action on the observation, an episode being of the one
under which it is most likely. *scripted*: the expert, chance, an expert half of whose actions are
random, one that walks along the walls, one that mostly turns (`babyai:UnlockPickup`). *trained*:
the expert, chance, and greedy agents of SFT, DAgger and inverse RL (`babyai:GoToLocalS6N2`).

**Switch.** Eight cycles of 20 episodes, of one policy and then of another: for each ordered pair
and each of the seven places, the change point nearest to the true one. Eight cycles of one policy:
is one found? Episodes are neither those fitted on nor those of the mixture.

**Success.** Three behaviours are fitted on one policy alone, the half-random expert or the agent of
SFT: the success of each on held-out episodes, with its interval.

**Toy.** Two agents choose a side of a road (the convention, shared) while one leads and one waits
(the role). ARI of joint clusters with the convention and of local ones with the role, hierarchical
and flat: the flat rival has no joint latent, so an episode is told by its agents' mean latent, and
roles of both by k-means too, which suits it better.

Seeds from 500,000 on served to choose the clusters; none of them is in the result.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from behaviours_data import SCRIPTED, TRAINED, Mixture, coordination
from common import environment

from stepagent.analysis import Behaviours, HashedWords, LatentOptions, change_points
from stepagent.analysis.tracks import Actions, done_by
from stepagent.evaluation.statistics import rate_interval

MOST = 200  # episodes of a policy to fit on
SIZES = (30, 60, 120, MOST)
HELD_OUT = range(10_000, 10_100)
CYCLES, PER_CYCLE = 8, 20
SEQUENCES = 3  # without a switch, of each policy

# ------------------------------------------------------------------ mixture


def mixture(mixed: Mixture, folder: Path, each: int, seed: int) -> dict[str, Any]:
    known, whose_known = mixed.of_all(range(each), folder)
    held_out, whose = mixed.of_all(HELD_OUT, folder)
    found = Behaviours.fit(known, count=len(mixed.policies), parts=mixed.parts, seed=seed)
    labels = found.assign(held_out)
    latents = [found.latents(own)[0] for own in (known, held_out)]
    by_means = k_means(*latents, len(mixed.policies), seed)
    scaled = StandardScaler().fit(latents[0])
    told = LogisticRegression(C=10, max_iter=3000)
    told.fit(scaled.transform(latents[0]), whose_known)
    told_labels = told.predict(scaled.transform(latents[1]))
    result = {
        "mixture": mixed.name,
        "each": each,
        "seed": seed,
        "ari": adjusted_rand_score(whose, labels),
        "k_means": adjusted_rand_score(whose, by_means),
        "told_latents": adjusted_rand_score(whose, told_labels),
        "labels": labels.tolist(),
        "table": counted(whose, labels, len(mixed.policies)),
        "names": list(found.names),
        "gain": found.gain,
    }
    if mixed is SCRIPTED and each == MOST:
        result["plane"] = PCA(2).fit(latents[0]).transform(latents[1]).round(2).tolist()
        result["switches"] = switches(found, mixed, folder, seed)
    return result


def told_policies(mixed: Mixture, folder: Path, each: int) -> dict[str, Any]:
    """The ceiling of what an observation and the action there tell of whose episode it is."""
    known, whose_known = mixed.of_all(range(each), folder)
    held_out, whose = mixed.of_all(HELD_OUT, folder)
    actions = Actions.of([action for e in known for action in done_by(e)], 32)
    words = HashedWords(512)
    seen = words([text for e in held_out for text in e.observations])
    done = actions.index([action for e in held_out for action in done_by(e)])
    of_episode = np.repeat(np.arange(len(held_out)), [len(e.actions) for e in held_out])
    logps = np.zeros((len(held_out), len(mixed.policies)))
    for k in range(len(mixed.policies)):
        own = [e for e, policy in zip(known, whose_known, strict=True) if policy == k]
        rows = words([text for e in own for text in e.observations])
        policy = LogisticRegression(C=10, max_iter=200)
        policy.fit(rows, actions.index([action for e in own for action in done_by(e)]))
        logp = np.full((len(seen), len(actions.names)), np.log(1e-4))  # of what it never did
        logp[:, policy.classes_] = np.log(policy.predict_proba(seen).clip(1e-4))
        np.add.at(logps[:, k], of_episode, logp[np.arange(len(done)), done])
    labels = logps.argmax(1)
    return {
        "mixture": mixed.name,
        "each": each,
        "ari": adjusted_rand_score(whose, labels),
        "accuracy": float((labels == whose).mean()),
        "table": counted(whose, labels, len(mixed.policies)),
    }


def counted(whose: np.ndarray, labels: np.ndarray, count: int) -> list[list[int]]:
    """[policy][behaviour] episodes."""
    table = np.zeros((count, count), int)
    np.add.at(table, (whose, labels), 1)
    return table.tolist()


# ------------------------------------------------------------------ switch


def switches(found: Behaviours, mixed: Mixture, folder: Path, seed: int) -> dict[str, Any]:
    """Each switch's error in cycles, None where none is found; and changes where there are none."""
    length = CYCLES * PER_CYCLE
    seeds = range(20_000, 20_000 + SEQUENCES * length)
    sequences = {
        policy: found.assign(mixed.episodes(policy, seeds, folder)).reshape(
            SEQUENCES, CYCLES, PER_CYCLE
        )
        for policy in mixed.policies
    }
    results = []
    for before, after in ((a, b) for a in sequences for b in sequences if a != b):
        for at in range(1, CYCLES):
            cycles = [*sequences[before][0][:at], *sequences[after][0][at:]]
            changes = [change.at for change in change_points(cycles, seed=seed)]
            error = min((abs(place - at) for place in changes), default=None)
            results.append([before, after, at, error, len(changes)])
    same = [own for of_policy in sequences.values() for own in of_policy]
    example = [*sequences["half random"][0][:5], *sequences["expert"][0][5:]]
    return {
        "switches": results,
        "false": sum(bool(change_points(list(own), seed=seed)) for own in same),
        "without": len(same),
        "example": {
            "at": 5,
            "found": [change.at for change in change_points(example, seed=seed)],
            "shares": [(np.bincount(own, minlength=5) / len(own)).tolist() for own in example],
        },
    }


# ------------------------------------------------------------------ success


def success(mixed: Mixture, policy: str, folder: Path, seed: int) -> dict[str, Any]:
    """Of the behaviours of one policy, on episodes that were not fitted on."""
    known = mixed.episodes(policy, range(MOST), folder)
    held_out = mixed.episodes(
        policy, range(20_000, 20_000 + SEQUENCES * CYCLES * PER_CYCLE), folder
    )
    result: dict[str, Any] = {"policy": policy, "seed": seed, "behaviours": []}
    try:
        found = Behaviours.fit(known, count=3, parts=mixed.parts, seed=seed)
    except ValueError as error:  # it has one behaviour only
        return result | {"refused": str(error)}
    labels = found.assign(held_out)
    for k, name in enumerate(found.names):
        own = [float(e.success) for e, label in zip(held_out, labels, strict=True) if label == k]
        rate = rate_interval(own) if own else None
        interval = None if rate is None else [rate.mean, rate.low, rate.high]
        result["behaviours"].append({"name": name, "episodes": len(own), "success": interval})
    return result | {"gain": found.gain}


# ------------------------------------------------------------------ toy


def toy(seed: int) -> dict[str, Any]:
    known, _, _ = coordination(240, 100 + seed)
    held_out, conventions, roles = coordination(120, 200 + seed)
    result: dict[str, Any] = {"seed": seed}
    for name, hierarchical in (("hierarchical", True), ("flat", False)):
        options = LatentOptions(hierarchical=hierarchical)
        found = Behaviours.fit(known, count=3, local_count=2, options=options, seed=seed)
        joint, local = found.assign(held_out), found.assign_local(held_out)
        local_EIL, seen_EIL = (found.latents(own)[1] for own in (known, held_out))
        if not hierarchical:
            joint = k_means(local_EIL.mean(1), seen_EIL.mean(1), 3, seed)
        size = local_EIL.shape[-1]
        by_means = k_means(local_EIL.reshape(-1, size), seen_EIL.reshape(-1, size), 2, seed)
        result[name] = {
            "convention": adjusted_rand_score(conventions, joint),
            "role": adjusted_rand_score(roles.ravel(), local.ravel()),
            "role, k-means": adjusted_rand_score(roles.ravel(), by_means),
        }
    return result


def k_means(known: np.ndarray, held_out: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The clusters of the points held out."""
    found: np.ndarray = KMeans(count, n_init=10, random_state=seed).fit(known).predict(held_out)
    return found


# ------------------------------------------------------------------ all


def cell(folder: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    path = folder / "cells" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compute()))
        print(name, file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    seeds, folder = range(args.seeds), args.output
    wanted = [(SCRIPTED, each) for each in SIZES] + [(TRAINED, MOST)] * args.trained
    return {
        "mixture": [
            cell(folder, f"{m.name} {n} {s}", partial(mixture, m, folder, n, s))
            for m, n in wanted
            for s in seeds
        ],
        "told": [
            cell(folder, f"told {m.name} {n}", partial(told_policies, m, folder, n))
            for m, n in wanted
        ],
        "success": [
            cell(folder, f"success {policy} {s}", partial(success, m, policy, folder, s))
            for m, policy in [(SCRIPTED, "half random")] + [(TRAINED, "SFT")] * args.trained
            for s in seeds
        ],
        "toy": [cell(folder, f"toy {s}", partial(toy, s)) for s in seeds],
    }


def table(result: dict[str, Any]) -> str:
    lines = [*_mixtures(result), "", *_switches(result["mixture"]), ""]
    for name, policies in (("scripted", SCRIPTED.policies), ("trained", TRAINED.policies)):
        shown = [one for one in result["mixture"] if (one["mixture"], one["each"]) == (name, MOST)]
        if shown:
            lines += [f"Held-out episodes of seed 0, {name}, policies by behaviours:", ""]
            lines += ["| policy | " + " | ".join(shown[0]["names"]) + " |"]
            lines += ["|---" * (len(policies) + 1) + "|"]
            rows = zip(policies, shown[0]["table"], strict=True)
            lines += [f"| {p} | " + " | ".join(map(str, row)) + " |" for p, row in rows] + [""]
    return "\n".join([*lines, *_success(result["success"]), "", *_toys(result["toy"])])


def _mixtures(result: dict[str, Any]) -> list[str]:
    lines = [
        "| policies | episodes of each to fit on | ARI with the policies | of k-means "
        "| between seeds | told: latents | told: policies |",
        "|---" * 7 + "|",
    ]
    for told in result["told"]:
        name, each = told["mixture"], told["each"]
        own = [one for one in result["mixture"] if (one["mixture"], one["each"]) == (name, each)]
        between = [adjusted_rand_score(a["labels"], b["labels"]) for a, b in combinations(own, 2)]
        columns = [[one[key] for one in own] for key in ("ari", "k_means")]
        columns += [between, [one["told_latents"] for one in own], [told["ari"]]]
        shown = [", ".join(f"{x:.2f}" for x in values) for values in columns]
        lines.append(f"| {name} | {each} | " + " | ".join(shown) + " |")
    return lines


def _switches(mixtures: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| seed | switches | at the cycle | within one cycle | none found "
        "| with another change too | found without a switch |",
        "|---" * 7 + "|",
    ]
    for one in mixtures:
        if told := one.get("switches"):
            errors = [error for *_, error, _ in told["switches"]]
            counts = [len(errors), errors.count(0), errors.count(0) + errors.count(1)]
            counts += [errors.count(None), sum(n > 1 for *_, n in told["switches"])]
            without = f"{told['false']} of {told['without']}"
            lines.append(f"| {one['seed']} | {' | '.join(map(str, counts))} | {without} |")
    return lines


def _success(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| policy, seed | behaviour | episodes | success |", "|---" * 4 + "|"]
    for one in found:
        which = f"{one['policy']}, {one['seed']}"
        if "refused" in one:
            lines.append(f"| {which} | refused: one behaviour only | | |")
        for kind in one["behaviours"]:
            mean, low, high = kind["success"] or [math.nan] * 3
            rate = f"{mean:.2f} ({low:.2f} … {high:.2f})"
            lines.append(f"| {which} | {kind['name']} | {kind['episodes']} | {rate} |")
    return lines


def _toys(toys: list[dict[str, Any]]) -> list[str]:
    figures = ("convention", "role", "role, k-means")
    columns = [f"{name}: {figure}" for name in ("hierarchical", "flat") for figure in figures]
    lines = ["| toy, seed | " + " | ".join(columns) + " |", "|---" * 7 + "|"]
    for one in toys:
        both = [one[name][figure] for name in ("hierarchical", "flat") for figure in figures]
        lines.append(f"| {one['seed']} | " + " | ".join(f"{x:.2f}" for x in both) + " |")
    return lines


def picture(path: Path, result: dict[str, Any]) -> None:
    """Held-out episodes in the plane of their latents, and shares of behaviours along a switch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    one = next(m for m in result["mixture"] if "switches" in m)
    points, example = np.array(one["plane"]), one["switches"]["example"]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 3.2), width_ratios=(5, 4), layout="constrained"
    )
    whose = np.repeat(np.arange(len(SCRIPTED.policies)), len(HELD_OUT))
    for k, policy in enumerate(SCRIPTED.policies):
        left.plot(*points[whose == k].T, ".", markersize=5, alpha=0.6, label=policy)
    left.legend(fontsize=8, frameon=False)
    left.set_xticks([])
    left.set_yticks([])
    left.set_title("latents of held-out episodes, by policy", fontsize=10)
    shares = np.array(example["shares"])
    bottom = np.zeros(len(shares))
    for k in np.flatnonzero(shares.max(0) > 0):
        right.bar(range(len(shares)), shares[:, k], bottom=bottom, label=one["names"][k])
        bottom += shares[:, k]
    for at in example["found"]:
        right.axvline(at - 0.5, color="black", linestyle="--", linewidth=1)
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    right.set_xlabel("cycle")
    right.set_title(f"half-random until cycle {example['at'] - 1}, then the expert", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trained", action="store_true", help="the trained mixture too (minutes)")
    parser.add_argument("--output", type=Path, default=Path("runs/behaviours"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    parser.add_argument("--picture", type=Path, help="draw latents and a switch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), **result}) + "\n")
        args.json.with_suffix(".md").write_text(table(result) + "\n")
    if args.picture:
        picture(args.picture, result)


if __name__ == "__main__":
    main()
