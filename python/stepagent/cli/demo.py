"""``stepagent demo``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..optional import require
from .base import NEW_FOLDER, Interrupted, reports

if TYPE_CHECKING:
    from ..tools.demo import Method
    from ..tools.demo.language_model import Size

_ARMS = ("sft_continued", "dagger", "stepagent", "rft", "eto", "inverse_expert_states")


@click.command()
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--model",
    metavar="scratch|smollm2|PATH",
    default="scratch",
    show_default=True,
    help="Who learns: a small transformer from scratch on BabyAI, or a language model with LoRA on "
    "TextWorld, SmolLM2-135M-Instruct or that of a folder.",
)
@click.option(
    "--method",
    type=click.Choice(["implicit", "inverse"]),
    help="From scratch: how StepAgent reflects. Run with both in one folder, they share a report."
    "  [default: implicit]",
)
@click.option(
    "--arm",
    "arms",
    type=click.Choice(_ARMS),
    multiple=True,
    help="Of a language model: how it goes on after SFT; may be repeated. Further ones in one "
    "folder share a report.  [default: all but rft and eto]",
)
@click.option(
    "--size",
    type=click.Choice(["small", "full"]),
    help="Of a language model: full takes an hour or two on two cores.  [default: full]",
)
@click.option(
    "--output", type=NEW_FOLDER, help="[default: runs/demo; of a language model runs/demo_lm]"
)
@reports
def demo(
    seed: int,
    model: str,
    method: Method | None,
    arms: tuple[str, ...],
    size: Size | None,
    output: Path | None,
) -> tuple[dict[str, Any], str]:
    """Train an agent on a real environment: in minutes, or a language model in two hours."""
    useless = {"arm": arms, "size": size} if model == "scratch" else {"method": method}
    for name, value in useless.items():
        if value:
            raise click.UsageError(f"--{name} is of no use with --model {model}")
    if model == "scratch":
        require("stepagent demo", "demo")
    else:
        require(f"stepagent demo --model {model}", "textworld")
        require(f"stepagent demo --model {model}", "train", "peft")
    from transformers.utils.logging import disable_progress_bar

    # Of reading and writing weights; ours and the trainer's stay.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        if model == "scratch":
            output = output or Path("runs/demo")
            metrics, table = _from_scratch(output, seed, method or "implicit")
        else:
            output = output or Path("runs/demo_lm")
            metrics, table = _language_model(output, seed, model, size or "full", arms)
    except KeyboardInterrupt as interrupt:
        raise Interrupted("the same command continues where it stopped") from interrupt
    files = "metrics.json, report.html, the trajectories and the models"
    return metrics, f"{table}\nWrote {files} to {output}"


def _from_scratch(output: Path, seed: int, method: Method) -> tuple[dict[str, Any], str]:
    from ..report.demo import closing_table
    from ..tools.demo import Settings, run_demo

    metrics = run_demo(output, Settings(seed=seed), method)
    return metrics, closing_table(metrics)


def _language_model(
    output: Path, seed: int, model: str, size: Size, arms: tuple[str, ...]
) -> tuple[dict[str, Any], str]:
    from ..report.language_model_demo import language_model_table
    from ..tools.demo.language_model import DEFAULT_ARMS, SIZES, run_language_model_demo

    settings = replace(SIZES[size], seed=seed, model=model)
    metrics = run_language_model_demo(output, settings, arms or DEFAULT_ARMS)
    return metrics, language_model_table(metrics)
