"""What the docs name is there: modules and names of the package, and the folders on the map."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import stepagent

ROOT = Path(__file__).parents[1]
PACKAGE = Path(stepagent.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
NAMED = sorted(set(re.findall(r"\bstepagent(?:\.(?!json\b)\w+)+", TEXT)))
PUBLIC = {
    "analysis": "ContrastOptions HashedWords ModelRows Subgoals info_nce",
    "episode_file": "EpisodeFile describe_seeds open_episodes",
    "episodes": "Episode load_episodes",
    "evaluation": "Diagnosis Interval bootstrap diagnose stratified_bootstrap success_rate",
    "evolve": "Caps Evolved FileProposer NoMoreProposals Request ServerProposer evolve told",
    "methods": "Batch Comparison Method PPOMethod Run StepTable method_class register_method",
    "metrics": "METRICS compare invalid_actions progress_curve split_by success summarize",
    "models": "LMHead check_tree_support hidden_states lm_head read_trees score_trees",
    "policies": "ExpertPolicy ModelPolicy Policy RandomPolicy",
    "preferences": "PreferencePair ipr_pairs load_pairs load_rollouts save_pairs save_rollouts",
    "ranks": "over_ranks",
    "report": "load_runs write_report",
    "rollout": "continue_rollouts own_expert rollout_and_query run_episodes",
    "server_policies": "ChatPolicy EnginePolicy",
}


def named(path: str) -> Any:
    """What a dotted path leads to: modules as far as there are any, then their attributes."""
    found, *names = import_module("stepagent"), *path.split(".")[1:]
    for name in names:
        if not hasattr(found, name):
            import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", NAMED)
def test_what_the_docs_name_is_there(path: str) -> None:
    if path.startswith(("stepagent.kernels", "stepagent.integrations.trl")):
        # Importing one loads triton or TRL.
        assert find_spec(".".join(path.split(".")[:3])) is not None
    else:
        assert named(path) is not None


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_module_has_its_names(module: str) -> None:
    found = import_module(f"stepagent.{module}")
    assert set(PUBLIC[module].split()) <= set(vars(found))


def test_modules_that_come_with_the_package_need_no_import() -> None:
    modules = ["engines", "envs", "episodes", "models", "policies", "rollout", "server_policies"]
    program = f"import stepagent as sa; print([sa.{', sa.'.join(modules)}])"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_map_has_every_folder_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("## Folders") : page.index("`import-linter` holds")]
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"`(\w+)/`", table)) - {"bench", "templates"} == rooms


def test_every_file_that_the_map_names_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`([\w/]+\.(?:py|pyi|json|cpp|toml))`", page):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


def test_the_stub_has_every_public_name() -> None:
    """Which a client's type checker reads in place of the package's `__init__.py`."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname for node in imports for alias in node.names}
    assert set(stepagent.__all__) <= names
    assert all(hasattr(stepagent, name) for name in names)
