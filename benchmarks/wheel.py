"""The sdist and the wheels: small, complete, free of libtorch, at work where there is no compiler.

The sdist is built from this folder, and from it, not from this folder, a wheel for each `--python`
(or those in `--dist` are taken, as `make wheels` leaves them). Then checked, each red check ending
the run with 1:

* size of each below 1 MB, and which files a wheel holds: the extension, stubs, py.typed, every
  kernels/*.py,
* no libtorch, libc10 or CUDA library among what the extension links (``readelf -d``),
* installed with ``pip install --no-index --no-deps`` into a fresh virtual environment, it passes
  tests/wheel_smoke.py from an empty directory with nothing but that environment's bin on PATH.

The fresh environment sees torch, numpy and the other dependencies through one .pth file that names
the site-packages of `--python`; they come after its own. So nothing is downloaded again; that
pyproject.toml names every dependency is not what is shown here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1_000_000
SHIPPED = {".py", ".pyi"}
FORBIDDEN = ("torch", "c10", "cuda", "cudart", "nvidia")
SMOKE_TEST = ROOT / "tests" / "wheel_smoke.py"
SDIST = """
import sys
from scikit_build_core.build import build_sdist
build_sdist(sys.argv[1])
"""
FACTS = """
import json, platform, sys, sysconfig
print(json.dumps([f"cp{sys.version_info[0]}{sys.version_info[1]}{sys.abiflags}",
                  platform.python_version(), sysconfig.get_path("purelib")]))
"""


def run(*command: object, **options: Any) -> str:
    """Its standard output; a red check if it fails."""
    words = [str(word) for word in command]
    common.say("$ " + " ".join(word if len(word) < 80 else "…" for word in words))
    done = subprocess.run(words, capture_output=True, text=True, **options)
    common.check(done.returncode == 0, f"{words[0]} ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def facts(python: str) -> tuple[str, str, str]:
    """The ABI, as in a wheel's name, the version and the site-packages of a Python."""
    abi, number, packages = json.loads(run(python, "-c", FACTS))
    return abi, number, packages


def build(dist: Path, pythons: list[str], folder: Path, *, isolated: bool) -> None:
    """The sdist by this Python, which has scikit-build-core; of it a wheel by each."""
    run(sys.executable, "-c", SDIST, dist, cwd=ROOT)
    flags = [] if isolated else ["--no-build-isolation"]
    for number, python in enumerate(pythons):
        command = [python, "-m", "pip", "wheel", *dist.glob("*.tar.gz"), "--no-deps", *flags]
        run(*command, "-w", dist, f"--config-settings=build-dir={folder / f'cmake{number}'}")


def only(dist: Path, pattern: str) -> Path:
    found = sorted(dist.glob(pattern))
    common.check(len(found) == 1, f"one {pattern} must be in {dist}, got {len(found)}")
    size = found[0].stat().st_size
    common.check(size < MAX_BYTES, f"{found[0].name} has {size} bytes; the limit is {MAX_BYTES}")
    return found[0]


def check_contents(wheel: Path) -> dict[str, int]:
    """Files and their sizes; a red check where one is missing."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
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


def check_at_work(wheel: Path, python: str, packages: str, folder: Path) -> None:
    """Install it in a fresh environment; the smoke test, without a compiler on PATH."""
    home = folder / f"venv-{wheel.stem}"
    run(python, "-m", "venv", "--without-pip", home)
    own = home / "bin" / "python"
    flags = ["--no-index", "--no-deps", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", own, "install", *flags, wheel)
    (Path(facts(str(own))[2]) / "dependencies.pth").write_text(packages + "\n")
    empty = folder / f"empty-{wheel.stem}"
    empty.mkdir()
    bare = {"PATH": str(home / "bin"), "HOME": str(empty)}
    common.say(run(own, "-I", SMOKE_TEST, cwd=empty, env=bare).strip())


def check(dist: Path, python: str, folder: Path) -> dict[str, Any]:
    """What was found of the wheel for this Python."""
    abi, number, packages = facts(python)
    wheel = only(dist, f"stepagent-*-{abi}-*.whl")
    sizes = check_contents(wheel)
    needed = check_links(wheel, sizes, folder / wheel.stem)
    check_at_work(wheel, python, packages, folder)
    kernels = sum(name.startswith("stepagent/kernels/") for name in sizes)
    return {
        "wheel": wheel.name,
        "python": number,
        "bytes": wheel.stat().st_size,
        "files": len(sizes),
        "kernels": kernels,
        "extension_bytes": next(size for name, size in sizes.items() if name.endswith(".so")),
        "extension_links": needed,
        "smoke_test_without_compiler": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    parser.add_argument(
        "--python",
        dest="pythons",
        action="append",
        help="a Python that has pip, torch and numpy; may be repeated.  [default: this one]",
    )
    parser.add_argument("--dist", type=Path, help="check the sdist and the wheels of this folder")
    parser.add_argument(
        "--no-build-isolation",
        action="store_true",
        help="build with each Python's own scikit-build-core and pybind11: no network",
    )
    options = parser.parse_args()
    pythons = options.pythons or [sys.executable]
    where = common.environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist = options.dist or folder / "dist"
        if options.dist is None:
            build(dist, pythons, folder, isolated=not options.no_build_isolation)
        sdist = only(dist, "stepagent-*.tar.gz")
        wheels = [check(dist, python, folder) for python in pythons]
        source = {"name": sdist.name, "bytes": sdist.stat().st_size}
    result = {"benchmark": "wheel", "sdist": source, "wheels": wheels}
    rows = [[source["name"], f"{source['bytes'] / 1000:.0f}", "", "", ""]]
    for wheel in wheels:
        files = f"{wheel['files']}, {wheel['kernels']} of them kernels"
        links = ", ".join(wheel["extension_links"])
        rows.append([wheel["wheel"], f"{wheel['bytes'] / 1000:.0f}", files, links, wheel["python"]])
    heads = ["", "kB", "files", "the extension links", "smoke test passed on Python"]
    text = common.table(heads, rows)
    common.report("The wheel", __doc__ or "", text, result, options.json, where)


if __name__ == "__main__":
    main()
