"""The card beside collected episodes: what it says, that the Hub's readers read it, whose it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from datasets import load_dataset
from hostile_envs import LEVEL
from huggingface_hub import DatasetCard

from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.cli import main
from stepagent.evaluation.card import dataset_card
from stepagent.records.episodes import Episode


def collect(folder: Path) -> str:
    path = folder / "expert.jsonl"
    words = ["collect", "--env", LEVEL, "--episodes", "4", "--output", str(path), "--card"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_card_says_how_episodes_came_about_and_the_hub_finds_the_file(tmp_path: Path) -> None:
    assert f"Wrote their card to {tmp_path / 'README.md'}" in collect(tmp_path)
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["configs"][0]["data_files"] == "expert.jsonl"
    assert "license" not in card.data.to_dict()
    assert f"| `environment` | {LEVEL} |" in card.text
    assert "| `policy` | expert |" in card.text
    assert "| `seeds` | 4 |" in card.text
    assert "| `success` | 1.000 (" in card.text
    assert str(tmp_path) not in card.text
    rows = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(rows) == 4
    assert {"messages", "meta"} <= set(rows.column_names)


def test_a_card_of_several_policies_counts_each_and_says_what_crashed() -> None:
    expert = list(run_episodes(LEVEL, ExpertPolicy(), range(3), progress=None))
    drunk = list(run_episodes(LEVEL, RandomPolicy(), range(2), max_steps=3, progress=None))
    crashed = Episode(environment=LEVEL, seed=9, policy="expert", crashed="TimeoutError")
    text = dataset_card([*expert, *drunk, crashed], "mixed.jsonl")
    assert "| `policy` | expert (4), random (2) |" in text
    assert "| `episodes that crashed` | 1 |" in text
    assert f"| `steps` | {sum(len(e.actions) for e in [*expert, *drunk])} |" in text
    with pytest.raises(ValueError, match="an episode must have ended, got 1 that crashed"):
        dataset_card([crashed], "none.jsonl")


def test_a_persons_card_is_left(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    assert "a person wrote it" in collect(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
