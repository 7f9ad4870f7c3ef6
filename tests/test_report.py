"""The report: what it reads, what it says of it, and that it is one page that loads nothing."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_cases import EXPERT, HOSTILE, episode, write_run, write_runs

import stepagent
from stepagent import Trajectory, save_trajectories
from stepagent.cli import main
from stepagent.records.provenance import sitting
from stepagent.report import Run, load_run, load_runs, write_report
from stepagent.report.board import board
from stepagent.report.charts import Line, line_chart, ticks
from stepagent.report.divergence import divergences
from stepagent.report.numbers import visible
from stepagent.report.payload import payload

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags balance while it collects attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
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
        if not {"style", "script"} & set(self.open):
            self.text.append(" ".join(data.split()))

    @property
    def words(self) -> str:
        return " ".join(filter(None, self.text))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return load_runs(write_runs(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def html(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, runs)
    return path.read_text(encoding="utf-8")


def loaded(folder: Path, episodes: list[Trajectory], log: Any = None) -> Run:
    return load_run(write_run(folder, episodes, log))


# ---------------------------------------------------------------------------------------- reading


INSPECTED = {"index": 0, "id": "a", "input_ids": [1], "action_spans": [], "steps": [], "run": {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(INSPECTED), "the branches of stepagent inspect"),
        ('[{"loss": 1.0, "epoch": 1}]', "a trainer's log"),
        ('{"success_rate": 1.0, "metrics": {}}', "the report of a command"),
        ("<!DOCTYPE html>", "an HTML page"),
        ("kernel_name,kernel_provider\n", "figures of stepagent bench"),
        ("PAR1....", "Parquet"),
        (
            json.dumps({"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}),
            "trajectories (stepagent train reads them), not episodes",
        ),
        ('{"sittings": []}', "how a run came about"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=rf"file\.jsonl holds {re.escape(said)}"):
        load_run(path)


def test_settings_are_those_of_the_records_and_of_the_sittings(tmp_path: Path) -> None:
    run = {"command": "evaluate", "policy": "runs/mine", "fingerprint": "abc", "max_steps": None}
    folder = write_run(
        tmp_path / "mine",
        [episode(s, run={**run, "seeds": "0-1" if s else "0"}) for s in range(2)],
    )
    for seconds in (1, 2):
        with sitting(folder / "episodes.jsonl"):
            time.sleep(0.1 * seconds)
    with sitting(folder, model="base", data="data.jsonl", options={"method": "sft"}):
        pass
    found = load_run(folder).settings
    assert found["fingerprint"] == "abc"
    assert found["seeds"] == "several"
    assert found["stepagent version"] == stepagent.__version__
    assert 0.2 < found["seconds"] < 60
    assert found["date"].startswith("20")
    assert (found["training: model"], found["training: method"]) == ("base", "sft")
    shown = dict(board([load_run(folder)], load_run(folder))["settings"])
    assert shown["policy"] == ["runs/mine"]
    assert shown["max_steps"] == ["–"]


def test_an_output_that_never_came_has_no_sitting(tmp_path: Path) -> None:
    with sitting(tmp_path / "never.jsonl"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_a_folder_or_a_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", [episode(1)], [{"cycle": 0, "kl": 0.5}, {"loss": 1.0}])
    save_trajectories(tmp_path / "bot.jsonl", [episode(1, policy="expert")])
    mine, inside, bot = load_runs([folder, folder / "episodes.jsonl", tmp_path / "bot.jsonl"])
    assert (mine.name, mine.expert, mine.cycles) == (str(folder), False, [{"cycle": 0, "kl": 0.5}])
    assert (inside.name, inside.cycles) == (str(folder / "episodes.jsonl"), [])
    assert (bot.name, bot.expert) == ("bot", True)
    assert mine.episodes[0].actions == EXPERT


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list"),
        ('[{"cycle": "one"}]', "a cycle must be a whole number, got 'one'"),
    ],
)
def test_a_log_that_is_none_is_named(tmp_path: Path, log: str, reason: str) -> None:
    folder = write_run(tmp_path / "run", [episode(1)])
    (folder / "log.json").write_text(log)
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'log.json'}") + f".*{reason}"):
        load_run(folder)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("task", 5, "task must be str or null, got 5"),
        ("seed", True, "seed must be int, got True"),
        ("success", 1, "success must be bool, got 1"),
        ("rewards", [0.5, "1", 0, 0], r"rewards\[1\] must be float or int, got '1'"),
        ("valid", [True, True, None, True], r"valid\[2\] must be bool, got None"),
        (
            "step_rewards",
            [None, {}, 0, 0],
            r"step_rewards\[1\] must be float or int or null, got {}",
        ),
        ("invalid", [None, ["<b>"], None, None], r"invalid\[1\] must be"),
        ("progress", [0.5], "'progress' in meta must have a value for each of the 4 steps"),
    ],
)
def test_a_value_of_another_type_is_named(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    wrong = episode(2)
    wrong.meta[key] = value
    folder = write_run(tmp_path / "run", [episode(1), wrong])
    with pytest.raises(ValueError, match=f"{reason}"):
        load_run(folder)


def test_a_folder_without_episodes_and_a_run_given_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no episodes\.jsonl"):
        load_run(tmp_path)
    folder = write_run(tmp_path / "run", [episode(1)])
    with pytest.raises(ValueError, match="is given 2 times"):
        load_runs([folder, folder])


# ------------------------------------------------------------------ divergence and payload


def test_where_the_two_part_is_told_by_the_experts_own_episode(runs: list[Run]) -> None:
    random, agent, expert = runs
    assert [found and found.step for found in divergences(random, runs)] == [0] * 6 + [0]
    for found in divergences(agent, runs):
        assert found is not None
        assert (found.step, found.course) == (2, EXPERT)
        assert found.pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert divergences(expert, runs) == [None] * 6


def test_before_they_part_steps_are_paired_side_by_side(tmp_path: Path) -> None:
    """An alignment of the whole would pair the expert's first with the agent's third."""
    bot = loaded(tmp_path / "bot", [episode(1, policy="expert", actions=["right", "right"])])
    actions = ["right", "forward", "right", "right"]
    agent = loaded(tmp_path / "agent", [episode(1, actions=actions)])
    (found,) = divergences(agent, [agent, bot])
    assert found is not None
    assert found.step == 1
    assert found.pairs[0] == (0, 0)


def test_without_the_experts_episode_the_recorded_answers_tell(tmp_path: Path) -> None:
    same = episode(1)
    other = episode(2, actions=["expert does 0", "no"])
    unknown = episode(3, expert_actions=[None, "no", *EXPERT[2:]])
    never = episode(4, expert_actions=[None] * 4)
    agent = loaded(tmp_path, [same, other, unknown, never, episode(5, expert_actions=None)] * 1)
    found = divergences(agent, [agent])
    assert [one and one.step for one in found] == [None, 1, 1, None, None]
    assert [one is None for one in found] == [False, False, False, True, True]


def unpacked(block: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(block)))


def test_the_payload_holds_every_step_and_every_text_once(runs: list[Run]) -> None:
    index, blocks = payload(runs)
    (block,) = map(unpacked, blocks)
    assert index["blocks"] == [19]
    assert len(block["texts"]) == len(set(block["texts"]))
    step = block["episodes"][index["run"].index(1)]
    texts = block["texts"]
    assert [texts[i] for i in step["observations"]] == [
        f"seed 0: you see step {t}" for t in range(4)
    ]
    assert texts[step["actions"][2]] == "agent does something"
    assert texts[step["last"]] == "seed 0: the end"
    assert step["valid"] == [1, 0, 1, 1]
    assert step["stepRewards"] == [None, -0.5, 1.0, -1.5]
    assert index["first_divergence"] == [0] * 7 + [2] * 6 + [None] * 6
    assert index["crashed"][6] == "the game died"
    assert index["success"][6] is None
    assert index["grounding_accuracy"][7] == 0.75


def test_a_seed_too_large_for_a_number_of_javascript_is_kept(tmp_path: Path) -> None:
    index, _ = payload([loaded(tmp_path, [episode(2**60 + 1), episode(7)])])
    assert index["seed"] == ["1152921504606846977", 7]


def test_what_a_record_does_not_tell_is_not_invented(tmp_path: Path) -> None:
    keys = ("rewards", "progress", "valid", "invalid", "expert_actions", "step_rewards")
    bare = episode(1, **dict.fromkeys((*keys, "task", "difficulty", "last_observation")))
    run = loaded(tmp_path / "old", [bare])
    index, (block,) = payload([run])
    (step,) = unpacked(block)["episodes"]
    assert step.keys() == {"observations", "actions"}
    for key in ("reward", "progress_rate", "grounding_accuracy", "task", "first_divergence"):
        assert index[key] == [None], key
    shown = board([run], run)
    assert [it["title"] for it in shown["bars"]] == ["Success", "Repetition", "Steps"]
    assert (shown["progress"], shown["splits"], shown["invalid"]) == (None, [], [])
    write_report(tmp_path / "report.html", [run])


# ------------------------------------------------------------------------------------------ board


def test_the_board_tells_means_differences_and_splits(runs: list[Run]) -> None:
    shown = board(runs, runs[0])
    bars = {it["title"]: it["bars"] for it in shown["bars"]}
    assert [bar.value for bar in bars["Success"]] == ["0.0%", "83.3%", "100.0%"]
    assert [bar.value for bar in bars["Grounding"]] == ["83.3%", "75.0%", "75.0%"]
    assert (bars["Success"][1].start, bars["Success"][1].width) == (0.0, 83.33)
    assert bars["Success"][1].low < 83.33 <= bars["Success"][1].high
    gains = shown["differences"]
    assert gains["baseline"] == "random"
    assert [(row["run"], row["pairs"]) for row in gains["rows"]] == [("agent", 6), ("expert", 6)]
    success = gains["rows"][0]["cells"][gains["titles"].index("Success")]
    assert (success["mean"], success["sure"]) == ("+83.3", True)
    by_task = {table["key"]: table["rows"] for table in shown["splits"]}["task"]
    assert [row["name"] for row in by_task] == ["boil", "melt"]
    assert [cell["success"] for cell in by_task[0]["cells"]] == ["0%", "67%", "100%"]
    assert shown["crashed"] == 1
    (kind,) = shown["invalid"]
    assert (kind["kind"], [cell["count"] for cell in kind["cells"]]) == (
        "unknown action",
        [6, 6, 6],
    )


def test_rewards_below_zero_have_bars_to_the_left(tmp_path: Path) -> None:
    low = loaded(tmp_path / "low", [episode(s, rewards=[-1.0, 0, 0, 0]) for s in range(3)])
    high = loaded(tmp_path / "high", [episode(s, rewards=[1.0, 0, 0, 0]) for s in range(3)])
    bars = {it["title"]: it["bars"] for it in board([low, high], low)["bars"]}["Reward"]
    assert [(bar.value, bar.start, bar.width) for bar in bars] == [
        ("−1.00", 0.0, 50.0),
        ("1.00", 50.0, 50.0),
    ]


def test_runs_on_other_seeds_are_not_compared(tmp_path: Path) -> None:
    one, other = (loaded(tmp_path / str(seed), [episode(seed)]) for seed in (1, 2))
    assert board([one, other], one)["differences"] is None


def test_a_seed_that_a_run_has_twice_is_in_no_pair(tmp_path: Path) -> None:
    one = loaded(tmp_path / "one", [episode(1), episode(2), episode(2, success=False)])
    other = loaded(tmp_path / "other", [episode(1, success=False), episode(2)])
    gains = board([one, other], one)["differences"]
    assert [row["pairs"] for row in gains["rows"]] == [1]


def test_a_run_that_only_crashed_is_shown_without_numbers(tmp_path: Path) -> None:
    good = loaded(tmp_path / "good", [episode(1)])
    bad = loaded(tmp_path / "bad", [episode(1, crashed="it died")])
    shown = board([good, bad], good)
    assert {it["bars"][1].value for it in shown["bars"]} == {"n/a"}
    assert shown["differences"] is None
    assert shown["progress"].head == ["Step", "good"]
    write_report(tmp_path / "report.html", [bad])


def test_the_ninth_run_has_the_first_ones_colour_in_dashes(tmp_path: Path) -> None:
    many = [loaded(tmp_path / f"run{n}", [episode(1)]) for n in range(9)]
    styles = [run["style"] for run in board(many, many[0])["runs"]]
    assert (styles[0], styles[7], styles[8]) == ("run-0", "run-7", "run-0 again")


def test_curves_of_progress_and_of_cycles(runs: list[Run]) -> None:
    shown = board(runs, runs[0])
    head, rows = shown["progress"].head, shown["progress"].rows
    assert head == ["Step", "random", "agent", "expert"]
    assert rows[0] == ["0", "0.0%", "0.0%", "0.0%"]
    assert rows[2] == ["2", "25.0%", "45.8%", "50.0%"]  # five at a half, one at a quarter
    assert rows[6] == ["6", "25.0%", "87.5%", "100.0%"]  # filled forward
    titles = {picture.title: picture for picture in shown["training"]}
    assert list(titles) == ["Success rate", "Agreement with the expert", "KL to the reference"]
    assert titles["KL to the reference"].rows == [["1", "0.1"], ["2", "n/a"]]
    assert titles["Success rate"].head == ["Cycle", "agent"]


def test_a_single_cycle_is_a_table_and_no_lone_dot(tmp_path: Path) -> None:
    run = loaded(tmp_path / "run", [episode(0)], [{"cycle": 0, "kl": 0.25}])
    (picture,) = board([run], run)["training"]
    assert picture.svg is None
    assert picture.rows == [["1", "0.25"]]


def test_what_is_logged_within_a_cycle_is_drawn_by_update(tmp_path: Path) -> None:
    log = [
        *({"loss": 1 / s, "grad_norm": 2.0, "epoch": s / 2, "step": s} for s in (1, 2, 3)),
        {"cycle": 0, "mean_loss": 0.5, "step": 3},
        {"train_loss": 0.5, "step": 3},
    ]
    run = loaded(tmp_path / "run", [episode(0)], log)
    loss, norm = board([run], run)["updates"]
    assert (loss.title, norm.title) == ("Loss", "Grad norm")
    assert loss.rows == [["1", "1"], ["2", "0.5"], ["3", "0.3333"]]
    assert loss.head[0] == "Update"


def test_one_episode_has_no_interval_and_is_not_sure(tmp_path: Path) -> None:
    """Not "+100 (+100 to +100)" in bold."""
    one = loaded(tmp_path / "one", [episode(0)])
    other = loaded(tmp_path / "other", [episode(0, success=False)])
    shown = board([other, one], other)
    bar = shown["bars"][0]["bars"][1]
    assert (bar.value, bar.bounds, bar.low) == ("100.0%", "", None)
    cell = shown["differences"]["rows"][0]["cells"][0]
    assert cell == {"mean": "+100.0", "bounds": "no interval", "sure": False}
    write_report(tmp_path / "report.html", [other, one])


def test_small_numbers_are_times_a_power_of_ten() -> None:
    line = Line("a", "run-0", [1, 2], [1e-6, 5e-6])
    svg = line_chart([line], title="t", x_label="cycle")
    assert 'class="unit">×10⁻⁶<' in svg
    assert re.findall(r'class="y">([^<]+)<', svg) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("length", [1, 4, 7])
def test_the_experts_step_stands_where_the_two_part(tmp_path: Path, length: int) -> None:
    """Wrong actions in a row: the expert's stands beside the first, at the same state, and beside
    no other."""
    bot = loaded(tmp_path / "bot", [episode(1, policy="expert", actions=["forward"])])
    wrong = [f"wrong {t}" for t in range(length)]
    agent = loaded(tmp_path / "agent", [episode(1, actions=wrong)])
    (found,) = divergences(agent, [agent, bot])
    assert found is not None
    assert (found.step, found.pairs) == (0, [(0, 0)])
    late = loaded(tmp_path / "late", [episode(1, actions=[*wrong, "forward"])])
    (found,) = divergences(late, [late, bot])
    assert found is not None
    assert found.pairs == [(0, 0), (0, length)]  # and where the agent does it at last


@pytest.mark.parametrize(
    "mark", ["\u202e", "\u2066", "\u200f", "\u200b", "\ufeff", "\u0085", "\u2028"]
)
def test_marks_that_turn_or_hide_text_are_visible(mark: str) -> None:
    assert visible(f"a{mark}b") == f"a⟨U+{ord(mark):04X}⟩b"
    assert visible("\u05d0\u0628 \u200d") == "\u05d0\u0628 \u200d"  # letters stay


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.49, 0.51), (-3, 700), (5, 5), (0, 0), (1e-9, 2e-9), (3e6, 9e6)]
)
def test_ticks_are_few_round_and_around_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high
    steps = {float(f"{b - a:.3g}") for a, b in pairwise(found)}
    assert len(steps) == 1
    assert f"{steps.pop():.0e}"[0] in "125"


def test_a_chart_of_one_value_and_gaps_is_drawn() -> None:
    svg = line_chart(
        [
            Line("a", "run-0", [1], [3.0]),
            Line("<b>", "run-1", [1, 2, 3], [math.nan, 1.0, math.nan]),
        ],
        title="<t>",
        x_label="cycle",
    )
    assert svg.count("<circle") == 2
    assert "nan" not in svg
    assert "<b>" not in svg
    assert 'aria-label="&lt;t&gt;"' in svg


# ------------------------------------------------------------------------------------------- page


def test_the_numbers_stand_in_the_page(html: str) -> None:
    words = Page(html).words
    for text in ("83.3%", "+83.3", "1 episode that crashed has no outcome", "unknown action"):
        assert text in words, text
    for title in ("Results", "Step by step", "Splits", "Training, cycle by cycle", "Episodes"):
        assert title in words, title


def test_the_page_loads_nothing_and_its_ids_are_unique(html: str) -> None:
    page = Page(html)
    links = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") or value == "data:," for value in links)
    assert not re.search(r"https?://|@import|url\(", html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        if name in ("aria-labelledby", "aria-controls") or (name == "href" and value[1:]):
            assert value.lstrip("#") in {*ids, "data:,"}, value
    assert ("html", "lang", "en") in page.attributes


def test_the_same_runs_give_the_same_page(tmp_path: Path, html: str, runs: list[Run]) -> None:
    write_report(tmp_path / "again.html", runs)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_hostile_text_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    meta = dict.fromkeys(("environment", "task", "last_observation"), HOSTILE)
    named = episode(1, **meta, invalid=[None, HOSTILE, None, None], actions=[HOSTILE] * 4)
    runs = [loaded(tmp_path / "run", [named, episode(2)], [{"cycle": 0, HOSTILE: 1.0}])]
    runs = [Run(HOSTILE, run.episodes, run.cycles) for run in runs]
    write_report(tmp_path / "report.html", runs)
    html = (tmp_path / "report.html").read_bytes().decode()
    assert "<img" not in html
    assert "\0" not in html
    assert html.count("<script") == html.count("</script>") == 3
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;␀" in html
    assert Page(html)


def test_a_baseline_that_is_no_run_and_no_runs_are_refused(tmp_path: Path, runs: list[Run]) -> None:
    with pytest.raises(ValueError, match="baseline must be one of random, agent, expert, got 'x'"):
        write_report(tmp_path / "report.html", runs, baseline="x")
    with pytest.raises(ValueError, match="runs must hold at least one, got none"):
        write_report(tmp_path / "report.html", [])


# ------------------------------------------------------------------------------------ command line


def test_the_command_writes_the_page_and_says_so(tmp_path: Path) -> None:
    paths = [str(path) for path in write_runs(tmp_path)]
    output = tmp_path / "new" / "board.html"
    command = ["report", *paths, "--output", str(output), "--baseline", paths[1], "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "output": str(output),
        "runs": {"random": 7, "agent": 6, "expert": 6},
        "baseline": "agent",
        "bytes": output.stat().st_size,
    }
    assert "Difference to agent on the same seeds" in Page(output.read_text()).words


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ((), 2, "Missing argument 'RUN...'"),
        (("nowhere",), 2, "'nowhere' does not exist"),
        (("agent", "--baseline", "random"), 2, "random is none of the RUNs"),
        (("empty",), 1, "empty holds no episodes.jsonl"),
    ],
)
def test_a_wrong_argument_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    exit_code: int,
    message: str,
) -> None:
    write_runs(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert not (tmp_path / "report.html").exists()
