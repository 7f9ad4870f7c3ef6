"""Every option of transformers' TrainingArguments: what becomes of it here.

An option is honoured, or refused by name where it asks for what is not done, or it is the host's
alone: transformers or accelerate act on it, and nothing here comes in between. The table in
docs/training.md is made from this file, and a test walks the dataclass, so that an option of a new
transformers has to be put in a class before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from .methods import method_class

if TYPE_CHECKING:
    from .config import StepAgentConfig


@dataclass(frozen=True)
class Refused:
    """Taken with these values alone."""

    why: str
    allowed: tuple[Any, ...] = field(default=(None,))

    def admits(self, value: Any) -> bool:
        return any(value == allowed for allowed in self.allowed)


HONOURED: dict[str, str] = {
    "per_device_train_batch_size": "trajectories of a batch, in one or more trees",
    "gradient_accumulation_steps": "the loss of a step is one, however it is cut into batches",
    "num_train_epochs": "of `method='sft'` at the expert's states. With cycles it is `cycles × "
    "epochs_per_cycle`, and any other value is refused",
    "max_steps": "of `method='sft'` at the expert's states; refused with cycles",
    "bf16": "autocast, in training and in every score",
    "fp16": "as `bf16`",
    "optim": "the host's. Schedule-free optimizers are refused with cycles: the weights that act "
    "would not be those that are saved",
    "gradient_checkpointing": "exact, also on trees",
    "gradient_checkpointing_kwargs": "as `gradient_checkpointing`",
    "activation_checkpointing": "the newer name of `gradient_checkpointing`",
    "activation_checkpointing_kwargs": "as `activation_checkpointing`",
    "neftune_noise_alpha": "of `method='sft'`; refused elsewhere, where the noise would look like "
    "a change of the policy",
    "logging_nan_inf_filter": "of the logged mean; a loss that is not finite ends the run in any "
    "case",
    "include_num_input_tokens_seen": "counts the tokens of the trees, which have no padding",
    "disable_tqdm": "also of encoding, inspection, scores and the critic",
    "per_device_eval_batch_size": "trajectories that are scored together",
    "save_only_model": "leaves out the cycle and the discriminator as well; such a checkpoint "
    "cannot be resumed with cycles",
    "ignore_data_skip": "goes on with the first batch of the epoch",
    "seed": "of the order, the agent's samples, the discriminator and its batches",
    "data_seed": "of the order of an epoch; None: `seed`",
    "train_sampling_strategy": "`random`, or `sequential`: the order of the dataset. The others "
    "are refused: a tree has no padding that like lengths would save",
    "dataloader_pin_memory": "of the tensors of a batch; off by default, as they are few and small",
    "accelerator_config": "`split_batches`, `dispatch_batches` and `use_seedable_sampler=False` "
    "are refused. `even_batches` changes nothing: every process has as many batches, and none "
    "learns a trajectory twice",
    "fsdp": "FSDP2 alone",
    "fsdp_config": "FSDP2 alone",
    "deepspeed": 'ZeRO-1 and ZeRO-2; ZeRO-3 is refused. Write `"gradient_clipping": "auto"` '
    "into its configuration: without it DeepSpeed clips to 1, whatever `max_grad_norm` says",
    "resume_from_checkpoint": "by `stepagent train`; in Python it is an argument of `train()`",
}

REFUSED: dict[str, Refused] = {
    "average_tokens_across_devices": Refused(
        "a mean is over the whole step, on all processes", (True,)
    ),
    "label_smoothing_factor": Refused(
        "log-probs of the labels alone are computed, not of the whole vocabulary", (0.0,)
    ),
    "bf16_full_eval": Refused("scores are computed in the precision of training", (False,)),
    "fp16_full_eval": Refused("scores are computed in the precision of training", (False,)),
    "batch_eval_metrics": Refused("figures are of the whole eval_dataset", (False,)),
    "eval_do_concat_batches": Refused("figures are of the whole eval_dataset", (True,)),
    "eval_use_gather_object": Refused("scores are gathered as they are", (False,)),
    "eval_accumulation_steps": Refused("a score is one number a token: all of them fit"),
    "torch_compile": Refused(
        "log-probs are computed in the place of the model's head, which its compiled graph does "
        "not see",
        (False,),
    ),
    "torch_compile_backend": Refused("see torch_compile"),
    "torch_compile_mode": Refused("see torch_compile"),
    "use_liger_kernel": Refused(
        "it would change the model after the probe that compares its trees with sequences; the "
        "loss here is fused already",
        (False,),
    ),
    "liger_kernel_config": Refused("see use_liger_kernel"),
    "auto_find_batch_size": Refused(
        "the steps of a cycle are counted before it begins; lower per_device_train_batch_size and "
        "raise gradient_accumulation_steps",
        (False,),
    ),
    "parallelism_config": Refused(
        "processes share trajectories, by DDP, FSDP2 or ZeRO-2, and a tree is in one of them"
    ),
    "dataloader_drop_last": Refused(
        "no trajectory of a cycle is left out; its last batch is smaller", (False,)
    ),
    "dataloader_num_workers": Refused(
        "batches are packed in C++ from data that changes each cycle", (0,)
    ),
    "dataloader_persistent_workers": Refused("there are no workers to load data", (False,)),
    "dataloader_prefetch_factor": Refused("there are no workers to load data"),
    "dataloader_multiprocessing_context": Refused("there are no workers to load data"),
    "dataloader_in_order": Refused("there are no workers to load data", (True,)),
    "remove_unused_columns": Refused(
        "a batch is trees, not columns of a dataset; what a row holds beside its trajectory is "
        "never read",
        (False,),
    ),
    "label_names": Refused("labels are the tokens of the actions"),
    "length_column_name": Refused("lengths are those of the trees", ("length",)),
}

_EVALUATION = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "prediction_loss_only"),
    *("include_for_metrics", "load_best_model_at_end", "metric_for_best_model"),
    "greater_is_better",
)
HONOURED |= dict.fromkeys(_EVALUATION, "of `eval_dataset`")

HOST: dict[str, tuple[str, ...]] = {
    "the optimizer and its schedule": (
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        *("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2"),
        *("adam_epsilon", "max_grad_norm"),
    ),
    "the device and its processes": (
        *("use_cpu", "tf32", "torch_empty_cache_steps", "full_determinism", "use_cache"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank", "debug"),
        "skip_memory_metrics",
    ),
    "logs": (
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node"),
        *("log_level", "log_level_replica", "report_to", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    "checkpoints": (
        *("output_dir", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
        *("enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
    ),
    "the Hub": (
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision"),
    ),
    "flags for scripts, which no Trainer reads": ("do_train", "do_eval", "do_predict"),
}

# Of accelerator_config, an object or a dict of its own.
_ACCELERATOR: dict[str, Refused] = {
    "split_batches": Refused("a batch is trees, which are not split", (False,)),
    "dispatch_batches": Refused("every process packs its own trees", (None, False)),
    "use_seedable_sampler": Refused("an order depends on the seed and the epoch alone", (True,)),
}
_SAMPLING = ("random", "sequential")


def check_arguments(args: StepAgentConfig) -> None:
    """Refuse, by name, every option that would be taken and not followed.

    Raises:
        ValueError: naming the option, what it must be, and why.
    """
    known = {own.name for own in fields(TrainingArguments)}
    values = {name: getattr(args, name) for name in REFUSED if name in known}
    _check(values, REFUSED)
    if args.train_sampling_strategy not in _SAMPLING:
        raise ValueError(
            f"train_sampling_strategy must be one of {_SAMPLING}, got "
            f"{args.train_sampling_strategy!r}: a tree has no padding that like lengths would save"
        )
    if args.neftune_noise_alpha is not None and method_class(args.method, args.states).scores:
        raise ValueError(
            f"neftune_noise_alpha must be None for method={args.method!r}, got "
            f"{args.neftune_noise_alpha}: its noise would look like a change of the policy"
        )
    if args.has_cycles and "schedule_free" in str(args.optim).lower():
        raise ValueError(
            f"optim must not be schedule-free with cycles, got {args.optim}: the weights "
            "that act would not be those that are saved"
        )


def check_accelerator(args: StepAgentConfig) -> None:
    """As `check_arguments`, of ``accelerator_config`` once transformers has read it."""
    values = {name: getattr(args.accelerator_config, name) for name in _ACCELERATOR}
    _check(values, _ACCELERATOR, "accelerator_config.")


def _check(values: Mapping[str, Any], rules: Mapping[str, Refused], prefix: str = "") -> None:
    for name, value in values.items():
        rule = rules[name]
        if not rule.admits(value):
            allowed = " or ".join(map(repr, rule.allowed))
            raise ValueError(f"{prefix}{name} must be {allowed}, got {value!r}: {rule.why}")


def table() -> str:
    """All options as the rows of a Markdown table, in order of name."""
    rows = {name: f"honoured: {what}" for name, what in HONOURED.items()}
    rows |= {name: f"refused: {rule.why}" for name, rule in REFUSED.items()}
    rows |= {name: f"the host's: {what}" for what, names in HOST.items() for name in names}
    lines = [f"| `{name}` | {rows[name]} |" for name in sorted(rows)]
    return "\n".join(["| Option | What becomes of it |", "| --- | --- |", *lines])
