"""`stepagent bench` on tiny shapes: its checks find what is wrong, its reports are complete.

No test looks at a time: machines are shared.
"""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import stepagent as sa
from stepagent.cli import main
from stepagent.tools.bench import checks, clocks, providers, runner
from stepagent.tools.bench.checks import Check, Errors
from stepagent.tools.bench.clocks import MODES
from stepagent.tools.bench.output import COLUMNS
from stepagent.tools.bench.problems import OPS, Shape, make_problem
from stepagent.tools.bench.providers import PROVIDERS, Implementation, Provider

CPU = torch.device("cpu")
SHAPE = Shape(N=96, H=32, V=500, dtype=torch.float32)
MASKED = Shape(N=960, H=32, V=500, dtype=torch.float32, scored=0.1)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "--suite", "tiny", *map(str, arguments)])


def report(*arguments: object) -> dict[str, Any]:
    result = bench("--json", *arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def provide(
    monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[..., Tensor] | Exception
) -> None:
    """Let a provider compute (or fail) like this."""

    def make(problem: object) -> Implementation:
        if isinstance(call, Exception):
            raise call
        return Implementation(call)

    monkeypatch.setitem(PROVIDERS, name, Provider(make))


def rounded(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """Logits rounded to bfloat16, as a product in the dtype of the model leaves them."""
    return sa.token_logprobs((hidden_RH @ weight_VH.T).bfloat16(), labels_N)


# ------------------------------------------------------------------ the report


def test_every_op_is_checked_and_measured(tmp_path: Path) -> None:
    result = report("--provider", "torch", "--csv", tmp_path / "r.csv", "--plots", tmp_path / "p")
    assert result["suite"] == "tiny"
    assert not result["interrupted"]
    assert result["wrote"] == [str(tmp_path / "r.csv"), str(tmp_path / "p")]
    assert set(result["environment"]) >= {"date", "device", "threads", "load_average", "versions"}
    assert min(result["ceilings"]["float32"].values()) > 0
    measured = {(r["op"], r["scored"] < r["N"], r["provider"]) for r in result["results"]}
    assert measured == {
        (op, masked, provider)
        for op in OPS
        for masked in (False, True)[: 1 + OPS[op].has_labels]
        for provider in ("stepagent", "torch")
    }
    for entry in result["results"]:
        for mode in MODES:
            assert 0 < entry["ms"][mode]["p20"] <= entry["ms"][mode]["p50"]
            assert entry["ms"][mode]["p50"] <= entry["ms"][mode]["p80"]
            rate = 1e3 * entry["counted"][mode] / entry["ms"][mode]["p50"]
            assert entry["per_second"][mode] == pytest.approx(rate)
            ceiling = result["ceilings"]["float32"][entry["unit"]]
            assert entry["of_ceiling"][mode] == pytest.approx(rate / ceiling)
        assert set(entry["errors"]) == set(entry["allowed"]) == {"value", "sum64", "gradient"}
        assert all(0 <= entry["errors"][name] <= entry["allowed"][name] for name in entry["errors"])
        if entry["provider"] == "stepagent":
            assert set(entry["times_ours"].values()) == {1.0}

    rows = read_csv(tmp_path / "r.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 4 * len(result["results"]), "three modes of speed, and memory"
    first, entry = rows[0], result["results"][0]
    assert first["kernel_name"] == entry["op"]
    assert (first["metric_name"], first["metric_unit"]) == ("speed", "ms")
    assert float(first["y_value_50"]) == entry["ms"]["forward"]["p50"]
    assert json.loads(first["extra_benchmark_config_str"])["V"] == entry["V"]
    assert rows[3]["metric_name"] == "memory"
    assert float(rows[3]["y_value_50"]) * 2**20 == entry["peak_bytes"]

    plots = sorted((tmp_path / "p").iterdir())
    assert [path.stem for path in plots] == sorted(OPS)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


def test_the_table_is_for_a_person() -> None:
    result = bench("--op", "linear_logprobs", "--provider", "torch-fp32")
    assert result.exit_code == 0, result.output
    assert "of ceiling" in result.stdout
    assert "linear_logprobs, N=96 H=32 V=500 float32" in result.stdout
    assert "without torch-fp32: the same as torch" in result.stdout


def test_counts_are_those_of_the_op() -> None:
    ops = ("linear_logprobs", "linear_logprobs_frozen", "token_logprobs")
    options = [word for op in ops for word in ("--op", op)]
    counts = {
        (r["op"], r["provider"], r["N"]): r["counted"]
        for r in report("--provider", "torch", *options)["results"]
    }
    product = 2 * SHAPE.N * SHAPE.H * SHAPE.V
    ours = counts["linear_logprobs", "stepagent", 96]
    assert ours == {"forward": product, "backward": 3 * product, "full": 4 * product}, "8NHV"
    kept = counts["linear_logprobs", "torch", 96]
    assert kept["full"] == 3 * product, "6NHV: the logits are kept"
    assert counts["linear_logprobs", "stepagent", 960] == ours, "only scored rows count"
    frozen = counts["linear_logprobs_frozen", "stepagent", 96]
    assert frozen == {"forward": 2 * product, "backward": 0, "full": 2 * product}, "4NHV"
    logits = SHAPE.N * SHAPE.V * 4
    assert counts["token_logprobs", "stepagent", 96]["forward"] == logits
    assert counts["token_logprobs", "stepagent", 96]["full"] == 3 * logits


def test_the_profile_is_a_trace_and_a_table(tmp_path: Path) -> None:
    report("--op", "linear_logprobs", "--provider", "torch", "--profile", tmp_path)
    traces, tables = sorted(tmp_path.glob("*.json")), sorted(tmp_path.glob("*.txt"))
    assert len(traces) == len(tables) == 4, "two shapes, ours and the provider asked for"
    for trace, table in zip(traces, tables, strict=True):
        events = json.loads(trace.read_text())["traceEvents"]
        assert any(event.get("name") == "aten::mm" for event in events)
        lines = table.read_text().splitlines()
        assert lines[0].split()[:3] == ["kernel", "calls", "ms"]
        assert any(line.startswith("aten::mm ") for line in lines)


# ------------------------------------------------------------------ the checks


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [SHAPE, MASKED], ids=["all scored", "a tenth scored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_ours_is_within_the_allowance(op: str, shape: Shape, dtype: torch.dtype) -> None:
    problem = make_problem(op, Shape(shape.N, shape.H, shape.V, dtype, shape.scored), CPU)
    check = Check(problem)
    errors = check.errors(getattr(sa, OPS[op].function))
    assert errors.within(check.allowed), (errors, check.allowed)


def wrong_sign(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda **inputs: -call(**inputs)


def scaled_gradient(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Right values; gradients 1 % too large."""

    def scaled(**inputs: Any) -> Tensor:
        values = call(**inputs)
        return values.detach() + 1.01 * (values - values.detach())

    return scaled


def masked_scored(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Scores rows that have no label."""
    return lambda labels_N, **inputs: call(labels_N=labels_N.clamp(min=0), **inputs)


def last_wrong(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As an offset that overflows would have it."""

    def last(**inputs: Any) -> Tensor:
        values = call(**inputs).clone()
        values[inputs["labels_N"].ne(-100).nonzero()[-1]] += 0.1
        return values

    return last


def poisoned(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda **inputs: call(**inputs) * torch.nan


@pytest.mark.parametrize(
    "mutation", [wrong_sign, scaled_gradient, masked_scored, last_wrong, poisoned]
)
@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs", "linear_logprobs_frozen"])
def test_what_is_wrong_is_not_allowed(
    op: str, mutation: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> None:
    problem = make_problem(op, MASKED, CPU)
    check = Check(problem)
    assert not check.errors(mutation(getattr(sa, OPS[op].function))).within(check.allowed)


def test_logits_rounded_to_16_bits_are_not_allowed_even_of_16_bit_inputs() -> None:
    problem = make_problem("linear_logprobs", Shape(N=96, H=32, V=500, dtype=torch.bfloat16), CPU)
    check = Check(problem)
    assert not check.errors(rounded).within(check.allowed)


def test_what_tensor_cores_truncate_is_allowed_where_they_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every log-prob off to one side, as on an H200 by 3.4e-5: more than a random sum allows."""
    shape = Shape(N=96, H=32, V=500, dtype=torch.bfloat16)
    problem = make_problem("linear_logprobs", shape, CPU)

    small = Check(problem).allowed.value / 2

    def one_sided(**inputs: Any) -> Tensor:
        return sa.linear_logprobs(**inputs) + small

    assert not Check(problem).errors(one_sided).within(Check(problem).allowed)
    monkeypatch.setattr(checks, "truncates", lambda device, dtype: True)
    assert Check(problem).errors(one_sided).within(Check(problem).allowed)
    assert not Check(problem).errors(rounded).within(Check(problem).allowed)


def test_nan_is_never_within() -> None:
    assert not Errors(float("nan"), 0.0, 0.0).within(Errors(1.0, 1.0, 1.0))
    assert Errors(1.0, 1.0, 1.0).within(Errors(1.0, 1.0, 1.0))


def test_a_peers_error_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, "verl", rounded)
    result = report("--op", "linear_logprobs", "--provider", "verl", "--provider", "torch")
    errors = {(r["provider"], r["N"]): r["errors"]["sum64"] for r in result["results"]}
    for N in (96, 960):
        assert errors["verl", N] > 1e3 * errors["torch", N] > 0


def test_where_ours_is_wrong_nothing_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    provide(monkeypatch, "stepagent", rounded)
    result = bench("--op", "linear_logprobs", "--provider", "torch", "--csv", tmp_path / "r.csv")
    assert result.exit_code == 1
    assert len(read_csv(tmp_path / "r.csv")) == 0
    assert "check failed, nothing reported: stepagent, linear_logprobs at N=96" in result.stderr


# ------------------------------------------------------------------ what goes wrong


def test_the_absent_and_the_failing_are_named_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provide(monkeypatch, "liger-flce", torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(providers, "find_spec", lambda package: None)
    result = report("--op", "linear_logprobs")
    reasons = {(e["provider"], e["shape"]): e["reason"] for e in result["absent"]}
    assert reasons["trl", str(SHAPE)] == "trl is not installed"
    assert reasons["verl", str(SHAPE)] == "verl is not installed"
    assert reasons["torch-fp32", str(SHAPE)] == "the same as torch: the inputs are float32"
    assert reasons["torch-compile", str(SHAPE)].startswith("slow to compile")
    failed = reasons["liger-flce", str(SHAPE)]
    assert failed == "failed: OutOfMemoryError: CUDA out of memory"
    measured = {(r["provider"], r["shape"]) for r in result["results"]}
    for shape in (SHAPE, MASKED):
        named = {provider for provider, of in reasons if of == str(shape)}
        took_part = {provider for provider, of in measured if of == str(shape)}
        assert named | took_part == set(PROVIDERS), "none is silently dropped"
        assert not named & took_part


def test_a_failure_while_timing_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def tiring(**inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:  # the checks of both shapes, and the first of the timed runs
            raise RuntimeError("tired")
        return sa.linear_logprobs(**inputs)

    provide(monkeypatch, "verl", tiring)
    result = report("--op", "linear_logprobs", "--provider", "verl")
    reasons = [e["reason"] for e in result["absent"] if e["provider"] == "verl"]
    assert reasons == ["failed: RuntimeError: tired"] * 2
    assert {r["provider"] for r in result["results"]} == {"stepagent"}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Where tests run in the background, a shell may have set Ctrl-C to be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: signal.Signals
) -> None:
    def measure(*arguments: Any) -> Any:
        # problem, calls, budget, probe
        if len(arguments[0].inputs["labels_N"]) == MASKED.N:
            signal.raise_signal(stop)
        return clocks.measure(*arguments)

    monkeypatch.setattr(runner, "measure", measure)
    result = bench(
        "--json", "--op", "linear_logprobs", "--provider", "torch", "--csv", tmp_path / "r.csv"
    )
    assert result.exit_code == 130
    partial = json.loads(result.stdout)
    assert partial["interrupted"]
    assert {r["shape"] for r in partial["results"]} == {str(SHAPE)}
    assert len(read_csv(tmp_path / "r.csv")) == 8
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_gpu_suite_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["bench", "--suite", "gpu"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: --suite gpu needs a GPU; torch sees none"


# ------------------------------------------------------------------ time and memory


def test_memory_is_what_is_held_beside_inputs_and_gradients() -> None:
    """Of a call that holds 7 MB more than it returns, 7 MB."""
    problem = make_problem("linear_logprobs", SHAPE, CPU)

    class Holding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
            ctx.sizes = hidden_RH.shape, weight_VH.shape
            held = torch.ones(7_000_000, dtype=torch.int8)
            return hidden_RH.new_zeros(len(hidden_RH)) * held[0]

        @staticmethod
        def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor]:
            hidden_size, weight_size = ctx.sizes
            return grad_N.new_zeros(hidden_size), grad_N.new_zeros(weight_size)

    def call(hidden_RH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        return Holding.apply(hidden_RH, weight_VH)

    gradients = 4 * (SHAPE.N + SHAPE.V) * SHAPE.H
    assert clocks.peak_bytes(problem, call) == pytest.approx(7_000_000 - gradients, rel=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", [SHAPE, MASKED], ids=["all scored", "a tenth scored"])
@pytest.mark.parametrize("op", ["token_logprobs", "logprob_diff", "linear_logprobs"])
@pytest.mark.parametrize(
    "name", ["torch-scored", "torch-compile", "trl", "trl-scored", "liger-scaled-ce"]
)
def test_the_peers_compute_what_they_are_compared_on(name: str, op: str, shape: Shape) -> None:
    """A peer called wrongly would look wrong, or fast, for no fault of its own."""
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    problem = make_problem(op, shape, CPU)
    try:
        implementation = PROVIDERS[name].make(problem)
    except providers.Unsuitable as unsuitable:
        pytest.skip(str(unsuitable))
    errors = Check(problem).errors(implementation.call)
    assert max(vars(errors).values()) <= 1e-4, errors
