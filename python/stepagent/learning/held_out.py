"""The held-out trajectories of a run: read, checked, and kept with the pairs of its cycle."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.trunk import Trunk
from ..envs.pool import EnvFactory
from .collecting import Collector, longest_action
from .cycle import Comparison, load_comparisons, save_comparisons
from .loading import encode_all
from .methods import method_class
from .parts import StepParts
from .preflight import check_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import StepAgentConfig

EVAL_FILE = "eval_cycle.safetensors"
_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class HeldOut:
    """Held-out trajectories of one name, "" where there is one set alone.

    first: the place of its first one, behind those in training: for the random numbers.
    comparisons: what the policy did at their states where the cycle began, with its scores.
    """

    trunks: list[Trunk]
    first: int = 0
    comparisons: list[Comparison] = field(default_factory=list)


def held_out(
    dataset: Any,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: StepAgentConfig,
    collector: Collector,
    called: str = "eval_dataset",
) -> dict[str, HeldOut]:
    """The sets of an ``eval_dataset`` by name: of one, of a dict of them, or none.

    Raises:
        ValueError: naming the row that is no trajectory, cannot be encoded or does not fit.
    """
    if dataset is None:
        return {}
    parts = dataset if _is_several(dataset) else {"": dataset}
    first, sets = collector.count, {}
    for key, part in parts.items():
        name = f"{called}[{key!r}]" if key else called
        trunks = encode_all(part, tokenizer, progress=not args.disable_tqdm, name=name)
        longest = args.max_new_tokens or max(collector.max_new_tokens, longest_action(trunks))
        inspects = method_class(args.method, args.states).pairs_held_out()
        check_budget(policy, trunks, args, longest, inspects=inspects, name=name)
        StepParts.of_run(args, tokenizer, collector.end_tokens).check(trunks, name)
        sets[str(key)] = HeldOut(trunks, first)
        first += len(trunks)
    return sets


def _is_several(dataset: Any) -> bool:
    return isinstance(dataset, Mapping) and not {"messages", "conversations"} & dataset.keys()


def check_evaluation(
    args: StepAgentConfig,
    env: str | EnvFactory | None,
    sets: Mapping[str, HeldOut],
    rollouts: int,
    fixed_reference: bool,
    own_metrics: bool,
) -> None:
    """Refuse, before training, what an evaluation could not be made or compared by.

    Raises:
        ValueError: naming the option and what to do.
    """
    if args.eval_strategy != "no" and not sets and not args.eval_episodes:
        raise ValueError(
            "eval_strategy must be 'no' unless there is something to evaluate: it needs an "
            "eval_dataset, or eval_episodes and env, got neither"
        )
    if args.eval_episodes and env is None:
        raise ValueError(f"eval_episodes={args.eval_episodes} needs env: a name or factory")
    if args.eval_episodes and args.rolls_out:
        last = args.rollout_seed_start + args.cycles * rollouts
        if args.eval_seed_start < last and (
            args.eval_seed_start + args.eval_episodes > args.rollout_seed_start
        ):
            raise ValueError(
                f"eval_seed_start must leave out the seeds {args.rollout_seed_start} to {last - 1} "
                f"of the rollouts in training, got {args.eval_seed_start}"
            )
    if args.batch_eval_metrics:
        raise ValueError(
            "batch_eval_metrics must be False: compute_metrics is given all of a set at once"
        )
    metric = best_metric(args)
    if metric is None or args.eval_strategy == "no":
        return
    known = metric_names(args, sets)
    if metric not in known and not own_metrics:
        raise ValueError(
            f"metric_for_best_model must be one of {[n.removeprefix('eval_') for n in known]}, got "
            f"{args.metric_for_best_model!r}"
        )
    moving = method_class(args.method, args.states).moving(fixed_reference)
    if args.cycles > 1 and known.get(metric) in moving:
        raise ValueError(
            f"metric_for_best_model must be one that cycles can be compared by, such as 'nll', "
            f"'agreement' or 'success_rate', got {args.metric_for_best_model!r}: each cycle's is "
            "by another reference or discriminator"
        )


def metric_names(args: StepAgentConfig, sets: Mapping[str, HeldOut]) -> dict[str, str]:
    """The metrics of an evaluation, each with the figure that it is."""
    of_acting = () if args.prediction_loss_only else ("agreement",)
    figures = ("nll", *of_acting, *method_class(args.method, args.states).figures)
    names = {f"{key_of('eval', name)}_{figure}": figure for name in sets for figure in figures}
    if args.eval_episodes:
        names |= {f"eval_{figure}": figure for figure in ("success_rate", "crashed")}
    return names


def key_of(prefix: str, name: str) -> str:
    return f"{prefix}_{name}" if name else prefix


def best_metric(args: StepAgentConfig) -> str | None:
    metric = args.metric_for_best_model
    if metric is None or metric.startswith("eval_"):
        return metric
    return f"eval_{metric}"


def save_pairs(folder: Path, sets: Mapping[str, HeldOut], cycle: int | None) -> None:
    """Write the cycle's pairs of all sets, where there are any."""
    every = [c for held in sets.values() for c in held.comparisons]
    if every:
        sizes = {name: len(held.comparisons) for name, held in sets.items()}
        save_comparisons(folder / EVAL_FILE, every, {"cycle": cycle, "sizes": sizes})


def load_pairs(folder: Path, sets: Mapping[str, HeldOut]) -> None:
    """Read what `save_pairs` wrote; without it, a warning and no pairs.

    Raises:
        ValueError: where ``eval_dataset`` is not that of the run.
    """
    if not (folder / EVAL_FILE).exists():
        _logger.warning(
            "%s has no %s: until the next cycle, evaluations are without rewards",
            *(folder, EVAL_FILE),
        )
        return
    every, progress = load_comparisons(folder / EVAL_FILE)
    sizes = {name: len(held.trunks) for name, held in sets.items()}
    trunks = [trunk for held in sets.values() for trunk in held.trunks]
    if progress["sizes"] != sizes or not all(
        np.array_equal(c.trunk.input_ids, trunk.input_ids)
        and np.array_equal(c.trunk.action_spans, trunk.action_spans)
        for c, trunk in zip(every, trunks, strict=True)
    ):
        raise ValueError(
            f"eval_dataset must be that of the run that {folder} is of, with rows "
            f"{json.dumps(progress['sizes'])}, got {json.dumps(sizes)} or other tokens"
        )
    rest = iter(every)
    for held in sets.values():
        held.comparisons = [next(rest) for _ in held.trunks]
