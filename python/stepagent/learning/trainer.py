"""Training: transformers.Trainer, fed by cycles of inspect → reflect.

One Trainer epoch is one pass over a cycle's comparisons; where a cycle begins, its data is made
anew. So checkpoints, resuming, schedules, logging, DDP and callbacks are transformers' own.

Reflection is a loss: supervised, that of implicit step rewards, or PPO's on what a discriminator
makes of a cycle's steps (inverse.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..acting.inspection import inspect
from ..acting.rollout import Expert, queried_rollouts, trunks_and_answers
from ..data.actions import FORMATS
from ..data.branch import Branch, agreement
from ..data.encoding import Trunk, encode
from ..data.trajectory import Trajectory
from ..engines import CompletionsEngine, Engine
from ..engines.adapters import PolicyOnEngine, check_adapter, first_state, logp_gap
from ..envs.pool import EnvFactory
from ..models import check_tree_support, evaluation_mode, score_trees
from ..ops import step_rewards
from ..ranks import over_ranks
from ..records.episodes import Episode
from ..trees.tree import TokenTree, pack_step_pairs
from .averages import Counts, RunningMeans
from .config import StepAgentConfig
from .cycle import (
    Comparison,
    StepTable,
    load_comparisons,
    naive_tokens,
    pack_comparisons,
    save_comparisons,
    split_by_trunk,
    unique_tokens,
)
from .inverse import InverseReflection, ppo_step_loss
from .losses import implicit_step_loss
from .preflight import (
    check_budget,
    check_discriminator,
    check_loaded_everywhere,
    check_no_dropout,
    check_reference,
    check_sharding,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CYCLE_FILE = "cycle.safetensors"
_SCORES = ("ref_logps", "old_logps", "advantages")
_PROBES = 8  # actions at one state, by which an engine is told from another policy
# Whose adapter is whole in each process; FSDP2's is gathered.
_TRAINED_WITH_ENGINE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class StepAgentTrainer(Trainer):
    """Train an agent towards an expert's trajectories.

    :param model: a causal language model, or the name or path of one.
    :param train_dataset: the expert's :class:`Trajectory` objects, or rows with ``messages``.
    :param processing_class: the tokenizer, with a chat template.
    :param ref_model: a fixed reference; None resets the reference to the policy at each cycle's
        start, as the paper does. Its log-probs are computed once a cycle, so no copy is kept.
    :param peft_config: train this adapter instead of the whole model.
    :param env: environment name or factory, needed for ``states="agent"``.
    :param expert: answers at the agent's states; None: the environment's own expert.
    :param discriminator: a decoder of the same tokenizer for the discriminator and the value
        function of ``method="inverse"``, all of it trained; None: ``args.discriminator_body``.
    :param engine: acts in place of the model here, which only learns: an engine of
        :mod:`stepagent.engines`, or the URL of a server. It is given the adapter in training where
        a cycle begins, and is left without it where training ends. See docs/engines.md.
    """

    args: StepAgentConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: StepAgentConfig,
        train_dataset: Sequence[Trajectory | Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        ref_model: PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        *,
        env: str | EnvFactory | None = None,
        expert: Expert | None = None,
        discriminator: PreTrainedModel | None = None,
        engine: Engine | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, StepAgentConfig):
            raise TypeError(f"args must be a StepAgentConfig, got {type(args).__name__}")
        if args.states == "agent" and env is None:
            raise ValueError("states='agent' needs env: an environment name or factory")
        check_loaded_everywhere()
        if engine is not None and not args.has_cycles:
            raise ValueError("engine is given, but method='sft' at the expert's states never acts")
        policy = _load_policy(model, peft_config, args.seed)
        check_tree_support(policy)
        check_reference(ref_model, policy, args)
        check_discriminator(discriminator, policy, args)
        if args.method == "inverse":
            check_no_dropout(policy)
        if engine is not None:
            check_adapter(policy)
        trunks = _encode_all(train_dataset, processing_class, progress=not args.disable_tqdm)
        self._env, self._expert = env, expert
        self._end_tokens = sorted(
            {int(t.input_ids[stop - 1]) for t in trunks for _, stop in t.action_spans}
        )
        longest = max(int(np.diff(trunk.action_spans).max()) for trunk in trunks)
        self._max_new_tokens = args.max_new_tokens or longest
        check_budget(policy, trunks, args, self._max_new_tokens)
        self._trunks = trunks
        self._per_epoch = args.rollouts or len(trunks)
        self._discriminator = discriminator
        super().__init__(
            model=policy,
            args=args,
            train_dataset=_CycleData(_rounded_up(self._per_epoch, args)),
            processing_class=processing_class,
            data_collator=self._collate,
            callbacks=[_CycleCallback(self), *(callbacks or [])],
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"one process cannot train on {args.n_gpu} GPUs: start one per GPU with "
                "`accelerate launch` or `torchrun`, or show it one by CUDA_VISIBLE_DEVICES"
            )
        state = self.accelerator.state
        check_sharding(getattr(state, "fsdp_plugin", None), state.deepspeed_plugin)
        # `compute_loss` divides by the counts of the whole step, and so needs no further division.
        self.model_accepts_loss_kwargs = True
        self._on_engine = None if engine is None else self._reach(engine)
        self._ref_model = ref_model
        if ref_model is not None:
            torch.nn.Module.to(ref_model, args.device)
        self._start()

    def _reach(self, engine: Engine | str) -> PolicyOnEngine:
        if isinstance(engine, str):
            engine = CompletionsEngine(engine)
        kind, processes = self.accelerator.distributed_type, self.accelerator.num_processes
        if kind not in _TRAINED_WITH_ENGINE and not self.accelerator.is_fsdp2:
            raise ValueError(f"engine= takes adapters of DDP and of FSDP2, but this run is {kind}")
        if processes > 1 and not engine.shared:
            raise ValueError(
                f"{type(engine).__name__} is in one process, but {processes} train: "
                "start a server, which all can ask, and give its URL"
            )
        return PolicyOnEngine(engine, Path(str(self.args.output_dir), "engine"))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``transformers.Trainer.train``: from the first cycle, or as a checkpoint left it."""
        self._start()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _start(self) -> None:
        # What is learnt from: this cycle's comparisons; for sft, the demonstrations and all since.
        self._comparisons = [Comparison.demonstration(trunk) for trunk in self._trunks]
        self._cycle: int | None = None
        # The cycle's figures, empty once they are logged.
        self._cycle_log: dict[str, float] = {}
        self._far = False  # the policy has moved by target_kl in this cycle
        self._means = RunningMeans()
        self._inverse = (
            InverseReflection(self._policy, self.args, self._discriminator)
            if self.args.method == "inverse"
            else None
        )

    # -- inspect: a cycle's data ---------------------------------------------------------------

    def begin_epoch(self, epoch: int) -> None:
        """Make a cycle's data where a cycle begins; choose what this epoch goes through."""
        cycle, part = divmod(epoch, self.args.epochs_per_cycle)
        if self.args.has_cycles and part == 0 and cycle != self._cycle:
            self._begin_cycle(cycle)
        data = cast(_CycleData, self.train_dataset)
        order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self._comparisons))
        # Fewer than the rollouts where some crashed: then the first ones come twice.
        items = [self._comparisons[i] for i in np.resize(order, self._per_epoch)]
        data.items = [*items, *[None] * (len(data) - len(items))]

    def _begin_cycle(self, cycle: int) -> None:
        self.log_cycle()  # of a run that was resumed after a cycle's last step, before its end
        published = self._publish_policy(cycle)
        make = self._at_agent_states if self.args.states == "agent" else self._at_expert_states
        fresh = make(cycle)
        self._cycle = cycle
        self._cycle_log = {
            "cycle": cycle,
            "agreement": agreement(
                [c.trunk for c in fresh],
                [c.branches for c in fresh],
                form=FORMATS[self.args.action_format],
                tokenizer=cast("PreTrainedTokenizerBase", self.processing_class),
            ),
            "tokens_unique": unique_tokens(fresh, self.args.max_tokens),
            "tokens_naive": naive_tokens(fresh),
            **published,
        }
        self._means, self._far = RunningMeans(), False
        if self.args.method == "sft":
            self._comparisons = [*self._comparisons, *fresh]
            return
        self._comparisons = self._with_reference(fresh)
        if self._inverse is not None:
            prepared = self._inverse.prepare(self._comparisons, cycle)
            self._comparisons, figures = broadcast_object_list([prepared])[0]
            self._cycle_log |= figures

    @torch.no_grad()
    def _publish_policy(self, cycle: int) -> dict[str, float]:
        """Have the engine, if any, act as the policy does now; see at one state that it does."""
        if self._on_engine is None:
            return {}
        state = first_state(self._trunks)
        ((branches,),) = self._on_engine.publish(
            self._policy,
            cycle,
            lambda actor: inspect(
                actor,
                [state],
                samples=_PROBES,
                max_new_tokens=self._max_new_tokens,
                eos_token_id=self._end_tokens,
                seed=self._cycle_seed(cycle),
            ),
        )
        trees = pack_step_pairs([state], [[[branch.token_ids for branch in branches]]])
        with evaluation_mode(self._policy):
            logps_N, _ = self._logps(self._policy, trees)
        expert = len(state.input_ids) - int(state.action_spans[0, 0])  # its action comes first
        return {"engine_gap": logp_gap(branches, logps_N[expert:].float().cpu().numpy())}

    def withdraw_policy(self) -> None:
        """Leave the engine, if any, without the adapter."""
        if self._on_engine is not None:
            self._on_engine.withdraw()

    def log_cycle(self) -> None:
        """Log the present cycle's figures, once."""
        if self._cycle_log:
            self.log({**self._cycle_log, **self._means.of_all_ranks().values()})
            self._cycle_log = {}

    def _at_expert_states(self, cycle: int) -> list[Comparison]:
        def inspected(places: list[int]) -> list[list[list[Branch]]]:
            return inspect(
                self._actor,
                [self._trunks[i] for i in places],
                samples=self.args.samples,
                max_new_tokens=self._max_new_tokens,
                temperature=self.args.temperature,
                eos_token_id=self._end_tokens,
                seed=self._cycle_seed(cycle),
                places=places,
                max_batch_tokens=self.args.inspect_batch_tokens,
                progress=not self.args.disable_tqdm,
            )

        costs = [len(trunk.input_ids) for trunk in self._trunks]
        branches = over_ranks(inspected, costs, alike=self._act_alike)
        tried = [[[branch.token_ids for branch in step] for step in steps] for steps in branches]
        return [
            Comparison(t, b, expert_trunk=True) for t, b in zip(self._trunks, tried, strict=True)
        ]

    def _at_agent_states(self, cycle: int) -> list[Comparison]:
        assert self._env is not None
        env, tokenizer = self._env, cast("PreTrainedTokenizerBase", self.processing_class)
        first = self.args.rollout_seed_start + cycle * self._per_epoch

        def rolled_out(places: list[int]) -> list[Episode]:
            return queried_rollouts(
                self._actor,
                env,
                self._expert,
                tokenizer=tokenizer,
                seeds=[first + place for place in places],
                max_new_tokens=self._max_new_tokens,
                temperature=self.args.temperature,
                eos_token_id=self._end_tokens,
                seed=self._cycle_seed(cycle),
                max_steps=self.args.max_steps_per_episode,
                progress=not self.args.disable_tqdm,
                action_format=self.args.action_format,
            )

        episodes = over_ranks(rolled_out, np.ones(self._per_epoch), alike=self._act_alike)
        form = FORMATS[self.args.action_format]
        trunks, branches = trunks_and_answers(episodes, tokenizer, form)
        return [Comparison(t, b, expert_trunk=False) for t, b in zip(trunks, branches, strict=True)]

    @property
    def _is_sharded(self) -> bool:
        """Whether a forward of the policy needs all processes at the same time."""
        return bool(self.is_fsdp_enabled)

    @property
    def _act_alike(self) -> bool:
        """Whether all processes have to act together; on an engine none needs another."""
        return self._is_sharded and self._on_engine is None

    @property
    def _policy(self) -> PreTrainedModel:
        return cast("PreTrainedModel", self.model)

    @property
    def _actor(self) -> PreTrainedModel | Engine:
        return self._policy if self._on_engine is None else self._on_engine.actor

    def _cycle_seed(self, cycle: int) -> int:
        return self.args.seed * 1_000_003 + cycle

    @torch.no_grad()
    def _with_reference(self, comparisons: list[Comparison]) -> list[Comparison]:
        """Score every comparison under the reference: a fixed model, or the policy as it is now.

        PPO also needs the log-probs under the policy as it is now.
        """
        ref = old = self._scored(self._ref_model or self._policy, comparisons)
        if self._inverse is None:
            return [replace(c, ref_logps=r) for c, r in zip(comparisons, ref, strict=True)]
        if self._ref_model is not None:
            old = self._scored(self._policy, comparisons)
        triples = zip(comparisons, ref, old, strict=True)
        return [replace(c, ref_logps=r, old_logps=o) for c, r, o in triples]

    def _scored(
        self, model: torch.nn.Module, comparisons: list[Comparison]
    ) -> list[NDArray[np.float32]]:
        """Log-probs of each comparison's actions, in the order of its tree."""
        size = self.args.per_device_eval_batch_size

        def scores(places: list[int]) -> list[NDArray[np.float32]]:
            batches = [places[i : i + size] for i in range(0, len(places), size)]
            scored = []
            for batch in tqdm(batches, desc="score", disable=self.args.disable_tqdm):
                trees = pack_comparisons([comparisons[i] for i in batch], self.args.max_tokens)
                logps, _ = self._logps(model, trees)
                values = logps.float().cpu().numpy()
                _check_finite(values, "the log-probs at the start of the cycle")
                scored += split_by_trunk(values, trees)
            return scored

        alike = self._is_sharded and model is self._policy
        with evaluation_mode(model):
            return over_ranks(scores, [c.tokens for c in comparisons], alike=alike)

    def _logps(
        self, model: torch.nn.Module, trees: Sequence[TokenTree], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """In the precision of training, head included; in another the reference would differ."""
        with self.accelerator.autocast():
            if entropy:
                return score_trees(model, trees, return_entropy=True)
            return score_trees(model, trees), None

    # -- reflect: learn from the comparisons ---------------------------------------------------

    def _collate(self, items: list[Comparison | None]) -> dict[str, Any]:
        """A batch of trees; of nothing but padding, a tree to go through the model all the same."""
        comparisons = [item for item in items if item is not None]
        trees = pack_comparisons(comparisons or self._comparisons[:1], self.args.max_tokens)
        if not comparisons:
            return {"trees": trees, "steps": None}
        return {
            "trees": trees,
            "steps": StepTable.of(trees, torch.tensor([c.expert_trunk for c in comparisons])),
            **{
                name: torch.from_numpy(np.concatenate([getattr(c, name) for c in comparisons]))
                for name in _SCORES
            },
        }

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As transformers'; ``num_items_in_batch`` is the step's :class:`Counts`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [_counts(batch["steps"]) for batch in batches]
        return batches, Counts.of_step(counts, self.accelerator)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """As transformers'; where ``target_kl`` was reached, nothing more is learnt in the cycle.

        A parameter without a gradient is left as it is, by optimisers and by their weight decay.
        """
        if self._far:
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
        """The batch's share of the loss of its step: implicit, PPO's, or the NLL of the expert.

        implicit: L = mean over pairs of −log σ(r_E − r_A),  r = β (log π − log π_ref) of an action;
        inverse: `ppo_loss` of the agent's steps; to either ``sft_weight`` adds the mean NLL of the
        expert's tokens. All means are over the items of the whole optimiser's step, whatever the
        batches and processes that it is divided over.

        :param num_items_in_batch: their :class:`Counts`; None: those of this batch.
        """
        if return_outputs:
            raise ValueError("the loss is computed on trees, which have no per-example outputs")
        with_entropy = self.args.method == "inverse" and self.args.entropy_coef > 0
        logps_N, entropy_N = self._logps(model, inputs["trees"], entropy=with_entropy)
        steps: StepTable | None = inputs["steps"]
        total: Counts = num_items_in_batch or _counts(steps)
        if steps is None:
            loss = logps_N.sum() * 0.0  # still connected: all processes go through the backward
            self._stop_where_far(logps_N.new_zeros(0))
        else:
            loss = self._batch_loss(logps_N, entropy_N, inputs, steps.to(logps_N.device), total)
        _check_finite(loss.detach().cpu().numpy(), "the loss")
        # Of one of the step's batches: the mean of all of them is the step's loss.
        self._means.add("mean_loss", loss.detach().reshape(1) * total.batches)
        return loss

    def _batch_loss(
        self,
        logps_N: Tensor,
        entropy_N: Tensor | None,
        inputs: dict[str, Any],
        steps: StepTable,
        total: Counts,
    ) -> Tensor:
        if self.args.method == "sft":
            return steps.expert_nll(logps_N, total.expert_tokens)
        if self.args.method == "implicit":
            loss = self._implicit_loss(logps_N, inputs["ref_logps"], steps, total)
        else:
            loss = self._ppo_loss(logps_N, entropy_N, inputs, steps, total)
        if self.args.sft_weight:
            loss = loss + self.args.sft_weight * steps.expert_nll(logps_N, total.expert_tokens)
        return loss

    def _implicit_loss(
        self, logps_N: Tensor, ref_logps_N: Tensor, steps: StepTable, total: Counts
    ) -> Tensor:
        ref_logps_N = ref_logps_N.to(logps_N.device)
        rewards_S = step_rewards(logps_N, ref_logps_N, steps.offsets, beta=self.args.beta)
        expert_P, agent_P = rewards_S[steps.expert_P], rewards_S[steps.agent_P]
        if not len(expert_P):
            return logps_N.sum() * 0.0  # nothing was compared: a zero that is still connected
        margins_P = (expert_P - agent_P).detach()
        self._means.add("reward_margin", margins_P)
        self._means.add("reward_accuracy", (margins_P > 0).float()[~steps.same_P])
        # E over the reference's own samples of log(ref / policy) estimates KL(ref ‖ policy).
        self._means.add("kl", -agent_P.detach() / self.args.beta)
        return implicit_step_loss(expert_P, agent_P).sum() / total.pairs

    def _ppo_loss(
        self,
        logps_N: Tensor,
        entropy_N: Tensor | None,
        inputs: dict[str, Any],
        steps: StepTable,
        total: Counts,
    ) -> Tensor:
        scores = {name: inputs[name].to(logps_N.device) for name in _SCORES}
        loss, figures = ppo_step_loss(self.args, logps_N, entropy_N, steps, total, **scores)
        for name, values in figures.items():
            self._means.add(name, values)
        self._stop_where_far(figures["kl"])
        return loss

    def _stop_where_far(self, kl_A: Tensor) -> None:
        """Where ``target_kl`` is reached on average, the processes of a run stop together."""
        if self.args.target_kl is None:
            return
        here = torch.stack([kl_A.sum(), kl_A.new_tensor(float(len(kl_A)))])
        moved, count = self.accelerator.reduce(here, "sum").tolist()
        self._far = count > 0 and moved / count > self.args.target_kl
        self._means.add("stopped_early", torch.tensor([float(self._far)]))

    def end_epoch(self, epoch: int) -> None:
        """Log a cycle's figures where a cycle ends."""
        if (epoch + 1) % self.args.epochs_per_cycle == 0:
            self.log_cycle()

    # -- what transformers.Trainer asks for ------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> None:
        return None  # begin_epoch has shuffled already, from the run's seed and the epoch

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 FLOP per parameter and tree token (forward and backward)."""
        tokens = sum(len(tree.input_ids) for tree in inputs["trees"])
        return 6 * self._policy.num_parameters() * tokens

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # First the cycle: transformers writes the file that makes a checkpoint a checkpoint last.
        means = self._means.of_all_ranks()
        if self.args.has_cycles and self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial)) / name
            folder.mkdir(parents=True, exist_ok=True)
            progress = {
                "cycle": self._cycle,
                "log": self._cycle_log,
                "means": means.state(),
                "far": self._far,
                "batch": self.get_total_train_batch_size(self.args),
            }
            save_comparisons(folder / _CYCLE_FILE, self._comparisons, progress)
            if self._inverse is not None:
                self._inverse.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.has_cycles:
            self._comparisons, progress = load_comparisons(Path(checkpoint) / _CYCLE_FILE)
            self._check_same_batch(checkpoint, progress["batch"])
            self._cycle, self._cycle_log = progress["cycle"], progress["log"]
            # Those of all processes, which the first one goes on with.
            self._means = RunningMeans(progress["means"] if self.args.process_index == 0 else None)
            self._far = progress["far"]
            if self._inverse is not None:
                self._inverse.load(Path(checkpoint))

    def _check_same_batch(self, checkpoint: str, before: int) -> None:
        """Steps are counted in batches: of another size, the run would go on somewhere else."""
        now = self.get_total_train_batch_size(self.args)
        if now != before:
            raise ValueError(
                f"{checkpoint} is of a run with {before} trajectories an optimiser's step, this "
                f"one has {now}: per_device_train_batch_size × gradient_accumulation_steps × "
                f"processes must be {before}"
            )


class _CycleCallback(TrainerCallback):
    """Tells the trainer where epochs begin and end."""

    def __init__(self, trainer: StepAgentTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epoch = int((state.epoch or 0) + 1e-6)
        self._trainer.begin_epoch(self._epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.end_epoch(self._epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.log_cycle()
        self._trainer.withdraw_policy()


def _counts(steps: StepTable | None) -> Counts:
    return Counts() if steps is None else steps.counts()


def _rounded_up(count: int, args: StepAgentConfig) -> int:
    """So that all processes have as many batches: what is missing is padded with None.

    accelerate would take the first items a second time, and they would count twice.
    """
    whole = args.world_size * args.per_device_train_batch_size if args.world_size > 1 else 1
    return -(-count // whole) * whole


class _CycleData(Dataset["Comparison | None"]):
    """A dataset of fixed length whose items are replaced each epoch."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.items: list[Comparison | None] = []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Comparison | None:
        return self.items[index]


def _encode_all(
    dataset: Sequence[Trajectory | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool,
) -> list[Trunk]:
    if len(dataset) == 0:
        raise ValueError("train_dataset is empty; at least one expert trajectory is needed")
    trunks = []
    for i, row in enumerate(tqdm(dataset, desc="encode", disable=not progress)):
        try:
            trajectory = (
                row if isinstance(row, Trajectory) else Trajectory(messages=row["messages"])
            )
            trunks.append(encode(trajectory, tokenizer))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"train_dataset[{i}]: {reason}") from error
    return trunks


def _load_policy(model: PreTrainedModel | str, peft_config: PeftConfig | None, seed: int) -> Any:
    """The model to train: loaded where only named, with the adapter where one is asked for."""
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
    if peft_config is None:
        return model
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs PEFT: pip install 'stepagent[train]'") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same adapter in every process
        return get_peft_model(model, peft_config)


def _check_finite(values: Any, what: str) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{what} hold NaN or infinity; lower the learning rate or look for a broken weight. "
            "Checkpoints written so far are kept"
        )
