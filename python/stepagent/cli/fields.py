"""Options of the command line from the fields of a dataclass, as ``--name value``.

Both spellings of a name are taken, ``--sft_weight`` and ``--sft-weight``. What a field is not given
is left to the dataclass.
"""

from __future__ import annotations

import ast
import difflib
import enum
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click


class FieldOption(click.Option):
    """An option of a dataclass's field."""


class ChoiceOrPath(click.Choice[str]):
    """One of some names, or ``module:Class``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if isinstance(value, str) and ":" in value:
            return value
        return super().convert(value, param, ctx)


def bool_or_text(value: str) -> bool | str:
    """Of a field that takes either, such as ``bool | str``."""
    try:
        return bool(click.BOOL.convert(value, None, None))
    except click.BadParameter:
        return value


def options(fields: Iterable[Field[Any]], hints: Mapping[str, Any]) -> list[FieldOption]:
    """The options of these fields, whose types ``hints`` gives."""
    return [option for field in fields for option in _options(field, hints[field.name])]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were given, by name: ``--no_name`` is name False."""
    found = {name: value for name, value in values.items() if value not in (None, ())}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if not name.startswith("no_")
    } | {name.removeprefix("no_"): False for name in found if name.startswith("no_")}


def spread(arguments: Sequence[str], known: Sequence[FieldOption]) -> list[str]:
    """``--names a b`` as ``--names a --names b``, for the options that take several values."""
    several = {name for option in known if option.multiple for name in option.opts}
    found: list[str] = []
    current: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            current = argument if argument in several else None
            if current is None:
                found.append(argument)
        else:
            found += [argument] if current is None else [current, argument]
    return found


def check_names(arguments: Sequence[str], known: Iterable[str]) -> None:
    """click.NoSuchOption for an argument ``--name`` that is none of the ``known`` ones."""
    spelled = {f"--{form}" for name in known for form in (name, name.replace("_", "-"))}
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in spelled:
            raise click.NoSuchOption(name, possibilities=difflib.get_close_matches(name, spelled))


def inherited_names() -> list[str] | None:
    """The fields of transformers' TrainingArguments, read from its source without importing it:
    that takes seconds. None where the source does not show them."""
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return None
    try:
        tree = ast.parse((Path(package.origin).parent / "training_args.py").read_bytes())
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments" and not node.bases:
            return [
                line.target.id
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            ]
    return None


def _options(field: Field[Any], hint: Any) -> list[FieldOption]:
    kinds = [kind for kind in _members(hint) if kind is not type(None)]
    settings = _settings(kinds, field.metadata.get("choices"), bool(field.metadata.get("open")))
    help = str(field.metadata.get("help", ""))
    if field.default not in (None, ""):
        help += f"  [default: {field.default}]"
    made = [FieldOption(_spellings(field.name), help=help, **settings)]
    if kinds == [bool] and field.default is True:
        made.append(FieldOption(_spellings(f"no_{field.name}"), is_flag=True, default=None))
    return made


def _settings(
    kinds: list[Any], choices: Sequence[Any] | None, or_path: bool = False
) -> dict[str, Any]:
    if choices:
        kind = ChoiceOrPath if or_path else click.Choice
        return {"type": kind([str(choice) for choice in choices])}
    if bool in kinds:  # --name, or --name true
        return {
            "type": click.BOOL if kinds == [bool] else bool_or_text,
            "is_flag": False,
            "flag_value": "true",
        }
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if lists:
        return {**_settings(list(get_args(lists[0])), None), "multiple": True}
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return {"type": click.Choice([str(member.value) for member in kind])}
        if get_origin(kind) is Literal:
            return {"type": click.Choice([str(choice) for choice in get_args(kind)])}
    if str in kinds or not set(kinds) & {int, float}:
        return {"type": click.STRING}  # that of a dict is JSON, which TrainingArguments reads
    return {"type": click.FLOAT if float in kinds else click.INT}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}", name]))
