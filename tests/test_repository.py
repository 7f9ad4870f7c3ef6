"""Workflows, hooks and the sdist: what they name is there, and what they use is pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)
PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def load(path: Path) -> dict[str, Any]:
    found = yaml.load(path.read_text(), yaml.BaseLoader)  # with it `on` is a word, not True
    assert isinstance(found, dict)
    return found


def jobs(path: Path) -> Iterator[dict[str, Any]]:
    yield from load(path)["jobs"].values()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_nothing_of_its_own(path: Path) -> None:
    for job in jobs(path):
        for step in job.get("steps", []):
            if "run" in step:
                script, *targets = step["run"].split()
                assert script == ".ci/run"
                assert set(targets) <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_by_the_hash_of_a_commit(path: Path) -> None:
    for job in jobs(path):
        if "uses" in job:  # another workflow of this repository
            assert (ROOT / job["uses"]).is_file()
            continue
        assert "timeout-minutes" in job
        for step in job["steps"]:
            assert PINNED.fullmatch(step.get("uses", "a/b@" + 40 * "0")), step["uses"]
    for line in path.read_text().splitlines():
        if "uses: " in line and "@" in line:
            assert re.search(r"  # v\d+(\.\d+)+$", line), f"the version beside the hash: {line}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_unless_a_job_says_more(path: Path) -> None:
    assert load(path)["permissions"] == {"contents": "read"}
    writing = [job for job in jobs(path) if "write" in job.get("permissions", {}).values()]
    assert all(job["environment"] == "pypi" for job in writing)


def test_the_matrix_is_what_the_package_claims() -> None:
    matrix = load(GITHUB / "workflows" / "ci.yml")["jobs"]["check"]["strategy"]["matrix"]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert matrix["python"] == claimed
    built = PYPROJECT["tool"]["cibuildwheel"]["build"]
    assert built == f"cp3{{{','.join(number[2:] for number in claimed)},14t}}-*"
    (floor,) = re.findall(
        r"transformers>=([\d.]+)", "\n".join(PYPROJECT["project"]["dependencies"])
    )
    assert [job["transformers"] for job in matrix["include"]] == [f"=={floor}.0", ">0"]


def test_hooks_have_the_versions_of_the_constraints() -> None:
    (local,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    needed = [need for hook in local["hooks"] for need in hook["additional_dependencies"]]
    assert {need.split("==")[0] for need in needed} == {"ruff", "clang-format"}
    assert all(PINS[name] == version for name, version in (need.split("==") for need in needed))


def test_issue_forms_ask_for_the_doctor() -> None:
    for name in ("bug", "feature"):
        form = load(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")["body"]
        fields = {field["id"]: field for field in form}
        assert "stepagent doctor" in fields["doctor"]["attributes"]["description"]


def test_the_citation_names_the_paper() -> None:
    cited = load(ROOT / "CITATION.cff")
    assert cited["title"] == PYPROJECT["project"]["name"]
    assert cited["license"] == PYPROJECT["project"]["license"]
    assert any("2411.03817" in one["value"] for one in cited["preferred-citation"]["identifiers"])


def test_the_sdist_has_all_that_a_build_needs(tmp_path: Path) -> None:
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True)
    (path,) = tmp_path.glob("stepagent-*.tar.gz")
    assert path.stat().st_size < 10**6
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members), "no links, no devices"
    names = [member.name.split("/", 1)[-1] for member in members]
    needed = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.?pp")}
    package = [path for path in (ROOT / "python").rglob("*.py*") if path.suffix in {".py", ".pyi"}]
    needed |= {str(path.relative_to(ROOT)) for path in package}
    needed |= {f"python/stepagent/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    needed |= {"python/stepagent/py.typed", "tests/wheel_smoke.py"}
    assert needed <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith((".ci", ".github", "build/", "dist/"))]


def test_cmake_downloads_nothing() -> None:
    files = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("CMakeLists.txt")]
    text = "".join(path.read_text() for path in files)
    assert "find_package(pybind11" in text
    assert not re.search(r"FetchContent|ExternalProject|file\(DOWNLOAD", text, re.IGNORECASE)


def test_ci_changes_only_the_pins_that_go_with_transformers(tmp_path: Path) -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^  (sed -E .*?)\n", script.replace("\\\n", ""), re.MULTILINE)
    made = tmp_path / "constraints.txt"
    words = {"TRANSFORMERS": "==5.0.0", "CONSTRAINTS": str(made), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-ec", command], cwd=ROOT, env=words, check=True)
    before = set((ROOT / "constraints.txt").read_text().splitlines())
    after = set(made.read_text().splitlines())
    assert after - before == {"transformers==5.0.0"}
    gone = {line.split("==")[0] for line in before - after}
    assert gone == {"transformers", "huggingface_hub", "tokenizers", "hf-xet"}
