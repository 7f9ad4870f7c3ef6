"""What a client's type checker sees: every public name, with its type.

The names have one list, `__init__.pyi`. `client.py` is a program that uses them all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stepagent

CLIENT = Path(__file__).parent / "client.py"
MYPY = [sys.executable, "-m", "mypy", "--strict"]
PYRIGHT = [sys.executable, "-m", "basedpyright", "--level", "error"]
PYRIGHT += ["--pythonpath", sys.executable]
# Not looked into by the quick test: with these it takes ten times as long.
HEAVY = "[mypy-torch.*,transformers.*,peft.*,accelerate.*,datasets.*]\nfollow_imports = skip\n"


def checked(command: list[str], program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, str(program)], capture_output=True, text=True)


def quick(tmp_path: Path) -> list[str]:
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\n{HEAVY}")
    return [*MYPY, f"--config-file={config}", f"--cache-dir={tmp_path / 'cache'}"]


def test_the_client_uses_every_public_name() -> None:
    nodes = ast.walk(ast.parse(CLIENT.read_text()))
    used = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "sa"
    }
    assert set(stepagent.__all__) <= used


def test_every_public_name_is_there() -> None:
    assert (
        {"StepAgentTrainer", "encode", "episodes"} <= set(stepagent.__all__) == set(dir(stepagent))
    )
    for name in stepagent.__all__:
        assert getattr(stepagent, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        stepagent.no_such_name  # noqa: B018


def test_mypy_accepts_the_client_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    found = checked(quick(tmp_path), CLIENT)
    assert found.returncode == 0, found.stdout
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import stepagent as sa\nx: str = sa.edit_distance('a', 'b')\nsa.no_such_name\n"
    )
    found = checked(quick(tmp_path), wrong)
    assert "wrong.py:2: error: Incompatible types" in found.stdout
    assert 'wrong.py:3: error: Module has no attribute "no_such_name"' in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [MYPY, PYRIGHT], ids=["mypy", "pyright"])
def test_type_checkers_accept_the_client(command: list[str]) -> None:
    found = checked(command, CLIENT)
    assert found.returncode == 0, found.stdout + found.stderr
