"""docs/tutorial.md runs as it is printed, block by block, and keeps what it promises."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import execute, python_of

pytest.importorskip("minigrid")

PAGE = "docs/tutorial.md"


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> dict[str, Any]:
    """What the blocks leave behind; ``sizes`` in place of the printed ones."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in python_of(PAGE):
        code = block.code
        for name, size in sizes.items():
            code = re.sub(rf"^{name} = \d+", f"{name} = {size}", code, flags=re.M)
        execute(replace(block, code=code), names)
    assert {name: names[name] for name in sizes} == sizes
    return names


def test_all_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(tmp_path, monkeypatch, EPISODES=6, EPOCHS=2, CYCLES=1)
    told = capsys.readouterr().out
    assert len(names["trajectories"]) == 6, "the expert succeeds"
    assert told.count("scored: ") == names["trunks"][0].num_steps
    assert "at the expert's states: " in told
    assert told.count("expert's action ") == names["trunk"].num_steps
    assert torch.isfinite(names["rewards"]).all()
    assert names["rewards"].abs().max() > 0, "training changed the policy"
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("sft", "agent"))
    assert (tmp_path / "runs/agent/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_as_printed_the_agent_is_better_than_the_one_it_began_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gain = run(tmp_path, monkeypatch)["gain"]
    assert gain.mean > 0  # on one machine +15 points, 95 %: +4 to +26
