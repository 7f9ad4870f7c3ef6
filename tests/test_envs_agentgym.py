"""The client of AgentGym's servers, against a real server that drives BabyAI in both dialects."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from agentgym_server import AgentGymServer

from stepagent import envs
from stepagent.acting.rollout import run_episodes
from stepagent.envs import ExpertUnavailable
from stepagent.envs.agentgym import AgentGymError, AgentGymTextEnv, parse_address

SEED = 5


def expert_walk(seed: int) -> list[tuple[str, str]]:
    """The expert's actions in the level itself, and what follows them."""
    env = envs.make("babyai:GoToLocalS6N2")
    env.reset(seed)
    walk, over = [], False
    while not over:
        action = env.expert_action()
        observation, _, terminated, truncated, _ = env.step(action)
        walk.append((action, observation))
        over = terminated or truncated
    return walk


@pytest.mark.parametrize(
    ("dialect", "named"),
    [("id", True), ("env_idx", False), ("env_idx", True), ("task", False), ("task", True)],
)
def test_an_episode_is_the_servers(dialect: str, named: bool) -> None:
    with AgentGymServer(dialect, named=named) as server:
        env = envs.make(f"agentgym:{server.url}")
        assert env.name == f"agentgym:{server.url}"
        first, info = env.reset(SEED)
        assert first == envs.make("babyai:GoToLocalS6N2").reset(SEED)[0]
        assert info == {"valid": True, "success": False, "progress": 0.0}
        walk = expert_walk(SEED)
        for action, expected in walk[:-1]:
            assert env.step(action) == (expected, 0.0, False, False, info)
        _, reward, terminated, truncated, info = env.step(walk[-1][0])
        assert (reward, terminated, truncated) == (1.0, True, False)
        assert info == {"valid": True, "success": True, "progress": 1.0}
        with pytest.raises(RuntimeError, match="reset"):
            env.step("left")
        assert env.reset(SEED)[0] == first
        with pytest.raises(ExpertUnavailable, match=server.url):
            env.expert_action()
        env.close()
        env.close()
        handle = "id" if dialect == "id" else "env_idx"
        assert server.requests[-1] == ("/close", {handle: 0})


def test_two_clients_have_an_environment_each() -> None:
    with AgentGymServer("id") as server:
        one, other = (envs.make(f"agentgym:{server.url}") for _ in range(2))
        first = one.reset(1)[0]
        assert other.reset(2)[0] != first
        one.step("left")
        assert [fields.get("id") for path, fields in server.requests if path == "/reset"] == [0, 1]
        one.close()
        other.close()


def test_a_task_description_comes_first() -> None:
    with AgentGymServer("id") as server:
        server.answers["/reset"] = {"task_description": "Boil water.", "observation": "A kitchen."}
        env = envs.make(f"agentgym:{server.url}")
        assert env.reset(0)[0] == "Boil water.\nA kitchen."
        env.close()


def test_scores_are_scaled_never_cut_and_progress_does_not_fall() -> None:
    with AgentGymServer("id") as server:
        env = envs.make(f"agentgym:{server.url}?scale=100")
        env.reset(0)
        found = []
        for score, done in ((30, False), (10, False), (100, True)):
            server.answers["/step"] = {
                "observation": "Nothing happens.",
                "score": score,
                "done": done,
            }
            _, reward, _, _, info = env.step("left")
            found.append((reward, info["progress"], info["success"]))
            assert (info["valid"], info["invalid"]) == (False, "refused action")
        assert [progress for _, progress, _ in found] == [0.3, 0.3, 1.0]
        assert [reward for reward, *_ in found] == pytest.approx([0.3, -0.2, 0.9])
        assert [success for *_, success in found] == [False, False, True]
        env.close()
        unscaled = envs.make(f"agentgym:{server.url}")
        unscaled.reset(0)
        with pytest.raises(AgentGymError, match=r"score 100 is above 1.*\?scale=100"):
            unscaled.step("left")
        unscaled.close()


def test_steps_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AgentGymTextEnv, "max_steps", 2)
    with AgentGymServer("id") as server:
        env = envs.make(f"agentgym:{server.url}")
        env.reset(0)
        assert [env.step("jump")[3] for _ in range(2)] == [False, True]
        env.close()


FAULTS: dict[str, tuple[Any, str]] = {
    "status": (lambda handler: handler.send_text("no such game", 500), "status 500: no such game"),
    "no JSON": (lambda handler: handler.send_text("<html>"), "no JSON: '<html>'"),
    "error": (lambda handler: handler.send_json({"error": "it broke"}), "an error: it broke"),
    "no observation": (lambda handler: handler.send_json({"done": False}), "no text 'observation'"),
    "a list": (lambda handler: handler.send_json([1]), "no text 'observation'"),
    "dropped": (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), "failed: "),
    "slow": (lambda handler: time.sleep(1.0), "not answered within 0.2 s"),
}


@pytest.mark.parametrize("path", ["/reset", "/step"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_server_does_wrong_is_an_error_that_names_it(fault: str, path: str) -> None:
    do, message = FAULTS[fault]
    with AgentGymServer("id") as server:
        env = AgentGymTextEnv(server.url, timeout=0.2 if fault == "slow" else 60.0)
        env.reset(SEED)
        server.faults[path] = do
        before = len(server.requests)
        with pytest.raises(AgentGymError, match=message) as raised:
            env.reset(0) if path == "/reset" else env.step("left")
        assert server.url in str(raised.value)
        assert len(server.requests) == before + 1  # not sent again
        env.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"observation": "", "score": 0, "done": "no"}, "done = 'no'"),
        ({"observation": "", "score": None, "done": False}, "score = None"),
        ({"observation": "", "reward": True, "done": False}, "reward = True"),
    ],
)
def test_a_step_that_is_none_is_an_error(answer: dict[str, Any], message: str) -> None:
    with AgentGymServer("id") as server:
        env = envs.make(f"agentgym:{server.url}")
        env.reset(0)
        server.answers["/step"] = answer
        with pytest.raises(AgentGymError, match=message):
            env.step("left")
        env.close()


@pytest.mark.parametrize("answer", [{}, {"id": "a"}, "0", None, True])
def test_an_environment_without_a_number_is_an_error(answer: Any) -> None:
    with AgentGymServer("id") as server:
        server.answers["/create"] = answer
        with pytest.raises(AgentGymError, match="must be a number"):
            envs.make(f"agentgym:{server.url}")


def test_no_server_and_a_server_that_went_away() -> None:
    with AgentGymServer("id") as server:
        env = envs.make(f"agentgym:{server.url}")
    with pytest.raises(AgentGymError, match=f"{server.url}: /create failed"):
        envs.make(f"agentgym:{server.url}")
    with pytest.raises(ConnectionError, match="/reset failed"):
        env.reset(0)
    env.close()


def test_addresses() -> None:
    assert parse_address("http://localhost:8000/") == ("http://localhost:8000", 1.0)
    assert parse_address("https://a.b/env?scale=100") == ("https://a.b/env", 100.0)
    wrong = ("", "localhost:8000", "ftp://a", "http://", "http://a?scale=0", "http://a?scale=x")
    for address in (*wrong, "http://a?speed=2", "http://a?scale="):
        with pytest.raises(ValueError, match="address must be http://host:port"):
            parse_address(address)


# ------------------------------------------------------------------ a handle that is held


@pytest.mark.parametrize("dialect", ["id", "env_idx", "task"])
def test_an_environment_that_another_episode_holds_is_refused(dialect: str) -> None:
    with AgentGymServer(dialect) as server:
        server.pool = 2
        one, other = (envs.make(f"agentgym:{server.url}") for _ in range(2))
        message = "/create gave environment 0, which another episode holds.*--batch-size"
        with pytest.raises(AgentGymError, match=message):
            envs.make(f"agentgym:{server.url}")
        assert "/close" not in [path for path, _ in server.requests]  # it is the other's
        one.close()
        server.created = 2
        again = envs.make(f"agentgym:{server.url}")  # given back, it may be had
        other.close()
        again.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_beyond_the_servers_pool_is_refused(workers: int) -> None:
    with AgentGymServer("env_idx") as server:
        server.pool = 2
        name = f"agentgym:{server.url}"
        with pytest.raises(AgentGymError, match=r"environment \d, which another episode holds"):
            run_episodes(name, Left(), range(4), batch_size=4, workers=workers, max_steps=2)
        server.created = 0
        episodes = run_episodes(name, Left(), range(4), batch_size=2, workers=workers, max_steps=2)
        first = [envs.make("babyai:GoToLocalS6N2").reset(seed)[0] for seed in range(4)]
        assert [episode.observations[0] for episode in episodes] == first


class Left:
    """Turns left."""

    name = "left"

    def begin(self, seeds: Any) -> None: ...

    def resume(self, seeds: Any, trajectories: Any, steps: Any) -> None: ...

    def act(self, observations: Any, envs: Any) -> list[str]:
        return ["left"] * len(observations)

    def keep(self, rows: Any) -> None: ...


def test_a_password_in_the_address_is_sent_and_recorded_nowhere() -> None:
    with AgentGymServer("id") as server:
        env = envs.make("agentgym:" + server.url.replace("//", "//me:secret@"))
        assert env.name == f"agentgym:{server.url}"
        env.reset(0)
        server.faults["/step"] = FAULTS["status"][0]
        with pytest.raises(AgentGymError) as raised:
            env.step("left")
        assert "secret" not in str(raised.value)
        assert server.keys == {"Basic bWU6c2VjcmV0"}
        env.close()
    with pytest.raises(ValueError, match="address must be http://host:port") as refused:
        parse_address("ftp://me:secret@a")
    assert "secret" not in str(refused.value)
