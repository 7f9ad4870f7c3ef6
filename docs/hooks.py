"""What the site has beside the Markdown of this folder; MkDocs calls these.

* The API reference, from the one list of public names, `stepagent/__init__.pyi`, and from the lists
  of the public modules (`__all__`). The pages are made from docstrings, without an import.
* The first page is `architecture.md`.
* Files elsewhere in the repository that a page links to, as the benchmarks' results.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
STUB = ROOT / "python" / "stepagent" / "__init__.pyi"
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_config(config: MkDocsConfig) -> None:
    config.nav.append({"API reference": [{title: path} for title, (path, _) in _pages().items()]})
    config.nav.append({"Measurements": [path for path in _outside() if path.endswith(".md")]})


@event_priority(100)  # before the check of the links, which has to know of these files
def on_files(files: Files, *, config: MkDocsConfig) -> None:
    first = files.get_file_from_path("architecture.md")
    first.dest_uri, first.url = "index.html", "index.html"
    for title, (path, names) in _pages().items():
        entries = "\n\n".join(f"::: {name}" for name in names)
        files.append(File.generated(config, path, content=f"# {title}\n\n{entries}\n"))
    for path in _outside():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Paths as they are in the repository become paths of the site, where docs/ is the root."""
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown.replace("](../../docs/", "](../../")
    return OUTSIDE.sub(r"](\1", markdown)


def _outside() -> list[str]:
    pages = sorted((ROOT / "docs").glob("*.md"))
    return sorted({path for page in pages for path in OUTSIDE.findall(page.read_text())})


def _pages() -> dict[str, tuple[str, list[str]]]:
    """The reference: title → path and public names, in the order of the stub."""
    package: Any = griffe.load("stepagent", search_paths=[STUB.parents[1]])
    folders, modules = defaultdict(list), []
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.module is None:
                modules += names
            else:
                folders[node.module.partition(".")[0]] += names
    pages = {
        f"stepagent: {folder}": (f"reference/{folder}.md", [f"stepagent.{name}" for name in names])
        for folder, names in folders.items()
    }
    for module in modules:
        names = [f"stepagent.{module}.{name}" for name in _names(package[module])]
        pages[f"stepagent.{module}"] = (f"reference/stepagent.{module}.md", names)
    return pages


def _names(module: Any) -> list[str]:
    if module.exports:
        return [str(name) for name in module.exports]
    return [name for name, member in module.members.items() if member.is_public]
