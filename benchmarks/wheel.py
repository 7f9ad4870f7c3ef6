"""The wheel: small, complete, free of libtorch, and importable where there is no compiler.

``pip wheel . --no-deps`` into a temporary folder (with a CMake folder of its own, so that an
editable install's is left alone), then checked, each red check ending the run with 1:

* size below 1 MB, and which files it holds: the extension, stubs, py.typed, every kernels/*.py,
* no libtorch, libc10 or CUDA library among what the extension links (``readelf -d``),
* installed with ``pip install --no-index --no-deps`` into a fresh virtual environment, it imports
  from an empty directory with nothing but that environment's bin on PATH, takes all of stepagent
  from there, loads no triton, and packs a tree with the extension.

The fresh environment sees torch, numpy and the other dependencies through one .pth file that names
this interpreter's site-packages; they come after its own. So nothing is downloaded again; that
pyproject.toml names every dependency is not what is shown here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1_000_000
SHIPPED = {".py", ".pyi"}
FORBIDDEN = ("torch", "c10", "cuda", "cudart", "nvidia")
PROGRAM = """
import json, sys
import stepagent as sa
from importlib.util import find_spec
(tree,) = sa.pack_step_pairs([sa.Trunk([5, 6, 7], [(1, 3)])], [[[[8]]]])
print(json.dumps({
    "files": [sa.__file__, sys.modules["stepagent._core"].__file__,
              find_spec("stepagent.kernels.token_logprobs").origin],
    "triton": "triton" in sys.modules,
    "input_ids": tree.input_ids.tolist(),
}))
"""


def run(*command: object, **options: Any) -> str:
    """Its standard output; a red check if it fails."""
    words = [str(word) for word in command]
    common.say("$ " + " ".join(word if len(word) < 80 else "…" for word in words))
    done = subprocess.run(words, capture_output=True, text=True, **options)
    common.check(done.returncode == 0, f"{words[0]} ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def build(folder: Path, *, isolated: bool) -> Path:
    flags = [] if isolated else ["--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", *flags]
    run(*command, "-w", folder, f"--config-settings=build-dir={folder / 'cmake'}")
    return next(folder.glob("stepagent-*.whl"))


def check_contents(wheel: Path) -> dict[str, int]:
    """Files and their sizes; a red check where one is missing or the wheel too large."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    size = wheel.stat().st_size
    common.check(size < MAX_BYTES, f"the wheel has {size} bytes; the limit is {MAX_BYTES}")
    package = [path for path in (ROOT / "python").rglob("*") if path.suffix in SHIPPED]
    names = {str(path.relative_to(ROOT / "python")) for path in package}
    names |= {f"stepagent/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    names.add("stepagent/py.typed")
    missing = sorted(names - set(sizes))
    common.check(not missing, f"the wheel lacks {', '.join(missing)}")
    return sizes


def check_links(wheel: Path, sizes: dict[str, int], folder: Path) -> list[str]:
    """The libraries that the extension links."""
    (extension,) = [name for name in sizes if name.endswith(".so")]
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(extension, folder)
    lines = run("readelf", "-d", folder / extension).splitlines()
    needed = [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]
    common.check(bool(needed), "readelf found no linked library at all")
    wrong = [name for name in needed if any(word in name for word in FORBIDDEN)]
    common.check(not wrong, f"the extension links {', '.join(wrong)}")
    return needed


def check_import(wheel: Path, folder: Path) -> None:
    """Install and import it in a fresh environment, without a compiler on PATH."""
    home = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    flags = ["--no-index", "--no-deps", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, wheel)
    paths = {"base": str(home), "platbase": str(home)}
    own = Path(sysconfig.get_path("platlib", "venv", vars=paths))
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = folder / "empty"
    empty.mkdir()
    bare = {"PATH": str(home / "bin"), "HOME": str(empty)}
    found = json.loads(run(python, "-c", PROGRAM, cwd=empty, env=bare))
    for path in found["files"]:
        common.check(Path(path).is_relative_to(own), f"{path} is not from the wheel in {own}")
    common.check(not found["triton"], "import stepagent loads triton")
    common.check(found["input_ids"] == [5, 8, 6, 7], f"the tree is {found['input_ids']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    parser.add_argument(
        "--no-build-isolation",
        action="store_true",
        help="build with this environment's scikit-build-core and pybind11: no network",
    )
    options = parser.parse_args()
    where = common.environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder, isolated=not options.no_build_isolation)
        sizes = check_contents(wheel)
        needed = check_links(wheel, sizes, folder)
        check_import(wheel, folder)
        size = os.path.getsize(wheel)
    kernels = sorted(name for name in sizes if name.startswith("stepagent/kernels/"))
    result = {
        "benchmark": "wheel",
        "wheel": wheel.name,
        "bytes": size,
        "files": sizes,
        "extension_links": needed,
        "imports_without_compiler": True,
    }
    rows = [
        ["size", f"{size / 1000:.0f} kB (limit {MAX_BYTES / 1000:.0f} kB)"],
        ["files", f"{len(sizes)}, {len(kernels)} of them kernels"],
        ["extension links", ", ".join(needed)],
        ["imports in a fresh environment without a compiler", "yes"],
    ]
    text = common.table([wheel.name, ""], rows)
    common.report("The wheel", __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
