"""Evaluation of a policy in training: on held-out trajectories, and in the environment.

Every process comes to have all values, in one order, and computes the same means of them: over all
tokens, pairs, states or episodes, however they were shared.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import EvalPrediction, speed_metrics

from ..acting.policies import ModelPolicy
from ..acting.rollout import run_episodes
from ..data.actions import FORMATS
from ..data.branch import Branch, agreement
from ..data.trunk import Trunk
from ..envs.pool import EnvFactory
from ..ops import step_sums
from ..ranks import over_ranks
from ..records.episodes import Episode
from .collecting import Collector, cycle_seed, inspected, longest_action
from .cycle import (
    SCORES,
    Comparison,
    StepTable,
    load_comparisons,
    pack_with_steps,
    save_comparisons,
)
from .loading import encode_all
from .objectives import batch_loss, reward_figures, sides
from .preflight import check_budget
from .scoring import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import StepAgentConfig
    from .inverse import InverseReflection

EVAL_FILE = "eval_cycle.safetensors"
ComputeMetrics = Callable[[EvalPrediction], Mapping[str, Any]]

_SIDES = ("expert_logp", "agent_logp", "expert_length", "agent_length", "identical_pairs")
_REWARDS = ("expert_reward", "agent_reward", "reward_margin", "reward_accuracy")
_FIGURES = {
    "sft": ("loss",),
    "implicit": ("loss", "kl", *_REWARDS, *_SIDES),
    "inverse": (*_REWARDS, *_SIDES),
}
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
        name = f"eval_dataset[{key!r}]" if key else "eval_dataset"
        trunks = encode_all(part, tokenizer, progress=not args.disable_tqdm, name=name)
        longest = args.max_new_tokens or max(collector.max_new_tokens, longest_action(trunks))
        inspects = args.method != "sft"
        check_budget(policy, trunks, args, longest, inspects=inspects, name=name)
        sets[str(key)] = HeldOut(trunks, first)
        first += len(trunks)
    return sets


def _is_several(dataset: Any) -> bool:
    return isinstance(dataset, Mapping) and not {"messages", "conversations"} & dataset.keys()


def check_evaluation(
    args: StepAgentConfig,
    env: str | EnvFactory | None,
    sets: Mapping[str, HeldOut],
    per_cycle: int,
    *,
    fixed_reference: bool,
    own_metrics: bool,
) -> None:
    """Refuse, before training, what an evaluation could not be made or compared by.

    Raises:
        ValueError: naming the option and what to do.
    """
    if args.eval_episodes and env is None:
        raise ValueError(f"eval_episodes={args.eval_episodes} needs env: a name or factory")
    if args.eval_episodes and args.states == "agent":
        last = args.rollout_seed_start + args.cycles * per_cycle
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
    metric = _best_metric(args)
    if metric is None or args.eval_strategy == "no":
        return
    known = _names(args, sets)
    if metric not in known and not own_metrics:
        raise ValueError(
            f"metric_for_best_model must be one of {[n.removeprefix('eval_') for n in known]}, got "
            f"{args.metric_for_best_model!r}"
        )
    moving = args.method == "inverse" or (args.method == "implicit" and not fixed_reference)
    figure = known.get(metric)
    if moving and args.cycles > 1 and figure in ("loss", "kl", *_REWARDS):
        raise ValueError(
            f"metric_for_best_model must be one that cycles can be compared by, such as 'nll', "
            f"'agreement' or 'success_rate', got {args.metric_for_best_model!r}: each cycle's is "
            "by another reference or discriminator"
        )


def _names(args: StepAgentConfig, sets: Mapping[str, HeldOut]) -> dict[str, str]:
    """The metrics of an evaluation, each with the figure that it is."""
    of_acting = () if args.prediction_loss_only else ("agreement",)
    figures = ("nll", *of_acting, *_FIGURES[args.method])
    names = {f"{_key('eval', name)}_{figure}": figure for name in sets for figure in figures}
    if args.eval_episodes:
        names |= {f"eval_{figure}": figure for figure in ("success_rate", "crashed")}
    return names


def _key(prefix: str, name: str) -> str:
    return f"{prefix}_{name}" if name else prefix


def _best_metric(args: StepAgentConfig) -> str | None:
    metric = args.metric_for_best_model
    if metric is None or metric.startswith("eval_"):
        return metric
    return f"eval_{metric}"


class Evaluator:
    """Evaluates the policy as it is now; remembers what the present cycle compares it with."""

    def __init__(
        self,
        sets: dict[str, HeldOut],
        args: StepAgentConfig,
        tokenizer: PreTrainedTokenizerBase,
        collector: Collector,
        env: str | EnvFactory | None,
        scorer: Scorer,
        compute_metrics: ComputeMetrics | None,
        *,
        sharded: bool,
    ) -> None:
        """``sharded``: a forward of the policy needs all processes at the same time."""
        self._sets, self._args, self._tokenizer = sets, args, tokenizer
        self._collector, self._env, self._scorer = collector, env, scorer
        self._compute_metrics, self._sharded = compute_metrics, sharded
        self._cycle: int | None = None

    def restart(self) -> None:
        """Forget the cycle."""
        self._cycle = None
        for held in self._sets.values():
            held.comparisons = []

    def begin_cycle(self, policy: PreTrainedModel, cycle: int) -> None:
        """Make the pairs of a cycle: what the policy does now, under the cycle's reference."""
        if cycle == self._cycle or self._args.method == "sft":
            return
        for held in self._sets.values():
            samples, temperature = self._args.samples, self._args.temperature
            if self._args.states == "agent":
                samples = 1
            branches = self._acts(policy, held, samples, temperature, cycle)
            tried = [[[b.token_ids for b in step] for step in steps] for steps in branches]
            pairs = zip(held.trunks, tried, strict=True)
            comparisons = [Comparison(t, b, expert_trunk=True) for t, b in pairs]
            held.comparisons = self._scorer.with_reference(
                policy, comparisons, sharded=self._sharded
            )
        self._cycle = cycle

    def evaluate(
        self,
        policy: PreTrainedModel,
        dataset: Any,
        prefix: str,
        inverse: InverseReflection | None,
    ) -> dict[str, float]:
        """The metrics of ``trainer.evaluate``, by ``prefix``_name; undefined ones are left out."""
        started = time.time()
        sets = self._chosen(policy, dataset)
        metrics: dict[str, float] = {}
        for name, held in sets.items():
            metrics |= self._of(policy, held, _key(prefix, name), inverse)[0]
        count = sum(len(held.trunks) for held in sets.values())
        if self._args.eval_episodes and dataset is None and not self._args.prediction_loss_only:
            found = self._success(policy)
            metrics |= {f"{prefix}_{figure}": value for figure, value in found.items()}
            count += self._args.eval_episodes
        return metrics | speed_metrics(prefix, started, num_samples=count)

    def predict(
        self, policy: PreTrainedModel, dataset: Any, prefix: str
    ) -> tuple[dict[str, float], EvalPrediction]:
        """Metrics of other trajectories, and the texts of what policy and expert do there."""
        started = time.time()
        (held,) = held_out(dataset, policy, self._tokenizer, self._args, self._collector).values()
        metrics, prediction = self._of(policy, held, prefix, None, predicts=True)
        assert prediction is not None
        return metrics | speed_metrics(prefix, started, num_samples=len(held.trunks)), prediction

    def _chosen(self, policy: PreTrainedModel, dataset: Any) -> dict[str, HeldOut]:
        """What is evaluated: all sets, one of their names, or others without pairs of the cycle."""
        if isinstance(dataset, str) and dataset in self._sets:
            dataset, sets = None, {"": self._sets[dataset]}
        else:
            sets = self._sets
        if dataset is not None:
            return held_out(dataset, policy, self._tokenizer, self._args, self._collector)
        if not sets and not self._args.eval_episodes:
            raise ValueError(
                "evaluate needs an eval_dataset, or eval_episodes and env, got neither"
            )
        if self._cycle is None:  # before training: as the first cycle would
            self.begin_cycle(policy, 0)
        return sets

    # -- held-out trajectories -------------------------------------------------------------------

    def _of(
        self,
        policy: PreTrainedModel,
        held: HeldOut,
        key: str,
        inverse: InverseReflection | None,
        *,
        predicts: bool = False,
    ) -> tuple[dict[str, float], EvalPrediction | None]:
        comparisons = held.comparisons or [Comparison.demonstration(t) for t in held.trunks]
        scored = self._scorer.scored(policy, comparisons, alike=self._sharded)
        logps_N = torch.from_numpy(np.concatenate(scored)).double()
        _, steps = pack_with_steps(comparisons, self._args.max_tokens)
        metrics = self._scored_figures(comparisons, logps_N, steps, inverse)
        prediction = None
        if predicts or not self._args.prediction_loss_only:
            acts = self._acts(policy, held, 1, 0.0, 0)
            form = FORMATS[self._args.action_format]
            metrics["agreement"] = agreement(
                held.trunks, acts, form=form, tokenizer=self._tokenizer
            )
            prediction = self._prediction(held.trunks, acts, logps_N, steps)
            metrics |= self._own_metrics(prediction, key)
        named = {n if n.startswith(f"{key}_") else f"{key}_{n}": v for n, v in metrics.items()}
        return named, prediction

    def _scored_figures(
        self,
        comparisons: Sequence[Comparison],
        logps_N: Tensor,
        steps: StepTable,
        inverse: InverseReflection | None,
    ) -> dict[str, float]:
        """Means over all tokens, actions and pairs: the cycle's loss on what it did not learn."""
        args, total = self._args, steps.counts()
        found = {"nll": float(steps.expert_nll(logps_N, total.expert_tokens))}
        values: dict[str, Tensor] = {}
        if args.method == "sft":
            found["loss"] = found["nll"]
        elif args.method == "implicit" and len(steps.expert_P):
            scores = {
                name: torch.from_numpy(np.concatenate([getattr(c, name) for c in comparisons]))
                for name in SCORES
            }
            scores = {name: score.double() for name, score in scores.items()}
            loss, values = batch_loss(args, logps_N, None, scores, steps, total)
            found["loss"] = float(loss)
        elif inverse is not None and len(steps.expert_P):
            rewards_S = inverse.rewards(comparisons, steps)
            values = reward_figures(rewards_S, steps) | sides(logps_N, steps)
        return found | {name: float(v.double().mean()) for name, v in values.items() if len(v)}

    def _acts(
        self, policy: PreTrainedModel, held: HeldOut, samples: int, temperature: float, cycle: int
    ) -> list[list[list[Branch]]]:
        longest = max(self._collector.max_new_tokens, longest_action(held.trunks))
        return inspected(
            policy,
            held.trunks,
            self._args,
            first_trunk=held.first,
            samples=samples,
            temperature=temperature,
            max_new_tokens=self._args.max_new_tokens or longest,
            eos_token_id=self._collector.end_tokens,
            seed=cycle_seed(self._args, cycle),
            alike=self._sharded,
        )

    def _prediction(
        self,
        trunks: Sequence[Trunk],
        acts: Sequence[Sequence[Sequence[Branch]]],
        logps_N: Tensor,
        steps: StepTable,
    ) -> EvalPrediction:
        """What ``compute_metrics`` is given (docs/api.md)."""
        wanted = self._args.include_for_metrics
        losses = None
        if "loss" in wanted:
            nll_T = -step_sums(logps_N, steps.offsets)[steps.expert_S]
            sizes = [trunk.num_steps for trunk in trunks]
            losses = [part.double().numpy() for part in torch.split(nll_T, sizes)]
        experts = [[t.input_ids[start:stop] for start, stop in t.action_spans] for t in trunks]
        return EvalPrediction(
            predictions=[[self._text(tried[0].token_ids) for tried in task] for task in acts],
            label_ids=[[self._text(action) for action in task] for task in experts],
            inputs=list(trunks) if "inputs" in wanted else None,
            losses=losses,
        )

    def _text(self, ids: Any) -> str:
        kept = ids[:-1] if int(ids[-1]) in self._collector.end_tokens else ids
        return str(self._tokenizer.decode(kept.tolist(), clean_up_tokenization_spaces=False))

    def _own_metrics(self, prediction: EvalPrediction, key: str) -> dict[str, float]:
        """Those of ``compute_metrics``; not finite ones stay, with a warning."""
        if self._compute_metrics is None:
            return {}
        found = self._compute_metrics(prediction)
        if not isinstance(found, Mapping):
            raise TypeError(f"compute_metrics must return a dict, got {type(found).__name__}")
        metrics = {}
        for name, value in found.items():
            try:
                metrics[str(name)] = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"compute_metrics must return numbers, got {value!r} of {name!r}"
                ) from error
            if not math.isfinite(metrics[str(name)]):
                _logger.warning("compute_metrics gave %s for %r of %s", value, name, key)
        return metrics

    # -- the environment -------------------------------------------------------------------------

    def _success(self, policy: PreTrainedModel) -> dict[str, float]:
        """The share of the greedy policy's episodes that succeeded, of those that did not crash."""
        args, env = self._args, self._env
        assert env is not None and args.eval_episodes is not None  # `check_evaluation` has seen it

        def rolled_out(places: list[int]) -> list[Episode]:
            assert env is not None
            greedy = ModelPolicy(
                policy,
                self._tokenizer,
                max_new_tokens=self._collector.max_new_tokens,
                eos_token_id=self._collector.end_tokens,
            )
            return run_episodes(
                env,
                greedy,
                [args.eval_seed_start + place for place in places],
                max_steps=args.max_steps_per_episode,
                progress=None if args.disable_tqdm else "evaluate",
                action_format=args.action_format,
            )

        episodes = over_ranks(rolled_out, np.ones(args.eval_episodes), alike=self._sharded)
        ended = [episode.success for episode in episodes if episode.crashed is None]
        found = {"success_rate": float(np.mean(ended))} if ended else {}
        return found | {"crashed": float(len(episodes) - len(ended))}

    # -- the best model and checkpoints ----------------------------------------------------------

    def has_best_metric(self, metrics: Mapping[str, float]) -> bool:
        """Whether the best model can be chosen by these; a warning where its metric is no number.

        False of nan, infinity, and of a figure that this evaluation left undefined.
        """
        metric = _best_metric(self._args)
        if metric is None:
            return True
        if metric not in metrics and metric not in _names(self._args, self._sets):
            return True  # a wrong name, which transformers refuses
        value = metrics.get(metric, math.nan)
        if not math.isfinite(value):
            _logger.warning(
                "%s is %s in this evaluation, so it cannot be that of the best model", metric, value
            )
        return math.isfinite(value)

    def save(self, folder: Path) -> None:
        """Write the cycle's pairs, where there are any."""
        every = [c for held in self._sets.values() for c in held.comparisons]
        if every:
            sizes = {name: len(held.comparisons) for name, held in self._sets.items()}
            save_comparisons(folder / EVAL_FILE, every, {"cycle": self._cycle, "sizes": sizes})

    def load(self, folder: Path, cycle: int | None) -> None:
        """Read what `save` wrote; without it, the rewards of this cycle are left out.

        Raises:
            ValueError: where ``eval_dataset`` is not that of the run.
        """
        self.restart()
        self._cycle = cycle
        if not self._sets or self._args.method == "sft":
            return
        if not (folder / EVAL_FILE).exists():
            _logger.warning(
                "%s has no %s: until the next cycle, evaluations are without rewards",
                *(folder, EVAL_FILE),
            )
            return
        every, progress = load_comparisons(folder / EVAL_FILE)
        sizes = {name: len(held.trunks) for name, held in self._sets.items()}
        trunks = [trunk for held in self._sets.values() for trunk in held.trunks]
        if progress["sizes"] != sizes or not all(
            np.array_equal(c.trunk.input_ids, trunk.input_ids)
            for c, trunk in zip(every, trunks, strict=True)
        ):
            raise ValueError(
                f"eval_dataset must be that of the run that {folder} is of, with rows "
                f"{json.dumps(progress['sizes'])}, got {json.dumps(sizes)} or other tokens"
            )
        self._cycle = progress["cycle"]
        rest = iter(every)
        for held in self._sets.values():
            held.comparisons = [next(rest) for _ in held.trunks]
