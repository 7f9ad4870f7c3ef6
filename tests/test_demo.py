"""The demo's pipeline at a tiny size: all stages for real, on the real environment."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("minigrid")

from stepagent.learning.trainer import StepAgentTrainer
from stepagent.records.episodes import load_episodes
from stepagent.report.demo import closing_table
from stepagent.tools import demo

TINY = demo.Settings(
    demonstrations=6,
    hidden_size=16,
    layers=1,
    batch_size=4,
    sft_max_epochs=4,
    cycles=2,
    epochs_per_cycle=1,
    rollouts=6,
    max_steps=5,
    rollout_max_steps=3,
    inverse_samples=2,
    validation_episodes=4,
    evaluation_episodes=6,
)
INVERSE_STAGES = ("inverse_expert_states", "inverse")
STAGES = ("sft", "sft_continued", "stepagent_expert_states", "stepagent", "dagger")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo.run_demo(folder, TINY)


def test_the_metrics_hold_what_was_promised(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["environment"] == TINY.environment
    assert metrics["stepagent"]["states"] == "agent"
    assert metrics["episodes"] == 6
    assert metrics["tokens"]["naive"] > metrics["tokens"]["unique"] > 0
    cycles = metrics["stepagent"]["cycles"]
    assert [cycle["cycle"] for cycle in cycles] == [1, 2]
    assert all({"loss", "agreement", "success_rate"} <= cycle.keys() for cycle in cycles)
    # The last cycle counts, not the best.
    assert cycles[-1]["success_rate"] == metrics["stepagent"]["success_rate"]
    for name in (*STAGES, "random"):
        low, high = metrics[name]["interval"]
        assert 0 <= low <= metrics[name]["success_rate"] <= high <= 1


def test_seeds_for_training_choosing_and_reporting_are_disjoint() -> None:
    for seed in range(3):
        s = replace(demo.Settings(), seed=seed)
        rollouts = range(s.first_rollout_seed, s.first_rollout_seed + s.cycles * s.rollouts)
        ranges = [s.demonstration_seeds, rollouts, s.validation_seeds, s.evaluation_seeds]
        assert sum(map(len, ranges)) == len(set().union(*ranges))
        assert rollouts[-1] < 10_000 * (seed + 1)


def test_the_report_shows_the_run(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    page = (folder / "report.html").read_text()
    assert TINY.environment in page
    assert f"{metrics['stepagent']['success_rate']:.1%}".rstrip("%") in page
    table = closing_table(metrics)
    assert "DAgger" in table
    assert "paired" in table


def test_every_policy_differs_from_the_one_it_went_on_from(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    weights = [(folder / name / "model.safetensors").read_bytes() for name in STAGES]
    assert len(set(weights)) == len(STAGES)


def test_a_second_run_reuses_what_is_there(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = finished

    def train(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(StepAgentTrainer, "train", train)
    again = demo.run_demo(folder, TINY)
    assert again["seconds"] >= metrics["seconds"]
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}


def test_an_interrupted_run_ends_as_an_undisturbed_one(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of StepAgent's second cycle, then the same command again."""
    _, metrics = finished
    log_cycle = StepAgentTrainer.log_cycle

    def interrupt(trainer: StepAgentTrainer) -> None:
        log_cycle(trainer)
        if trainer.args.method == "implicit" and trainer.state.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepAgentTrainer, "log_cycle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path, TINY)
    resumed = demo.run_demo(tmp_path, TINY)
    assert {**resumed, "seconds": 0} == {**metrics, "seconds": 0}


def test_the_other_method_adds_its_stages_and_shares_the_report(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, metrics = finished
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    kept = (both / "stepagent" / "model.safetensors").stat().st_mtime_ns
    added = demo.run_demo(both, TINY, "inverse")
    assert (both / "stepagent" / "model.safetensors").stat().st_mtime_ns == kept
    assert added["main"] == "inverse"
    assert added["stepagent"] == metrics["stepagent"]
    assert [cycle["cycle"] for cycle in added["inverse"]["cycles"]] == [1, 2]
    assert added["inverse"]["cycles"][-1]["success_rate"] == added["inverse"]["success_rate"]
    assert set(added["differences"]) == {"random", *STAGES, *INVERSE_STAGES} - {"inverse"}
    assert "a discriminator" in (both / "report.html").read_text()
    table = closing_table(added)
    assert "StepAgent, inverse RL − DAgger" in table


def test_the_main_stages_episodes_say_what_each_step_was_worth(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    episodes = load_episodes(folder / "stepagent" / "episodes.jsonl")
    rewards = [r for e in episodes for r in e.step_rewards]
    assert len(rewards) == sum(len(e.actions) for e in episodes)
    assert len(set(rewards)) > 1
    assert all(not e.step_rewards for e in load_episodes(folder / "sft" / "episodes.jsonl"))


def test_another_run_in_the_same_folder_is_refused(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    with pytest.raises(ValueError, match="holds a run with other settings \\(seed\\)"):
        demo.run_demo(folder, replace(TINY, seed=1))


def test_the_curves_to_the_expert_go_on_from_a_finished_demo(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """examples/convergence_babyai.py: a point before the first cycle and one after each."""
    path = Path(__file__).parents[1] / "examples" / "convergence_babyai.py"
    spec = importlib.util.spec_from_file_location("convergence_babyai", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder, _ = finished
    found = example.curves(folder, episodes=3)
    assert list(found) == list(example.WAYS)
    for curve in found.values():
        assert len(curve) == 3
        assert curve[0] == found["SFT continued"][0]  # all go on from the same model
        for point in curve:
            assert point["kl_expert_states"] > 0
            assert 0 < point["agreement_agent_states"] < 1
    assert len({curve[-1]["kl_expert_states"] for curve in found.values()}) == 3
    example.plot(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
