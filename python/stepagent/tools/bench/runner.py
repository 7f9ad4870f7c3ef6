"""The run: every provider checked on every problem, then timed, then reported."""

from __future__ import annotations

import gc
import os
import platform
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .checks import Check, Errors
from .clocks import MODES, Probe, Times, ceilings, measure, peak_bytes
from .output import CsvFile, write_plots
from .problems import OPS, SUITES, Problem, Shape, Suite, make_problem, product
from .profiles import write_profile
from .providers import OURS, PROVIDERS, Implementation, Unsuitable

# Seconds of timed repetitions for each provider and problem, by suite.
BUDGET_S = {"tiny": 0.02, "cpu": 1.0, "gpu": 0.4}
_PACKAGES = ("stepagent", "torch", "triton", "trl", "liger-kernel", "verl")

Case = tuple[str, Shape]  # an op, by name, at a shape


def run_bench(
    suite: Suite,
    ops: Sequence[str] = (),
    providers: Sequence[str] = (),
    *,
    csv: Path | None = None,
    plots: Path | None = None,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Check, measure and report. The CSV grows problem by problem; Ctrl-C and SIGTERM end early.

    A problem is measured right after its check. Where ours is further from the reference than
    allowed, nothing of that problem is measured, and the report names it under "failed".

    Args:
        suite: of `SUITES`.
        ops: of `OPS`; all where empty.
        providers: of `PROVIDERS`; all where empty. Ours always takes part: it is the measure.
        csv, plots, profile: a file and two folders to write, or None.

    Raises:
        ValueError: a suite that this machine cannot run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if suite == "gpu" and device.type == "cpu":
        raise ValueError("--suite gpu needs a GPU; torch sees none")
    cases = [
        (op, shape)
        for shape in SUITES[suite]
        for op in ops or OPS
        if OPS[op].has_labels or shape.scored == 1.0
    ]
    asked = [name for name in PROVIDERS if name == OURS or name in (providers or PROVIDERS)]
    where = environment(device)
    with tqdm(total=2 * len(cases) * len(asked), smoothing=0.1) as bar:
        run = _Run(suite, device, asked, set(providers), bar)
        with CsvFile(csv, where) as file, _stopped_by_sigterm():
            interrupted = False
            try:
                run.find_ceilings()
                for case in cases:
                    if run.check(case):
                        file.write(run.measure(case))
                run.find_ceilings()  # again, as other work on the machine comes and goes
            except KeyboardInterrupt:
                interrupted = True
    run.compare_with_ceilings()
    if plots is not None:
        write_plots(plots, run.results)
    if profile is not None and not interrupted:
        run.profile(cases, profile)
    return {
        "suite": suite,
        "interrupted": interrupted,
        "environment": where,
        "ceilings": {_name(dtype): rates for dtype, rates in run.ceilings.items()},
        "results": run.results,
        "absent": run.absent,
        "failed": run.failed,
        "wrote": [str(path) for path in (csv, plots, profile) if path is not None],
    }


@dataclass
class _Run:
    suite: Suite
    device: torch.device
    asked: list[str]
    by_name: set[str]  # the providers that were asked for by name
    bar: Any
    checked: dict[Case, dict[str, Errors]] = field(default_factory=dict)
    allowed: dict[Case, Errors] = field(default_factory=dict)
    ceilings: dict[torch.dtype, dict[str, float]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def check(self, case: Case) -> bool:
        """Every provider's errors, and whether ours are allowed.

        A provider that fails or does not suit is left out, with the reason.
        """
        self.bar.set_description("check")
        with self._problem(case) as problem:
            check = Check(problem)
            self.allowed[case] = check.allowed
            self.checked[case] = {}
            for provider in self.asked:
                self.bar.set_postfix_str(f"{case[0]}, {provider}")
                try:
                    implementation = self._implementation(problem, provider)
                    self.checked[case][provider] = check.errors(implementation.call)
                except Unsuitable as unsuitable:
                    self._leave_out(case, provider, str(unsuitable))
                except Exception as error:
                    if provider == OURS:
                        raise
                    self._leave_out(case, provider, _failure(error))
                self.bar.update()
        ours = self.checked[case][OURS]
        if ours.within(check.allowed):
            return True
        problem_name = f"{OURS}, {case[0]} at {case[1]}"
        numbers = f"errors {asdict(ours)}, allowed {asdict(check.allowed)}"
        self.failed.append(f"check failed, nothing reported: {problem_name}: {numbers}")
        self.bar.write(self.failed[-1], file=sys.stderr)
        return False

    def find_ceilings(self) -> None:
        """The best that was seen so far."""
        for dtype in {shape.dtype for shape in SUITES[self.suite]}:
            rates = ceilings(self.device, dtype, small=self.suite == "tiny")
            before = self.ceilings.get(dtype, rates)
            self.ceilings[dtype] = {unit: max(rates[unit], before[unit]) for unit in rates}

    def compare_with_ceilings(self) -> None:
        best = {_name(dtype): rates for dtype, rates in self.ceilings.items()}
        for result in self.results:
            ceiling = best[result["dtype"]][result["unit"]]
            rates = result["per_second"].items()
            result["of_ceiling"] = {mode: rate / ceiling for mode, rate in rates}

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Time and memory of the providers that were checked."""
        results = []
        self.bar.set_description("measure")
        with self._problem(case) as problem:
            self.bar.set_postfix_str(case[0])
            used = {name: self._implementation(problem, name) for name in self.checked[case]}
            calls = {name: implementation.call for name, implementation in used.items()}
            probe = Probe(self.device, case[1].dtype, problem.op.unit, self.suite == "tiny")
            times = measure(problem, calls, BUDGET_S[self.suite], probe)
            ours, in_turns = times[OURS], probe.rate()
            for name, of_one in times.items():
                try:
                    if isinstance(of_one, Exception):
                        raise of_one
                    if isinstance(ours, Exception):
                        raise RuntimeError("there is nothing of ours to compare with")
                    peak = peak_bytes(problem, calls[name])
                    result = self._result(case, name, used[name], of_one, ours, peak)
                    rates = result["per_second"].items()
                    result["of_ceiling_in_turns"] = {mode: r / in_turns for mode, r in rates}
                    results.append(result)
                except Exception as error:
                    self._leave_out(case, name, _failure(error))
        self.bar.update(len(self.asked))
        self.results += results
        return results

    def profile(self, cases: Sequence[Case], folder: Path) -> None:
        """A trace and a table of each problem: of ours, and of the providers asked for by name."""
        for case in cases:
            with self._problem(case) as problem:
                for name in self.checked[case]:
                    if name == OURS or name in self.by_name:
                        call = self._implementation(problem, name).call
                        write_profile(folder, problem, name, call)

    @contextmanager
    def _problem(self, case: Case) -> Iterator[Problem]:
        yield make_problem(*case, self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _implementation(self, problem: Problem, name: str) -> Implementation:
        provider = PROVIDERS[name]
        if provider.on_request(problem) and name not in self.by_name:
            raise Unsuitable(f"slow to compile: only with --provider {name}")
        return provider.make(problem)

    def _leave_out(self, case: Case, provider: str, reason: str) -> None:
        op, shape = case
        reason = " ".join(reason.split())
        self.absent.append({"op": op, "shape": str(shape), "provider": provider, "reason": reason})
        self.bar.write(f"{op}, {shape}: without {provider}: {reason}", file=sys.stderr)

    def _result(
        self,
        case: Case,
        provider: str,
        implementation: Implementation,
        times: Times,
        ours: Times,
        peak: int,
    ) -> dict[str, Any]:
        name, shape = case
        op = OPS[name]
        counts = _counts(case, implementation)
        ms = {mode: _quantiles(times[mode]) for mode in MODES}
        rates = {mode: 1e3 * counts[mode] / ms[mode]["p50"] for mode in MODES}
        our_ms = {mode: statistics.median(ours[mode]) for mode in MODES}
        return {
            "op": name,
            "provider": provider,
            "shape": str(shape),
            "N": shape.N,
            "scored": shape.n,
            "H": shape.H,
            "V": shape.V,
            "dtype": _name(shape.dtype),
            "errors": asdict(self.checked[case][provider]),
            "allowed": asdict(self.allowed[case]),
            "repeats": len(times["full"]),
            "ms": ms,
            "times_ours": {mode: ms[mode]["p50"] / our_ms[mode] for mode in MODES},
            "unit": op.unit,
            "counted": counts,
            "per_second": rates,
            "peak_bytes": peak,
        }


def _counts(case: Case, implementation: Implementation) -> dict[str, int]:
    """FLOP or bytes, as `Op.unit` says: what the op needs, where the provider spends it."""
    op, shape = OPS[case[0]], case[1]
    forward, backward = op.count(shape)
    if op.unit == "FLOP" and implementation.logits == "again":
        backward += product(shape)
    if op.unit == "FLOP" and implementation.logits == "gradient":
        forward, backward = forward + product(shape), backward - product(shape)
    return {"forward": forward, "backward": backward, "full": forward + backward}


def _quantiles(times: list[float]) -> dict[str, float]:
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(times), "p80": p80}


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}"[:500]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """A time limit ends a run as Ctrl-C does: with a report of what there is."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when: what a reader needs to judge or repeat the figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
