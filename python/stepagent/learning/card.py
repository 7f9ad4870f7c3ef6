"""The model card of a run: a README.md beside a saved model, written from the run, offline.

Its first line after the metadata says that it was written by this file. A card without that line
is a person's, and is left as it is, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from ..files import write_text
from ..models import unwrapped
from ..records.cards import MARKER, is_a_persons, plain, table
from ..records.provenance import versions
from .arguments import HOST
from .evaluating import EvaluatingTrainer
from .options import StepAgentOptions

if TYPE_CHECKING:
    from ..data.trunk import Trunk
    from .config import StepAgentConfig

_CITATION = """\
@article{deng2024novice,
  title   = {From Novice to Expert: LLM Agent Policy Optimization via Step-wise Reinforcement
             Learning},
  author  = {Deng, Zhirui and Dou, Zhicheng and Zhu, Yutao and Wen, Ji-Rong and Xiong, Ruibin and
             Wang, Mang and Chen, Weipeng},
  journal = {arXiv preprint arXiv:2411.03817},
  year    = {2024}
}"""
# Of TrainingArguments, what decides what is learnt. All others may name the machine, or hold a key.
_TOLD = (
    *HOST["the optimizer and its schedule"],
    *("optim", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("bf16", "fp16", "seed", "data_seed", "neftune_noise_alpha", "train_sampling_strategy"),
)


@dataclass(frozen=True)
class DataFacts:
    """What a card says of the data. The name is the last of its path, the hash the file's."""

    trajectories: int
    states: int
    name: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, trunks: Sequence[Trunk], source: Any) -> DataFacts:
        """Of a run's trunks, and where they were read from: a path, or anything else."""
        states = sum(len(trunk.action_spans) for trunk in trunks)
        if not isinstance(source, str | os.PathLike):
            return cls(len(trunks), states)
        digest = None
        if Path(source).is_file():
            with open(source, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(len(trunks), states, Path(source).name, digest)


class CardWritingTrainer(EvaluatingTrainer):
    """What ``transformers.Trainer`` saves and pushes, with the card of the run beside it."""

    args: StepAgentConfig
    data_facts: DataFacts

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with _card_of_a_person(folder) as theirs:
            super()._save(output_dir, state_dict)
        if not theirs:
            self._write_card(folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """As transformers', offline; a card that a person wrote is kept.

        Raises:
            ValueError: for arguments that describe the data: the run does.
        """
        if tasks or dataset or dataset_args:
            raise ValueError(
                "tasks, dataset and dataset_args must be None, as the card describes the data of "
                f"the run, got {tasks!r}, {dataset!r}, {dataset_args!r}: write a card of your own"
            )
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero() and not is_a_persons(folder / "README.md"):
            more = {"language": language, "license": license, "datasets": dataset_tags}
            given = [tags] if isinstance(tags, str) else tags or []
            self._write_card(folder, model_name, finetuned_from, given, more)

    def _write_card(
        self,
        folder: Path,
        title: str | None = None,
        base: str | None = None,
        tags: Sequence[str] = (),
        more: Mapping[str, Any] | None = None,
    ) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        base = base or str(getattr(unwrapped(model).config, "name_or_path", "") or "")
        adapter = getattr(model, "peft_config", None)
        kinds = [str(plain(config.peft_type)).lower() for config in (adapter or {}).values()]
        data = ModelCardData(
            base_model=base if _on_the_hub(base) else None,
            library_name="peft" if adapter else "transformers",
            pipeline_tag="text-generation",
            tags=["stepagent", self.args.method, *kinds, *tags],
            **(more or {}),
        )
        text = "\n\n".join(
            (
                MARKER,
                f"# {title or folder.name}",
                _origin(Path(base).name if os.path.isdir(base) else base, kinds, self.args),
                "## Data\n\n" + _of_data(self.data_facts),
                "## Options\n\nThose that differ from their defaults.\n\n"
                + table(_given(self.args)),
                "## Figures\n\n" + _figures(self.state.log_history),
                "## Versions\n\n" + table(versions("peft") if adapter else versions()),
                f"## Citation\n\n```bibtex\n{_CITATION}\n```",
            )
        )
        write_text(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")))


@contextmanager
def _card_of_a_person(folder: Path) -> Iterator[bool]:
    """Whether there is one, which is after the block what it was before: PEFT adds to cards."""
    card = folder / "README.md"
    theirs = card.read_bytes() if is_a_persons(card) else None
    try:
        yield theirs is not None
    finally:
        if theirs is not None:
            card.write_bytes(theirs)


def _on_the_hub(name: str) -> bool:
    """Whether it has the form of a model's name there, and is no folder here: a path is refused."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.isdir(name)


def _origin(base: str, adapters: Sequence[str], args: StepAgentConfig) -> str:
    what = f"An adapter ({', '.join(adapters)}) of" if adapters else "Trained from"
    cycles = f", cycles={args.cycles}" if args.has_cycles else ""
    return (
        f"{what} {f'`{base}`' if base else 'a model without a name'}, by "
        "[stepagent](https://arxiv.org/abs/2411.03817): "
        f"`method={args.method!r}, states={args.states!r}{cycles}`."
    )


def _of_data(facts: DataFacts) -> str:
    text = f"{facts.trajectories} trajectories of an expert, {facts.states} states"
    if facts.name is not None:
        text += f", from `{facts.name}`"
    if facts.sha256 is not None:
        text += f" (SHA-256 `{facts.sha256}`)"
    return text + "."


def _given(args: StepAgentConfig) -> dict[str, Any]:
    own = [field.name for field in fields(StepAgentOptions)]
    changed = args.changed([*own, *_TOLD])
    return changed | ({"processes": args.world_size} if args.world_size > 1 else {})


def _figures(log: Sequence[Mapping[str, Any]]) -> str:
    """Of the last cycle and the last evaluation, or the last loss of a run without cycles."""
    wanted = ("cycle", "eval_nll", "loss")
    last = {key: next((e for e in reversed(log) if key in e), None) for key in wanted}
    if last["cycle"] is not None:
        last["loss"] = None
    named = {name: value for entry in last.values() for name, value in (entry or {}).items()}
    return table(named) if named else "None yet: nothing has been logged."
