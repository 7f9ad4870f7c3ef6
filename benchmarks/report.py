"""The report of 1,000 episodes of 50 steps: how large it is, and how soon it can be used.

Four runs of as many episodes, one of them the expert's, on the same seeds. Observations are made
like ScienceWorld's, 300 to 1,500 characters, and no two are the same, which real ones often are:
the page keeps every text once. Each step has all that a record can hold. Measured in headless
Chromium, each time in a fresh browser:

* opens: from the navigation until the table of episodes is on the screen and its buttons work;
* unfolds: from a click on an episode until its 50 steps are laid out;
* finds: from the last letter typed until the filtered table is drawn, all texts being searched.

Checked first: the unfolded steps' texts are those that went in.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from playwright.sync_api import Browser, Page, sync_playwright

from stepagent import Trajectory, save_trajectories
from stepagent.report import load_runs, write_report

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
TARGETS = {"opens": 2.0, "megabytes": 15.0}

ROOMS = (
    "kitchen hallway bathroom greenhouse workshop foundry bedroom living-room outside art-studio"
)
THINGS = (
    *("a painting", "a glass jar", "a metal pot", "a thermometer", "a lighter", "an orange"),
    *(
        "a stopwatch",
        "a wooden cupboard",
        "a counter",
        "a fridge",
        "a bowl of soil",
        "an avocado seed",
    ),
    *(
        "a blast furnace",
        "a copper wire",
        "a light bulb",
        "a battery",
        "a self-watering pot",
        "a sink",
    ),
)
STATES = (
    "closed",
    "open",
    "turned off",
    "turned on",
    "empty",
    "broken",
    "deactivated",
    "filled with",
)
VERBS = ("open", "pick up", "look at", "focus on", "activate", "move", "pour", "use")
TASKS = ("boil", "melt", "grow plant", "find animal", "measure melting point", "electric circuit")


def observation(draw: random.Random) -> str:
    """A room and what is in it."""
    room = draw.choice(ROOMS.split())
    lines = [f"This room is called the {room}. In it, you see:"]
    length = draw.randint(300, 1500)
    while sum(map(len, lines)) < length:
        thing, state, inside = draw.choice(THINGS), draw.choice(STATES), draw.choice(THINGS)
        degrees = draw.randint(-40, 1200)
        lines.append(
            f"\t{thing}, which is {state} (containing {inside}, {degrees} degrees celsius)"
        )
    return "\n".join(lines)[:1500]


def action(draw: random.Random) -> str:
    return f"{draw.choice(VERBS)} {draw.choice(THINGS).split(' ', 1)[1]}"


def episode(policy: str, seed: int, steps: int) -> Trajectory:
    draw = random.Random(f"{policy} {seed}")
    messages = []
    for _ in range(steps):
        messages.append({"role": "user", "content": observation(draw)})
        messages.append({"role": "assistant", "content": action(draw)})
    success = draw.random() < 0.5
    valid = [draw.random() < 0.9 for _ in range(steps)]
    rewards = [round(draw.choice((0, 0, 0, draw.uniform(-0.1, 0.2))), 3) for _ in range(steps)]
    gains = sorted(draw.random() for _ in range(steps - 1))
    meta = {
        "environment": "scienceworld",
        "policy": policy,
        "seed": seed,
        "split": "test",
        "task": TASKS[seed % len(TASKS)],
        "difficulty": ("easy", "hard")[seed % 2],
        "success": success,
        "rewards": rewards,
        "progress": [*gains, 1.0 if success else gains[-1]],
        "valid": valid,
        "invalid": [
            None if ok else draw.choice(("unknown action", "no such thing")) for ok in valid
        ],
        "expert_actions": [action(draw) for _ in range(steps)],
        "step_rewards": [draw.gauss(0, 1) for _ in range(steps)],
        "last_observation": observation(draw),
    }
    return Trajectory(messages, reward=sum(rewards), id=f"scienceworld/{seed}", meta=meta)


def timed_page(browser: Browser, path: Path) -> tuple[Page, float]:
    """The open page, and the seconds from navigation until the frame after its script had run."""
    page = browser.new_page()
    page.goto(path.as_uri())
    return page, float(page.evaluate(DRAWN))


DRAWN = """() => new Promise((done) => requestAnimationFrame(() => setTimeout(() =>
  done(performance.now() / 1000))))"""
UNFOLD = """() => new Promise((done) => {
  const start = performance.now();
  new MutationObserver(() => {
    if (document.querySelector('.unfolded .steps') === null) return;
    document.body.getBoundingClientRect();
    done((performance.now() - start) / 1000);
  }).observe(document.querySelector('#episodes'), {childList: true, subtree: true});
  document.querySelector('.toggle').click();
})"""
FIND = """(words) => new Promise((done) => {
  const start = performance.now(), status = document.querySelector('#status');
  new MutationObserver(() => {
    if (!status.textContent.includes(' of ')) return;
    document.body.getBoundingClientRect();
    done((performance.now() - start) / 1000);
  }).observe(status, {childList: true});
  const input = document.querySelector('#words');
  input.value = words;
  input.dispatchEvent(new Event('input'));
})"""


def measure(path: Path, first: Trajectory, episodes: int) -> dict[str, float]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        page, opens = timed_page(browser, path)
        rows = page.locator("tr.episode").count()
        common.check(rows == min(100, episodes), f"{rows} rows are drawn")
        unfolds = float(page.evaluate(UNFOLD))
        shown = page.locator(".unfolded .steps .action").all_text_contents()
        given = [m["content"] for m in first.messages if m["role"] == "assistant"]
        common.check(all(a in shown for a in given), "the steps are not those that went in")
        finds = float(page.evaluate(FIND, "copper wire"))
        heap = float(page.evaluate("performance.memory.usedJSHeapSize / 1e6"))
        browser.close()
    return {"opens": opens, "unfolds": unfolds, "finds": finds, "heap_megabytes": heap}


def write_runs(options: argparse.Namespace, folder: Path) -> tuple[list[Path], Trajectory]:
    paths = []
    policies = ("expert", "agent", "sft", "random")
    for policy in policies:
        each = options.episodes // len(policies)
        episodes = [episode(policy, seed, options.steps) for seed in range(each)]
        paths.append(folder / f"{policy}.jsonl")
        save_trajectories(paths[-1], episodes)
    return paths, episode(policies[0], 0, options.steps)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    where = common.environment("playwright")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, first = write_runs(options, folder)
        given = sum(path.stat().st_size for path in paths) / 1e6
        common.say(f"{options.episodes} episodes, {given:.1f} MB of JSONL")
        start = time.perf_counter()
        write_report(folder / "report.html", load_runs(paths))
        writes = time.perf_counter() - start
        megabytes = (folder / "report.html").stat().st_size / 1e6
        times = []
        for _ in range(options.repeats):
            times.append(measure(folder / "report.html", first, options.episodes))
            common.say(f"opens in {times[-1]['opens']:.2f} s")
    medians = {key: statistics.median(t[key] for t in times) for key in times[0]}
    result: dict[str, Any] = {
        "benchmark": "report",
        "episodes": options.episodes,
        "steps": options.steps,
        "jsonl_megabytes": given,
        "megabytes": megabytes,
        "write_seconds": writes,
        **medians,
        "targets": TARGETS,
        "all": times,
    }
    rows = [
        ["page, MB", f"{megabytes:.1f}", f"< {TARGETS['megabytes']:.0f}"],
        ["the same as JSONL, MB", f"{given:.1f}", ""],
        ["opens, s", f"{medians['opens']:.2f}", f"< {TARGETS['opens']:.0f}"],
        ["unfolds an episode, s", f"{medians['unfolds']:.2f}", ""],
        ["finds a text in all steps, s", f"{medians['finds']:.2f}", ""],
        ["written in, s", f"{writes:.1f}", ""],
    ]
    text = common.table(["", f"median of {options.repeats}", "target"], rows)
    title = f"The report of {options.episodes:,} episodes × {options.steps} steps in Chromium"
    common.report(title, __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
