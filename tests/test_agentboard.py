"""AgentBoard's result folders: its definitions on hand-made logs, both ways, and broken ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from stepagent import envs
from stepagent.cli import main
from stepagent.evaluation.agentboard import is_agentboard, load_agentboard, save_agentboard
from stepagent.evaluation.metrics import METRICS, mean_progress_curve, split_by, summarize
from stepagent.evaluation.subskills import TASKS, sub_skills, success_by_task
from stepagent.policies import ExpertPolicy, RandomPolicy
from stepagent.records.episodes import Episode
from stepagent.report import load_run
from stepagent.rollout import run_episodes

# As AgentBoard's tasks log: (id, is_done, progress, grounding, changes, difficulty, turns).
EXAMPLES = [
    (0, True, 1.0, 0.75, [[0, 0.25], [3, 1.0]], "easy", 4),
    (1, False, 0.5, 1 / 3, [[1, 0.5]], "hard", 3),
    (2, False, 0.0, 0.5, [], "hard", 2),
    (3, False, 0.4, 1.0, [[0, 0.1], [1, 0.2], [4, 0.4]], "easy", 6),
]
STEPS = 30


def example(told: tuple[Any, ...]) -> dict[str, Any]:
    """A record of `TaskLogger.save_sample_data_to_file_detailed`, written out by hand."""
    id, is_done, progress, grounding, changes, difficulty, turns = told
    trajectory: dict[str, Any] = {"Interaction Turn 0": {"Goal": f"goal {id}"}}
    for step in range(turns):
        score = max([0.0, *(s for at, s in changes if at <= step)])
        turn = {"Observation": f"seen {step}", "Action": f"act {step}", "Progress Rate": score}
        trajectory.setdefault(f"Interaction Turn {step}", {}).update(turn)
    return {
        "id": id,
        "task_name": "boil",
        "goal": f"goal {id}",
        "difficulty": difficulty,
        "is_done": is_done,
        "progress_rate": progress,
        "grounding_acc": grounding,
        "score_change_record": changes,
        "trajectory": trajectory,
    }


def line(told: tuple[Any, ...]) -> str:
    id, is_done, progress, grounding, changes, *_ = told
    return (
        f"[EXP] {id}: [success_rate]: {is_done}, [progress_rate]: {progress}, [grounding_acc]: "
        f"{grounding}, [score_state]: {[tuple(change) for change in changes]} \n"
    )


def means(task: str = "scienceworld") -> dict[str, Any]:
    return {
        "task_name": task,
        "success_rate": 0.25,
        "progress_rate": 1.9 / 4,
        "grounding_acc": (0.75 + 1 / 3 + 1.5) / 4,
        "success_rate_hard": 0.0,
        "success_rate_easy": 0.5,
        "progress_rate_hard": 0.25,
        "progress_rate_easy": 0.7,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "gpt"
    (found / "logs").mkdir(parents=True)
    log = "".join(json.dumps(example(told), indent=2) + "\n" for told in EXAMPLES)
    (found / "logs" / "scienceworld.jsonl").write_text(log)
    (found / "scienceworld.txt").write_text("".join(map(line, EXAMPLES)))
    summary = {**means(), "task_name": "embodied_summary"}
    text = "\n".join([json.dumps(means()), json.dumps(summary), ""])
    (found / "all_results.txt").write_text(text)
    return found


def curve_of_agentboard() -> list[float]:
    """TaskLogger.log_summary: changes forward-filled over 30 steps, averaged, 0 put before."""
    total = [0.0] * STEPS
    for _, _, _, _, changes, *_ in EXAMPLES:
        scores, current = dict(map(tuple, changes)), 0.0
        for step in range(STEPS):
            current = scores.get(step, current)
            total[step] += current
    return [0.0, *(value / len(EXAMPLES) for value in total)]


# -------------------------------------------------------------------------------------- reading


def test_the_metrics_are_agentboards(folder: Path) -> None:
    episodes = load_agentboard(folder)
    assert [e.seed for e in episodes] == [0, 1, 2, 3]
    assert {e.environment for e in episodes} == {"scienceworld (AgentBoard)"}
    found = summarize(episodes).metrics
    told = means()
    assert found["success"].mean == pytest.approx(told["success_rate"])
    assert found["progress_rate"].mean == pytest.approx(told["progress_rate"])
    assert found["grounding_accuracy"].mean == pytest.approx(told["grounding_acc"])
    assert found["steps"].mean == 15 / 4
    assert "reward" not in found, "the log has none"
    for difficulty, own in split_by("difficulty", episodes).items():
        groups = summarize(own).metrics
        assert groups["success"].mean == told[f"success_rate_{difficulty}"]
        assert groups["progress_rate"].mean == pytest.approx(told[f"progress_rate_{difficulty}"])
    assert mean_progress_curve(episodes, STEPS).tolist() == pytest.approx(curve_of_agentboard())


def test_steps_are_in_their_order_with_the_goal_before_the_first(folder: Path) -> None:
    episode = load_agentboard(folder)[1]
    assert episode.actions == ["act 0", "act 1", "act 2"]
    assert episode.observations == ["goal 1", "seen 0", "seen 1"]
    assert episode.last_observation == "seen 2"
    assert episode.progress == [0.0, 0.5, 0.5]
    assert (episode.task, episode.difficulty) == ("boil", "hard")


def test_ten_turns_and_more_are_in_order_and_one_a_line_is_read_too(folder: Path) -> None:
    told = example((7, False, 0.0, 1.0, [], "easy", 12))
    shuffled = dict(sorted(told["trajectory"].items()))  # as text, 10 before 2
    path = folder / "logs" / "scienceworld.jsonl"
    path.write_text(
        json.dumps({**told, "trajectory": shuffled}) + "\n" + json.dumps({**told, "id": 8})
    )
    (folder / "scienceworld.txt").unlink()
    (folder / "all_results.txt").unlink()
    first, second = load_agentboard(folder)
    assert first.actions == second.actions == [f"act {step}" for step in range(12)]


def test_a_last_action_that_was_not_taken_is_no_step(folder: Path) -> None:
    told = example((0, False, 0.0, 0.0, [], "easy", 2))
    told["trajectory"]["Interaction Turn 2"] = {"Action": "said nothing"}
    (folder / "logs" / "scienceworld.jsonl").write_text(json.dumps(told))
    for name in ("scienceworld.txt", "all_results.txt"):
        (folder / name).unlink()
    assert len(load_agentboard(folder)[0].actions) == 2


def test_what_only_the_overview_has_counts_without_steps(folder: Path) -> None:
    shutil.rmtree(folder / "logs")
    episodes = load_agentboard(folder)
    assert summarize(episodes).metrics["progress_rate"].mean == pytest.approx(1.9 / 4)
    assert "steps" not in summarize(episodes).metrics
    assert mean_progress_curve(episodes, STEPS).tolist() == pytest.approx(curve_of_agentboard())
    done = CliRunner().invoke(main, ["report", str(folder), "--output", str(folder / "r.html")])
    assert done.exit_code == 0, done.output


def test_an_example_that_the_details_lack_is_taken_from_the_overview(folder: Path) -> None:
    path = folder / "logs" / "scienceworld.jsonl"
    path.write_text("".join(json.dumps(example(told)) for told in EXAMPLES[:3]))
    episodes = load_agentboard(folder)
    assert [len(e.actions) for e in episodes] == [4, 3, 2, 0]


def test_means_of_another_run_are_named(folder: Path) -> None:
    (folder / "all_results.txt").write_text(json.dumps({**means(), "success_rate": 0.5}))
    with pytest.warns(RuntimeWarning, match=r"says success_rate 0\.5 of scienceworld, .* 0\.25"):
        assert len(load_agentboard(folder)) == 4


# -------------------------------------------------------------------------------- bad input


def changed(**told: Any) -> dict[str, Any]:
    return {name: value for name, value in {**example(EXAMPLES[1]), **told}.items() if value != ""}


BROKEN = [
    (changed(grounding_acc=""), "got no 'grounding_acc'"),
    (changed(score_change_record=""), "got no 'score_change_record'"),
    (changed(is_done="maybe"), "is_done must be true or false, got 'maybe'"),
    (changed(is_done=0.5), "is_done must be true or false, got 0.5"),
    (changed(progress_rate=1.5), r"progress_rate must be a number in \[0, 1\], got 1.5"),
    (changed(progress_rate=float("nan")), r"progress_rate must be a number in \[0, 1\], got nan"),
    (changed(grounding_acc="1"), r"grounding_acc must be a number in \[0, 1\], got '1'"),
    (changed(score_change_record=[[9, 0.5]]), "score_change_record must lie within 3 steps"),
    (changed(score_change_record=[[0, 2]]), r"a score must be a number in \[0, 1\], got 2"),
    (changed(score_change_record=[3]), "is not of AgentBoard"),
    (changed(trajectory=[{"Action": "x"}]), "trajectory must be an object of interaction turns"),
    (changed(trajectory={"Turn 1": {}}), "must hold 'Interaction Turn 0' and so on, got 'Turn 1'"),
    (changed(id="first"), "is not of AgentBoard"),
    ([1], "an example must be an object"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_a_record_of_another_version_is_named(folder: Path, record: Any, message: str) -> None:
    path = folder / "logs" / "scienceworld.jsonl"
    path.write_text(json.dumps(example(EXAMPLES[0])) + json.dumps(record))
    before = {p: p.read_bytes() for p in folder.rglob("*.*")}
    with pytest.raises(ValueError, match=message) as raised:
        load_agentboard(folder)
    assert f"{path}, example 2" in str(raised.value)
    assert {p: p.read_bytes() for p in folder.rglob("*.*")} == before


def test_a_log_that_was_cut_short_is_named_with_its_line(folder: Path) -> None:
    path = folder / "logs" / "scienceworld.jsonl"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"scienceworld\.jsonl: no JSON after line \d+"):
        load_agentboard(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[EXP] 0: [reward]: 1\n", r"scienceworld\.txt:1 must be a line '\[EXP\] 0: …'"),
        (line((0, "done()", 0, 0, [])), r"scienceworld\.txt:1 must hold numbers"),
        (line((0, False, 1.0, 0.75, [])), "must say the same of example 0 as scienceworld.jsonl"),
        (line(EXAMPLES[0]) * 2, "must have an id of its own, got 0 again"),
    ],
)
def test_a_broken_overview_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "scienceworld.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_agentboard(folder)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with (folder / "all_results.txt").open("a") as file:
        file.write(json.dumps(means("babyai")) + "\n")
    with pytest.raises(ValueError, match=r"must have babyai\.txt or logs/babyai\.jsonl, the log"):
        load_agentboard(folder)
    (folder / "all_results.txt").write_text('{"task": "babyai"}\n')
    with pytest.raises(ValueError, match=r"all_results\.txt:1 is not of AgentBoard: KeyError"):
        load_agentboard(folder)
    (folder / "all_results.txt").write_text("")
    assert len(load_agentboard(folder)) == 4, "a run that is under way has no means yet"
    for path in (folder / "logs" / "scienceworld.jsonl", folder / "scienceworld.txt"):
        path.write_text("")
    with pytest.raises(ValueError, match="must have an example of scienceworld in its log"):
        load_agentboard(folder)
    assert not is_agentboard(tmp_path)
    with pytest.raises(ValueError, match="must have the logs of AgentBoard"):
        load_agentboard(tmp_path)


# -------------------------------------------------------------------------------------- writing


@pytest.fixture(scope="module")
def played() -> list[Episode]:
    pytest.importorskip("minigrid")
    runs = [
        run_episodes("babyai:GoToLocalS6N2", p, range(6)) for p in (ExpertPolicy(), RandomPolicy())
    ]
    return [*runs[0], *(replace(e, seed=e.seed + 100) for e in runs[1])]


def test_what_is_written_reads_back_with_the_same_metrics(
    played: list[Episode], tmp_path: Path
) -> None:
    assert save_agentboard(tmp_path, played) == ["babyai"]
    back = load_agentboard(tmp_path)
    ours, theirs = summarize(played), summarize(back)
    for name in ("success", "progress_rate", "grounding_accuracy", "steps"):
        assert theirs.metrics[name].mean == pytest.approx(ours.metrics[name].mean), name
    assert theirs.progress_curve == pytest.approx(ours.progress_curve)
    for a, b in zip(played, back, strict=True):
        assert (a.actions, a.observations, a.last_observation, a.task, a.difficulty) == (
            b.actions,
            b.observations,
            b.last_observation,
            b.task,
            b.difficulty,
        )


def test_a_folder_that_was_read_is_written_as_it_was(folder: Path, tmp_path: Path) -> None:
    save_agentboard(tmp_path / "again", load_agentboard(folder))
    for name in ("scienceworld.txt", "logs/scienceworld.jsonl"):
        ours, theirs = (tmp_path / "again" / name).read_text(), (folder / name).read_text()
        if name.endswith("txt"):
            assert ours == theirs
        else:
            assert [json.loads(text) for text in parts(ours)] == [
                json.loads(text) for text in parts(theirs)
            ]
    first = json.loads((tmp_path / "again" / "all_results.txt").read_text())
    assert first == pytest.approx({**means(), "task_name": "scienceworld"}) or all(
        first[name] == pytest.approx(value)
        for name, value in means().items()
        if name != "task_name"
    )


def parts(text: str) -> list[str]:
    return [part + "\n}" for part in text.strip().removesuffix("}").split("\n}\n") if part]


def test_what_is_none_of_agentboards_is_refused(played: list[Episode], tmp_path: Path) -> None:
    elsewhere = replace(played[0], environment="textworld")
    with pytest.raises(ValueError, match=r"environment must be one of AgentBoard's, .*'textworld'"):
        save_agentboard(tmp_path, [*played, elsewhere])
    with pytest.raises(ValueError, match="babyai must have each seed once, got 0 again"):
        save_agentboard(tmp_path, [*played, played[0]])
    with pytest.raises(ValueError, match="must have a seed >= 0, progress and valid actions"):
        save_agentboard(tmp_path, [replace(played[0], valid=[])])
    with pytest.raises(ValueError, match="an episode must have ended, got none of 1"):
        save_agentboard(tmp_path, [replace(played[0], crashed="gone")])
    assert not list(tmp_path.iterdir()), "nothing is half written"


# ----------------------------------------------------------------------------------- sub-skills


def test_sub_skills_are_agentboards_sums_over_all_nine() -> None:
    rates = {task: place / 10 for place, task in enumerate(TASKS)}
    found = sub_skills(rates)
    memory = [1, 2, 1, 1, 2, 1, 3, 2, 3]
    assert found["memory"] == pytest.approx(np.dot(memory, list(rates.values())) / 16)
    assert sub_skills(dict.fromkeys(TASKS, 1.0)) == pytest.approx(dict.fromkeys(found, 1.0))


def test_sub_skills_of_some_tasks_are_renormalised_over_them() -> None:
    found = sub_skills({"scienceworld": 0.5, "babyai": 0.2})
    assert found["memory"] == pytest.approx((2 * 0.5 + 1 * 0.2) / 3)
    assert found["grounding"] == pytest.approx((3 * 0.5 + 2 * 0.2) / 5)
    assert set(sub_skills({"webshop": 0.3}).values()) == {0.3}, "one task's weights say nothing"


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({}, "at least one of AgentBoard's tasks"),
        ({"textworld": 1.0}, "task must be one of alfworld, .* got 'textworld'"),
        ({"babyai": 1.2}, r"success of babyai must lie in \[0, 1\], got 1.2"),
    ],
)
def test_sub_skills_of_nothing_are_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sub_skills(rates)


def test_success_by_task_joins_levels_and_leaves_crashes_out() -> None:
    episodes = [
        Episode("babyai:GoToLocal", 0, success=True),
        Episode("babyai:Open", 0),
        Episode("babyai (AgentBoard)", 0, success=True, crashed="gone"),
        Episode("textworld", 0, success=True),
        Episode("scienceworld (AgentBoard)", 3, success=True),
    ]
    assert success_by_task(episodes) == {"scienceworld": 1.0, "babyai": 0.5}


# ------------------------------------------------------------------------------------ the report


def test_the_report_shows_both_beside_each_other(
    folder: Path, played: list[Episode], tmp_path: Path
) -> None:
    both = [*load_agentboard(folder), *played]
    save_agentboard(tmp_path / "mine", both)
    path = tmp_path / "report.html"
    command = ["report", str(folder), str(tmp_path / "mine"), "--output", str(path), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runs"] == {"gpt": 4, "mine": 16}
    page = path.read_text()
    assert "Sub-skills" in page
    assert "mine: scienceworld, babyai, 2 of 9" in page
    assert "Spatial navigation" in page
    alone = CliRunner().invoke(main, ["report", str(folder), "--output", str(path)])
    assert alone.exit_code == 0
    assert "Sub-skills" not in path.read_text(), "of one task all skills would be the same"


def test_the_report_writes_folders_that_it_reads(played: list[Episode], tmp_path: Path) -> None:
    from stepagent import save_trajectories

    save_trajectories(tmp_path / "bot.jsonl", [e.trajectory() for e in played])
    boards = tmp_path / "boards"
    command = ["report", str(tmp_path / "bot.jsonl"), "--output", str(tmp_path / "r.html")]
    done = CliRunner().invoke(main, [*command, "--agentboard", str(boards), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["agentboard"] == {"bot": ["babyai"]}
    assert load_run(boards / "bot").name == "bot"
    assert METRICS["success"](load_run(boards / "bot").episodes[0]) == 1.0
    other = Episode("textworld", 0, actions=["look"], observations=["x"], progress=[0.0])
    save_trajectories(tmp_path / "other.jsonl", [other.trajectory()])
    command[1] = str(tmp_path / "other.jsonl")
    refused = CliRunner().invoke(main, [*command, "--agentboard", str(boards)])
    assert refused.exit_code == 1
    assert "environment must be one of AgentBoard's" in refused.stderr


def test_a_measured_value_is_kept_by_a_file_of_episodes(folder: Path) -> None:
    episode = load_agentboard(folder)[0]
    assert Episode.of(episode.trajectory()).measured == episode.measured
    assert envs.shown_name(episode.environment) == "scienceworld (AgentBoard)"
