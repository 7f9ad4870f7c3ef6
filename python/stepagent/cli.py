"""The command line: ``stepagent demo | collect | train | … | bench | warmup | doctor``.

A command's report goes to stdout, as text or with ``--json`` as one JSON object; progress and logs
go to stderr. Exit codes: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C. What is heavy or
optional is imported inside the command that needs it.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click
import numpy as np
import torch
from tqdm.auto import tqdm

from . import envs
from .bench.problems import OPS, SUITES
from .bench.providers import PROVIDERS
from .branches import Inspection, Shard, fingerprint, iterate_branches
from .doctor import describe, diagnose, require
from .encoding import Trunk, encode
from .engines import EngineError
from .envs import ExpertUnavailable
from .evaluation import agreement, bootstrap, success_rate
from .inspection import inspect
from .policies import ExpertPolicy, ModelPolicy, Policy, RandomPolicy
from .rollout import Episode, action_tokens, run_episodes
from .trajectory import load_trajectories, save_trajectories

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

    from .config import StepAgentConfig
    from .engines import Engine

# What a user can cause and mend: one line instead of a traceback.
_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    ExpertUnavailable,
    FloatingPointError,
    EngineError,
)
_TRAINING_ARGUMENTS = (
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)
# A run from the command line can be resumed, and reports to nobody unless asked to.
_TRAINING_DEFAULTS = {
    "output_dir": "runs/train",
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "dataloader_pin_memory": False,  # a batch is a few small arrays
}

_POSITIVE = click.IntRange(min=1)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
_NEW_FOLDER = click.Path(file_okay=False, path_type=Path)


class _Interrupted(click.ClickException):
    exit_code = 130

    def show(self, file: Any = None) -> None:
        click.echo(f"Interrupted: {self.message}", err=True)


class _Commands(click.Group):
    """Commands in the order of a project's life, whose errors end as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted("nothing was written") from interrupt
        except _USER_ERRORS as error:
            message = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(message) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stepagent")
def main() -> None:
    """Step-wise rewards for LLM agents: from expert trajectories to a better agent."""


def _reports(function: Callable[..., tuple[dict[str, Any], str]]) -> Callable[..., None]:
    """Give a command ``--json``; print its report, and nothing else that is printed, on stdout."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    @functools.wraps(function)
    def command(as_json: bool, **options: Any) -> None:
        with redirect_stdout(sys.stderr):
            report, text = function(**options)
        click.echo(json.dumps(report) if as_json else text)
        if report.get("interrupted"):
            raise _Interrupted("the report holds what there was until then")

    return command


# ------------------------------------------------------------------ demo


@main.command()
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--output", type=_NEW_FOLDER, default="runs/demo", show_default=True)
@_reports
def demo(seed: int, output: Path) -> tuple[dict[str, Any], str]:
    """Train an agent on a real environment, in minutes."""
    require("stepagent demo", "demo")
    from transformers.utils.logging import disable_progress_bar

    from .demo import Settings, run_demo
    from .report import closing_table

    # Of reading and writing weights; ours and the trainer's stay.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        metrics = run_demo(output, Settings(seed=seed))
    except KeyboardInterrupt as interrupt:
        raise _Interrupted("the same command goes on where it stopped") from interrupt
    files = "metrics.json, report.html, the trajectories and the models"
    return metrics, f"{closing_table(metrics)}\nWrote {files} to {output}"


# ------------------------------------------------------------------ collect


def _episode_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which episodes to run."""
    for option in reversed(
        (
            click.option("--env", required=True, help="For example babyai:GoToLocalS6N2."),
            click.option("--episodes", type=_POSITIVE, default=100, show_default=True),
            click.option(
                "--seed-start",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                help="Environment seed of the first episode; the others follow.",
            ),
            click.option("--max-steps", type=_POSITIVE, help="End an episode sooner."),
            click.option(
                "--max-new-tokens",
                type=_POSITIVE,
                default=32,
                show_default=True,
                help="Longest action of a model.",
            ),
            click.option("--batch-size", type=_POSITIVE, default=64, show_default=True),
        )
    ):
        function = option(function)
    return function


def _check_policy(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value not in ("expert", "random") and not Path(value).is_dir():
        raise click.BadParameter(f"{value!r} is neither 'expert' nor 'random' nor a model's folder")
    return value


_policy = functools.partial(
    click.option, "--policy", metavar="expert|random|PATH", callback=_check_policy
)


@main.command()
@_policy(default="expert", show_default=True, help="Who acts; PATH is a model's folder.")
@_episode_options
@click.option("--output", type=_NEW_FILE, required=True, help="JSONL of trajectories.")
@_reports
def collect(policy: str, output: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Run episodes and save their trajectories.

    Of the expert's episodes, only those that succeeded are kept.
    """
    _make_parent(output)
    episodes = _run("collect", policy, **options)
    ended = _ended(episodes)
    kept = [e for e in ended if e.success] if policy == "expert" else ended
    if not kept:
        raise ValueError(f"none of {len(episodes)} expert episodes in {options['env']} succeeded")
    save_trajectories(output, [episode.trajectory() for episode in kept])
    report = {
        "path": str(output),
        "environment": options["env"],
        "policy": policy,
        "episodes": len(episodes),
        "kept": len(kept),
        "success_rate": success_rate(episodes),
    }
    dropped = len(episodes) - len(kept)
    text = f"{policy} in {options['env']}: success rate {report['success_rate']:.1%}"
    if dropped:
        text += f"; dropped {dropped} of {len(episodes)} episodes, which failed or crashed"
    return report, f"{text}\nWrote {len(kept)} trajectories to {output}"


# ------------------------------------------------------------------ train


class _TrainCommand(click.Command):
    """Its help lists StepAgent's own options; the hundred of TrainingArguments are documented."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        from transformers import TrainingArguments

        from .config import StepAgentConfig

        inherited = {field.name for field in fields(TrainingArguments)}
        own = [field for field in fields(StepAgentConfig) if field.name not in inherited]
        with formatter.section("Training options, as --name value"):
            formatter.write_dl([(f"--{field.name}", _field_help(field)) for field in own])
        with formatter.section("Every option of transformers.TrainingArguments"):
            formatter.write(f"  {_TRAINING_ARGUMENTS}\n")  # unwrapped, to be clicked on
            changed = ", ".join(f"{name} {value}" for name, value in _TRAINING_DEFAULTS.items())
            formatter.write_text(f"Defaults of this command: {changed}")


def _field_help(field: Field[Any]) -> str:
    text = str(field.metadata["help"])
    return text if field.default is None else f"{text}  [default: {field.default}]"


@main.command(cls=_TrainCommand, context_settings={"ignore_unknown_options": True})
@click.option("--model", required=True, metavar="NAME_OR_PATH", help="Model, with its tokenizer.")
@click.option("--data", type=_FILE, required=True, help="Expert trajectories.")
@click.option("--env", help="Environment of --states agent.")
@click.option(
    "--lora-rank",
    "--lora_rank",
    type=_POSITIVE,
    help="Train a LoRA adapter of this rank on all linear layers.",
)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in --output_dir.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[--NAME VALUE]...")
@_reports
def train(
    model: str,
    data: Path,
    env: str | None,
    lora_rank: int | None,
    resume: bool,
    options: tuple[str, ...],
) -> tuple[dict[str, Any], str]:
    """Train an agent towards an expert's trajectories."""
    config = _training_config(options)
    if env is not None and config.states != "agent":
        raise click.UsageError(f"--env is of no use with --states {config.states}")
    checkpoint = config.resume_from_checkpoint or _checkpoint(config, resume)
    trajectories = load_trajectories(data)
    adapter = None if lora_rank is None else _lora(lora_rank)
    agent, tokenizer = _load_model(model)
    # Whoever loads the trained model is told by it what ends an action.
    agent.generation_config.eos_token_id = _end_tokens([encode(trajectories[0], tokenizer)])
    from .trainer import StepAgentTrainer

    trainer = StepAgentTrainer(agent, config, trajectories, tokenizer, peft_config=adapter, env=env)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    except KeyboardInterrupt as interrupt:
        raise _Interrupted(_how_to_resume(config)) from interrupt
    report = {
        "output_dir": config.output_dir,
        "method": config.method,
        "cycles": [entry for entry in trainer.state.log_history if "cycle" in entry],
        "train_loss": result.training_loss,
        "steps": result.global_step,
    }
    return report, _training_text(report)


def _training_config(options: Sequence[str]) -> StepAgentConfig:
    from .config import StepAgentConfig

    parser = _training_parser(StepAgentConfig)
    values, unknown = parser.parse_known_args(list(options))
    for name in unknown:
        if not name.startswith("-"):
            raise click.UsageError(f"Got unexpected extra argument {name!r}")
        name = name.partition("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions)
        raise click.NoSuchOption(name, possibilities=near)
    return StepAgentConfig(**vars(values))


def _training_parser(config: type[StepAgentConfig]) -> HfArgumentParser:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise click.UsageError(message)

    parser = Parser(cast("Any", config), add_help=False, allow_abbrev=False)
    parser.set_defaults(**_TRAINING_DEFAULTS)
    return parser


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


# ------------------------------------------------------------------ evaluate


@main.command()
@_policy(required=True, help="Who acts; PATH is a model's folder.")
@_episode_options
@click.option("--output", type=_NEW_FILE, help="JSONL of the episodes as trajectories.")
@_reports
def evaluate(policy: str, output: Path | None, **options: Any) -> tuple[dict[str, Any], str]:
    """Measure an agent's success in an environment."""
    if output is not None:
        _make_parent(output)
    episodes = _run("evaluate", policy, **options)
    ended = _ended(episodes)
    report = {
        "environment": options["env"],
        "policy": policy,
        "seed_start": options["seed_start"],
        **_summary(ended),
        "crashed": len(episodes) - len(ended),
        "output": None if output is None else str(output),
    }
    if output is not None:
        save_trajectories(output, [episode.trajectory() for episode in ended])
    return report, _evaluation_text(report)


def _ended(episodes: Sequence[Episode]) -> list[Episode]:
    """Without those that crashed, which are neither successes nor failures of the policy."""
    ended = [episode for episode in episodes if episode.crashed is None]
    if not ended:
        raise ValueError(f"all {len(episodes)} episodes crashed, the first: {episodes[0].crashed}")
    return ended


def _summary(episodes: Sequence[Episode]) -> dict[str, Any]:
    interval = bootstrap([episode.success for episode in episodes])
    return {
        "episodes": len(episodes),
        "success_rate": interval.mean,
        "success_rate_interval": [interval.low, interval.high],
        "mean_reward": float(np.mean([sum(episode.rewards) for episode in episodes])),
        "mean_progress": float(np.mean([episode.progress[-1] for episode in episodes])),
        "grounding_accuracy": float(np.mean([v for episode in episodes for v in episode.valid])),
        "mean_steps": float(np.mean([len(episode.actions) for episode in episodes])),
    }


def _evaluation_text(report: dict[str, Any]) -> str:
    low, high = report["success_rate_interval"]
    first, last = report["seed_start"], report["seed_start"] - 1
    last += report["episodes"] + report["crashed"]
    crashed = f"; {report['crashed']} more crashed" if report["crashed"] else ""
    lines = [
        f"{report['policy']} in {report['environment']}, "
        f"{report['episodes']} episodes, seeds {first} to {last}{crashed}",
        f"success rate        {report['success_rate']:.1%}  (95 %: {low:.1%} to {high:.1%})",
        f"mean reward         {report['mean_reward']:.3f}",
        f"mean progress       {report['mean_progress']:.3f}",
        f"grounding accuracy  {report['grounding_accuracy']:.1%}",
        f"mean steps          {report['mean_steps']:.1f}",
    ]
    if report["output"]:
        lines.append(f"Wrote {report['episodes']} trajectories to {report['output']}")
    return "\n".join(lines)


# ------------------------------------------------------------------ inspect


def _check_engine(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value not in ("local", "vllm") and not value.startswith(("http://", "https://")):
        raise click.BadParameter(f"{value!r} is neither 'local' nor 'vllm' nor a server's URL")
    return value


def _check_shard(ctx: click.Context, param: click.Parameter, value: str) -> Shard:
    try:
        return Shard.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _launched_shard() -> str:
    """As ``accelerate launch`` and ``torchrun`` say; without them a single part."""
    return f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"


@main.command("inspect")
@click.option("--model", type=_FOLDER, required=True, help="Folder of a model and its tokenizer.")
@click.option("--data", type=_FILE, required=True, help="Expert trajectories.")
@click.option(
    "--output",
    type=_NEW_FILE,
    required=True,
    help="JSONL, or .parquet, a record a trajectory. A run that was stopped goes on in it.",
)
@click.option("--samples", type=_POSITIVE, default=1, show_default=True, help="Actions a state.")
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True)
@click.option("--max-new-tokens", type=_POSITIVE, help="[default: the longest expert action]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--engine",
    metavar="local|vllm|URL",
    callback=_check_engine,
    default="local",
    show_default=True,
    help="Who decodes; URL is that of a server such as `vllm serve`, which has the model.",
)
@click.option("--served-model", metavar="NAME", help="Of several on the server.")
@click.option(
    "--chunk",
    type=_POSITIVE,
    default=32,
    show_default=True,
    help="Trajectories sampled and written together.",
)
@click.option(
    "--shard",
    metavar="I/N",
    callback=_check_shard,
    default=_launched_shard,
    help="Do part I of N, from 0.  [default: as accelerate launch says]",
)
@_reports
def inspect_command(
    model: Path,
    data: Path,
    output: Path,
    engine: str,
    served_model: str | None,
    chunk: int,
    shard: Shard,
    max_new_tokens: int | None,
    **sampling: Any,
) -> tuple[dict[str, Any], str]:
    """Let an agent act at every state of an expert."""
    output = shard.path(output)
    _make_parent(output)
    trajectories = load_trajectories(data)
    agent, tokenizer = _agent(engine, model, served_model)
    trunks = [encode(trajectory, tokenizer) for trajectory in tqdm(trajectories, desc="encode")]
    ends = _end_tokens(trunks)
    longest = max(int(np.diff(trunk.action_spans).max()) for trunk in trunks)
    sampling |= {"max_new_tokens": max_new_tokens or longest, "eos_token_id": ends}
    where = engine if engine in ("local", "vllm") else "server"
    inspection = Inspection(
        trajectories,
        trunks,
        lambda part, first: inspect(agent, part, first_trunk=first, **sampling),
        functools.partial(_decoded, tokenizer=tokenizer, ends=ends),
        run={
            "model": model.resolve().name,
            "fingerprint": fingerprint(model),
            "engine": where,
            "chunk": chunk,
            **sampling,
        },
    )
    chunks = shard.chunks(len(trunks), chunk)
    try:
        inspection.write(output, chunks)
    except KeyboardInterrupt as interrupt:
        raise _Interrupted("the same command goes on where it stopped") from interrupt
    report = {"output": str(output), "samples": sampling["samples"], **_inspected(output)}
    text = f"Wrote {report['trajectories']} trajectories to {output}"
    if report["steps"]:
        actions = report["steps"] * report["samples"]
        agreed = f"agreement with the expert: {report['agreement']:.1%} of {actions} actions"
        text = f"{agreed}\n{text}"
    return report, text


def _agent(
    engine: str, folder: Path, served_model: str | None
) -> tuple[PreTrainedModel | Engine, PreTrainedTokenizerBase]:
    if served_model is not None and engine in ("local", "vllm"):
        raise click.UsageError(f"--served-model is of no use with --engine {engine}")
    if engine == "local":
        return _load_model(folder, _device())
    tokenizer = _load_tokenizer(folder)
    if engine == "vllm":
        require("--engine vllm", "vllm")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        from vllm import LLM

        from .engines import VLLMEngine

        return VLLMEngine(LLM(model=str(folder), enable_prefix_caching=True)), tokenizer
    from .engines import CompletionsEngine

    return CompletionsEngine(engine, model=served_model), tokenizer


def _inspected(output: Path) -> dict[str, Any]:
    """What the whole file holds; a part may hold nothing."""
    trajectories, steps, agreed = 0, 0, 0.0
    for trunk, branches in iterate_branches(output):
        trajectories += 1
        steps += trunk.num_steps
        agreed += agreement([trunk], [branches]) * trunk.num_steps
    return {
        "trajectories": trajectories,
        "steps": steps,
        "agreement": agreed / steps if steps else None,
    }


def _decoded(
    token_ids: list[int], *, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> str:
    ended = token_ids[-1] in ends
    return str(tokenizer.decode(token_ids[:-1] if ended else token_ids)).strip()


# ------------------------------------------------------------------ bench


@main.command()
@click.option(
    "--suite", type=click.Choice(list(SUITES)), help="Shapes.  [default: gpu, or cpu without one]"
)
@click.option("--op", "ops", type=click.Choice(list(OPS)), multiple=True, help="Repeatable.")
@click.option(
    "--provider",
    "providers",
    type=click.Choice(list(PROVIDERS)),
    multiple=True,
    help="Repeatable; ours always takes part.",
)
@click.option("--csv", type=_NEW_FILE, help="Write figures in Liger's CSV schema.")
@click.option("--plots", type=_NEW_FOLDER, help="Write a PNG for each op.")
@click.option("--profile", type=_NEW_FOLDER, help="Write a trace and a table of kernels of each.")
@_reports
def bench(suite: str | None, plots: Path | None, **options: Any) -> tuple[dict[str, Any], str]:
    """Check every op against the reference, then time it against its rivals.

    Speed, memory, and the fraction of what this machine reaches. Where a check of ours fails,
    nothing is reported.
    """
    if plots is not None:
        require("--plots", "demo", "matplotlib")
    from .bench.output import describe as describe_bench
    from .bench.runner import run_bench

    report = run_bench(
        suite or ("gpu" if torch.cuda.is_available() else "cpu"), plots=plots, **options
    )
    return report, describe_bench(report)


# ------------------------------------------------------------------ warmup


@main.command()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    required=True,
    help="GPU to compile for, such as sm_90 or gfx942; may be repeated.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("bfloat16", "float32"),
    show_default=True,
    help="Of the logits or the head: bfloat16, float16 or float32; may be repeated.",
)
@_reports
def warmup(archs: tuple[str, ...], dtypes: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Compile every Triton kernel ahead of time; needs no GPU.

    Fills Triton's cache (TRITON_CACHE_DIR), for example of a container image. Only the same version
    of Triton finds the kernels there.
    """
    import triton

    from .warmup import compile_all

    kernels = [asdict(kernel) for kernel in compile_all(archs, dtypes, progress=True)]
    report = {"triton": triton.__version__, "cache": triton.knobs.cache.dir, "kernels": kernels}
    return report, _warmup_text(report)


def _warmup_text(report: dict[str, Any]) -> str:
    kernels = [{**k, "instructions": " ".join(k["instructions"])} for k in report["kernels"]]
    rows = [list(kernels[0]), *([*kernel.values()] for kernel in kernels)]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell!s:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append("spills: bytes of stack a thread on NVIDIA, registers on AMD; shared: bytes")
    found = f"{len(kernels)} kernels of Triton {report['triton']}"
    return "\n".join([*lines, f"Wrote {found} to {report['cache']}"])


# ------------------------------------------------------------------ doctor


@main.command()
@_reports
def doctor() -> tuple[dict[str, Any], str]:
    """Say what works on this machine, and why."""
    report = diagnose()
    return report, describe(report)


# ------------------------------------------------------------------ shared


def _run(
    label: str,
    policy: str,
    *,
    env: str,
    episodes: int,
    seed_start: int,
    max_steps: int | None,
    max_new_tokens: int,
    batch_size: int,
) -> list[Episode]:
    actor: Policy
    if policy == "expert":
        actor = ExpertPolicy()
    elif policy == "random":
        actor = RandomPolicy()
    else:
        actor = _model_policy(policy, env, max_new_tokens)
    seeds = range(seed_start, seed_start + episodes)
    return run_episodes(
        env, actor, seeds, max_steps=max_steps, batch_size=batch_size, progress=label
    )


def _model_policy(path: str, env: str, max_new_tokens: int) -> ModelPolicy:
    action = _some_action(env)  # first: a wrong name need not wait for a model
    model, tokenizer = _load_model(path, _device())
    end_of_turn = int(action_tokens(action, tokenizer)[-1])
    return ModelPolicy(model, tokenizer, max_new_tokens=max_new_tokens, eos_token_id=end_of_turn)


def _some_action(name: str) -> str:
    with closing(envs.make(name)) as env:
        env.reset(seed=0)
        return env.actions[0] if env.actions else env.expert_action()


def _load_model(
    path: str | Path, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = _load_tokenizer(path)
    with _loading(path):
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, device_map=device)
    return model, tokenizer


def _load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer, which must know how to write a chat."""
    from transformers import AutoTokenizer

    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {str(path)!r} must have a chat template, it has none")
    return cast("PreTrainedTokenizerBase", tokenizer)


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # which may not name what was asked for
        raise ValueError(
            f"{str(path)!r} must be a folder with a model and its tokenizer, "
            f"or a name on the Hugging Face Hub: {error}"
        ) from error


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # that of accelerate launch and torchrun


def _end_tokens(trunks: Sequence[Trunk]) -> list[int]:
    """The ids that end the actions of these trunks."""
    return sorted({int(t.input_ids[stop - 1]) for t in trunks for _, stop in t.action_spans})


def _make_parent(output: Path) -> None:
    """At once, so that no work is lost to a folder that cannot be made."""
    output.parent.mkdir(parents=True, exist_ok=True)
