"""``stepagent train``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from ..data.arguments import parse_arguments
from ..files import write_text
from ..learning.options import StepAgentOptions
from ..optional import require
from .base import FILE, POSITIVE, Interrupted, reports
from .choices import TREE_ATTENTION
from .fields import FieldOption, check_names, given, inherited_names, options, spread
from .loading import import_from_here, load_model, load_tokenizer
from .reading import on_error_option, read

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from ..data.trajectory import OnError
    from ..learning.config import StepAgentConfig
    from ..models.attention import TreeAttention

_TRAINING_ARGUMENTS = (
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)
# A run from the command line can be resumed, and reports to nobody unless asked to.
_TRAINING_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/train",
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 1,
}


class _TrainCommand(click.Command):
    """Its help lists StepAgent's own options; the hundred of TrainingArguments are documented."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for title, own in (("Options", False), ("Training options", True)):
            rows = [o.get_help_record(ctx) for o in options if isinstance(o, FieldOption) is own]
            with formatter.section(title):
                formatter.write_dl([row for row in rows if row is not None])
        with formatter.section("Every option of transformers.TrainingArguments"):
            formatter.write(f"  {_TRAINING_ARGUMENTS}\n")  # unwrapped, to be clicked on
            changed = ", ".join(f"{name} {value}" for name, value in _TRAINING_DEFAULTS.items())
            formatter.write_text(f"Defaults of this command: {changed}")


def _check_url(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.startswith(("http://", "https://")):
        raise click.BadParameter(f"{value!r} is no server's URL")
    return value


@click.command(cls=_TrainCommand, context_settings={"ignore_unknown_options": True})
@click.option("--model", required=True, metavar="NAME_OR_PATH", help="Model, with its tokenizer.")
@click.option("--data", type=FILE, required=True, help="Expert trajectories.")
@click.option("--eval-data", type=FILE, help="Held-out expert trajectories, for --eval-strategy.")
@click.option("--env", help="Environment to act in, and of --eval-episodes.")
@click.option(
    "--lora-rank",
    "--lora_rank",
    type=POSITIVE,
    help="Train a LoRA adapter of this rank on all linear layers.",
)
@click.option(
    "--attn-implementation",
    "--attn_implementation",
    type=click.Choice(TREE_ATTENTION),
    help="Load the model with it; flex_attention needs no L² mask on a GPU.",
)
@click.option(
    "--engine",
    metavar="URL",
    callback=_check_url,
    help="Of a `vllm serve` that acts in place of the model here, with its adapter (--lora-rank).",
)
@click.option(
    "--ref-model",
    "--ref_model",
    metavar="NAME_OR_PATH",
    help="A fixed reference; the teacher of --method distillation.",
)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in --output_dir.")
@on_error_option
@click.argument("inherited", nargs=-1, type=click.UNPROCESSED, metavar="[--NAME VALUE]...")
@reports
def train(
    model: str,
    data: Path,
    eval_data: Path | None,
    env: str | None,
    lora_rank: int | None,
    attn_implementation: TreeAttention | None,
    engine: str | None,
    ref_model: str | None,
    resume: bool,
    on_error: OnError,
    inherited: tuple[str, ...],
    **own: Any,
) -> tuple[dict[str, Any], str] | None:
    """Train an agent towards an expert's trajectories."""
    config = _training_config(inherited, given(own))
    from ..learning.methods import method_class

    acts = config.states == "agent" or method_class(config.method, config.states).needs_env
    if env is not None and not acts and not config.eval_episodes:
        raise click.UsageError(
            f"--env is of no use with --states {config.states} and no --eval-episodes"
        )
    import_from_here()  # an environment of one's own
    checkpoint = config.resume_from_checkpoint or _checkpoint(config, resume)
    words = load_tokenizer(model, parse_arguments(config.chat_template_kwargs))
    reading = read(data, words, on_error)  # first: a bad row need not wait
    held_out = None if eval_data is None else read(eval_data, words, on_error).trajectories
    adapter = None if lora_rank is None else _lora(lora_rank)
    from ..data.ends import ends_of
    from ..learning.precision import loading_dtype

    agent, tokenizer = load_model(
        model, attn_implementation=attn_implementation, dtype=loading_dtype(config, adapter)
    )
    from ..learning.loading import same_model

    reference: PreTrainedModel | str | None = ref_model
    if adapter is not None and ref_model is not None and same_model(ref_model, model):
        reference = agent  # with the adapter off: one copy in memory
    # Whoever loads the trained model finds there what ends an action.
    agent.generation_config.eos_token_id = ends_of(reading.trunks)
    from ..learning.trainer import StepAgentTrainer

    trainer = StepAgentTrainer(
        agent,
        config,
        reading.trajectories,
        tokenizer,
        reference,
        peft_config=adapter,
        env=env,
        engine=engine,
        eval_dataset=held_out,
    )
    from ..learning.card import DataFacts
    from ..records.provenance import sitting

    trainer.data_facts = DataFacts.of(reading.trunks, data)
    told = {"model": model, "data": str(data), "options": _TRAINING_DEFAULTS | given(own)}
    if eval_data is not None:
        told["eval_data"] = str(eval_data)
    first = trainer.is_world_process_zero()
    try:
        with sitting(Path(str(config.output_dir)), **told) if first else nullcontext():
            result = trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_how_to_resume(config)) from interrupt
    trainer.accelerator.end_training()  # the processes leave their group together
    if not trainer.is_world_process_zero():
        return None
    log = json.dumps(trainer.state.log_history, indent=2)
    write_text(f"{config.output_dir}/log.json", log + "\n")
    report: dict[str, Any] = {
        "output_dir": config.output_dir,
        "method": config.method,
        "cycles": [entry for entry in trainer.state.log_history if "cycle" in entry],
        "train_loss": result.training_loss,
        "steps": result.global_step,
    }
    if on_error == "skip":
        report["skipped"] = reading.records()
    return report, _training_text(report)


train.params += options(fields(StepAgentOptions), get_type_hints(StepAgentOptions))


def _training_config(inherited: Sequence[str], own: dict[str, Any]) -> StepAgentConfig:
    """From StepAgent's own options and the arguments that are none of them."""
    known = inherited_names()
    if known is not None:  # a typo is an error before transformers is imported
        mine = [field.name for field in fields(StepAgentOptions)]
        check_names(inherited, [*known, *(f"no_{name}" for name in known), *mine])
    from transformers import TrainingArguments

    from ..learning.config import StepAgentConfig

    hints = get_type_hints(TrainingArguments)
    theirs = options((f for f in fields(TrainingArguments) if f.init), hints)
    reader = click.Command("train", params=list(theirs), add_help_option=False)
    read = reader.make_context("train", spread(inherited, theirs), click.get_current_context())
    values: dict[str, Any] = _TRAINING_DEFAULTS | given(read.params) | own
    if Path(str(values["output_dir"])).exists() and not Path(str(values["output_dir"])).is_dir():
        raise ValueError(f"output_dir must be a folder or new, got {values['output_dir']}")
    return StepAgentConfig(**values)


def _checkpoint(config: StepAgentConfig, resume: bool) -> str | None:
    """The checkpoint to resume from. Two runs are never mixed in one folder."""
    last = _last_checkpoint(config)
    if resume and last is None:
        raise ValueError(f"--resume: there is no checkpoint in {config.output_dir}")
    if last is not None and not resume:
        raise ValueError(
            f"{last} is of an earlier run: add --resume to continue it, "
            "or choose another --output_dir"
        )
    return last


def _last_checkpoint(config: StepAgentConfig) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    assert config.output_dir is not None  # a default of this command
    if not Path(config.output_dir).is_dir():
        return None
    last: str | None = get_last_checkpoint(config.output_dir)  # type: ignore[no-untyped-call]
    return last


def _how_to_resume(config: StepAgentConfig) -> str:
    last = _last_checkpoint(config)
    if last is None:
        return "no checkpoint was written yet"
    return f"the same command with --resume continues from {last}"


def _lora(rank: int) -> PeftConfig:
    require("--lora-rank", "train", "peft")
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _training_text(report: dict[str, Any]) -> str:
    lines = [
        f"cycle {cycle['cycle']}: agreement {cycle['agreement']:.1%}, loss {cycle['mean_loss']:.4f}"
        for cycle in report["cycles"]
    ]
    lines.append(f"{report['steps']} updates, mean loss {report['train_loss']:.4f}")
    lines.append(f"Wrote the model and its tokenizer to {report['output_dir']}")
    return "\n".join(lines)
