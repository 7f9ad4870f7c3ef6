"""The command line of rollouts: one's own environment, the Hub, action formats, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from completions_server import CompletionsServer
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent import envs
from stepagent.cli import main
from stepagent.records.episodes import load_episodes

LEVEL = "babyai:GoToLocalS6N2"
OWN = """
class Guess:
    name, max_steps = "guess", 10
    instructions = "Guess a digit."

    def __init__(self, digits="0123456789"):
        self.actions = tuple(digits)

    def reset(self, seed):
        self.number, self.steps = self.actions[seed % len(self.actions)], 0
        return "guess a digit", {"valid": True, "success": False, "progress": 0.0}

    def check_seed(self, seed):
        if seed > 20:
            raise ValueError(f"guess has no seed {seed}: it has 0 to 20")

    def step(self, action):
        self.steps += 1
        done = action == self.number
        info = {"valid": action in self.actions, "success": done, "progress": float(done)}
        return ("yes" if done else "no"), float(done), done, not done and self.steps >= 10, info

    def expert_action(self):
        return self.number

    def close(self):
        pass


class Half:
    name = "half"


def last_word(text):
    if not text:
        raise ValueError("silence")
    return text.split()[-1]


number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, in the folder where the command runs."""
    name = f"guessing_{abs(hash(str(tmp_path)))}"
    Path(tmp_path, f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return name


def evaluate(*options: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, options), "--json"])


# ------------------------------------------------------------------ module:Class


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_of_ones_own_is_named_by_module_and_class(
    module: str, workers: int, tmp_path: Path
) -> None:
    name = f"{module}:Guess"
    options = ("--policy", "expert", "--episodes", 3, "--workers", workers)
    result = evaluate("--env", name, *options, "--output", tmp_path / "e.jsonl")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["environment"], report["success_rate"]) == (name, 1.0)
    assert [e.actions for e in load_episodes(tmp_path / "e.jsonl")] == [["0"], ["1"], ["2"]]
    with_task = evaluate("--env", f"{name}:789", *options)
    assert json.loads(with_task.stdout)["success_rate"] == 1.0


def test_what_is_no_environment_is_named(module: str) -> None:
    for name, message in (
        (f"{module}:Nothing", f"module '{module}' must have 'Nothing' to make an environment"),
        (f"{module}:number", f"{module}:number must be a class or a function, got 3"),
        (f"{module}:Half", "must make a stepagent.envs.TextEnv, what it made lacks actions, max"),
        (
            "nowhere_at_all:Guess",
            "of a module that is found here, got 'nowhere_at_all:Guess'",
        ),
        ("babyi:GoToLocal", "of a module that is found here, got 'babyi:GoToLocal'"),
        ("nonsense", "or your own module:Class, got 'nonsense'"),
        ("babyai", "level of BabyAI must be given, as babyai:GoToLocal, one of "),
    ):
        result = evaluate("--env", name, "--policy", "random", "--episodes", 1)
        assert result.exit_code == 1, name
        assert message in result.stderr
        assert result.stderr.startswith("Error: ")
    with pytest.raises(ValueError, match=r"must be None, got 'test': register\(\) gives it some"):
        envs.factory("json:JSONDecoder", "test")


# ------------------------------------------------------------------ before anything starts


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("policy", ["expert", "random"])
def test_a_seed_that_is_not_there_is_one_line_before_anything_starts(
    module: str, policy: str, workers: int, tmp_path: Path
) -> None:
    path = tmp_path / "e.jsonl"
    options = ("--policy", policy, "--workers", workers, "--output", path)
    result = evaluate("--env", f"{module}:Guess", *options)  # 100 episodes
    assert result.exit_code == 1
    assert "Error: guess has no seed 21: it has 0 to 20" in result.stderr
    assert not path.exists()


# ------------------------------------------------------------------ formats and instructions


@pytest.fixture
def server() -> Any:
    with CompletionsServer([], []) as server:
        server.chat = lambda messages: f"Thought: it is\nAction: {len(server.requests) - 1}"
        yield server


def test_the_format_and_the_instructions_are_given_and_recorded(
    module: str, server: Any, tmp_path: Path
) -> None:
    path = tmp_path / "e.jsonl"
    command = ("--env", f"{module}:Guess", "--policy", server.url, "--output", path)
    react = ("--episodes", 1, "--action-format", "react", "--temperature", 0.5)
    result = evaluate(*command, *react, "--token-limit", "max_completion_tokens")
    assert result.exit_code == 0, result.stderr
    (request,) = server.requests
    assert (request["temperature"], request["max_completion_tokens"]) == (0.5, 32)
    assert "max_tokens" not in request
    system, user = request["messages"]
    told = "Answer with your thought and one action, as\nThought: …\nAction: …"
    assert system == {"role": "system", "content": f"Guess a digit.\n\n{told}"}
    assert user == {"role": "user", "content": "guess a digit"}
    (episode,) = load_episodes(path)
    assert (episode.taken, episode.action_format) == (["0"], "react")
    assert episode.system == system["content"]
    assert "of another run: it has " in evaluate(*command, "--episodes", 1).stderr
    server.requests.clear()
    silent = evaluate(*command[:4], "--episodes", 1, "--no-instructions")
    assert silent.exit_code == 0, silent.stderr
    assert server.requests[0]["messages"] == [user]


def test_a_function_of_ones_own_reads_the_action(module: str, server: Any) -> None:
    options = ("--policy", server.url, "--episodes", 1, "--action-format", f"{module}:last_word")
    result = evaluate("--env", f"{module}:Guess", *options)
    assert json.loads(result.stdout)["success_rate"] == 1.0, result.stderr
    for wrong in ("xml", f"{module}:nothing", "nowhere_at_all:f"):
        result = evaluate("--env", LEVEL, "--policy", "random", "--action-format", wrong)
        assert result.exit_code == 2
        message = f"'{wrong}' is neither plain, react, json, tool_call nor your own module:function"
        assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "expert", "--temperature", 1), "--temperature is of no use with --policy"),
        (("--policy", "random", "--instructions"), "--instructions is of no use with --policy"),
        (("--policy", "random", "--token-limit", "max_tokens"), "--token-limit is of no use"),
        (("--policy", "random", "--server-timeout", 3), "--server-timeout is of no use"),
        (("--policy", "localhost:8000"), "did you mean http://localhost:8000?"),
        (("--policy", "me:secret@localhost:8000"), "did you mean http://localhost:8000?"),
        (("--policy", "http://me:secret@a:port"), "must be a server's address, got 'http://a:port"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(options: Any, message: str) -> None:
    result = evaluate("--env", LEVEL, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "secret" not in result.stderr


def test_a_password_in_the_address_is_stored_and_printed_nowhere(
    module: str, server: Any, tmp_path: Path
) -> None:
    path = tmp_path / "e.jsonl"
    url = server.url.replace("//", "//me:secret@") + "?key=secret"
    options = ("--policy", url, "--episodes", 2, "--output", path)
    result = evaluate("--env", f"{module}:Guess", *options)
    assert result.exit_code == 0, result.stderr
    assert server.keys == {"Basic bWU6c2VjcmV0"}
    assert "secret" not in result.stdout + result.stderr + path.read_text()
    assert json.loads(result.stdout)["policy"] == server.url


# ------------------------------------------------------------------ a name on the Hub


def test_a_model_is_evaluated_by_its_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    cache = tmp_path / "hub" / "models--tiny--agent"
    folder = cache / "snapshots" / commit
    tiny_agent().save_pretrained(folder)
    babyai_tokenizer().save_pretrained(folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "e.jsonl"
    options = ("--episodes", 2, "--max-steps", 2, "--max-new-tokens", 3, "--output", path)
    command = ("--env", LEVEL, "--policy", "tiny/agent", *options, "--no-instructions")
    result = evaluate(*command)
    assert result.exit_code == 0, result.stderr
    assert {e.policy for e in load_episodes(path)} == {"tiny/agent"}
    assert str(tmp_path) not in path.read_text()
    by_folder = evaluate("--env", LEVEL, "--policy", folder, *options[:-2])
    assert json.loads(by_folder.stdout)["metrics"] == json.loads(result.stdout)["metrics"]
    missing = evaluate("--env", LEVEL, "--policy", "nobody/nothing", "--episodes", 1)
    assert missing.exit_code == 1
    assert "'nobody/nothing' must be a folder with a model" in missing.stderr
