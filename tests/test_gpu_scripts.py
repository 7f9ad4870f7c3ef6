"""Dry runs of the scripts for a GPU machine, on the CPU at tiny sizes."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import stepagent

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"


def run(script: str, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and lines of a script, which must be JSON each."""
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--device=cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.stdout, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_smoke_passes_on_a_cpu() -> None:
    code, lines = run("smoke")
    environment, *cases, counts = lines
    assert "torch" in environment["environment"]
    assert [case for case in cases if case["ok"] is False] == []
    outcomes = [case["ok"] for case in cases]
    assert counts == {
        "passed": outcomes.count(True),
        "failed": 0,
        "skipped": outcomes.count(None),
        "not_reached": 0,
    }
    assert counts["passed"] > 90
    assert code == 0


def test_smoke_reports_what_it_did_not_reach() -> None:
    code, lines = run("smoke", "--only=steps", "--seconds=0")
    assert lines[-1] == {"passed": 0, "failed": 0, "skipped": 0, "not_reached": 3}
    assert code == 1


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Load a module of the folder, as the scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def lines(script: Any) -> Any:
    return script("lines")


@pytest.mark.parametrize(
    ("error", "ok"), [(0.5, True), (1.0, True), (1.5, False), (math.nan, False), (math.inf, False)]
)
def test_a_figure_is_withheld_where_a_check_failed(
    lines: Any, capsys: pytest.CaptureFixture[str], error: float, ok: bool
) -> None:
    def work() -> Any:
        findings = lines.Findings(figures={"ms": 3.0})
        findings.add("value", error, 1.0)
        return findings

    counts = lines.Counts()
    lines.attempt("case", {"N": 2}, work, counts)
    line = json.loads(capsys.readouterr().out)
    assert line["ok"] is ok
    assert (line["figures"] == {"ms": 3.0}) is ok
    assert (counts.passed, counts.failed, counts.skipped) == (ok, not ok, 0)


def test_what_raises_is_a_line(lines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks() -> Any:
        raise RuntimeError("no kernel image")

    def skips() -> Any:
        raise lines.Skip("needs CUDA")

    counts = lines.Counts()
    lines.attempt("broken", {}, breaks, counts)
    lines.attempt("elsewhere", {}, skips, counts)
    broken, elsewhere = map(json.loads, capsys.readouterr().out.splitlines())
    assert broken["ok"] is False
    assert broken["raised"] == "RuntimeError: no kernel image"
    assert elsewhere["skipped"] == "needs CUDA"
    assert counts == lines.Counts(passed=0, failed=1, skipped=1)


def test_smoke_sees_wrong_values_and_wrong_gradients(script: Any) -> None:
    ops = script("smoke_ops")
    arguments, leaves, _ = ops.linear_arguments(
        ops.TINY.middle(), ops.EVERYTHING, ops.Draw(torch.device("cpu"))
    )
    truth = ops.Truth("linear_logprobs", arguments, leaves)

    def rounded(**given: Any) -> Any:
        """What a product rounded to halves would do to the logits, and so to the log-probs."""
        logps_N, entropy_N = stepagent.linear_logprobs(**given)
        return logps_N.bfloat16().float(), entropy_N

    def frozen(**given: Any) -> Any:
        """Half of the gradient of the bias is lost."""
        bias_V = given["bias_V"]
        given["bias_V"] = (bias_V + bias_V.detach()) / 2
        return stepagent.linear_logprobs(**given)

    assert truth.judge().ok
    wrong = truth.judge(rounded)
    assert not wrong.errors["value"] <= wrong.allowed["value"]
    wrong = truth.judge(frozen)
    assert wrong.errors["value"] <= wrong.allowed["value"]
    assert not wrong.errors["d_bias_V"] <= wrong.allowed["d_bias_V"]


@pytest.mark.slow
# The older names, which transformers 5.17 knows too.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_system_sees_a_wrong_mask(script: Any) -> None:
    model, trees = script("system_model"), script("system_trees")
    device = torch.device("cpu")
    system = trees.System(model.build(model.TINY, device), model.TINY, device)
    tree = model.Pairs(model.TINY, 3).tree()
    seen = tree.attention_mask(torch.bool)
    sibling = seen.clone()  # one more token of a branch is seen by what comes after it
    branch = int((~seen[0, 0, -1]).nonzero()[0])
    sibling[0, 0, branch + 1 :, branch] = True
    for mask, ok in ((seen, True), (sibling, False), (torch.ones_like(seen).tril(), False)):
        scored = model.learn(system.model, partial(trees.score_by_hand, system, tree, mask))
        assert trees.truth(system, 3).findings(*scored).ok is ok


@pytest.mark.slow
def test_system_passes_on_a_cpu() -> None:
    code, lines = run("system")
    environment, *cases, counts = lines
    assert environment["environment"]["model"]["vocab_size"] == 500
    assert [case for case in cases if case["ok"] is False] == []
    skipped = [case for case in cases if case["ok"] is None]
    assert {case["skipped"] for case in skipped} == {
        "FlexAttention has no backward on a CPU",
        "batch_invariant runs on a GPU only",
    }
    assert all(case["figures"] for case in cases if case["ok"])
    assert counts == {"passed": len(cases) - len(skipped), "failed": 0, "skipped": len(skipped)}
    assert code == 0


def test_the_kit_takes_the_versions_that_are_tested(script: Any) -> None:
    kit = script("kit")
    pins = (FOLDER.parent.parent / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = {line.partition("==")[0] for line in pins.splitlines() if "==" in line}
    assert {*kit.RIVALS, *kit.NEEDS} <= pinned


def test_a_kit_installs_beside_the_machine(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "import os\nprint(os.environ['TRITON_CACHE_DIR'])\n")
        info = "carried-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    shutil.copy(FOLDER / "install.sh", tmp_path)
    commands = f"set -eu; source {tmp_path}/install.sh; python3 -c 'import carried'"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", commands],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PATH": path, "PYTHONPATH": ""},
    )
    assert done.stdout.strip() == str(tmp_path / "triton-cache"), done.stderr
