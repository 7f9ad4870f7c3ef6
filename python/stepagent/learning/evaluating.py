"""Evaluation of a policy in training: on held-out trajectories, and in the environment.

Every process comes to have all values, in one order, and computes the same means of them: over all
tokens, pairs, states or episodes, however they were shared.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction, PredictionOutput, speed_metrics

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
    pack_with_steps,
)
from .held_out import HeldOut, best_metric, held_out, key_of, load_pairs, metric_names, save_pairs
from .methods import method_class
from .methods.method import Batch, Method
from .parts import StepParts
from .scoring import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import StepAgentConfig

ComputeMetrics = Callable[[EvalPrediction], dict[str, Any]]

_logger = logging.getLogger(__name__)


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

    @property
    def _parts(self) -> StepParts:
        return StepParts.of_run(self._args, self._tokenizer, self._collector.end_tokens)

    def restart(self) -> None:
        """Forget the cycle."""
        self._cycle = None
        for held in self._sets.values():
            held.comparisons = []

    def begin_cycle(self, policy: PreTrainedModel, cycle: int) -> None:
        """Make the pairs of a cycle: what the policy does now, under the cycle's reference."""
        method = method_class(self._args.method, self._args.states)
        if cycle == self._cycle or not method.pairs_held_out():
            return
        for held in self._sets.values():
            samples, temperature = self._args.samples, self._args.temperature
            branches = self._acts(policy, held, samples, temperature, cycle)
            tried = [[[b.token_ids for b in step] for step in steps] for steps in branches]
            pairs = zip(held.trunks, tried, strict=True)
            comparisons = self._parts.told([Comparison(t, b, expert_trunk=True) for t, b in pairs])
            held.comparisons = self._scorer.with_scores(
                policy, comparisons, method.scores, sharded=self._sharded
            )
        self._cycle = cycle

    def evaluate(
        self,
        policy: PreTrainedModel,
        dataset: Any,
        prefix: str,
        method: Method,
    ) -> dict[str, float]:
        """The metrics of ``trainer.evaluate``, by ``prefix``_name; undefined ones are left out."""
        started = time.time()
        sets = self._chosen(policy, dataset)
        metrics: dict[str, float] = {}
        for name, held in sets.items():
            metrics |= self._of(policy, held, key_of(prefix, name), method)[0]
        count = sum(len(held.trunks) for held in sets.values())
        if self._args.eval_episodes and dataset is None and not self._args.prediction_loss_only:
            found = self._success(policy)
            metrics |= {f"{prefix}_{figure}": value for figure, value in found.items()}
            count += self._args.eval_episodes
        return metrics | _speed(prefix, started, count)

    def predict(
        self, policy: PreTrainedModel, dataset: Any, prefix: str, method: Method
    ) -> tuple[dict[str, float], EvalPrediction]:
        """Metrics of other trajectories, and the texts of what policy and expert do there."""
        started = time.time()
        sets = self._read(policy, dataset, "test_dataset")
        if list(sets) != [""]:
            raise TypeError(f"test_dataset must be one dataset, got {list(sets) or None}")
        held = sets[""]
        metrics, prediction = self._of(policy, held, prefix, method, predicts=True)
        assert prediction is not None
        return metrics | _speed(prefix, started, len(held.trunks)), prediction

    def _chosen(self, policy: PreTrainedModel, dataset: Any) -> dict[str, HeldOut]:
        """What is evaluated: all sets, one of their names, or others without pairs of the cycle."""
        if isinstance(dataset, str) and dataset in self._sets:
            dataset, sets = None, {"": self._sets[dataset]}
        else:
            sets = self._sets
        if dataset is not None:
            return self._read(policy, dataset, "eval_dataset")
        if not sets and not self._args.eval_episodes:
            raise ValueError(
                "evaluate needs an eval_dataset, or eval_episodes and env, got neither"
            )
        if self._cycle is None:  # before training: as the first cycle would
            self.begin_cycle(policy, 0)
        return sets

    def _read(self, policy: PreTrainedModel, dataset: Any, name: str) -> dict[str, HeldOut]:
        return held_out(dataset, policy, self._tokenizer, self._args, self._collector, name)

    # -- held-out trajectories -------------------------------------------------------------------

    def _of(
        self,
        policy: PreTrainedModel,
        held: HeldOut,
        key: str,
        method: Method,
        *,
        predicts: bool = False,
    ) -> tuple[dict[str, float], EvalPrediction | None]:
        comparisons = held.comparisons or self._parts.told(
            [Comparison.demonstration(t) for t in held.trunks]
        )
        scored = self._scorer.scored(policy, comparisons, alike=self._sharded)
        logps_N = torch.from_numpy(np.concatenate(scored)).double()
        _, steps = pack_with_steps(comparisons, self._args.max_tokens)
        metrics = self._scored_figures(comparisons, logps_N, steps, method)
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
        method: Method,
    ) -> dict[str, float]:
        """Means over all tokens, actions and pairs: the cycle's loss on what it did not learn."""
        scores = {
            name: torch.from_numpy(np.concatenate([getattr(c, name) for c in comparisons])).double()
            for name in SCORES
        }
        batch = Batch.of(logps_N, None, scores, steps, steps.counts())
        found = {"nll": float(batch.nll())}
        values = method.measure(batch, comparisons)
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
            nll_T = -step_sums(steps.counting(logps_N), steps.offsets)[steps.expert_S]
            sizes = [trunk.num_steps for trunk in trunks]
            losses = [part.double().numpy() for part in torch.split(nll_T, sizes)]
        experts = [[t.input_ids[start:stop] for start, stop in t.action_spans] for t in trunks]
        return EvalPrediction(  # whose types are those of fixed shapes
            cast("Any", [[self._text(tried[0].token_ids) for tried in task] for task in acts]),
            cast("Any", [[self._text(action) for action in task] for task in experts]),
            inputs=cast("Any", list(trunks) if "inputs" in wanted else None),
            losses=cast("Any", losses),
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
        assert env is not None  # `check_evaluation` has seen to it

        def rolled_out(places: list[int]) -> list[Episode]:
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

        episodes = over_ranks(rolled_out, np.ones(args.eval_episodes or 0), alike=self._sharded)
        ended = [episode.success for episode in episodes if episode.crashed is None]
        found = {"success_rate": float(np.mean(ended))} if ended else {}
        return found | {"crashed": float(len(episodes) - len(ended))}

    # -- the best model and checkpoints ----------------------------------------------------------

    def has_best_metric(self, metrics: Mapping[str, float]) -> bool:
        """Whether the best model can be chosen by these; a warning where its metric is no number.

        False of nan, infinity, and of a figure that this evaluation left undefined.
        """
        metric = best_metric(self._args)
        if metric is None:
            return True
        if metric not in metrics and metric not in metric_names(self._args, self._sets):
            return True  # a wrong name, which transformers refuses
        value = metrics.get(metric, math.nan)
        if not math.isfinite(value):
            _logger.warning(
                "%s is %s in this evaluation, so it cannot be that of the best model", metric, value
            )
        return math.isfinite(value)

    def save(self, folder: Path) -> None:
        """Write the cycle's pairs, where there are any."""
        save_pairs(folder, self._sets, self._cycle)

    def load(self, folder: Path, cycle: int) -> None:
        """Read what `save` wrote."""
        self.restart()
        if self._sets and method_class(self._args.method, self._args.states).pairs_held_out():
            load_pairs(folder, self._sets)
        self._cycle = cycle


def _speed(prefix: str, started: float, samples: int) -> dict[str, float]:
    found: dict[str, float] = speed_metrics(prefix, started, num_samples=samples)  # type: ignore[no-untyped-call]
    return found


class EvaluatingTrainer(Trainer):
    """What ``transformers.Trainer`` is asked about evaluation, answered by an `Evaluator`."""

    _evaluator: Evaluator
    _method: Method

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As transformers': measure the policy, log it, tell the callbacks. See docs/api.md.

        Args:
            eval_dataset: None: the trainer's, with its environment; the name of one of several; or
                other trajectories, which have no rewards, as no cycle has paired them.
            ignore_keys: Of no effect.
            metric_key_prefix: Begins the names of the metrics.
        """
        self._end_optimizer_step()
        policy = cast("PreTrainedModel", self.model)
        metrics = self._evaluator.evaluate(policy, eval_dataset, metric_key_prefix, self._method)
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As transformers', with the texts that ``compute_metrics`` is given."""
        self._end_optimizer_step()
        policy = cast("PreTrainedModel", self.model)
        metrics, texts = self._evaluator.predict(
            policy, test_dataset, metric_key_prefix, self._method
        )
        handler = self.callback_handler
        self.control = handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(cast("Any", texts.predictions), texts.label_ids, metrics)

    def _end_optimizer_step(self) -> None:
        """Schedule-free optimisers keep other weights for acting than for learning."""
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not self._evaluator.has_best_metric(metrics):
            return False
        return super()._determine_best_metric(metrics, trial)
