"""Training: transformers.Trainer, fed by cycles of inspect → reflect.

One Trainer epoch is one pass over a cycle's comparisons; where a cycle begins, its data is made
anew. So checkpoints, resuming, schedules, logging, DDP and callbacks are transformers' own.

This file is the order in which things happen. What happens has files of its own: ``loading.py``
what is given by name, ``preflight.py``, ``noise.py`` and ``reference_policy.py`` what is refused,
``collecting.py`` acting, ``scoring.py`` log-probs, ``batches.py`` batches, ``methods/`` what is
learnt from a cycle and by which loss, ``evaluating.py`` what is measured on held-out trajectories,
``checkpoint.py`` what a checkpoint holds, ``card.py`` what is said of the run beside a saved model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from ..acting.askers import Asker
from ..acting.rollout import Expert
from ..data.trajectory import Trajectory
from ..engines import Engine
from ..engines.adapters import check_adapter
from ..envs.pool import EnvFactory
from ..models import auxiliary_weight, check_tree_support, evaluation_mode, recorded_routing
from .averages import Counts, RunningMeans
from .batches import CycleData, collate, counts_of
from .card import CardWritingTrainer, DataFacts
from .checkpoint import (
    CYCLE_FILE,
    Place,
    RunSizes,
    check_same_run,
    check_same_step,
    load_place,
    save_run,
)
from .collecting import Acting, Collector
from .config import StepAgentConfig
from .cycle import (
    SCORES,
    Comparison,
    load_comparisons,
    save_comparisons,
)
from .epochs import EpochCallback
from .evaluating import ComputeMetrics, Evaluator
from .figures import collected_figures
from .held_out import check_evaluation, held_out
from .loading import encode_run, load_policy, load_reference
from .methods import method_class, method_of
from .methods.method import Batch, Run
from .noise import check_quiet
from .parts import StepParts
from .preflight import (
    check_budget,
    check_discriminator,
    check_engine,
    check_loaded_everywhere,
    check_one_gpu,
    check_optimizer,
    check_parallelism,
    check_sharding,
)
from .reference_policy import check_reference
from .scoring import Scorer, check_finite

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..trees.tree import TokenTree


class StepAgentTrainer(CardWritingTrainer):
    """Train an agent towards an expert's trajectories.

    Args:
        model: A causal language model, or the name or path of one, which is then loaded with
            float32 weights (``args.model_dtype``).
        train_dataset: The expert's `Trajectory` objects, or rows in any form of
            `stepagent.load_trajectories`; an ``IterableDataset`` or a generator is read once.
        processing_class: The tokenizer, with a chat template. Where the run has template arguments
            (``args.chat_template_kwargs``, or what all of ``train_dataset`` gives alike), the
            trainer has and saves a copy that carries them.
        ref_model: A fixed reference, or the name or path of one; None resets the reference to the
            policy at each cycle's start, as the paper does. Its log-probs are computed once a
            cycle, so no copy is kept. The model that a policy's adapter lies in stands for the
            policy without its adapter; so does, with ``peft_config``, the name of ``model``, of
            which one copy is then in memory.
        peft_config: Train this adapter instead of the whole model.
        env: Environment name or factory, needed for ``states="agent"`` and
            ``"mixed"``.
        expert: Answers at the agent's states; None: the environment's own expert.
        asker: Says which of the agent's states are worth an answer, with ``ask="worth"``; None: a
            `stepagent.askers.WorthAsker`. What it has learnt is in each checkpoint, as
            ``asker.safetensors``.
        discriminator: A decoder of the same tokenizer for the discriminator and the value function
            of ``method="inverse"``, all of it trained; None: ``args.discriminator_body``.
        engine: Acts in place of the model here, which only learns: an engine of
            `stepagent.engines`, or the URL of a server. It is given the adapter in training where a
            cycle begins, and is left without it where training ends. See docs/engines.md.
        eval_dataset: Held-out trajectories in any form of ``train_dataset``, or a dict of them, for
            `evaluate`; the options ``eval_episodes`` and ``env`` also measure success.
        compute_metrics: Given a ``transformers.EvalPrediction`` of each set, whose
            ``predictions[i][t]`` is the text of the greedy policy at state t of trajectory i, and
            ``label_ids[i][t]`` the expert's; with ``include_for_metrics`` also ``losses[i]``, (T,)
            float64, −log π of the expert's actions, and ``inputs[i]``, the `Trunk`. It returns
            numbers by name.
        optimizers: (optimiser, scheduler), either None, of ``model``'s own parameters.
    """

    args: StepAgentConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: StepAgentConfig,
        train_dataset: Iterable[Trajectory | Mapping[str, Any]] | str,
        processing_class: PreTrainedTokenizerBase,
        ref_model: PreTrainedModel | str | None = None,
        peft_config: PeftConfig | None = None,
        *,
        env: str | EnvFactory | None = None,
        expert: Expert | None = None,
        asker: Asker | None = None,
        discriminator: PreTrainedModel | None = None,
        engine: Engine | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        eval_dataset: Any = None,
        compute_metrics: ComputeMetrics | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, StepAgentConfig):
            raise TypeError(f"args must be a StepAgentConfig, got {type(args).__name__}")
        if args.rolls_out and env is None:
            raise ValueError(f"states={args.states!r} needs env: an environment name or factory")
        method_class(args.method, args.states).check_run(
            args,
            env=env is not None,
            reference=ref_model is not None,
            discriminator=discriminator is not None,
        )
        check_loaded_everywhere()
        if asker is not None and args.ask != "worth":
            raise ValueError(f"asker is given, but ask={args.ask!r}: it needs ask='worth'")
        if engine is not None:
            check_engine(args)
        policy = load_policy(model, peft_config, args)
        check_tree_support(policy)
        ref_model = load_reference(ref_model, model, policy, args)
        check_reference(ref_model, policy)
        check_discriminator(discriminator, policy)
        check_quiet(policy, args)
        if engine is not None:
            check_adapter(policy)
        trajectories, trunks, processing_class = encode_run(train_dataset, processing_class, args)
        self._collector = Collector(trunks, processing_class, args, env, expert, asker)
        check_budget(policy, trunks, args, self._collector.max_new_tokens, inspects=args.inspects)
        self._parts = StepParts.of_run(args, processing_class, self._collector.end_tokens)
        self._parts.check(trunks, "train_dataset")
        sets = held_out(eval_dataset, policy, processing_class, args, self._collector)
        rollouts, metrics = self._collector.rollouts, compute_metrics is not None
        check_evaluation(args, env, sets, rollouts, ref_model is not None, metrics)
        check_optimizer(optimizers[0], policy)
        self._trunks = trunks
        self.data_facts = DataFacts.of(trunks, train_dataset)
        self._epochs = EpochCallback(self)
        super().__init__(
            model=policy,
            args=args,
            train_dataset=CycleData(self._collector.per_cycle, args),
            processing_class=processing_class,
            data_collator=self._collate,
            callbacks=[self._epochs, *(callbacks or [])],
            # Without one, transformers refuses an eval_strategy; episodes need none.
            eval_dataset=() if eval_dataset is None and args.eval_episodes else eval_dataset,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
        )
        check_one_gpu(args.n_gpu)
        state = self.accelerator.state
        check_sharding(getattr(state, "fsdp_plugin", None), state.deepspeed_plugin)
        check_parallelism(getattr(self.accelerator, "parallelism_config", None))
        # `compute_loss` divides by the counts of the whole step, and so needs no further division.
        self.model_accepts_loss_kwargs = True
        if engine is not None:
            self._collector.act_on(engine, self.accelerator)
        if ref_model is not None:
            torch.nn.Module.to(ref_model, args.device)
        self._scorer = Scorer(args, self.accelerator, ref_model)
        self._evaluator = Evaluator(
            sets,
            args,
            processing_class,
            self._collector,
            env,
            self._scorer,
            compute_metrics,
            sharded=self._is_sharded,
        )
        self._run = Run(
            *(policy, processing_class, trajectories, trunks),
            *(env, discriminator, ref_model, self._scorer),
        )
        self._start()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``transformers.Trainer.train``: from the first cycle, or as a checkpoint left it.

        Raises:
            ValueError: where a checkpoint's run counted its steps by other sizes.
        """
        self._start()
        if resume_from_checkpoint is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        else:
            folder = resume_from_checkpoint or None
        if folder is not None:
            check_same_run(Path(folder), self._sizes())
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _start(self) -> None:
        # What is learnt from: at first the demonstrations, then what the method makes of a cycle.
        self._comparisons = self._parts.told(
            [Comparison.demonstration(trunk) for trunk in self._trunks]
        )
        self._cycle: int | None = None
        # The cycle's figures, empty once they are logged.
        self._cycle_log: dict[str, float] = {}
        self._far = False  # the policy has moved by target_kl in this cycle
        self._skipped = False  # a step since the last log, as there was nothing to learn in it
        self._means = RunningMeans()
        self._epochs.start(Place(0, 0))
        self._evaluator.restart()
        self._collector.questions.restart()
        self._method = method_of(self.args)
        self._method.start(replace(self._run, policy=self._policy))

    @property
    def _policy(self) -> PreTrainedModel:
        return cast("PreTrainedModel", self.model)

    @property
    def asker(self) -> Asker:
        """Chooses the agent's states at which the expert is asked, with what it has learnt."""
        return self._collector.questions.asker

    @property
    def _is_sharded(self) -> bool:
        """Whether a forward of the policy needs all processes at the same time."""
        return bool(self.is_fsdp_enabled)

    @property
    def steps_per_epoch(self) -> int:
        """The optimiser's, of an epoch that no callback ends."""
        batch = self._sizes().trajectories_a_step
        return -(-self._collector.per_cycle // batch)

    def _sizes(self) -> RunSizes:
        return RunSizes.of(self.args, self._trunks, self._collector.per_cycle)

    # -- inspect: a cycle's data ---------------------------------------------------------------

    def begin_epoch(self, epoch: int) -> None:
        """Make a cycle's data where a cycle begins; choose what this epoch goes through."""
        cycle = epoch // self.args.epochs_per_cycle
        if self.args.has_cycles and cycle != self._cycle:
            self._begin_cycle(cycle)
        cast(CycleData, self.train_dataset).choose(self._comparisons, epoch)

    def _begin_cycle(self, cycle: int) -> None:
        self.log_cycle()  # of a run that was resumed after a cycle's last step, before its end
        published = self._collector.publish(self._policy, cycle, self._score_policy)
        acting = Acting(self._collector, self._policy, cycle, self._is_sharded)
        fresh, explored = self._method.collect(acting, cycle)
        self._collector.keep_rollouts(cycle)
        fresh = self._parts.told(fresh)
        self._cycle = cycle
        self._check_answered(fresh, cycle)
        self._cycle_log = {
            "cycle": cycle,
            **collected_figures(fresh, self.args, self.processing_class),
            **published,
            **explored,
        }
        self._means, self._far = RunningMeans(), False
        if self._method.scores:
            fresh = self._with_scores(fresh)
            self._evaluator.begin_cycle(self._policy, cycle)
        prepared = self._method.reflect(fresh, self._comparisons, cycle)
        self._comparisons, figures = broadcast_object_list([prepared])[0]
        self._cycle_log |= figures

    def _check_answered(self, fresh: Sequence[Comparison], cycle: int) -> None:
        """Before anything is learnt: an expert that has no answers would be learnt from in vain."""
        rollouts = [c for c in fresh if not c.expert_trunk]
        if cycle or not rollouts or not self._method.needs_answers:
            return
        if not any(c.expert_answers for c in rollouts):
            states = sum(c.trunk.num_steps for c in rollouts)
            raise ValueError(
                f"the expert must answer at the agent's states with states={self.args.states!r}, "
                f"but had no answer at any of {states}: give expert=, or an env that has one"
            )

    def _with_scores(self, comparisons: Sequence[Comparison]) -> list[Comparison]:
        wanted, sharded = self._method.scores, self._is_sharded
        return self._scorer.with_scores(self._policy, comparisons, wanted, sharded=sharded)

    @torch.no_grad()
    def _score_policy(self, trees: Sequence[TokenTree]) -> Tensor:
        with evaluation_mode(self._policy):
            return self._scorer.logps(self._policy, trees)[0]

    def withdraw_policy(self) -> None:
        """Leave the engine, if any, without the adapter."""
        self._collector.withdraw()

    def log_cycle(self) -> None:
        """Log the present cycle's figures, once."""
        if self._cycle_log:
            self.log({**self._cycle_log, **self._means.of_all_ranks().values()})
            self._cycle_log = {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers'; a loss comes with the figures of the steps since the last."""
        if {"loss", "learning_rate"} <= logs.keys():  # transformers', of all processes
            recent = self._means.take_recent().of_all_ranks().values()
            loss = recent.pop("mean_loss", None)
            if self._skipped:  # steps that transformers has counted as a loss of 0
                logs = {name: value for name, value in logs.items() if name != "loss"}
                logs |= {} if loss is None else {"loss": loss}
                self._skipped = False
            logs = logs | recent
        super().log(logs, start_time)

    # -- reflect: learn from the comparisons ---------------------------------------------------

    def _collate(self, items: list[Comparison | None]) -> dict[str, Any]:
        stand_in = Comparison.demonstration(self._trunks[0])
        return collate(items, self.args.max_tokens, stand_in)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As transformers'; ``num_items_in_batch`` is the step's `Counts`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [counts_of(batch["steps"]) for batch in batches]
        return batches, Counts.of_step(counts, self.accelerator)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """As transformers'; where ``target_kl`` was reached, nothing more is learnt in the cycle,
        and in a step that has no trajectory on any process nothing at all.

        A parameter without a gradient is left as it is, by optimisers and by their weight decay.
        """
        if self._far or (num_items_in_batch is not None and num_items_in_batch.nothing):
            self._skipped = True
            return torch.zeros((), device=self.args.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's share of the loss of its step, by ``args.method`` (``methods/``).

        All means are over the items of the whole optimiser's step, for any batches and
        processes that it is divided over. Where the model's configuration asks for the auxiliary
        loss of its experts (``output_router_logits``), its mean over the step's batches is added.

        Args:
            num_items_in_batch: Their `Counts`; None: those of this batch.
        """
        if return_outputs:
            raise ValueError("the loss is computed on trees, which have no per-example outputs")
        steps = inputs["steps"]
        total: Counts = num_items_in_batch or counts_of(steps)
        with recorded_routing(model) as routing:
            logps_N, entropy_N = self._scorer.logps(
                model, inputs["trees"], entropy=self._method.entropy
            )
        figures: dict[str, Tensor] = {}
        if steps is None:
            loss = logps_N.sum() * 0.0  # still connected: all processes go through the backward
        else:
            scores = {name: inputs[name].to(logps_N.device) for name in SCORES}
            steps = steps.to(logps_N.device)
            batch = Batch.of(logps_N, entropy_N, scores, steps, total)
            loss, figures = self._method.loss(batch)
        if routing is not None:
            balance = routing.loss(inputs["trees"])
            figures["router_loss"] = balance.detach().reshape(1)
            loss = loss + auxiliary_weight(model) * balance / total.batches
        self._stop_where_far(figures.get("kl", logps_N.new_zeros(0)))
        for name, values in figures.items():
            self._means.add(name, values)
        check_finite(loss.detach().cpu().numpy(), "the loss")
        # The mean over a step's batches is the step's loss, and steps count alike.
        share = 1 / (total.batches * self.args.world_size)
        self._means.add("mean_loss", loss.detach().reshape(1) * total.batches, share)
        return loss

    def _stop_where_far(self, kl_A: Tensor) -> None:
        """Where ``target_kl`` is reached on average, the processes of a run stop together."""
        if self._method.target_kl is None:
            return
        here = torch.stack([kl_A.sum(), kl_A.new_tensor(float(len(kl_A)))])
        moved, count = self.accelerator.reduce(here, "sum").tolist()
        self._far = count > 0 and moved / count > self._method.target_kl
        self._means.add("stopped_early", torch.tensor([float(self._far)]))

    def end_epoch(self, epoch: int) -> None:
        """Log a cycle's figures where a cycle ends."""
        if (epoch + 1) % self.args.epochs_per_cycle == 0:
            self.log_cycle()

    # -- what transformers.Trainer asks for ------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> None:
        return None  # CycleData has shuffled already, from the run's seed and the epoch

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            here = torch.tensor(_tokens_of(inputs))
            seen = self.accelerator.reduce(here.to(self.args.device), "sum")
            self.state.num_input_tokens_seen += int(seen)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 FLOP per parameter and tree token (forward and backward)."""
        return 6 * self._policy.num_parameters() * _tokens_of(inputs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """As transformers', which divides all steps by those of an epoch, ended early or not."""
        found = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        place = None if checkpoint is None else load_place(Path(checkpoint))
        if place is None:
            size = self.args.gradient_accumulation_steps
            place = Place(found[0], found[1] // size)
        place = place.of(steps_per_epoch)
        if self.args.ignore_data_skip:
            place = Place(place.epoch, 0)
        self._epochs.start(place)
        return place.epoch, place.step * self.args.gradient_accumulation_steps

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Ours first: transformers writes last the file that makes a checkpoint a checkpoint.
        means = self._means.of_all_ranks()
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial)) / name
            folder.mkdir(parents=True, exist_ok=True)
            save_run(
                folder, self._epochs.place(self.state.global_step, self.control), self._sizes()
            )
            if self.args.has_cycles and not self.args.save_only_model:
                self._save_cycle(folder, means)
        super()._save_checkpoint(model, trial)

    def _save_cycle(self, folder: Path, means: RunningMeans) -> None:
        progress = {
            "cycle": self._cycle,
            "log": self._cycle_log,
            "means": means.state(),
            "far": self._far,
            "batch": self._sizes().trajectories_a_step,
        }
        save_comparisons(folder / CYCLE_FILE, self._comparisons, progress)
        self._collector.questions.save(folder)
        self._evaluator.save(folder)
        self._method.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.args.has_cycles:
            return
        folder = Path(checkpoint)
        self._comparisons, progress = load_comparisons(folder / CYCLE_FILE)
        check_same_step(folder, progress["batch"], self._sizes().trajectories_a_step)
        self._cycle, self._cycle_log = progress["cycle"], progress["log"]
        # Those of all processes, which the first one goes on with.
        self._means = RunningMeans(progress["means"] if self.args.process_index == 0 else None)
        self._far = progress["far"]
        self._collector.questions.load(folder)
        self._evaluator.load(folder, self._cycle)
        self._method.load(folder)


def _tokens_of(batch: Mapping[str, Any]) -> int:
    """Of its trees; those of a batch that is nothing but padding teach nothing."""
    return sum(len(tree.input_ids) for tree in batch["trees"]) if batch["steps"] else 0
