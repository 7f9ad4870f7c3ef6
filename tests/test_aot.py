"""Kernels compiled ahead of time for GPUs that are not there: resources, instructions, cache keys.

In other processes: this one may have set Triton to interpret, and that cannot be undone.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

slow = pytest.mark.slow
MAX_BLOCK = 4096  # logits in a tile, as shipped: tests of kernels cut it in their own processes
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
KERNELS = (
    "labels",
    "token_logprobs",
    "token_logprobs, entropy",
    "token_logprobs backward",
    "token_logprobs backward, entropy",
    "logprob_diff",
    "fused_linear fold",
    "fused_linear join",
    "fused_linear fold, entropy",
    "fused_linear join, entropy",
    "linear slice",
    "linear slice, entropy",
    "linear slice, frozen head",
    "linear results",
    "linear results, entropy",
    "linear slice backward",
    "linear slice backward, entropy",
    "step_sums",
    "step_rewards",
    "step_rewards backward",
    "step_pair_loss rewards",
    "step_pair_loss",
    "step_pair_loss backward",
    "step_gae",
    "step_gae, bootstrap",
)
TRITON = ".".join(version("triton").split(".")[:2])
# By version of Triton, arch, dtype and kernel: registers a thread, spills, bytes of shared memory.
BUDGET = json.loads(Path(__file__).with_name("aot_budget.json").read_text())
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}  # of a program
SHARED |= {"gfx942": 65536, "gfx950": 163840}


def python(*arguments: str, cache: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    env |= {"TRITON_CACHE_DIR": str(cache), **changes}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def warmup(
    *archs: str, cache: Path, dtypes: tuple[str, ...] = (), **changes: str
) -> subprocess.CompletedProcess[str]:
    options = [option for arch in archs for option in ("--arch", arch)]
    options += [option for dtype in dtypes for option in ("--dtype", dtype)]
    return python("-m", "stepagent", "warmup", *options, "--json", cache=cache, **changes)


@pytest.mark.parametrize(
    ("arch", "dtypes"),
    [
        ("sm_90", ("bfloat16",)),
        *(pytest.param(arch, ("bfloat16", "float32"), marks=slow) for arch in ARCHS),
    ],
)
def test_every_kernel_compiles_within_its_budget(
    arch: str, dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    finished = warmup(arch, cache=tmp_path, dtypes=dtypes)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["cache"] == str(tmp_path)
    found = [(row["kernel"], row["arch"], row["dtype"]) for row in report["kernels"]]
    assert found == [(k, arch, d) for d in dtypes for k in KERNELS]
    binaries = {path.suffix for path in tmp_path.rglob("*")}
    assert (".hsaco" if arch.startswith("gfx") else ".cubin") in binaries
    for row in report["kernels"]:
        assert row["shared"] <= SHARED[arch], row
        if arch == "sm_90":
            assert row["spills"] == 0, row
        assert set(row["instructions"]) == expected_instructions(**row), row
        if TRITON in BUDGET:  # another version's code generation is another table
            registers, spills, shared = BUDGET[TRITON][arch][row["dtype"]][row["kernel"]]
            assert row["registers"] <= registers, row
            assert row["spills"] <= spills, row
            assert row["shared"] <= shared, row


# Instructions for each logit, in the loop over a row: at most so many let the memory of an H200 be
# the limit (a copy of 4.2 TB/s is 2.1e12 halves a second; 132 multiprocessors issue 28e12).
LEAN = {"_token_logprobs_kernel": 14, "_logprob_diff_kernel": 14}


def test_loops_over_a_row_are_lean(tmp_path: Path) -> None:
    import triton

    assert warmup("sm_90", cache=tmp_path, dtypes=("bfloat16",)).returncode == 0
    for kernel, most in LEAN.items():
        cubins = sorted(tmp_path.rglob(f"{kernel}.cubin"))
        assert cubins
        for cubin in cubins:
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            warps = json.loads(cubin.with_suffix(".json").read_text())["num_warps"]
            per_logit = [32 * warps * length / MAX_BLOCK for length in folding_loops(sass)]
            assert per_logit
            assert max(per_logit) <= most, (cubin.name, per_logit)


def folding_loops(sass: str) -> list[int]:
    """Instructions in each loop that raises to a power, by the jump back at its end."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", sass)
    code = [(int(address, 16), text) for address, text in found]
    lengths = []
    for end, text in code:
        jump = re.search(r"BRA\S* .*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < end:
            body = [t for address, t in code if int(jump[1], 16) <= address <= end]
            if any("MUFU.EX2" in t for t in body):
                lengths.append(len(body))
    return lengths


def expected_instructions(kernel: str, arch: str, dtype: str, **_: object) -> set[str]:
    """Only the fused fold multiplies: by the matrix units, and fed by what copies to them."""
    if "fused_linear fold" not in kernel:
        return set()
    if arch.startswith("gfx"):
        return {"v_mfma"}
    if dtype == "float32":
        return {"LDGSTS"}
    return {"sm_90": {"HGMMA", "UTMALDG"}, "sm_100": {"UTCHMMA", "UTMALDG"}}.get(
        arch, {"HMMA", "LDGSTS"}
    )


# Launches on real memory what the warm-up launched on none; both for a GPU that is not there.
LAUNCH = """
import torch
from stepagent.kernels.fused_linear import fused_linear_logprobs
from stepagent.kernels.logprob_diff import logprob_diff
from stepagent.kernels.token_logprobs import token_logprobs, token_logprobs_backward
from stepagent.tools.warmup import TARGETS, _compiling_for

V, H = {V}, {H}
logits_NV, labels_N = torch.zeros(3, V, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
inputs, g_N = (logits_NV, labels_N, torch.ones(())), torch.ones(3)
head = (torch.zeros(3, H, dtype=torch.bfloat16), torch.empty(V, H, dtype=torch.bfloat16))
with _compiling_for(TARGETS["sm_90"]):
    token_logprobs(*inputs, with_entropy=True)
    token_logprobs_backward(g_N, g_N, [g_N] * 4, *inputs)
    token_logprobs_backward(g_N, None, [g_N] * 4, *inputs)
    logprob_diff(logits_NV, *inputs)
    fused_linear_logprobs(*head, labels_N, None, torch.ones(()), None, with_entropy=True)
"""


@slow
def test_a_launch_finds_what_the_warmup_compiled(tmp_path: Path) -> None:
    text = python("-m", "stepagent", "warmup", "--arch", "sm_90", cache=tmp_path).stdout
    columns = "kernel                            arch   dtype     registers  spills  shared"
    assert f"{columns}  instructions\n" in text
    assert f"Wrote 50 kernels of Triton {version('triton')} to {tmp_path}\n" in text
    warm = set(tmp_path.iterdir())
    for V, H, compiled in ((50_000, 80, 0), (50_001, 81, 6)):  # 16 divides the first two
        finished = python("-c", LAUNCH.format(V=V, H=H), cache=tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert len(set(tmp_path.iterdir()) - warm) == compiled


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("sm_70", {}, "arch must be one of sm_80, .* got 'sm_70'"),
        ("sm_90", {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        ("sm_90", {"dtypes": ("float64",)}, "dtype must be one of bfloat16, .* got 'float64'"),
    ],
)
def test_warmup_refuses(arch: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    finished = warmup(arch, cache=tmp_path, **changes)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert re.search(message, finished.stderr)
    assert not any(tmp_path.iterdir())
