"""Outputs: what no run may replace or delete, and what is written whole or not at all."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from stepagent.cli import main
from stepagent.data.trajectory import Trajectory, load_trajectories, save_trajectories
from stepagent.files import atomic, destination, write_text
from stepagent.records.episode_file import open_episodes
from stepagent.records.journal import open_journal

ONE = Trajectory([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}])


def device(path: Path) -> None:
    """A character device, as /dev/null is."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS: dict[str, Callable[[Path], None]] = {
    "a character device": device,
    "a FIFO": os.mkfifo,
    "a socket": bound_socket,
    "a folder": os.mkdir,
}
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "text"),
    "trajectories": lambda path: save_trajectories(path, [ONE]),
    "episodes": lambda path: open_episodes(path, {}, [0]).__enter__(),
    "journal": lambda path: open_journal(path, b"{", "a test").__enter__(),
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    return Path("out.jsonl")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_regular_file_stays(there: Path, kind: str, writer: str, linked: bool) -> None:
    KINDS[kind](there)
    before, path = os.stat(there), there
    if linked:
        path = Path("link.jsonl")
        path.symlink_to(there)
    with pytest.raises(OSError, match=f"must be a regular file, or none yet, got {kind}: {path}"):
        WRITERS[writer](path)
    after = os.stat(there)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert path.is_symlink() == linked
    assert len(os.listdir()) == 1 + linked


COMMANDS = [
    ("collect", "--env", "babyai:GoToObj", "--output"),
    ("evaluate", "--env", "babyai:GoToObj", "--policy", "random", "--output"),
    ("report", "runs.jsonl", "--output"),
    ("inspect", "--model", ".", "--data", "runs.jsonl", "--output"),
    ("bench", "--csv"),
]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"a folder"}))
@pytest.mark.parametrize("command", COMMANDS, ids=[c[0] for c in COMMANDS])
def test_every_command_refuses_it_before_any_work(
    there: Path, command: tuple[str, ...], kind: str
) -> None:
    KINDS[kind](there)
    Path("runs.jsonl").write_text("{}")
    result = CliRunner().invoke(main, [*command, str(there)])
    assert result.exit_code == 2
    assert f"must be a regular file, or none yet, got {kind}" in " ".join(result.stderr.split())
    assert os.path.lexists(there)


@pytest.mark.parametrize(
    "command", [("demo", "--output"), ("bench", "--plots"), ("bench", "--profile")]
)
def test_an_output_folder_is_a_folder(there: Path, command: tuple[str, ...]) -> None:
    os.mkfifo(there)
    result = CliRunner().invoke(main, [*command, str(there)])
    assert result.exit_code == 2
    assert "must be a folder, or nothing yet" in " ".join(result.stderr.split())


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_a_link_and_what_it_leads_to_is_written(there: Path, dangling: bool) -> None:
    if not dangling:
        there.write_text("before")
    Path("folder").mkdir()
    link = Path("folder/link.jsonl")
    link.symlink_to(Path("..") / there)
    save_trajectories(link, [ONE])
    assert link.is_symlink()
    assert load_trajectories(there) == [ONE]


def test_a_run_that_cannot_begin_removes_only_what_it_made(there: Path) -> None:
    there.touch()
    with pytest.raises(KeyboardInterrupt), open_journal(there, b"{", "a test"):
        raise KeyboardInterrupt
    assert there.exists()  # it was there before
    link = Path("link.jsonl")
    link.symlink_to("new.jsonl")
    with pytest.raises(KeyboardInterrupt), open_journal(link, b"{", "a test"):
        raise KeyboardInterrupt
    assert link.is_symlink()
    assert not Path("new.jsonl").exists()  # it made that


def test_a_file_put_in_its_place_meanwhile_is_not_removed(there: Path) -> None:
    with suppress(KeyboardInterrupt), open_journal(there, b"{", "a test"):
        there.unlink()
        there.write_text("another's")
        raise KeyboardInterrupt
    assert there.read_text() == "another's"


def test_a_failure_leaves_the_file_as_it_was(there: Path) -> None:
    there.write_text("before")
    there.chmod(0o640)
    with suppress(RuntimeError), atomic(there) as file:
        file.write(b"half")
        raise RuntimeError
    assert there.read_text() == "before"
    write_text(there, "after\r\n")
    assert there.read_bytes() == b"after\r\n"
    assert stat.S_IMODE(there.stat().st_mode) == 0o640
    assert os.listdir() == [there.name]
    assert destination(there) == there.resolve()


def test_the_csv_of_a_benchmark_is_a_regular_file(there: Path) -> None:
    pytest.importorskip("matplotlib")
    from stepagent.tools.bench.output import CsvFile

    os.mkfifo(there)
    with pytest.raises(OSError, match="got a FIFO"):
        CsvFile(there, {})
    assert stat.S_ISFIFO(os.stat(there).st_mode)
