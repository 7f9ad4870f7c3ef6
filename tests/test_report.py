"""The report: its numbers, its escaping, and that it is one whole page that loads nothing."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stepagent.report import ExampleStep, ExampleTrajectory, write_report

pytest.importorskip("matplotlib")

METRICS: dict[str, Any] = {
    "environment": "babyai:GoToLocalS6N2",
    "seed": 3,
    "sft": {"success_rate": 0.755, "interval": [0.69, 0.81]},
    "sft_continued": {"success_rate": 0.7475, "interval": [0.683, 0.803], "epochs": 12},
    "stepagent": {
        "success_rate": 0.88,
        "interval": [0.828, 0.918],
        "states": "agent",
        "cycles": [
            {
                "cycle": cycle,
                "loss": 0.69 - 0.05 * cycle,
                "agreement": 0.8 + 0.02 * cycle,
                "success_rate": rate,
                "reward_margin": 0.4 + 0.3 * cycle,
                "reward_accuracy": 0.9,
                "kl": 0.01,
            }
            for cycle, rate in enumerate((0.79, 0.83, 0.82, 0.86, 0.88), start=1)
        ],
    },
    "stepagent_expert_states": {
        "success_rate": 0.765,
        "states": "expert",
        "cycles": [
            {"cycle": cycle, "loss": 0.6, "agreement": 0.9, "success_rate": 0.75 + 0.003 * cycle}
            for cycle in range(1, 6)
        ],
    },
    "dagger": {
        "success_rate": 0.83,
        "interval": [0.772, 0.876],
        "cycles": [
            {"cycle": cycle, "success_rate": 0.755 + 0.015 * cycle} for cycle in range(1, 6)
        ],
    },
    "differences": {
        "sft": {"mean": 0.125, "low": 0.071, "high": 0.179},
        "dagger": {"mean": 0.05, "low": -0.004, "high": 0.104},
    },
    "expert_agreement": {"sft": 0.912, "stepagent": 0.941},
    "random": {"success_rate": 0.045},
    "tokens": {"unique": 1_234_567, "naive": 14_814_804},
    "episodes": 200,
    "validation_seeds": [10_000, 10_099],
    "evaluation_seeds": [20_000, 20_199],
    "seconds": 372.4,
    "hyperparameters": {"beta": 1.0, "sft": {"learning_rate": 1e-3}, "optim": "adamw"},
}
OPTIONAL = (
    *("stepagent_expert_states", "dagger", "differences", "expert_agreement", "random"),
    "hyperparameters",
)
EXAMPLE = ExampleTrajectory(
    title="babyai:GoToLocalS6N2, seed 20004: go to the red ball",
    steps=(
        ExampleStep(
            "mission : go to the red ball . red ball ahead 2 left 1 , walls ahead 3 left 2 right 1",
            "forward", "forward", "forward", 0.12, 0.12,
        ),
        ExampleStep("red ball ahead 1 left 1", "forward", "left", "forward", 1.84, -2.31),
        ExampleStep("red ball left 1 , walls ahead 1", "left", "right", "left", 0.95, -0.4),
        ExampleStep("red ball ahead 1", "left", "left", "forward", -0.37, -0.37),
    ),
)  # fmt: skip

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags balance while it collects attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.svg_text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        (self.svg_text if "svg" in self.open else self.text).append(" ".join(data.split()))

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def report(
    tmp_path: Path, metrics: dict[str, Any] = METRICS, example: ExampleTrajectory = EXAMPLE
) -> str:
    path = tmp_path / "report.html"
    write_report(path, metrics, example)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(tmp_path_factory.mktemp("report"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a report."""
    monkeypatch.setattr("stepagent.report._pictures", lambda *_: defaultdict(str))


def test_the_numbers_stand_in_the_page(html: str) -> None:
    joined = " ".join(Page(html).text)
    for number in (
        *("88.0%", "75.5%", "83.0%", "74.8%", "95% interval 82.8–91.8%"),  # success rates
        *("+12.5", "+7.1 to +17.9", "−0.4 to +10.4"),  # differences, in points
        *("91.2%", "94.1%"),  # agreement on held-out expert states
        *("+1.84", "−2.31", "−0.37"),  # step rewards
        *("1,234,567", "14,814,804", "(12.0×)", "200", "10000–10099", "20000–20199"),
        *("6 min 12 s", "sft.learning_rate", "0.001", "adamw", "babyai:GoToLocalS6N2"),
    ):
        assert number in joined, number
    assert joined.count("not the expert’s") == 3


def test_the_pictures_hold_text_and_a_description(html: str) -> None:
    page = Page(html)
    assert [tag for tag, name, _ in page.attributes if name == "viewbox"] == ["svg"] * 4
    for text in ("88.0%", "StepAgent", "DAgger", "Agreement with the expert", "step"):
        assert text in page.svg_text
    labels = page.values("aria-label")
    assert any("step 2 +1.84; step 3 +0.95" in label for label in labels)
    assert any("cycle 1 79.0%; cycle 2 83.0%" in label for label in labels)
    assert any("DAgger 83.0%" in label for label in labels)


def test_the_page_loads_nothing_and_its_ids_are_unique(html: str) -> None:
    page = Page(html)
    for attribute in ("src", "href", "xlink:href"):
        assert all(value.startswith("#") for value in page.values(attribute))
    assert not re.search(r"https?://|@import|<script|<link", html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert {a or b for a, b in references} <= set(ids)
    assert ("html", "lang", "en") in page.attributes


def test_colours_follow_the_page(html: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--accent)" in pictures
    assert not re.search(r"(?:fill|stroke): #", pictures)


def test_the_same_run_gives_the_same_page(tmp_path: Path, html: str) -> None:
    assert report(tmp_path) == html


@pytest.mark.usefixtures("no_pictures")
def test_html_in_observations_actions_and_names_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert('&')</script>"
    step = ExampleStep(attack, attack, attack, "<b>", 0.1, 0.1)
    metrics = METRICS | {
        "environment": attack,
        "hyperparameters": {attack: attack},
        "differences": {attack: {"mean": 0.1, "low": 0.0, "high": 0.2}},
    }
    html = report(tmp_path, metrics, ExampleTrajectory(attack, (step,)))
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;" in html
    assert attack in Page(html).text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("key", OPTIONAL)
def test_an_optional_key_may_be_missing_or_null(tmp_path: Path, key: str) -> None:
    metrics = {k: v for k, v in METRICS.items() if k != key}
    assert Page(report(tmp_path, metrics)).text
    assert Page(report(tmp_path, METRICS | {key: None})).text


def test_the_least_metrics_are_enough(tmp_path: Path) -> None:
    required = ("cycle", "loss", "agreement", "success_rate")
    metrics = {key: value for key, value in METRICS.items() if key not in OPTIONAL}
    metrics |= {"sft": {"success_rate": 0.5}, "sft_continued": {"success_rate": 0.5}}
    metrics["stepagent"] = {
        "success_rate": 0.6,
        "states": "expert",
        "cycles": [{k: c[k] for k in required} for c in METRICS["stepagent"]["cycles"]],
    }
    page = Page(report(tmp_path, metrics))
    assert not any("DAgger" in text or text.startswith("95% interval") for text in page.text)
    assert not any("margin, expert" in text for text in page.svg_text)


@pytest.mark.parametrize(
    "path",
    [
        *("environment", "seed", "sft", "sft.success_rate", "sft_continued.success_rate"),
        *("stepagent.success_rate", "stepagent.states", "stepagent.cycles", "dagger.success_rate"),
        *("tokens.unique", "tokens.naive", "episodes", "validation_seeds", "evaluation_seeds"),
        "seconds",
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
        report(tmp_path, metrics)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_key_of_a_cycle_is_named(tmp_path: Path) -> None:
    metrics = copy.deepcopy(METRICS)
    del metrics["stepagent"]["cycles"][1]["agreement"]
    with pytest.raises(KeyError, match=r"stepagent\.cycles\[1\]\.agreement"):
        report(tmp_path, metrics)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_value_that_is_no_number_is_not_available(tmp_path: Path, nothing: Any) -> None:
    rates = {"success_rate": nothing, "interval": [nothing, nothing]}
    cycle = dict.fromkeys(METRICS["stepagent"]["cycles"][0], nothing) | {"cycle": 1}
    metrics = METRICS | {
        **dict.fromkeys(("random", "sft", "sft_continued", "dagger"), rates),
        "stepagent": {**rates, "states": "agent", "cycles": [cycle]},
        "differences": {"sft": dict.fromkeys(("mean", "low", "high"), nothing)},
        "expert_agreement": {"sft": nothing, "stepagent": nothing},
        "tokens": {"unique": nothing, "naive": nothing},
        "hyperparameters": {"beta": nothing},
        "seconds": nothing,
    }
    step = ExampleStep("o", "a", "b", "a", nothing, nothing)
    page = Page(report(tmp_path, metrics, ExampleTrajectory("t", (step,))))
    assert page.text.count("n/a") >= 15
    assert "n/a" in page.svg_text
    raw = re.compile(r"\b(nan|inf|None)\b")
    assert not [text for text in page.text + page.svg_text if raw.search(text)]


def test_a_long_trajectory_of_zero_rewards_is_drawn(tmp_path: Path) -> None:
    steps = (ExampleStep("o", "a", "b", "a", 0.0, -0.0),) * 60
    assert "+0.00" in Page(report(tmp_path, example=ExampleTrajectory("t", steps))).text


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'stepagent[demo]'")):
        report(tmp_path)
