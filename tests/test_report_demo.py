"""The demo's page: the board over the stages' episodes, and in front the demo's own summary."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
from report_cases import HOSTILE, episode, write_run
from test_report import Page

from stepagent import save_trajectories
from stepagent.report.demo import (
    ExampleStep,
    ExampleTrajectory,
    closing_table,
    write_demo_report,
)

METRICS: dict[str, Any] = {
    "environment": "babyai:GoToLocalS6N2",
    "seed": 3,
    "method": "implicit",
    "main": "stepagent",
    "random": {"success_rate": 0.045, "interval": [0.02, 0.07]},
    "sft": {"success_rate": 0.755, "interval": [0.69, 0.81]},
    "sft_continued": {"success_rate": 0.7475, "interval": [0.683, 0.803]},
    "stepagent": {
        "success_rate": 0.88,
        "interval": [0.828, 0.918],
        "states": "agent",
        "cycles": [{"cycle": 1, "loss": 0.5, "agreement": 0.8, "success_rate": 0.88}],
    },
    "inverse_agent": {"success_rate": 0.815, "interval": [0.77, 0.87]},
    "dagger": {"success_rate": 0.83, "interval": [0.772, 0.876]},
    "differences": {
        "sft": {"mean": 0.125, "low": 0.071, "high": 0.179},
        "sft_continued": {"mean": 0.1325, "low": 0.081, "high": 0.189},
        "dagger": {"mean": 0.05, "low": -0.004, "high": 0.104},
    },
    "expert_agreement": {"sft": 0.912, "stepagent": 0.941},
    "tokens": {"unique": 1_234_567, "naive": 14_814_804},
    "episodes": 200,
    "validation_seeds": [10_000, 10_099],
    "evaluation_seeds": [20_000, 20_199],
    "seconds": 372.4,
    "hyperparameters": {"beta": 1.0, "sft": {"learning_rate": 1e-3}, "optim": "adamw"},
}
EXAMPLE = ExampleTrajectory(
    title="babyai:GoToLocalS6N2/20004",
    steps=(
        ExampleStep("red ball ahead 2 left 1", "forward", "forward", "forward", 0.12, 0.12),
        ExampleStep("red ball ahead 1 left 1", "forward", "left", "forward", 1.84, -2.31),
        ExampleStep("red ball left 1 , walls ahead 1", "left", "right", "left", 0.95, -0.4),
        ExampleStep("red ball ahead 1", "left", "left", "forward", -0.37, -0.37),
    ),
)
AGENTS = ("random", "sft", "sft_continued", "stepagent", "inverse_agent", "dagger")


def report(
    folder: Path, metrics: dict[str, Any] = METRICS, example: ExampleTrajectory = EXAMPLE
) -> str:
    for agent in AGENTS:
        success = agent == "stepagent"
        log = [{"cycle": 0, "agreement": 0.8}] if success else None
        write_run(folder / agent, [episode(s, success=success) for s in range(3)], log)
    # Older files do not say whose they are.
    bot = [episode(s, policy="expert", expert_actions=None) for s in range(3)]
    for one in bot:
        del one.meta["policy"]
    save_trajectories(folder / "expert_held_out.jsonl", bot)
    write_demo_report(folder, metrics, example)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report(tmp_path_factory.mktemp("demo")))


def test_the_summary_stands_in_the_page(page: Page) -> None:
    for text in (
        *("88.0%", "75.5%", "83.0%", "81.5%", "95% interval 82.8–91.8%"),  # success rates
        *("+12.5", "+7.1 to +17.9", "−0.4 to +10.4"),  # differences, in points
        *("91.2%", "94.1%"),  # agreement on held-out expert states
        *("+1.84", "−2.31", "−0.37"),  # step rewards
        *("1,234,567", "14,814,804", "(12.0×)", "200", "10000–10099", "20000–20199"),
        *("6 min 12 s", "sft.learning_rate", "0.001", "adamw", "babyai:GoToLocalS6N2"),
    ):
        assert text in page.words, text
    assert page.words.count("not the expert’s") == 3


def test_the_board_stands_in_it_too_with_every_stage_that_was_evaluated(page: Page) -> None:
    assert "Difference to SFT on the same seeds" in page.words
    for name in (
        "Random actions",
        "SFT continued",
        "DAgger",
        "StepAgent",
        "inverse agent",
        "Expert",
    ):
        assert page.words.count(name) >= 2, name
    assert "Agreement with the expert" in page.words
    assert "Episodes" in page.text


@pytest.mark.parametrize("key", ["differences", "expert_agreement", "hyperparameters", "dagger"])
def test_an_optional_key_may_be_missing_or_null(tmp_path: Path, key: str) -> None:
    metrics = {k: v for k, v in METRICS.items() if k != key}
    assert Page(report(tmp_path, metrics)).text
    assert Page(report(tmp_path, METRICS | {key: None})).text


@pytest.mark.parametrize(
    "path",
    [
        *(
            "environment",
            "seed",
            "method",
            "main",
            "sft",
            "sft_continued",
            "stepagent.states",
            "seconds",
        ),
        *("tokens.unique", "tokens.naive", "episodes", "validation_seeds", "evaluation_seeds"),
    ],
)
def test_a_missing_required_key_is_named(tmp_path: Path, path: str) -> None:
    metrics = copy.deepcopy(METRICS)
    *parents, last = path.split(".")
    values = metrics
    for parent in parents:
        values = values[parent]
    del values[last]
    with pytest.raises(KeyError, match=re.escape(repr(path))):
        write_demo_report(tmp_path, metrics, EXAMPLE)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_value_that_is_no_number_is_not_available(tmp_path: Path, nothing: Any) -> None:
    rates = {"success_rate": nothing, "interval": [nothing, nothing]}
    metrics = METRICS | {
        **dict.fromkeys(("random", "sft", "sft_continued", "dagger"), rates),
        "stepagent": {**rates, "states": "agent", "cycles": []},
        "differences": {"sft": dict.fromkeys(("mean", "low", "high"), nothing)},
        "expert_agreement": {"sft": nothing, "stepagent": nothing},
        "tokens": {"unique": nothing, "naive": nothing},
        "hyperparameters": {"beta": nothing},
        "seconds": nothing,
    }
    step = ExampleStep("o", "a", "b", "a", nothing, nothing)
    page = Page(report(tmp_path, metrics, ExampleTrajectory("t", (step,))))
    assert page.words.count("n/a") >= 15
    assert not re.search(r"\b(nan|inf|None)\b", page.words)


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    step = ExampleStep(HOSTILE, HOSTILE, HOSTILE, "<b>", 0.1, 0.1)
    metrics = METRICS | {
        "environment": HOSTILE,
        "hyperparameters": {HOSTILE: HOSTILE},
        "differences": {HOSTILE: {"mean": 0.1, "low": 0.0, "high": 0.2}},
    }
    html = report(tmp_path, metrics, ExampleTrajectory(HOSTILE, (step,)))
    assert "<img" not in html
    assert "<b>" not in html
    assert "\0" not in html
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;␀" in html


def test_the_closing_table_has_a_row_for_every_agent_and_paired_gains() -> None:
    rows = closing_table(METRICS).split("\n")
    assert [row.split("  ")[0] for row in rows[1:7]] == [
        "Random actions",
        "SFT",
        "SFT continued",
        "DAgger",
        "StepAgent",
        "inverse agent",
    ]
    assert rows[5].split() == ["StepAgent", "88.0%", "82.8%", "…", "91.8%", "94.1%"]
    assert rows[7] == "StepAgent − SFT: +12.5 points (95 % interval +7.1 … +17.9, paired)"
    assert "one training run" in rows[-2]
    assert rows[-1].endswith("(12.0×)")
