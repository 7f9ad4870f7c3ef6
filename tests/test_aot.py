"""Kernels compiled ahead of time for GPUs that are not there: registers, spills, cache keys.

In other processes: this one may have set Triton to interpret, and that cannot be undone.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

slow = pytest.mark.slow
ARCHS = [
    "sm_90",
    *(pytest.param(arch, marks=slow) for arch in ("sm_80", "sm_100", "sm_120", "gfx942", "gfx950")),
]
KERNELS = (
    "token_logprobs",
    "token_logprobs, entropy",
    "token_logprobs backward",
    "token_logprobs backward, entropy",
    "logprob_diff",
)
# A thread may have 512 on gfx9; on NVIDIA 128 leave room for four blocks of 128 threads an SM.
MAX_REGISTERS = 128


def python(*arguments: str, cache: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    env |= {"TRITON_CACHE_DIR": str(cache), **changes}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def warmup(*archs: str, cache: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    options = [option for arch in archs for option in ("--arch", arch)]
    return python("-m", "stepagent", "warmup", *options, "--json", cache=cache, **changes)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_and_spills_nothing(arch: str, tmp_path: Path) -> None:
    finished = warmup(arch, cache=tmp_path)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["cache"] == str(tmp_path)
    found = [(row["kernel"], row["arch"], row["dtype"]) for row in report["kernels"]]
    assert found == [(k, arch, d) for d in ("bfloat16", "float32") for k in KERNELS]
    for row in report["kernels"]:
        assert row["spills"] == 0, row
        assert 16 <= row["registers"] <= MAX_REGISTERS, row
    binaries = {path.suffix for path in tmp_path.rglob("*")}
    assert (".hsaco" if arch.startswith("gfx") else ".cubin") in binaries


# Launches on real memory what the warm-up launched on none; both for a GPU that is not there.
LAUNCH = """
import torch
from stepagent.kernels.logprob_diff import logprob_diff
from stepagent.kernels.token_logprobs import token_logprobs, token_logprobs_backward
from stepagent.warmup import TARGETS, _compiling_for

V = {V}
logits_NV, labels_N = torch.zeros(3, V, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
inputs, g_N = (logits_NV, labels_N, torch.ones(())), torch.ones(3)
with _compiling_for(TARGETS["sm_90"]):
    token_logprobs(*inputs, with_entropy=True)
    token_logprobs_backward(g_N, g_N, [g_N] * 4, *inputs)
    token_logprobs_backward(g_N, None, [g_N] * 4, *inputs)
    logprob_diff(logits_NV, *inputs)
"""


@slow
def test_a_launch_finds_what_the_warmup_compiled(tmp_path: Path) -> None:
    text = python("-m", "stepagent", "warmup", "--arch", "sm_90", cache=tmp_path).stdout
    assert "kernel                            arch   dtype     registers  spills\n" in text
    assert f"Wrote 10 kernels of Triton {version('triton')} to {tmp_path}\n" in text
    warm = set(tmp_path.iterdir())
    for V, compiled in ((50_000, 0), (50_001, 4)):  # 16 divides the first
        finished = python("-c", LAUNCH.format(V=V), cache=tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert len(set(tmp_path.iterdir()) - warm) == compiled


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("sm_70", {}, "arch must be one of sm_80, .* got 'sm_70'"),
        ("sm_90", {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
)
def test_warmup_refuses(arch: str, changes: dict[str, str], message: str, tmp_path: Path) -> None:
    finished = warmup(arch, cache=tmp_path, **changes)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert re.search(message, finished.stderr)
    assert not any(tmp_path.iterdir())
