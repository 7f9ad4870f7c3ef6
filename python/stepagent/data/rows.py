"""Rows of what trajectories are read from: files, datasets, lists; each with its place for errors.

The format of a file is found in its content, never from its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..optional import require
from .strict_json import parse

Source = str | os.PathLike[str] | Iterable[Any]
PARQUET = b"PAR1"


def rows_of(
    source: Source, split: str | None = None, name: str = "rows"
) -> Iterator[tuple[str, Any]]:
    """Each row of a source with the place to name in errors.

    Args:
        source: A file (JSONL, JSON, Parquet), a ``datasets.Dataset`` or ``DatasetDict``, or rows.
        split: Which of a DatasetDict; it may be left out where there is one.
        name: What to call a source that is no file.

    Yields:
        (place, row). Nulls that Arrow puts into a struct for a key that a row lacks are gone.
        In JSONL a line that is no JSON is a ValueError in place of its row, so that others can
        still be read.

    Raises:
        FileNotFoundError: For a file that is not there.
        ValueError: For a file that cannot be read at all, an unknown split.
        ImportError: For Parquet without pyarrow.
    """
    if isinstance(source, str | os.PathLike):
        if split is not None:
            raise ValueError(f"split must be None for a file, got {split!r}")
        yield from _file(Path(source))
        return
    source = _split(source, split)
    arrow = hasattr(source, "features") and hasattr(source, "column_names")  # datasets.Dataset
    for index, row in enumerate(source):
        yield f"{name}[{index}]", without_nulls(row) if arrow else row


def _split(source: Iterable[Any], split: str | None) -> Iterable[Any]:
    if not isinstance(source, dict):
        if split is not None:
            raise ValueError(f"split must be None unless there are several, got {split!r}")
        return source
    if "messages" in source or "conversations" in source:
        raise TypeError("the source must be a list of rows, got a single row: [row]")
    names = list(source)
    if split is None and len(names) == 1:
        (split,) = names
    if split not in source:
        raise ValueError(f"split must be one of {names}, got {split!r}")
    chosen: Iterable[Any] = source[split]
    return chosen


def without_nulls(value: Any) -> Any:
    """A row without the Nones of dicts, which Arrow puts where a key is absent."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        raise ValueError(
            f"{path} must be a JSONL, JSON or Parquet file, got a directory: pass what "
            "datasets.load_from_disk makes of it"
        )
    content = path.read_bytes()
    if content.startswith(PARQUET):
        yield from _parquet(path)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be valid UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} must hold at least one row, got an empty file")
    yield from _json(path, text)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    require("reading Parquet", "train", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield f"{path}: row {index}", without_nulls(row)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} must be a readable Parquet file: {error}") from error


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # "\n" alone ends a line: splitlines would also cut at the U+2028 that JSON strings may hold
    lines = text.split("\n")
    first = next(index for index, line in enumerate(lines) if line.strip())
    if lines[first].lstrip().startswith("["):
        for index, record in enumerate(_parse(path, text)):
            yield f"{path}: item {index}", record
    elif not _is_json(lines[first]) and not any(map(_is_object, lines[first + 1 : first + 3])):
        yield str(path), _parse(path, text)  # one object over several lines
    else:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_or_error(path, line, number)


def _is_json(line: str) -> bool:
    try:
        parse(line)
    except json.JSONDecodeError:
        return False
    except ValueError:  # NaN, nesting: a whole value all the same
        return True
    return True


def _is_object(line: str) -> bool:
    return line.startswith("{") and _is_json(line)


def _parse_or_error(path: Path, line: str, number: int) -> Any:
    try:
        return _parse(path, line, number)
    except ValueError as error:
        return error


def _parse(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return parse(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: column {error.colno}: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}:{first_line}: {error}") from error
