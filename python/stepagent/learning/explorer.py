"""Explore with one policy, ship another: a second actor for the inverse form.

After OPARL (arXiv 2312.15965), which does so with critics. The *learner* is the run's policy, an
adapter on its base. The *explorer* is another adapter of the same form on the same base. A cycle:

    every other rollout is the explorer's                              [turns.py]
    an action's old log-prob is that of whoever acted
    one ensemble of discriminators judges all episodes                 [inverse.py]
    the learner's reward is their least, the explorer's their largest, bounded
    the explorer is set to the learner, every ``explorer_reset`` cycles
    the explorer learns from all episodes, here; then the learner does, in the trainer

Either is off the other's policy, so PPO's ratio is to the policy that acted, step by step.

The explorer's weights take the adapter's place while it acts and learns, and are put away again.
Nobody else ever meets them: what is evaluated, saved and shipped is the learner by construction.

A agent's steps of a cycle, E discriminators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..ranks import sum_gradients, sum_over_ranks
from .averages import Counts
from .batches import collate, counts_of
from .cycle import SCORES, Comparison
from .inverse import InverseReflection, Verdict, with_advantages
from .methods.method import Batch
from .reference_policy import has_adapter

if TYPE_CHECKING:
    from .config import StepAgentConfig
    from .methods.method import Run
    from .parts import StepParts

EXPLORER_FILE, OPTIMIZER_FILE = "explorer.safetensors", "explorer_optimizer.pt"
# Where each process has the whole adapter, and its gradients are those of a plain backward.
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

BatchLoss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


def check_explorer(args: StepAgentConfig) -> None:
    """Refuse options with which an explorer would be none, or would not be bounded.

    Raises:
        ValueError: naming the option and what it must be.
    """
    if args.explorer == "none":
        if args.explorer_reset != type(args).explorer_reset:
            raise ValueError(
                f"explorer_reset={args.explorer_reset} needs explorer='optimistic', got 'none'"
            )
        return
    rules = {
        "states": (args.states == "agent", "'agent', whose rollouts the two actors take in turn"),
        "discriminators": (args.discriminators > 1, "2 or more: the optimism of one is nil"),
        "discriminator_diversity": (
            args.discriminator_diversity > 0,
            "above 0: the optimism of discriminators that are alike is nil",
        ),
        "reward_aggregate": (
            args.reward_aggregate != "optimistic",
            "'pessimistic' or 'mean', the learner's: it would be the explorer's",
        ),
        "discriminator_smoothing": (
            args.discriminator_smoothing > 0,
            "above 0: -log of it bounds the explorer's reward",
        ),
        "rollouts": (args.rollouts != 1, "2 or more, one for each actor"),
        "target_kl": (
            args.target_kl is None,
            "left out: the actors are apart before they learn, as it would measure",
        ),
        "verify": (args.verify is None, "left out: what verifies an answer is one policy"),
        "fp16": (not args.fp16, "off, as the explorer's loss is not scaled: take bf16"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(
                f"{name} must be {rule}, with explorer={args.explorer!r}, got "
                f"{getattr(args, name)!r}"
            )


class Explorer:
    """The second actor: its adapter, its optimiser, how it acts and learns."""

    def __init__(self, run: Run, args: StepAgentConfig, loss: BatchLoss) -> None:
        """It begins as the learner is.

        Args:
            loss: The learner's, which is computed with the explorer's log-probs.

        Raises:
            ValueError: for a policy without an adapter, or one that is sharded.
        """
        if not has_adapter(run.policy):
            raise ValueError(
                "explorer='optimistic' is a second adapter on the base of the first, but "
                f"{type(run.policy).__name__} has none: give a peft_config, as LoraConfig("
                "task_type='CAUSAL_LM', target_modules='all-linear'), --lora-rank on the command "
                "line, or a model with an adapter"
            )
        assert run.scorer is not None  # of a trainer
        kind = run.scorer.distributed_type
        if kind not in _WHOLE:
            raise ValueError(f"explorer='optimistic' must have one process or DDP, got {kind}")
        self._policy, self._scorer, self._args = run.policy, run.scorer, args
        self._loss = loss
        self._adapter = {n: p for n, p in run.policy.named_parameters() if p.requires_grad}
        self.reset()

    def reset(self) -> None:
        """Be as the learner is, with an optimiser that knows of nothing yet."""
        args = self._args
        self._weights = {name: p.detach().clone() for name, p in self._adapter.items()}
        self._optimizer = torch.optim.AdamW(
            self._adapter.values(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Inside the block the policy is the explorer, and what it learns is the explorer's."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._adapter.items():
            other = parameter.detach().clone()
            parameter.copy_(self._weights[name])
            self._weights[name] = other

    def scored(self, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """Those that the explorer acted in with its log-probs in place of the learner's."""
        own = [c for c in comparisons if c.explored]
        with self.acting():
            logps = iter(self._scorer.scored(self._policy, own, alike=False))
        return [replace(c, old_logps=next(logps)) if c.explored else c for c in comparisons]

    def learn(self, comparisons: Sequence[Comparison], cycle: int) -> None:
        """``epochs_per_cycle`` passes of the loss, in steps as large as the learner's."""
        args, count = self._args, len(comparisons)
        size = args.per_device_train_batch_size * args.world_size
        step = size * args.gradient_accumulation_steps
        with self.acting():
            for epoch in range(args.epochs_per_cycle):
                order = np.random.default_rng((args.seed, cycle, 3, epoch)).permutation(count)
                for first in range(0, count, step):
                    items = [comparisons[i] for i in order[first : first + step]]
                    self._step([items[i : i + size] for i in range(0, len(items), size)])

    def _step(self, batches: Sequence[Sequence[Comparison]]) -> None:
        """One of the optimiser, on batches that the processes share."""
        args, parameters = self._args, self._adapter.values()
        own = [
            collate(batch[args.process_index :: args.world_size], args.max_tokens, batch[0])
            for batch in batches
        ]
        counts = [astuple(counts_of(batch["steps"])) for batch in own]
        total = Counts(*map(sum_over_ranks, map(sum, zip(*counts, strict=True))))
        if total.nothing:
            return
        for batch in own:
            if batch["steps"] is not None:
                loss = self._loss(self._under_policy(batch, total))[0]
                loss.backward()  # type: ignore[no-untyped-call]
        sum_gradients(parameters)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _under_policy(self, batch: dict[str, Any], total: Counts) -> Batch:
        logps_N, entropy_N = self._scorer.logps(
            self._policy, batch["trees"], entropy=self._args.entropy_coef > 0
        )
        device = logps_N.device
        scores = {name: batch[name].to(device) for name in SCORES}
        return Batch.of(logps_N, entropy_N, scores, batch["steps"].to(device), total)

    def state(self) -> dict[str, Tensor]:
        """Its adapter, by the names that the policy has for its own."""
        return {name: weight.contiguous().cpu() for name, weight in self._weights.items()}

    def save(self, folder: Path) -> None:
        """Write its adapter and its optimiser's moments."""
        save_file(self.state(), folder / EXPLORER_FILE)
        torch.save(self._optimizer.state_dict(), folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: where the adapter has another form.
        """
        for path in (folder / EXPLORER_FILE, folder / OPTIMIZER_FILE):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, so the run cannot be resumed from it")
        weights = load_file(folder / EXPLORER_FILE)
        here, there = (
            {name: tuple(w.shape) for name, w in found.items()}
            for found in (self._adapter, weights)
        )
        if here != there:
            raise ValueError(
                f"{folder / EXPLORER_FILE} must hold an adapter of the form that the policy has; "
                "resume with the peft_config of that run"
            )
        self._weights = {n: weights[n].to(p.device, p.dtype) for n, p in self._adapter.items()}
        moments = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        moments["param_groups"] = self._optimizer.state_dict()["param_groups"]  # of the arguments
        self._optimizer.load_state_dict(moments)


class ExploringReflection(InverseReflection):
    """As `InverseReflection`, for the learner; and the explorer learns from the same verdict."""

    actors: ClassVar[int] = 2

    def __init__(
        self, run: Run, args: StepAgentConfig, parts: StepParts | None, loss: BatchLoss
    ) -> None:
        """``loss``: as `Explorer`'s."""
        super().__init__(run.policy, args, run.discriminator, parts)
        self.explorer = Explorer(run, args, loss)

    def prepare(
        self, comparisons: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        """As there; before it returns the explorer has learnt."""
        comparisons = self.explorer.scored(comparisons)
        if cycle % self._args.explorer_reset == 0:
            self.explorer.reset()
        verdict, figures = self.judge(comparisons, cycle)
        least_A = self._aggregated(self._rewards(verdict.logits_EA))
        largest_A, bounded = self.optimistic(verdict.logits_EA)
        learners, learnt = self.credit(verdict, least_A, cycle)
        explorers, _ = self.credit(verdict, largest_A, cycle, actor=1)
        self._remember(comparisons)
        self.explorer.learn(with_advantages(comparisons, explorers, verdict.steps), cycle)
        figures |= learnt | {"explorer_bounded": bounded}
        figures |= _figures_of_actors(comparisons, verdict, least_A, largest_A)
        return with_advantages(comparisons, learners, verdict.steps), figures

    def optimistic(self, logits_EA: Tensor) -> tuple[Tensor, float]:
        """(A,), the largest reward, and the share of it that is at its bound.

        −log D has none where D → 0, as at text that no discriminator has seen. The best one on
        labels that are smoothed by ε is never surer than ε, so its logit is within ± log((1−ε)/ε):
        no action is worth more, −log ε, than one that is surely the expert's.
        """
        smoothing = self._args.discriminator_smoothing
        bound = math.log((1 - smoothing) / smoothing)
        rewards_EA = self._rewards(logits_EA.clamp(-bound, bound))
        share = (logits_EA.amin(0) < -bound).double().mean()
        return rewards_EA.amax(0), float(share)

    def save(self, folder: Path) -> None:
        """As there, and the explorer."""
        super().save(folder)
        self.explorer.save(folder)

    def load(self, folder: Path) -> None:
        """As there, and the explorer."""
        super().load(folder)
        self.explorer.load(folder)


def _figures_of_actors(
    comparisons: Sequence[Comparison], verdict: Verdict, least_A: Tensor, largest_A: Tensor
) -> dict[str, float]:
    """Of each actor's own rollouts: the mean of the reward that it follows, and the states."""
    explored = torch.tensor([c.explored for c in comparisons])
    explored_A = explored[verdict.steps.trunk_S[verdict.agent_A]]
    figures: dict[str, float] = {}
    for name, second, rewards_A in (
        ("learner", False, least_A),
        ("explorer", True, largest_A),
    ):
        own = [c for c in comparisons if c.explored is second]
        if own:  # all of an actor's rollouts can have crashed
            figures[f"{name}_reward"] = float(rewards_A[explored_A == second].mean())
        figures[f"{name}_states"] = distinct_states(own)
    return figures


def distinct_states(comparisons: Sequence[Comparison]) -> int:
    """How many different observations were acted at, by what each state adds to the dialogue."""
    seen = set()
    for c in comparisons:
        before = 0
        for start, stop in c.trunk.action_spans:
            seen.add(c.trunk.input_ids[before:start].tobytes())
            before = stop
    return len(seen)
