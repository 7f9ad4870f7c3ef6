"""A stage of training in its folder: done once, and gone on with where it was interrupted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_utils import get_last_checkpoint

from ...files import write_text
from ...learning.config import StepAgentConfig
from ...learning.trainer import StepAgentTrainer


def is_trained(folder: Path) -> bool:
    """Whether the stage that has this folder has ended."""
    return (folder / "log.json").exists()


def train_stage(
    folder: Path,
    title: str,
    options: dict[str, Any],
    make_trainer: Callable[[StepAgentConfig], StepAgentTrainer],
) -> None:
    """Leave the trained model and ``log.json`` in ``folder``, unless they are there.

    Args:
        options: of `StepAgentConfig`, beside its output folder.
    """
    if is_trained(folder):
        return
    tqdm.write(f"\n{title}", file=sys.stderr)
    checkpoints = folder / "checkpoints"
    saving: dict[str, Any] = {"save_strategy": "epoch", "save_total_limit": 1}
    trainer = make_trainer(StepAgentConfig(output_dir=str(checkpoints), **(saving | options)))
    trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    trainer.save_model(str(folder))
    shutil.rmtree(checkpoints)
    write_text(folder / "log.json", json.dumps(trainer.state.log_history, indent=2))


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.exists() else None  # type: ignore[no-untyped-call]
