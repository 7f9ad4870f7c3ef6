"""The card beside a saved model: what it says, that the Hub reads it, and whose it is."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from peft import LoraConfig
from test_ranks import trajectories
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent import save_trajectories
from stepagent.cli import main
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.records.cards import MARKER

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def lora() -> LoraConfig:  # a run writes into it
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    def make(model: Any = None, data: Any = None, **options: Any) -> StepAgentTrainer:
        adapter = options.pop("peft_config", None)
        defaults: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
        defaults |= {"save_strategy": "no", "output_dir": str(tmp_path / "run"), "cycles": 2}
        args = StepAgentConfig(**defaults | options)
        data = trajectories() if data is None else data
        model = tiny_agent() if model is None else model
        return StepAgentTrainer(model, args, data, babyai_tokenizer(), peft_config=adapter)

    return make


def card_in(folder: Any) -> ModelCard:
    return ModelCard.load(Path(folder) / "README.md")


def test_a_card_says_what_a_model_was_trained_from(trainer, tmp_path):
    tiny_agent().save_pretrained(tmp_path / "base")
    data = tmp_path / "expert.jsonl"
    save_trajectories(data, trajectories())
    made = trainer(
        str(tmp_path / "base"), str(data), peft_config=lora(), beta=0.5, learning_rate=2e-3
    )
    made.train()
    made.save_model()
    card = card_in(made.args.output_dir)
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "peft"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["tags"] == ["stepagent", "implicit", "lora"]
    assert "base_model" not in metadata  # the Hub refuses a path
    assert card.text.lstrip().startswith(MARKER)
    states = sum(len(trunk.action_spans) for trunk in made._trunks)
    cycle = [entry for entry in made.state.log_history if "cycle" in entry][-1]
    for said in (
        "# run",
        "An adapter (lora) of `base`",
        "`method='implicit', states='expert', cycles=2`",
        f"{len(trajectories())} trajectories of an expert, {states} states, from `expert.jsonl`",
        hashlib.sha256(data.read_bytes()).hexdigest(),
        "| `beta` | 0.5 |",
        "| `learning_rate` | 0.002 |",
        "| `cycles` | 2 |",
        f"| `agreement` | {cycle['agreement']:.5g} |",
        f"| `reward_margin` | {cycle['reward_margin']:.5g} |",
        "| `peft` |",
        "| `transformers` |",
        "arXiv:2411.03817",
    ):
        assert said in card.text
    for unsaid in ("`samples`", "`seed`", "`optim`", "output_dir", str(tmp_path)):
        assert unsaid not in card.text


def test_a_card_of_a_run_without_cycles_has_its_last_loss_and_the_name_on_the_hub(trainer):
    model = tiny_agent()
    model.config.name_or_path = "owner/base"
    made = trainer(model, method="sft", cycles=5, num_train_epochs=2, logging_steps=1)
    made.train()
    made.save_model()
    card = card_in(made.args.output_dir)
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "transformers"
    loss = [entry for entry in made.state.log_history if "loss" in entry][-1]["loss"]
    assert f"| `loss` | {loss:.5g} |" in card.text
    assert "`method='sft', states='expert'`" in card.text
    assert "`peft`" not in card.text


@pytest.mark.parametrize("adapter", [None, lora], ids=["model", "adapter"])
def test_a_card_that_a_person_wrote_is_kept_to_the_byte(adapter, trainer):
    made = trainer(peft_config=adapter and adapter())
    folder = Path(made.args.output_dir)
    theirs = b"---\nlicense: mit\n---\r\n\r\n# Mine\r\n"
    (folder / "README.md").write_bytes(theirs)
    made.save_model()
    made.create_model_card()
    assert (folder / "README.md").read_bytes() == theirs
    (folder / "README.md").unlink()
    made.save_model()
    first = card_in(folder)
    assert "nothing has been logged" in first.text
    made.train()
    made.save_model()  # its own card it writes anew
    assert "| `cycle` | 1 |" in card_in(folder).text
    assert card_in(folder).text.count("## Versions") == 1
    kept = str(card_in(folder)).replace(MARKER, "").encode()
    (folder / "README.md").write_bytes(kept)
    made.save_model()
    assert (folder / "README.md").read_bytes() == kept


def test_each_checkpoint_has_a_card(trainer):
    made = trainer(save_strategy="epoch", peft_config=lora())
    made.train()
    cards = sorted(Path(made.args.output_dir).glob("checkpoint-*/README.md"))
    assert len(cards) == 2
    assert all(MARKER in card.read_text(encoding="utf-8") for card in cards)


def test_a_card_names_no_keys_and_no_places(trainer, tmp_path):
    options = {"hub_token": "hf_secret", "run_name": "private", "hub_model_id": "me/it"}
    made = trainer(**options)
    made.save_model()
    text = (Path(made.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert not any(word in text for word in (*options.values(), str(tmp_path)))


def test_a_push_has_the_card_of_the_run_with_what_it_was_given(trainer, monkeypatch):
    """Offline: what would be uploaded is looked at in its place."""
    made = trainer(hub_model_id="me/agent")
    pushed: dict[str, Any] = {}
    monkeypatch.setattr(made, "init_hf_repo", lambda **_: setattr(made, "hub_model_id", "me/agent"))
    monkeypatch.setattr(
        "transformers.trainer.hf_api",
        lambda: type("Api", (), {"upload_folder": lambda _, **given: pushed.update(given)})(),
    )
    made.train()
    made.push_to_hub(license="mit", language="en", tags="agents", finetuned_from="owner/base")
    card = card_in(pushed["folder_path"])
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert card.data.base_model == "owner/base"
    assert card.data.tags == ["stepagent", "implicit", "agents"]
    assert "# agent" in card.text
    assert "| `agreement` |" in card.text
    with pytest.raises(ValueError, match="tasks, dataset and dataset_args must be None"):
        made.create_model_card(dataset="mine")


def test_a_run_from_the_command_line_names_its_file(tmp_path, caplog):
    """And its reference, the model's own name, is the policy without its adapter."""
    model, data, run = tmp_path / "model", tmp_path / "expert.jsonl", tmp_path / "agent"
    tiny_agent().save_pretrained(model)
    babyai_tokenizer().save_pretrained(model)
    save_trajectories(data, trajectories())
    options = ["--lora-rank", "2", "--ref-model", str(model), "--cycles", "1", "--use_cpu", "true"]
    paths = ["--model", str(model), "--data", str(data), "--output_dir", str(run)]
    with caplog.at_level(logging.INFO):
        done = CliRunner().invoke(main, ["train", *paths, *options])
    assert done.exit_code == 0, done.output
    assert f"from `expert.jsonl` (SHA-256 `{hashlib.sha256(data.read_bytes()).hexdigest()}`" in (
        card_in(run).text
    )
    assert "one copy of the base in memory" in caplog.text
    page = (Path(__file__).parent.parent / "docs" / "run_folder.md").read_text(encoding="utf-8")
    unnamed = {path.name for path in run.rglob("*") if path.is_file() and path.name not in page}
    assert not unnamed
