"""The C++ core on random inputs, built with AddressSanitizer and UBSan: `make fuzz`, in short."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = sorted(
    path.stem for path in (ROOT / "csrc/fuzz").glob("*.cpp") if path.stem != "standalone"
)

pytestmark = pytest.mark.slow


def probe(compiler: str, folder: Path) -> str | None:
    """Why this compiler cannot build the targets; None if it can."""
    if shutil.which("cmake") is None or shutil.which(compiler) is None:
        return f"needs cmake and {compiler}"
    library = ["-fsanitize=fuzzer"] if "clang" in compiler else []
    source = folder / "probe.cpp"
    entry = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }\n'
    source.write_text(entry if library else "int main() {}\n")
    command = [compiler, "-fsanitize=address,undefined", *library, source, "-o", folder / "probe"]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{compiler} lacks the sanitizers' libraries" if done.returncode else None


@pytest.fixture(scope="module", params=["g++", "clang++"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs: on the standalone driver with GCC, on libFuzzer with Clang."""
    folder = tmp_path_factory.mktemp("fuzz")
    reason = probe(request.param, folder)
    if reason is not None:
        pytest.skip(reason)
    options = ["-DSTEPAGENT_SANITIZE=ON", f"-DCMAKE_CXX_COMPILER={request.param}"]
    for command in (
        ["cmake", "-S", ROOT, "-B", folder / "build", *options],
        ["cmake", "--build", folder / "build"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build/csrc/fuzz"


@pytest.mark.parametrize("target", TARGETS)
def test_random_inputs_pass(programs: Path, target: str, tmp_path: Path) -> None:
    command = [programs / f"fuzz_{target}", "-runs=10000", "-seed=1", "-max_len=128"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Done 10000 runs" in done.stderr
