"""Every Python block of the README and of docs/ runs here, or says above itself why it does not.

A page's blocks run in order among the same names: those that all pages take as given (`given`), and
what the blocks before left. A block that is not run has a comment on the line above its fence,
``<!-- not run: why -->``, and is held against the package all the same: it is Python, and the names
and keywords that it uses of stepagent exist. The commands of shell blocks are not run; the options
that they name exist.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from completions_server import ModelServer
from pages import PAGES, ROOT, Block, blocks_of, execute, python_of
from tiny_models import babyai_tokenizer, tiny_agent

import stepagent as sa
from stepagent import envs
from stepagent.cli import main
from stepagent.learning import methods
from stepagent.learning.config import StepAgentConfig

# These have a test that runs all their blocks and looks at what comes out.
ELSEWHERE = {
    "docs/tutorial.md": "tests/test_tutorial.py",
    "docs/environments.md": "tests/test_envs_docs.py",
}
PYTHON = [block for page in PAGES for block in python_of(page)]
RUN_HERE = sorted({b.page for b in PYTHON if b.excuse is None} - ELSEWHERE.keys())
SERVER = "http://localhost:8000"  # on the pages; here one of our own

# ------------------------------------------------------------------ they run


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pages take as given: a small agent, expert trajectories, and what was tried at them."""
    pytest.importorskip("minigrid")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(envs, "_factories", dict(envs._factories))
    monkeypatch.setattr(methods, "_registered", {})
    episodes = sa.rollout.run_episodes(
        "babyai:GoToLocalS6N2", sa.policies.ExpertPolicy(), range(2), max_steps=3
    )
    trajectories = [episode.trajectory() for episode in episodes]
    for path in ("expert.jsonl", "runs/random.jsonl", "runs/mine/episodes.jsonl"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sa.save_trajectories(path, trajectories)
    model, tokenizer = tiny_agent(), babyai_tokenizer()
    trunks = [sa.encode(trajectory, tokenizer) for trajectory in trajectories]
    branches = sa.inspect(model, trunks, max_new_tokens=2)
    with torch.no_grad():
        ref_logps = sa.score_trees(model, sa.pack_step_pairs(trunks[:1], branches[:1]))
    return {
        **{"sa": sa, "np": np, "torch": torch, "model": model, "tokenizer": tokenizer},
        **{"trajectories": trajectories, "trajectory": trajectories[0]},
        **{"trunks": trunks, "trunk": trunks[0], "branches": branches[0], "ref_logps": ref_logps},
        "args": StepAgentConfig("runs/given", use_cpu=True, report_to=[]),
        "policy": sa.policies.ModelPolicy(model, tokenizer, max_new_tokens=2, temperature=1.0),
        "trees": 500 * sa.pack_step_pairs(trunks[:1], branches[:1]),  # of several rows
        "world_size": 2,
    }


# PEFT's, of what is to come in transformers v6.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("page", RUN_HERE)
def test_the_blocks_of_a_page_run_in_order(page: str, given: dict[str, Any]) -> None:
    with ModelServer(given["model"]) as server:
        for block in python_of(page):
            if block.excuse is None:
                code = block.code.replace(SERVER, server.url)
                execute(Block(page, block.line, "python", code, None), given)


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_what_runs_elsewhere_is_run_there(page: str) -> None:
    assert page in PAGES
    test = (ROOT / ELSEWHERE[page]).read_text()
    assert Path(page).name in test
    assert re.search(r"\bexec(ute)?\(", test)


# ------------------------------------------------------------------ what they name is there


def faults(code: str) -> list[str]:
    """What of stepagent the code names and the package lacks: modules, names, keywords."""
    tree = ast.parse(code)
    found: list[str] = []
    known: dict[str, Any] = {"sa": sa}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stepagent"):
            for alias in node.names:
                try:
                    known[alias.asname or alias.name] = imported(str(node.module), alias.name)
                except (ImportError, AttributeError):
                    found.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and resolve(node, known) is MISSING:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and callable(function := resolve(node.func, known)):
            found += unknown_keywords(node, function)
    return sorted(found)


MISSING, UNKNOWN = object(), None


def imported(module: str, name: str) -> Any:
    """The object of this name; of an adapter, whose host may be absent, UNKNOWN if it is there."""
    if module.startswith("stepagent.integrations"):
        path = ROOT / "python" / Path(*module.split("."))
        if not (path / f"{name}.py").exists() and name not in defined(path.with_suffix(".py")):
            raise ImportError(f"{module}.{name}")
        return UNKNOWN
    found = importlib.import_module(module)
    if not hasattr(found, name):
        return importlib.import_module(f"{module}.{name}")
    return getattr(found, name)


def defined(path: Path) -> set[str]:
    """The classes and functions of a file that is not imported; none where there is no file."""
    body = ast.parse(path.read_text()).body if path.exists() else []
    return {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def resolve(node: ast.expr, known: dict[str, Any]) -> Any:
    """What a dotted name stands for: UNKNOWN where it is none of the package's."""
    if isinstance(node, ast.Name):
        return known.get(node.id, UNKNOWN)
    if not isinstance(node, ast.Attribute):
        return UNKNOWN
    owner = resolve(node.value, known)
    if not (inspect.ismodule(owner) or isinstance(owner, type)):
        return UNKNOWN
    return getattr(owner, node.attr, MISSING)


def unknown_keywords(call: ast.Call, function: Any) -> list[str]:
    taken = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return []
    names = {parameter.name for parameter in taken}
    used = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    return [f"{ast.unparse(call.func)}({name}=)" for name in used if name not in names]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_block_is_python_and_names_what_exists(block: Block) -> None:
    assert faults(block.code) == []
    assert block.excuse is None or len(block.excuse.split()) > 2, "a reason"


def test_what_does_not_exist_is_found() -> None:
    assert faults("sa.no_such(1)\nx = sa.metrics.neither") == ["sa.metrics.neither", "sa.no_such"]
    assert faults("from stepagent.metrics import nobody") == ["stepagent.metrics.nobody"]
    assert faults("from stepagent.nowhere import x") == ["stepagent.nowhere.x"]
    assert faults("from stepagent.integrations.trl import Nobody") == [
        "stepagent.integrations.trl.Nobody"
    ]
    assert faults("from stepagent.integrations import nothing") == [
        "stepagent.integrations.nothing"
    ]
    assert faults("sa.inspect(m, t, max_new_token=3)") == ["sa.inspect(max_new_token=)"]
    assert faults("sa.StepAgentConfig('x', methods='sft')") == ["sa.StepAgentConfig(methods=)"]
    assert faults("from stepagent import envs as e\ne.made('x')") == ["e.made"]
    fine = "from stepagent.integrations.trl import tree_rows\nmodel.no_such(sa.encode(x, y).z)"
    assert faults(fine) == []
    with pytest.raises(SyntaxError):
        faults("rewards = (")


def test_a_block_is_found_with_its_line_and_its_excuse() -> None:
    text = "# T\n<!-- not run: it needs -> a GPU -->\n```python\nx\n```\n\n```\ny\n```\n"
    excused, plain = blocks_of("README.md", text)
    assert (excused.code, excused.line, excused.excuse) == ("x\n", 4, "it needs -> a GPU")
    assert (plain.code, plain.language, plain.excuse) == ("y\n", "", None)


# ------------------------------------------------------------------ shell blocks


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of stepagent in a shell block, with the names of their options."""
    lines = re.sub(r"\\\n|\n(?=[ \t]+\[)", " ", text).split("\n")
    found = [re.search(r"\bstepagent +([a-z]+)\b(.*)", line) for line in lines]
    return [
        (match[1], re.findall(r"(?<![\w-])--([a-z][\w-]*)", match[2].split(" #")[0]))
        for match in found
        if match is not None
    ]


def options(command: str) -> set[str]:
    """All options of a command; those of ``train`` are also transformers'."""
    parsed = main.get_command(click.Context(main), command)
    assert parsed is not None, command
    names = {name.lstrip("-") for option in parsed.params for name in option.opts}
    if command == "train":
        names |= set(StepAgentConfig.__dataclass_fields__)
    return names | {"help"}


SHELL = [
    block
    for page in PAGES
    for block in blocks_of(page)
    if block.language in ("", "sh", "bash") and commands(block.code)
]


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_the_options_of_a_command_exist(block: Block) -> None:
    for command, used in commands(block.code):
        assert set(used) <= options(command), command


def test_the_commands_of_a_block_are_found() -> None:
    text = (
        "accelerate launch --processes 2 -m stepagent train --a-b 1 \\\n  --c_d  # --not\n"
        "stepagent check FILE [--x N]\n                [--y]\n# none here\n"
    )
    assert commands(text) == [("train", ["a-b", "c_d"]), ("check", ["x", "y"])]
    assert {"seeds", "workers"} <= options("evaluate")
    assert "a-b" not in options("train")
