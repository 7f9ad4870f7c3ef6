"""Search over policy text: what is accepted, what is passed over, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from completions_server import CompletionsServer, status

from stepagent import envs
from stepagent.acting.server_policies import ChatPolicy
from stepagent.cli import main
from stepagent.engines import Server
from stepagent.evolve import (
    Caps,
    Evolved,
    FileProposer,
    NoMoreProposals,
    Request,
    ServerProposer,
    evolve,
    told,
)
from stepagent.rollout import run_episodes

pytest.importorskip("gymnasium")

from stepagent.envs.blackjack import BlackjackTextEnv, Hand
from stepagent.evolve.blackjack import Follower, Rule, follow, mutate, read_rules

GOOD = "Against 2 to ace: stand on hard 15 or more.\nAgainst 2 to ace: stand on soft 18 or more."
BAD = "Against 2 to ace: stand on hard 21 or more."
SMALL = {"episodes": 60, "held_out": 30, "children": 3}
OWN = "stepagent.evolve.blackjack:"


class Says:
    """Proposes these, then no more; a function among them is called."""

    name = "says"

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = answers, list[Request]()

    def __call__(self, request: Request) -> Any:
        if request.number > len(self.answers):
            raise NoMoreProposals(f"{len(self.answers)} were said")
        self.asked.append(request)
        answer = self.answers[request.number - 1]
        return answer() if callable(answer) else answer


def raised(error: BaseException) -> Callable[[], str]:
    def fail() -> str:
        raise error

    return fail


def search(folder: Path, propose: Any, guideline: str = "", **changed: Any) -> Evolved:
    options = SMALL | {"policy": follow, "env": "blackjack"} | changed
    env, policy = options.pop("env"), options.pop("policy")
    return evolve(env, policy, guideline, propose, folder, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ the search


def test_it_goes_on_from_what_was_accepted_and_keeps_the_rest_out(tmp_path: Path) -> None:
    says = Says(BAD, GOOD, BAD + "\n" + GOOD)
    found = search(tmp_path, says, episodes=200)
    assert [one.outcome for one in found.proposals[1:]] == ["refused", "accepted", "refused"]
    assert [one.parent for one in found.proposals] == [None, 0, 0, 2]
    assert [one.number for one in found.path] == [0, 2]
    assert found.guideline == GOOD
    assert (tmp_path / "guideline.txt").read_text() == GOOD + "\n"
    assert found.episodes == 200 * (1 + 2 * 3)
    assert [request.guideline for request in says.asked] == ["", "", GOOD]
    assert [[text for text, _ in request.refused] for request in says.asked] == [[], [BAD], []]
    for request in says.asked:
        assert 0 < len(request.failed) <= 8
        assert not any(episode.success for episode in request.failed)
    assert "3 were said" in found.reason


def test_the_difference_is_that_of_the_pairs_on_its_seeds(tmp_path: Path) -> None:
    found = search(tmp_path, Says(GOOD)).proposals[1]
    assert found.seeds == "90-149", "after 30 held out and the root's 60"
    seeds = range(90, 150)
    paid = [
        [sum(e.rewards) for e in run_episodes("blackjack", follow(text), seeds)]
        for text in (GOOD, "")
    ]
    assert found.payoff == np.mean(paid[0])
    assert found.parent_payoff == np.mean(paid[1])
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(np.mean(np.subtract(*paid)))


def test_no_seed_decides_twice_and_the_held_out_ones_decide_nothing(tmp_path: Path) -> None:
    search(tmp_path, mutate, caps=Caps(proposals=6), children=6, seed_start=1000)
    told = lines(tmp_path)
    deciding = [line["seeds"] for line in told if line["event"] in ("root", "judged")]
    held_out = {line["seeds"] for line in told if line["event"] == "held out"}
    assert held_out == {"1000-1029"}
    spans = [tuple(map(int, seeds.split("-"))) for seeds in deciding]
    assert len(spans) > 3
    assert all(a[1] < b[0] for a, b in pairwise(spans))
    assert spans[0][0] == 1030


def test_what_plays_the_same_differs_by_0_and_is_never_accepted(tmp_path: Path) -> None:
    remarks = [f"{GOOD}\n# reading {n}" for n in range(4)]
    found = search(tmp_path, Says(*remarks), GOOD, children=4)
    for one in found.proposals[1:]:
        assert one.difference is not None
        assert (one.difference.mean, one.accepted) == (0.0, False)


def test_a_gain_in_every_single_episode_is_accepted(tmp_path: Path) -> None:
    class Obey(BlackjackTextEnv):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            won = float(action == "stand")
            self._over = True
            return "", won, True, False, {"valid": True, "success": won > 0, "progress": won}

    stand = "\n".join(f"Against 2 to ace: stand on {kind} 4 or more." for kind in ("hard", "soft"))
    hit = stand.replace(" 4 ", " 22 ")
    found = search(tmp_path, Says(stand), hit, env=Obey, episodes=10)
    assert found.guideline == stand
    assert found.path[1].difference.low == 1.0  # type: ignore[union-attr]


UNUSABLE = [
    (None, "nothing"),
    ("", "nothing"),
    (" \n", "garbage: a guideline must be a text, got ' \\n'"),
    (7, "garbage: a guideline must be a text, got 7"),
    ("Always win.", "garbage: line 1 must be a rule such as"),
    ("Against 6 to 2: stand on hard 12 or more.", "garbage: line 1 must be a rule"),
    ("Against 1: stand on hard 12 or more.", "garbage: line 1 must be a rule"),
    (raised(OSError("no route")), "the proposer failed: OSError: no route"),
    (raised(RuntimeError("x" * 10_000)), "the proposer failed: RuntimeError: x"),
    (f"{GOOD}\n", "the same as the root"),
]


@pytest.mark.parametrize(("answer", "problem"), UNUSABLE)
def test_an_answer_of_no_use_is_written_down_and_passed_over(
    tmp_path: Path, answer: Any, problem: str
) -> None:
    found = search(tmp_path, Says(answer, BAD), GOOD)
    assert [one.outcome for one in found.proposals[1:]] == ["unusable", "refused"]
    assert str(found.proposals[1].problem).startswith(problem)
    assert found.guideline == GOOD


def test_a_proposer_without_an_idea_ends_the_search(tmp_path: Path) -> None:
    found = search(tmp_path, Says(*[None] * 10))
    assert found.reason == "3 proposals in a row were not accepted"
    assert len(found.proposals) == 4
    assert found.episodes == SMALL["episodes"], "none was played for nothing"


def test_what_was_tried_is_not_tried_again(tmp_path: Path) -> None:
    found = search(tmp_path, Says(BAD, f" {BAD}\n", "# a remark"), children=5)
    assert [one.problem for one in found.proposals[1:]] == [None, "the same as number 1", None]


@pytest.mark.parametrize(
    ("caps", "reason"),
    [
        (Caps(depth=1), "1 accepted, the depth that was allowed"),
        (Caps(proposals=2), "2 proposals, as many as were allowed"),
        (Caps(episodes=60 * 5), "300 episodes, and no more comparison within 300"),
        (Caps(episodes=60 * 5 + 119), "300 episodes, and no more comparison within 419"),
        (Caps(episodes=1), "60 episodes, and no more comparison within 1"),
    ],
)
def test_it_ends_at_its_caps(tmp_path: Path, caps: Caps, reason: str) -> None:
    found = search(tmp_path, Says(GOOD, f"{GOOD}\n# 1", f"{GOOD}\n# 2"), caps=caps)
    assert found.reason == reason
    assert caps.episodes is None or found.episodes <= max(caps.episodes, 60)


def test_the_held_out_payoffs_are_of_the_same_hands(tmp_path: Path) -> None:
    found = search(tmp_path, Says(GOOD), held_out=200, episodes=200)
    paid = [
        [sum(e.rewards) for e in run_episodes("blackjack", follow(text), range(200))]
        for text in ("", GOOD)
    ]
    assert [one.payoffs for one in found.path] == paid
    assert found.held_out(1).mean == pytest.approx(np.mean(paid[1]))  # type: ignore[union-attr]
    gain = found.held_out(1, 0)
    assert gain is not None
    assert gain.mean == pytest.approx(np.mean(np.subtract(paid[1], paid[0])))
    assert search(tmp_path / "none", Says(GOOD), held_out=0).held_out(0) is None


# ------------------------------------------------------------------------------- stop and go on


class Stops(Follower):
    """Ctrl-C at the n-th decision of all its episodes."""

    left = 0

    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str]:
        Stops.left -= 1
        if Stops.left == 0:
            raise KeyboardInterrupt
        return super().act(observations, envs)


@pytest.mark.parametrize("after", [1, 3, 8, 11, 20, 27])
def test_a_search_that_was_stopped_goes_on_to_the_same_end(tmp_path: Path, after: int) -> None:
    def stopping(guideline: str) -> Follower:
        return Stops(read_rules(guideline))

    run = {"policy": "rules"}
    proposals = [BAD, None, GOOD, f"{GOOD}\n# again"]
    whole = search(tmp_path / "whole", Says(*proposals), run=run, children=4)
    Stops.left = after
    says = Says(*proposals)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "stopped", says, policy=stopping, run=run, children=4)
    asked = len(says.asked)
    says = Says(*proposals)
    again = search(tmp_path / "stopped", says, run=run, children=4)
    assert again == whole
    assert asked + len(says.asked) == len(proposals), "no proposal is asked for, and paid, twice"
    files = [tmp_path / name / "journal.jsonl" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_proposer_that_is_interrupted_is_asked_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Says(BAD, raised(KeyboardInterrupt())))
    found = search(tmp_path, Says(BAD, GOOD))
    assert [one.text for one in found.proposals[1:]] == [BAD, GOOD]


def test_a_line_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    whole = search(tmp_path, Says(BAD, GOOD))
    journal = tmp_path / "journal.jsonl"
    kept = journal.read_bytes()
    for cut in range(1, len(kept), len(kept) // 4):
        journal.write_bytes(kept[:cut])
        assert search(tmp_path, Says(BAD, GOOD)) == whole
        assert journal.read_bytes() == kept


def test_larger_caps_go_on_where_it_ended(tmp_path: Path) -> None:
    first = search(tmp_path, Says(BAD, GOOD), caps=Caps(proposals=1))
    assert len(first.proposals) == 2
    says = Says(BAD, GOOD)
    found = search(tmp_path, says)
    assert [request.number for request in says.asked] == [2]
    assert found.proposals[:2] == first.proposals


@pytest.mark.parametrize(
    "changed", [{"episodes": 61}, {"held_out": 0}, {"guideline": BAD}, {"payoff": "success"}]
)
def test_another_search_is_refused_and_the_file_stays(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    search(tmp_path, Says(BAD))
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match="is of another run: it has"):
        search(tmp_path, Says(BAD), **changed)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["something else\n", '{"event": "root"}\n', '{"event": "judged", "number": 4}\n', "[]\n"],
)
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / "journal.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"journal\.jsonl"):
        search(tmp_path, Says(BAD))
    assert (tmp_path / "journal.jsonl").read_text() == content


# -------------------------------------------------------------------------- environments' troubles


class Few(BlackjackTextEnv):
    """Has 200 hands."""

    def check_seed(self, seed: int) -> None:
        if seed >= 200:
            raise ValueError(f"seed must be below 200, got {seed}")


def test_it_ends_where_the_environment_has_no_more_seeds(tmp_path: Path) -> None:
    found = search(tmp_path, Says(BAD, GOOD), env=Few)  # 30 + 60 + 60 + 60 > 200
    assert found.reason == "no more seeds: seed must be below 200, got 200"
    assert [one.outcome for one in found.proposals[1:]] == ["refused", "open"]
    assert found.path[0].payoffs
    with pytest.raises(ValueError, match="seed must be below 200, got 200"):
        search(tmp_path / "none", Says(BAD), env=Few, seed_start=150)
    assert not (tmp_path / "none" / "journal.jsonl").exists(), "nothing was found until then"


class Breaks(BlackjackTextEnv):
    """Crashes where the dealer shows one of these, once a player takes a card."""

    cards: tuple[int, ...] = ()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "hit" and self._hand.dealer in self.cards:
            raise OSError("the table broke")
        return super().step(action)


@pytest.mark.filterwarnings("ignore:.*episodes crashed")
def test_pairs_that_crashed_are_left_out_and_too_many_decide_nothing(tmp_path: Path) -> None:
    class Rarely(Breaks):
        cards = (11,)

    class Often(Breaks):
        cards = (2, 3, 4)

    stand = "\n".join(f"Against 2 to ace: stand on {kind} 4 or more." for kind in ("hard", "soft"))
    few = search(tmp_path / "few", Says(GOOD), stand, env=Rarely).proposals[1]
    assert few.crashed > 0
    assert few.pairs + few.crashed == 60
    assert few.outcome == "accepted"
    many = search(tmp_path / "many", Says(GOOD), stand, env=Often).proposals[1]
    assert (many.outcome, many.payoff, many.accepted) == ("crashed", None, False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"episodes": 0}, "episodes must be a whole number >= 1, got 0"),
        ({"children": 0}, "children must be a whole number >= 1, got 0"),
        ({"held_out": -1}, "held_out must be a whole number >= 0, got -1"),
        ({"payoff": "steps"}, "payoff must be one of reward, success, progress_rate, got 'steps'"),
        ({"guideline": "win"}, "line 1 must be a rule"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "new", Says(GOOD), **changed)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- servers and files


@pytest.fixture
def server() -> Any:
    with CompletionsServer([], []) as running:
        yield running


def chatting(text: str) -> Callable[[list[dict[str, str]]], str]:
    return lambda messages: text


@pytest.mark.slow
def test_a_model_is_told_the_guideline_first(server: Any, tmp_path: Path) -> None:
    server.chat = lambda messages: "stand" if GOOD in messages[0]["content"] else "hit"
    policy = told(ChatPolicy(Server(server.url), max_new_tokens=4, system="You play."))
    found = search(tmp_path, Says(GOOD), BAD, policy=policy, episodes=20, held_out=4)
    assert {request["messages"][0]["content"] for request in server.requests} == {
        f"You play.\n\n{BAD}",
        f"You play.\n\n{GOOD}",
    }
    assert found.guideline == GOOD, "standing at once beats hitting until one has lost"
    assert told(ChatPolicy(Server(server.url), max_new_tokens=4))("").system is None  # type: ignore[attr-defined]


def test_who_is_told_nothing_cannot_follow() -> None:
    with pytest.raises(TypeError, match=r"policy must read a first message \(system\)"):
        told(follow(GOOD))


def test_a_server_is_shown_what_went_wrong_and_proposes(server: Any, tmp_path: Path) -> None:
    server.chat = chatting(f"It stands too early.\n<guideline>\n{GOOD}\n</guideline> Done.")
    proposer = ServerProposer(Server(server.url), about="Play Blackjack.", max_new_tokens=99)
    found = search(tmp_path, proposer, caps=Caps(proposals=1))
    assert found.proposals[1].text == GOOD
    (request,) = server.requests
    system, asked = (message["content"] for message in request["messages"])
    assert "<guideline> and </guideline>" in system
    assert "The task:\nPlay Blackjack." in asked
    assert "It saw: You have" in asked
    assert "Reward: -1" in asked
    assert (request["max_tokens"], request["temperature"]) == (99, 1.0)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("Play better.", "garbage: no <guideline>…</guideline> in 'Play better.'"),
        ("<guideline>cut", "garbage: no <guideline>"),
        ("<guideline>\n</guideline>", "nothing"),
        ("", "nothing"),
        (None, "nothing"),
        ("<guideline>Win.</guideline>", "garbage: line 1 must be a rule"),
    ],
)
def test_a_servers_answer_of_no_use(
    server: Any, tmp_path: Path, answer: str | None, problem: str
) -> None:
    server.chat = lambda messages: answer
    found = search(tmp_path, ServerProposer(Server(server.url)), caps=Caps(proposals=1))
    assert str(found.proposals[1].problem).startswith(problem)


def test_a_server_that_refuses_or_is_gone_is_passed_over(server: Any, tmp_path: Path) -> None:
    server.faults = [status(400, "no")]
    found = search(tmp_path / "refused", ServerProposer(Server(server.url)), caps=Caps(proposals=1))
    assert "the server answered nothing" in str(found.proposals[1].problem)
    gone = Server("http://127.0.0.1:9", model="tiny", retries=0)
    found = search(tmp_path / "gone", ServerProposer(gone))
    assert [one.outcome for one in found.proposals[1:]] == ["unusable"] * 3
    assert "the proposer failed: EngineError" in str(found.proposals[1].problem)


def test_a_file_of_proposals(tmp_path: Path) -> None:
    path = tmp_path / "proposals.txt"
    path.write_text(f"{BAD}\n=====\n\n=====\n{GOOD}\n")
    found = search(tmp_path / "out", FileProposer(path))
    assert [one.text for one in found.proposals[1:]] == [BAD, None, GOOD]
    assert found.reason.endswith("proposals.txt has 3 proposals")
    path.write_text(path.read_text() + f"======\n{GOOD}\n# longer\n")
    assert len(search(tmp_path / "out", FileProposer(path)).proposals) == 5


# ------------------------------------------------------------------------------ Blackjack's rules


def test_rules_are_read_as_they_are_written() -> None:
    rules = [Rule(2, 6, False, 13), Rule(9, 11, True, 19), Rule(11, 11, False, 17)]
    text = "\n".join(map(str, rules))
    assert text.splitlines() == [
        "Against 2 to 6: stand on hard 13 or more.",
        "Against 9 to ace: stand on soft 19 or more.",
        "Against ace: stand on hard 17 or more.",
    ]
    assert read_rules(f"\n# a remark\n  {text}\n") == rules
    with pytest.raises(ValueError, match="line 3 must be a rule such as"):
        read_rules(f"{GOOD}\nAgainst 2: hit.")


def test_the_last_rule_that_fits_decides_and_a_coin_where_none_does() -> None:
    policy = follow(
        "Against 2 to ace: stand on hard 17 or more.\nAgainst 5: stand on hard 12 or more."
    )
    policy.begin(range(400))
    shown = "You have {} {}. The dealer shows {}."
    for kind, total, card, action in [
        ("hard", 12, "5", "stand"),
        ("hard", 11, "5", "hit"),
        ("hard", 16, "an ace", "hit"),
        ("hard", 17, "10", "stand"),
    ]:
        assert set(policy.act([shown.format(kind, total, card)] * 400, [])) == {action}
    tossed = policy.act([shown.format("soft", 17, "5")] * 400, [])
    assert 160 < tossed.count("hit") < 240
    assert not Rule(2, 6, True, 18).fits(Hand(17, False, 5))


def test_the_empty_guideline_is_random_play() -> None:
    paid = [sum(e.rewards) for e in run_episodes("blackjack", follow(""), range(1500))]
    assert -0.47 < np.mean(paid) < -0.32


def test_mutations_are_rules_and_differ() -> None:
    texts = {mutate(Request(GOOD, [], [], number)) for number in range(60)}
    assert all(read_rules(text) for text in texts)
    assert len(texts) > 25
    assert mutate(Request(GOOD, [], [], 7)) == mutate(Request(GOOD, [], [], 7))


# --------------------------------------------------------------------------------- command line


def command(folder: Path, *changed: str, proposer: str = f"{OWN}mutate") -> Result:
    options = ["--env", "blackjack", "--policy", f"{OWN}follow", "--propose", proposer]
    options += ["--output", str(folder), "--episodes", "40", "--held-out", "20"]
    return CliRunner().invoke(main, ["evolve", *options, "--proposals", "2", *changed])


def test_the_command_reports_and_goes_on(tmp_path: Path) -> None:
    first = command(tmp_path / "out", "--json")
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report["environment"] == "blackjack"
    assert report["reason"] == "2 proposals, as many as were allowed"
    assert sum(report["proposals"].values()) == 2
    assert report["path"][0]["held_out"]["mean"] < 0
    again = command(tmp_path / "out", "--json")
    assert json.loads(again.stdout) == report, "nothing is played again"
    text = command(tmp_path / "out", "--proposals", "3")
    assert "3 proposals, as many as were allowed" in text.output
    assert "the first   held out" in text.output
    other = command(tmp_path / "out", "--episodes", "41")
    assert other.exit_code == 1
    assert "is of another run: it has episodes 40, not 41" in other.stderr


@pytest.mark.slow
def test_the_command_acts_and_proposes_by_servers(server: Any, tmp_path: Path) -> None:
    def chat(messages: list[dict[str, str]]) -> str:
        if "You improve the guideline" in messages[0]["content"]:
            return "<guideline>Stand.</guideline>"
        return "stand" if messages[0]["content"].endswith("Stand.") else "hit"

    server.chat = chat
    (tmp_path / "first.txt").write_text("Take a card.\n")
    options = ["--policy", server.url, "--guideline", str(tmp_path / "first.txt"), "--json"]
    options += ["--episodes", "24", "--held-out", "4"]
    done = command(tmp_path / "out", *options, proposer=server.url)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["guideline"] == "Stand."
    first = server.requests[0]["messages"][0]["content"]
    assert first.startswith("You play one hand of Blackjack"), "the environment's instructions"


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stops_once.py").write_text(
        "def propose(request):\n"
        "    if request.number == 2:\n"
        "        raise KeyboardInterrupt\n"
        f"    return {BAD!r}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stopped = command(tmp_path / "out", proposer="stops_once:propose")
    assert stopped.exit_code == 130
    assert "what was judged is in" in stopped.stderr
    assert [line["event"] for line in lines(tmp_path / "out")] == ["root", "proposed", "judged"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--policy", "expert"], "'expert' is neither a server's URL nor a model's folder"),
        (["--propose", "nobody"], "'nobody' is neither a server's URL nor a file of proposals"),
        (["--propose", f"{OWN}nobody"], "cannot be imported"),
        (["--propose", "no_such_module:f"], "cannot be imported"),
        (["--policy", f"{OWN}_LEAST"], "must be a function, got 12"),
        (["--system", "x"], "--system is of no use with --policy stepagent.evolve"),
        (["--proposer-model", "x"], "--proposer-model is of no use with --propose"),
        (["--proposer-tokens", "9"], "--proposer-tokens is of no use with --propose"),
        (["--env", "no-such"], "environment must be one of"),
        (["--split", "test"], "split of environment 'blackjack' must be None"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(
    tmp_path: Path, changed: list[str], message: str
) -> None:
    refused = command(tmp_path / "out", *changed)
    assert refused.exit_code in (1, 2)
    assert message in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_workers_play_the_same(tmp_path: Path) -> None:
    alone = search(tmp_path / "alone", Says(GOOD), episodes=20, held_out=8)
    beside = search(tmp_path / "beside", Says(GOOD), episodes=20, held_out=8, workers=2)
    assert alone == beside
    assert partial(envs.make, "blackjack")().name == "blackjack"
