"""The report in a real headless Chromium: clicks, keys, sizes, colours, and not one request."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_cases import HOSTILE, episode, write_run, write_runs

from stepagent.report import load_run, load_runs, write_report

sync_api = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PHONE = {"width": 390, "height": 844}

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium found: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "report.html", load_runs(write_runs(folder)))
    return folder / "report.html"


class Opened:
    """A page, and all that it complained of or asked the network for."""

    def __init__(self, browser: Browser, path: Path, **options: object) -> None:
        self.page: Page = browser.new_page(**options)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.complaints.append(request.url))
        self.page.goto(path.as_uri())
        self.complaints.remove(path.as_uri())
        expect(self.rows.first).to_be_visible()

    @property
    def rows(self) -> Locator:
        return self.page.locator("tr.episode")

    def column(self, name: str) -> list[str]:
        return self.page.locator(f'tr.episode [data-label="{name}"]').all_text_contents()


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report)
    yield opened
    opened.page.close()
    assert opened.complaints == []


def test_headers_sort_by_click_and_by_key_and_say_so(opened: Opened) -> None:
    episodes = opened.page.locator("#episodes")
    header = episodes.get_by_role("columnheader", name="Steps", exact=True)
    assert header.get_attribute("aria-sort") is None
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert opened.column("Steps") == ["1"] + ["4"] * 12 + ["6"] * 6
    opened.page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert opened.column("Steps") == ["6"] * 6 + ["4"] * 12 + ["1"]
    episodes.get_by_role("columnheader", name="Progress").get_by_role("button").press("Space")
    assert header.get_attribute("aria-sort") is None
    progress = opened.column("Progress")
    assert progress[-1] == "n/a"  # of the one that crashed: last, either way
    assert progress[:-1] == sorted(progress[:-1], key=lambda text: int(text[:-1]))


def test_filters_by_run_outcome_and_text(opened: Opened) -> None:
    page, status = opened.page, opened.page.get_by_role("status")
    expect(status).to_have_text("19 of 19 episodes")
    page.get_by_label("Outcome", exact=True).select_option("failure")
    expect(status).to_have_text("7 of 19 episodes")
    page.get_by_label("Run", exact=True).select_option("agent")
    expect(status).to_have_text("1 of 19 episodes")
    assert opened.column("Seed") == ["2"]
    page.get_by_label("Outcome", exact=True).select_option("crashed")
    expect(status).to_have_text("0 of 19 episodes")
    for name in ("Outcome", "Run"):
        page.get_by_label(name, exact=True).select_option("")
    page.get_by_label("Text").fill("Agent DOES something")  # an action, in no column
    expect(status).to_have_text("6 of 19 episodes")
    page.get_by_label("Text").fill("melt")  # a task
    expect(status).to_have_text("9 of 19 episodes")
    page.get_by_label("Text").fill("")
    expect(status).to_have_text("19 of 19 episodes")


def test_an_episode_unfolds_by_key_into_its_steps(opened: Opened) -> None:
    page = opened.page
    page.get_by_label("Run", exact=True).select_option("agent")
    toggle = page.get_by_role("button", name="agent, seed 0: steps")
    assert toggle.get_attribute("aria-expanded") == "false"
    toggle.press("Enter")
    unfolded = page.locator(f"#{toggle.get_attribute('aria-controls')}")
    steps = unfolded.get_by_role("table", name="Steps of the episode")
    expect(steps).to_be_visible()
    assert toggle.get_attribute("aria-expanded") == "true"
    rows = steps.locator("tbody tr")
    texts = [" ".join(text.split()) for text in rows.all_inner_texts()]
    assert len(texts) == 5
    assert texts[1] == (
        "2 seed 0: you see step 1 expert does 1unknown action "
        "expert does 1 ✓ , same as the agent 0.00 −0.50 50%"
    )
    assert texts[2] == "Here the two part: the expert does expert does 2"
    assert "agent does something expert does 2 ✗" in texts[3]
    assert texts[0].endswith("−0.25 n/a 25%")
    expect(unfolded).to_contain_text("First differs from the expert at step 3.")
    expect(unfolded).to_contain_text("The expert’s own episode, 4 actions: expert does 0 → expert")
    expect(unfolded).to_contain_text("seed 0: the end")
    shares = unfolded.locator(".strip .reward").evaluate_all(
        "cells => cells.map((cell) => [cell.className, cell.style.getPropertyValue('--share')])"
    )
    assert shares[:2] == [["reward positive", "0.000"], ["reward negative", "0.200"]]  # 0.5 of 2.5
    toggle.press("Space")
    expect(steps).to_have_count(0)
    assert toggle.get_attribute("aria-expanded") == "false"


def test_what_is_unfolded_stays_so_when_the_table_is_sorted(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name="expert, seed 3: steps").click()
    expect(page.locator(".unfolded .steps")).to_be_visible()
    page.get_by_role("columnheader", name="Seed").get_by_role("button").click()
    expect(page.locator(".unfolded .steps")).to_be_visible()
    above = page.locator(".unfolded").evaluate("row => row.previousSibling.textContent")
    assert above.startswith("expert")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_without_scrolling_sideways(
    browser: Browser, report: Path, scheme: str
) -> None:
    opened = Opened(browser, report, viewport=PHONE, color_scheme=scheme)
    opened.page.locator(".toggle").first.click()
    expect(opened.page.locator(".unfolded .steps")).to_be_visible()
    for summary in opened.page.locator("figure summary").all():
        summary.click()
    width = opened.page.evaluate("document.documentElement.scrollWidth")
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert width == PHONE["width"]
    assert (sum(map(int, paper[4:-1].split(","))) < 150) == (scheme == "dark")
    opened.page.close()
    assert opened.complaints == []


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (...layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of layers) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (colour) => colour.map((x) => x / 255)
    .map((x) => (x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const under = (node) => (node === null ? [] :
    [...under(node.parentElement), getComputedStyle(node).backgroundColor]);
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim() !== '');
    if (!own || node.closest('svg, script, .unseen, noscript') || node.offsetWidth === 0) continue;
    const layers = under(node);
    const [a, b] = [rgb(...layers), rgb(...layers, getComputedStyle(node).color)].map(luminance);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push([node.className, node.textContent.slice(0, 30), ratio]);
  }
  return low;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser: Browser, report: Path, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    opened = Opened(browser, report, color_scheme=scheme)
    opened.page.get_by_role("button", name="agent, seed 2: steps").click()
    expect(opened.page.locator(".unfolded .steps")).to_be_visible()
    assert opened.page.evaluate(CONTRAST) == []
    opened.page.close()


def test_hostile_text_is_only_text(browser: Browser, tmp_path: Path) -> None:
    meta = dict.fromkeys(("environment", "task", "last_observation"), HOSTILE)
    answers = {"expert_actions": [HOSTILE] * 4, "invalid": [None, HOSTILE, None, None]}
    hostile = episode(1, actions=[HOSTILE] * 4, **meta, **answers)
    for message in hostile.messages:
        message["content"] = HOSTILE
    run = load_run(write_run(tmp_path / HOSTILE.replace("/", "").replace("\0", ""), [hostile]))
    write_report(tmp_path / "report.html", [run])
    opened = Opened(browser, tmp_path / "report.html")
    opened.page.locator(".toggle").click()
    shown = opened.page.locator(".unfolded .steps .action").first.text_content()
    assert shown == HOSTILE.replace("\0", "␀").replace("\u202e", "⟨U+202E⟩")
    assert opened.page.locator("img").count() == 0
    opened.page.get_by_label("Text").fill("onerror=")
    expect(opened.page.get_by_role("status")).to_have_text("1 of 1 episodes")
    opened.page.close()
    assert opened.complaints == []


def test_an_address_leads_to_one_episode(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.get_by_role("button", name="agent, seed 4: steps").click()
    link = opened.page.get_by_role("link", name="Link to this episode").get_attribute("href")
    assert link == "#episode/agent/toy/test/4"
    opened.page.close()
    there = browser.new_page()
    there.goto(report.as_uri() + str(link))
    unfolded = there.locator("tr.unfolded")
    expect(unfolded).to_have_count(1)
    expect(unfolded).to_contain_text("seed 4: you see step 0")
    expect(unfolded).to_be_in_viewport()
    there.close()


def test_the_shown_table_is_saved_as_csv_and_json(browser: Browser, tmp_path: Path) -> None:
    episodes = [episode(s, task=("=1+1", 'a "b", c')[s % 2], success=s < 2) for s in range(4)]
    write_report(tmp_path / "report.html", [load_run(write_run(tmp_path / "mine", episodes))])
    opened = Opened(browser, tmp_path / "report.html")
    opened.page.get_by_label("Outcome").select_option("failure")
    opened.page.locator("#episodes").get_by_role("button", name="Seed", exact=True).click()
    opened.page.locator("#episodes").get_by_role("button", name="Seed", exact=True).click()
    saved = {}
    for name in ("CSV", "JSON"):
        with opened.page.expect_download() as download:
            opened.page.get_by_role("button", name=name, exact=True).click()
        saved[name] = Path(download.value.path()).read_text(encoding="utf-8")
    rows = json.loads(saved["JSON"])
    assert [row["seed"] for row in rows] == [3, 2]
    assert (rows[0]["task"], rows[1]["task"]) == ('a "b", c', "=1+1")
    table = list(csv.DictReader(io.StringIO(saved["CSV"])))
    assert [row["seed"] for row in table] == ["3", "2"]
    assert (table[0]["task"], table[1]["task"]) == ('a "b", c', "'=1+1")  # no formula
    opened.page.close()
    assert [c for c in opened.complaints if not c.startswith("blob:")] == []


def test_one_head_alone_sticks(opened: Opened) -> None:
    """The head of an episode's steps scrolls away under the one of the table."""
    opened.page.get_by_role("button", name="agent, seed 0: steps").click()
    expect(opened.page.locator(".unfolded .steps")).to_be_visible()
    heads = opened.page.locator("#episodes thead").evaluate_all(
        "heads => heads.map((head) => getComputedStyle(head).position)"
    )
    assert heads == ["sticky", "static"]


@pytest.mark.parametrize("unfold", [False, True])
def test_a_long_name_without_a_break_stays_on_a_phone(
    browser: Browser, tmp_path: Path, unfold: bool
) -> None:
    long = "ThorEnvironmentWithAnUnbrokenName" * 4
    episodes = [episode(s, environment=f"{long}{s}", task=long + str(s)) for s in range(3)]
    runs = [write_run(tmp_path / f"{'Run' * 30}{i}", episodes) for i in range(2)]
    write_report(tmp_path / "report.html", load_runs(runs))
    opened = Opened(browser, tmp_path / "report.html", viewport=PHONE)
    if unfold:
        opened.page.locator(".toggle").first.click()
        expect(opened.page.locator(".unfolded .steps")).to_be_visible()
    assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    opened.page.close()


@pytest.mark.parametrize("scale", [1e-7, 3e-6, 1.0, 1e6, 1e12])
def test_labels_of_an_axis_are_whole(browser: Browser, tmp_path: Path, scale: float) -> None:
    """No label begins left of its picture, however small or large the numbers are."""
    log = [{"cycle": c, "kl": scale * (1 + 0.37 * c), "loss": 1 + c * 1e-5} for c in range(4)]
    run = load_run(write_run(tmp_path / "run", [episode(0)], log))
    write_report(tmp_path / "report.html", [run])
    opened = Opened(browser, tmp_path / "report.html")
    cut = opened.page.evaluate(
        "() => [...document.querySelectorAll('svg')].flatMap((svg) => "
        "[...svg.querySelectorAll('text')].filter((t) => "
        "t.getBoundingClientRect().left < svg.getBoundingClientRect().left - 0.5 || "
        "t.getBoundingClientRect().right > svg.getBoundingClientRect().right + 0.5)"
        ".map((t) => t.textContent))"
    )
    assert cut == []
    opened.page.close()


def test_the_log_prob_of_each_action_is_shown(browser: Browser, tmp_path: Path) -> None:
    spans = [[2, 4], [5, 6], [7, 9], [9, 10]]
    logps = [[-0.5, -1.0], [-2.0], [-0.25, -0.25], [-3.0]]
    told = {"token_ids": list(range(12)), "action_spans": spans, "logps": logps}
    write_report(
        tmp_path / "report.html", [load_run(write_run(tmp_path / "run", [episode(0, **told)]))]
    )
    opened = Opened(browser, tmp_path / "report.html")
    assert opened.column("Tokens") == ["12"]
    opened.page.locator(".toggle").click()
    cells = opened.page.locator('.steps [data-label="Log-prob"]')
    expect(cells).to_have_text(["−1.502 tokens", "−21 token", "−0.502 tokens", "−31 token"])
    opened.page.close()
    assert opened.complaints == []


@pytest.mark.slow
def test_long_observations_fold_and_many_rows_come_by_the_hundred(
    browser: Browser, tmp_path: Path
) -> None:
    episodes = [episode(seed, actions=["go"]) for seed in range(230)]
    episodes[0].messages[0]["content"] = f"{'long ' * 100}the end"
    run = load_run(write_run(tmp_path / "run", episodes))
    write_report(tmp_path / "report.html", [run])
    opened = Opened(browser, tmp_path / "report.html")
    status, more = opened.page.get_by_role("status"), opened.page.get_by_role("button", name="Show")
    expect(status).to_have_text("230 of 230 episodes, the first 100 shown")
    more.click()
    more.click()
    expect(status).to_have_text("230 of 230 episodes")
    assert opened.rows.count() == 230
    expect(more).to_be_hidden()
    opened.page.locator(".toggle").first.press("Enter")
    text = opened.page.locator(".unfolded details.text")
    expect(text).not_to_contain_text("the end", use_inner_text=True)
    text.locator("summary").press("Enter")
    expect(text).to_contain_text("the end", use_inner_text=True)
    opened.page.close()
    assert opened.complaints == []


@pytest.mark.slow
def test_print_is_dark_on_light_and_without_controls(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report, color_scheme="dark")
    opened.page.emulate_media(media="print")
    expect(opened.page.get_by_label("Text")).to_be_hidden()
    expect(opened.page.get_by_role("heading", name="Results")).to_be_visible()
    assert opened.page.evaluate(CONTRAST) == []
    colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"
    assert opened.page.pdf()[:5] == b"%PDF-"
    opened.page.close()
    assert opened.complaints == []


@pytest.mark.slow
def test_the_benchmark_measures_and_writes_its_result(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "report.py"
    tiny = ("--episodes=8", "--steps=3", "--repeats=1", f"--json={tmp_path / 'report.json'}")
    done = subprocess.run([sys.executable, script, *tiny], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "report.json").read_text())
    assert (result["benchmark"], result["episodes"], result["steps"]) == ("report", 8, 3)
    assert min(result[key] for key in ("opens", "unfolds", "finds", "megabytes")) > 0
    assert "opens, s" in (tmp_path / "report.md").read_text()
