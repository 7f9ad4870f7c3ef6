"""Docstrings are Google's, and say nothing of arguments that are not there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import stepagent

PACKAGE = Path(stepagent.__file__).parent
MODULES = [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]
SPHINX = re.compile(r":(param|type|returns?|rtype|raises)\b[^:\n]*:|:\w+(:\w+)?:`")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def arguments(node: Definition) -> set[str] | None:
    """Those of the function, or of the class's `__init__`; None where a class writes none."""
    if isinstance(node, ast.ClassDef):
        own = [one for one in node.body if isinstance(one, ast.FunctionDef)]
        return next((arguments(one) for one in own if one.name == "__init__"), None)
    found = node.args
    named = [*found.posonlyargs, *found.args, *found.kwonlyargs, found.vararg, found.kwarg]
    return {argument.arg for argument in named if argument is not None}


def described(docstring: str) -> Iterator[str]:
    """The names under ``Args:``; one entry may be for several, `a, b: …`."""
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", docstring, re.MULTILINE)
    for names in re.findall(r"^ {4}(\w[\w, ]*):", section[1] if section else "", re.MULTILINE):
        yield from names.split(", ")


@pytest.mark.parametrize("module", MODULES)
def test_arguments_that_a_docstring_describes_are_there(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, Definition):
            known = arguments(node)
            names = set(described(ast.get_docstring(node) or ""))
            assert known is None or names <= known, f"{module}: {node.name}"


def test_names_are_read_from_the_section_alone() -> None:
    text = "Does.\n\nargs: no.\n\nArgs:\n    a, b: two,\n        c: not one.\n\nRaises:\n    E: if."
    assert list(described(text)) == ["a", "b"]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_are_not_in_the_dialect_of_sphinx(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, Definition | ast.Module):
            found = SPHINX.search(ast.get_docstring(node) or "")
            name = getattr(node, "name", "the module")
            assert found is None, f"{module}: {name} has {found and found[0]!r}"


@pytest.mark.parametrize(
    "text", [":param x: what.", ":raises ValueError: if.", "As :func:`f`.", "A :py:class:`C`."]
)
def test_the_dialect_of_sphinx_is_found(text: str) -> None:
    assert SPHINX.search(text)
