"""TRL's trainers with StepAgent's objectives (written for TRL 1.16).

* `StepDPOTrainer`: pairs of actions, or of whole conversations, as TRL pads them. The log-probs are
  those of TRL's fused head, so FSDP, ZeRO and adapters are handled as TRL handles them.
* `TreeDPOTrainer`: an expert's trajectory and what was tried at its steps is one row, encoded once.
* `StepGRPOTrainer`: GRPO in which each step of a rollout has credit of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from numpy.typing import ArrayLike
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter

from ..data.encoding import encode
from ..data.trajectory import Trajectory
from ..data.trunk import Trunk
from ..learning.advantages import group_relative
from ..learning.averages import Counts
from ..learning.cycle import StepTable
from ..learning.losses import implicit_step_loss
from ..models import score_trees
from ..ops import step_rewards, step_sums
from ..trees.tree import pack_step_pairs
from .masked_steps import MaskedSteps

_DEFAULTS = {
    "loss_type": ["sigmoid"],
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
    "precompute_ref_log_probs": False,
}


class _StepTrainer(DPOTrainer):  # type: ignore[misc]
    """What both have in common: the options they take, the reference, the metrics."""

    data_collator: Any

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **options: Any) -> None:
        for name, default in _DEFAULTS.items() if args is not None else ():
            if getattr(args, name) != default:
                raise ValueError(
                    f"{name} must be {default!r} in {type(self).__name__}, whose loss is the "
                    f"implicit step loss, got {getattr(args, name)!r}"
                )
        super().__init__(model, ref_model, args, **options)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The frozen model: one of its own, or the policy with its adapter off."""
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            if self.ref_model is not None or not is_peft_model(self.model):
                yield self.ref_model
                return
            policy = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                yield self.model

    @torch.no_grad()
    def _log_pairs(
        self,
        tokens: Tensor,
        rewards: Sequence[Tensor],
        logps: Sequence[Tensor],
        entropy_N: Tensor,
    ) -> None:
        """TRL's own metrics, under its names; its means are over all processes."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            seen = int(self.accelerator.gather(tokens).sum())
            self._total_train_tokens += seen // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = (values.detach().float() for values in rewards)
        for name, values in {
            "entropy": entropy_N.detach(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[0].detach(),
            "logps/rejected": logps[1].detach(),
        }.items():
            here = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
            total, count = self.accelerator.reduce(here, "sum").tolist()
            self._metrics[mode][name].append(total / count if count else 0.0)


def _refuse_outputs(return_outputs: bool) -> None:
    if return_outputs:
        raise ValueError("compute_metrics must be None: the logits it is given are never built")


# --------------------------------------------------------------------- pairs as padded rows


class StepPairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator with a mask of the policy's own tokens, ``chosen_mask`` and ``rejected_mask``.

    Raises:
        ValueError: for a pair longer than ``max_length``: an action that is cut is another action.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sides = ("chosen", "rejected")
        longest = max(len(e["prompt_ids"]) + len(e[f"{s}_ids"]) for e in examples for s in sides)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"max_length must be at least {longest}, the tokens of a pair's longer side (None: "
                f"any), got {self.max_length}: a cut action is another action"
            )
        masks = [
            {
                "prompt_ids": [0] * len(example["prompt_ids"]),
                "chosen_ids": example["chosen_mask"],
                "rejected_ids": example["rejected_mask"],
            }
            for example in examples
        ]
        batch: dict[str, Any] = super().torch_call(examples)
        batch["completion_mask"] = batch["completion_mask"] * super().torch_call(masks)["input_ids"]
        return batch


class StepDPOTrainer(_StepTrainer):
    """TRL's DPOTrainer on pairs of actions, or of whole conversations that one prompt begins.

    Of the completions, only what the policy wrote counts: the actions of the assistant with the
    tokens that end them, and not the observations between them. With r = β Σ (log π − log π_ref)
    over these tokens the loss is −log σ(r_chosen − r_rejected), as in StepAgent's implicit form for
    one action, and in ETO (arXiv 2403.02502) for conversations.

    Args:
        model, ref_model, args, options: as `trl.DPOTrainer`'s; rows as TRL has them, ``prompt``,
            ``chosen`` and ``rejected``, the latter two of one or many messages.

    Raises:
        ValueError: for another loss than TRL's default, and for what `stepagent.encode` refuses.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **options: Any) -> None:
        super().__init__(model, ref_model, args, **options)
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator = StepPairCollator(**vars(self.data_collator))

    def step_objective(self, rewards_S: Tensor, row_offsets: Tensor) -> Tensor:
        """The loss of a batch, for a subclass to change.

        Args:
            rewards_S: implicit rewards of all steps of the 2P rows, with gradients.
            row_offsets: (2P + 1,) the steps of each row; the first P rows are the chosen ones.
        """
        chosen_P, rejected_P = step_sums(rewards_S, row_offsets).chunk(2)
        return implicit_step_loss(chosen_P, rejected_P).mean()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        unlimited = copy.copy(args)
        unlimited.max_length = None  # TRL drops what is longer; the collator says so
        rows = super()._prepare_dataset(dataset, processing_class, unlimited, name)
        return rows.map(partial(_own_tokens, tokenizer=processing_class))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for mask in ("chosen_mask", "rejected_mask"):
            if mask not in self._signature_columns:
                self._signature_columns.append(mask)

    def _score(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        keys = {name: value for name, value in inputs.items() if name != "completion_mask"}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(**keys, labels=labels, use_cache=False, fused_lm_head=True)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        _refuse_outputs(return_outputs)
        steps = MaskedSteps.of(inputs["completion_mask"][:, 1:])
        length = steps.mask_BT.shape[1]  # prompt tuning puts virtual tokens before the real ones
        with self._reference() as reference:
            ref_logps_N = steps.tokens(self._score(reference, inputs).log_probs[:, -length:])
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self._score(model, {**inputs, **router})
        logps_N = steps.tokens(outputs.log_probs[:, -length:])
        rewards_S = step_rewards(logps_N, ref_logps_N, steps.step_offsets, beta=self.beta)
        loss = self.step_objective(rewards_S, steps.row_offsets)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        rewards = step_sums(rewards_S, steps.row_offsets).chunk(2)
        logps = step_sums(step_sums(logps_N, steps.step_offsets), steps.row_offsets).chunk(2)
        entropy_N = steps.tokens(outputs.entropy[:, -length:])
        self._log_pairs(inputs["attention_mask"].sum(), rewards, logps, entropy_N)
        return loss


def _own_tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Which tokens of a row's completions the assistant wrote; of plain text, all."""
    masks = {}
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_ids"]
        if isinstance(row[side], str):
            masks[f"{side}_mask"] = [1] * len(ids)
            continue
        whole = [*row["prompt_ids"], *ids]
        trunk = encode(Trajectory([*row["prompt"], *row[side]]), tokenizer)
        if len(trunk.rewinds) or trunk.input_ids.tolist() != whole[: len(trunk.input_ids)]:
            raise ValueError(
                f"{side} must be tokens that go on from one turn to the next, but the chat template"
                " rewrites earlier turns: TreeDPOTrainer takes such conversations"
            )
        mask = [0] * len(whole)
        for start, stop in trunk.action_spans.tolist():
            mask[start:stop] = [1] * (stop - start)
        masks[f"{side}_mask"] = mask[len(row["prompt_ids"]) :]
    return masks


# ----------------------------------------------------------------------- pairs as token trees


def tree_rows(
    trunks: Sequence[Trunk], branches: Sequence[Sequence[Sequence[ArrayLike]]]
) -> list[dict[str, Any]]:
    """The rows of a dataset for `TreeDPOTrainer`: one for each expert trajectory.

    Args:
        trunks: the experts', as from `stepagent.encode`.
        branches: ``branches[i][t]``: actions tried at step t of ``trunks[i]``, as from
            `stepagent.inspect`.

    Returns:
        ``datasets.Dataset.from_list`` takes them.
    """
    return [
        {
            "input_ids": trunk.input_ids.tolist(),
            "action_spans": trunk.action_spans.tolist(),
            "rewinds": trunk.rewinds.tolist(),
            "branches": [[_ids(action) for action in actions] for actions in steps],
        }
        for trunk, steps in zip(trunks, branches, strict=True)
    ]


def _ids(action: Any) -> list[int]:
    return [int(token) for token in getattr(action, "token_ids", action)]


class TreeDPOTrainer(_StepTrainer):
    """TRL's DPOTrainer whose row is a tree: a trajectory, and actions tried at its steps.

    The expert's action is preferred to each that was tried at the same step; every token is encoded
    once, where T pairs as rows encode each state 2T times. The loss is the mean over the pairs of
    an optimiser's step, however they are divided over batches and processes.

    The trees need a model that `stepagent.check_tree_support` accepts. ``max_length`` bounds the
    tokens of a tree, not of a pair; None is no bound.

    Args:
        model, ref_model, args, options: as `trl.DPOTrainer`'s; the rows are those of `tree_rows`.

    Raises:
        ValueError: for another loss than TRL's default, and for a row that exceeds max_length.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **options: Any) -> None:
        super().__init__(model, ref_model, args, **options)
        self.data_collator = partial(_collate_trees, max_tokens=self.args.max_length)
        # `compute_loss` divides by the pairs of the whole step, and so needs no further division.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        missing = {"input_ids", "action_spans", "branches"} - next(iter(dataset)).keys()
        if missing:
            raise ValueError(f"rows must be those of tree_rows, got none of {sorted(missing)}")
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "action_spans", "rewinds", "branches"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As transformers'; ``num_items_in_batch`` is what the optimiser's step compares."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [batch["steps"].counts() for batch in batches]
        return batches, Counts.of_step(counts, self.accelerator)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The batch's share of the loss of its step."""
        _refuse_outputs(return_outputs)
        trees, steps = inputs["trees"], inputs["steps"]
        with self.accelerator.autocast():
            with self._reference() as reference:
                ref_logps_N = score_trees(reference, trees)
            logps_N, entropy_N = score_trees(model, trees, return_entropy=True)
        steps = steps.to(logps_N.device)
        rewards_S = step_rewards(logps_N, ref_logps_N, steps.offsets, beta=self.beta)
        rewards = rewards_S[steps.expert_P], rewards_S[steps.agent_P]
        total: Counts = num_items_in_batch or steps.counts()
        loss = implicit_step_loss(*rewards).sum() / (total.pairs or 1)
        logps_S = step_sums(logps_N, steps.offsets)
        logps = logps_S[steps.expert_P], logps_S[steps.agent_P]
        tokens = torch.tensor(_tokens(inputs), device=logps_N.device)
        self._log_pairs(tokens, rewards, logps, entropy_N)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 FLOP per parameter and tree token (forward and backward)."""
        policy = self.accelerator.unwrap_model(self.model)
        return 6 * int(policy.num_parameters()) * _tokens(inputs)


def _tokens(inputs: Mapping[str, Any]) -> int:
    return sum(len(tree.input_ids) for tree in inputs["trees"])


def _collate_trees(rows: Sequence[Mapping[str, Any]], max_tokens: int | None) -> dict[str, Any]:
    trunks = [Trunk(row["input_ids"], row["action_spans"], row.get("rewinds", ())) for row in rows]
    trees = pack_step_pairs(trunks, [row["branches"] for row in rows], max_tokens=max_tokens)
    all_expert = torch.ones(sum(trunk.num_steps for trunk in trunks), dtype=torch.bool)
    return {"trees": trees, "steps": StepTable.of(trees, all_expert)}


# ------------------------------------------------------------------------ credit to each step

Credit = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_credit(rewards_S: Tensor, row_offsets: Tensor, groups_B: Tensor) -> Tensor:
    """Each step's reward relative to those of all steps of its group (iStar, arXiv 2509.19199)."""
    return group_relative(rewards_S, groups_B.repeat_interleave(row_offsets.diff()))


class StepGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer in which each step of a rollout has credit of its own.

        A_s = A(outcome, from reward_funcs, as TRL computes it) + credit of the step

    ``rollout_func`` returns ``step_rewards`` beside TRL's keys: for each completion a list of one
    number a step. A step is a run of ones in its ``env_mask`` (without one, the whole completion).

    Args:
        args: as `trl.GRPOTrainer`'s, as are ``options``.
        credit: from rewards (S,), the steps of each completion (B + 1,) and the group of each
            completion (B,), those of all processes, to credit (S,).

    Raises:
        ValueError: without a rollout_func, with ``mask_truncated_completions`` (whose steps TRL
            hides), or for step rewards that do not fit the steps.
    """

    def __init__(self, *args: Any, credit: Credit = group_credit, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.rollout_func is None:
            raise ValueError("rollout_func must return step_rewards, got None for rollout_func")
        if self.mask_truncated_completions:
            raise ValueError(
                "mask_truncated_completions must be False, as it hides steps, got True"
            )
        self._credit = credit

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [dict(row) for row in inputs]  # TRL adds the rollout's fields: each row its own
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "step_rewards" not in inputs[0]:
            raise ValueError(f"rollout_func must return step_rewards, got {sorted(inputs[0])}")
        mask_BT = out["completion_mask"] * out.get("tool_mask", 1)
        steps = MaskedSteps.of(mask_BT)
        own_S = steps.join([row["step_rewards"] for row in inputs], "step_rewards")
        credit_S = self._credit_of_all(own_S, steps)
        out["advantages"] = (out["advantages"][:, None] + steps.spread(credit_S)) * mask_BT
        return out

    def _credit_of_all(self, own_S: Tensor, steps: MaskedSteps) -> Tensor:
        """The credit of this process's steps: a group's completions may be on several."""
        device, train = own_S.device, self.model.training
        size = self.num_generations if train else self.num_generations_eval
        shares = gather_object([(own_S.tolist(), steps.counts_B)])
        rewards_S = torch.tensor([r for rewards, _ in shares for r in rewards], device=device)
        counts_B = torch.tensor([c for _, counts in shares for c in counts], device=device)
        row_offsets = torch.nn.functional.pad(counts_B.cumsum(0), (1, 0))
        groups_B = torch.arange(len(counts_B), device=device) // size
        credit_S = self._credit(rewards_S, row_offsets, groups_B)
        self._metrics["train" if train else "eval"]["step_reward"].append(rewards_S.mean().item())
        before = sum(len(rewards) for rewards, _ in shares[: self.accelerator.process_index])
        return credit_S[before : before + len(own_S)]
