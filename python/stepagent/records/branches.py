"""Branch files: what an agent tried at every state, one trajectory a record.

JSONL is written by appending, chunk by chunk of trajectories, so a run that was killed continues
where it stopped: what is computed together is the same whether it was or not, and so is the file.
Parquet has its table of contents at the end; it is made of such a JSONL when that is complete.

    {"index": 7, "id": "a", "input_ids": [L], "action_spans": [[start, end], …T],
     "rewinds": [[at, depth], …], where there are any,
     "steps": [{"expert": text, "samples": [{"text", "token_ids", "logps"}, …]}, …T], "run": {…}}

``index`` is the trajectory's place in the data; ``run`` says how its branches were drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..data.branch import Branch
from ..data.trajectory import Trajectory
from ..data.trunk import Trunk
from ..files import atomic, destination
from ..optional import require
from .journal import check_run, json_records, open_journal, refuse_run

if TYPE_CHECKING:
    import pyarrow as pa

Steps = list[list[Branch]]
_FIRST_KEY = b'{"index": '
_WRITER = "stepagent inspect"
_ROWS = 64  # records of a Parquet row group


def load_branches(*paths: str | os.PathLike[str]) -> tuple[list[Trunk], list[Steps]]:
    """The trunks and the branches of files that ``stepagent inspect`` wrote, in their order.

    ``pack_step_pairs(*load_branches("steps.jsonl"))`` packs them.

    Raises:
        ValueError: naming file and line, for what is no such record, a last line that is cut short
            included.
    """
    pairs = [pair for path in paths for pair in iterate_branches(path)]
    return [trunk for trunk, _ in pairs], [steps for _, steps in pairs]


def iterate_branches(path: str | os.PathLike[str]) -> Iterator[tuple[Trunk, Steps]]:
    """The pairs of `load_branches` one at a time: a file may be larger than the memory."""
    for where, record in _records(Path(path)):
        try:
            yield _trunk(record), _steps(record)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Shard:
    """Part ``index``, from 0, of ``count``: whole chunks of trajectories, neighbours together.

    So the files of all shards, one after the other, are the file of a single process.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard must be 0/{self.count} to {self.count - 1}/{self.count}, "
                f"got {self.index}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``INDEX/COUNT``."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise ValueError(f"shard must be INDEX/COUNT, such as 0/4, got {text!r}")
        return cls(int(index), int(count))

    def path(self, output: Path) -> Path:
        """Where this part goes: ``steps-00000-of-00004.jsonl``."""
        if self.count == 1:
            return output
        part = f"{self.index:05d}-of-{self.count:05d}"
        return output.with_name(f"{output.stem}-{part}{output.suffix}")

    def chunks(self, total: int, size: int) -> list[range]:
        """The places of this part's trajectories among ``total``, chunk by chunk."""
        starts = range(0, total, size)
        first, last = (len(starts) * i // self.count for i in (self.index, self.index + 1))
        return [range(start, min(start + size, total)) for start in starts[first:last]]


@dataclass(frozen=True)
class BranchWriter:
    """Writes the branches that ``sample`` draws at the steps of trajectories.

    Attributes:
        trajectories: where the texts of the expert's actions come from.
        trunks: the same trajectories as token ids.
        sample: from trunks and the place of the first, their branches.
        decode: text of token ids.
        run: all that the branches depend on, as JSON can hold it; a file holds one run.
    """

    trajectories: Sequence[Trajectory]
    trunks: Sequence[Trunk]
    sample: Callable[[Sequence[Trunk], int], Sequence[Steps]]
    decode: Callable[[list[int]], str]
    run: dict[str, Any]

    def write(self, path: Path, chunks: Sequence[range]) -> None:
        """Write the records of ``chunks`` to ``path``, or what is missing of them.

        The suffix says the format: ``.parquet``, or else JSONL. A chunk is written when all of it
        is sampled.

        Raises:
            ValueError: where ``path`` holds something else, which stays as it is.
        """
        places = [place for chunk in chunks for place in chunk]
        if path.suffix != ".parquet":
            self._append(path, chunks, places)
            return
        require(path.name, "train", "pyarrow")
        journal = path.with_name(f"{path.name}.partial.jsonl")
        if path.exists() and not journal.exists():
            done = self._check(_records(path), places)
            if done < len(places):
                refuse_run(str(path), f"{done} trajectories, not {len(places)}")
            return
        self._append(journal, chunks, places)
        _write_parquet(path, journal)
        destination(journal).unlink()

    def _append(self, path: Path, chunks: Sequence[range], places: Sequence[int]) -> None:
        with open_journal(path, _FIRST_KEY, _WRITER) as journal:
            records = ((where, record) for where, record, _ in journal.records())
            done = self._check(_checked(records), places)
            bar = tqdm(total=len(places), initial=done, desc="inspect", unit="trajectory")
            with bar:
                for chunk in chunks:
                    # Drawn as a whole even where part of it is there: the batch decides rounding.
                    missing = chunk[done:]
                    done = max(0, done - len(chunk))
                    if missing:
                        journal.append(list(self._lines(chunk))[-len(missing) :])
                        bar.update(len(missing))

    def _lines(self, chunk: range) -> Iterator[bytes]:
        trunks = self.trunks[chunk.start : chunk.stop]
        for place, steps in zip(chunk, self.sample(trunks, chunk.start), strict=True):
            yield json.dumps(self._record(place, steps)).encode() + b"\n"

    def _record(self, place: int, steps: Steps) -> dict[str, Any]:
        trajectory, trunk = self.trajectories[place], self.trunks[place]
        experts = [trajectory.messages[index]["content"] for index in trajectory.step_indices]
        return {
            "index": place,
            "id": trajectory.id,
            "input_ids": trunk.input_ids.tolist(),
            "action_spans": trunk.action_spans.tolist(),
            **({"rewinds": trunk.rewinds.tolist()} if len(trunk.rewinds) else {}),
            "steps": [
                {"expert": expert, "samples": [self._sample(branch) for branch in tried]}
                for expert, tried in zip(experts, steps, strict=True)
            ],
            "run": self.run,
        }

    def _sample(self, branch: Branch) -> dict[str, Any]:
        ids = branch.token_ids.tolist()
        return {"text": self.decode(ids), "token_ids": ids, "logps": branch.logps.tolist()}

    def _check(self, records: Iterable[tuple[str, dict[str, Any]]], places: Sequence[int]) -> int:
        """The number of records, which must be the first of those of ``places``."""
        count = 0
        for where, record in records:
            if count == len(places) or record.get("index") != places[count]:
                refuse_run(where, f"trajectory {record.get('index')}")
            check_run(where, record["run"], self.run)
            trunk = self.trunks[places[count]]
            if not _same(record, trunk):
                refuse_run(where, f"other data as trajectory {places[count]}")
            count += 1
        return count


def fingerprint(folder: Path) -> str:
    """Tells a model from what training makes of it: a hash of samples of its files' bytes.

    All bytes of a small file; of a large one 64 pieces of 4 KiB, so that weights of any size take
    no time. Copies of a folder have the same.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(size // 64, 4096)):
                    file.seek(place)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------ records


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of the file, each with the place to name."""
    return _checked(_parquet_records(path) if path.suffix == ".parquet" else json_records(path))


def _checked(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record in records:
        if not isinstance(record, dict) or not isinstance(record.get("run"), dict):
            raise ValueError(f"{where} is no record of {_WRITER}")
        yield where, record


def _trunk(record: dict[str, Any]) -> Trunk:
    return Trunk(record["input_ids"], record["action_spans"], record.get("rewinds") or [])


def _same(record: dict[str, Any], trunk: Trunk) -> bool:
    names = ("input_ids", "action_spans", "rewinds")
    return all(
        np.array_equal(np.array(record.get(name) or []).ravel(), getattr(trunk, name).ravel())
        for name in names
    )


def _steps(record: dict[str, Any]) -> Steps:
    return [
        [
            Branch(np.array(s["token_ids"], dtype=np.int32), np.array(s["logps"], dtype=np.float32))
            for s in step["samples"]
        ]
        for step in record["steps"]
    ]


# ------------------------------------------------------------------ Parquet


def _schema() -> pa.Schema:
    import pyarrow as pa

    ids, text = pa.list_(pa.int32()), pa.string()
    sample = pa.struct({"text": text, "token_ids": ids, "logps": pa.list_(pa.float32())})
    step = pa.struct({"expert": text, "samples": pa.list_(sample)})
    return pa.schema(
        {
            "index": pa.int64(),
            "id": text,
            "input_ids": ids,
            "action_spans": pa.list_(ids),
            "rewinds": pa.list_(ids),  # null where there are none
            "steps": pa.list_(step),
            "run": text,  # JSON
        }
    )


def _write_parquet(path: Path, journal: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with atomic(path) as file, pq.ParquetWriter(file, schema) as writer:
        records = ({**r, "run": json.dumps(r["run"])} for _, r in _records(journal))
        while rows := list(islice(records, _ROWS)):
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    require(path.name, "train", "pyarrow")
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        row = 0
        for batch in file.iter_batches(_ROWS):
            for record in batch.to_pylist():
                if record.get("rewinds") is None:
                    record.pop("rewinds", None)
                if isinstance(record.get("run"), str):
                    record["run"] = json.loads(record["run"])
                yield f"{path}: row {row}", record
                row += 1
