"""The benchmarks on tiny shapes: their checks pass or refuse, and their results are complete.

No test looks at a time: machines are shared.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import babyai_tokenizer, tiny_agent

from stepagent import TokenTree

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = ["--steps=3", "--observation-tokens=5", "--action-tokens=3", "--layers=1", "--hidden=64"]
TINY += ["--threads=1", "--repeats=1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a benchmark as it runs: with its own folder on sys.path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # common.py would set it for other tests too
    threads = torch.get_num_threads()

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("common", None)
    torch.set_num_threads(threads)


def run(name: str, *options: str) -> dict[str, Any]:
    """Run a benchmark as a user does; its result."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(next(o for o in options if o.startswith("--json=")).removeprefix("--json="))
    result = json.loads(path.read_text())
    assert result["benchmark"] == name
    assert set(result["environment"]) >= {"date", "command", "device", "versions"}
    note = path.with_suffix(".md").read_text()
    assert result["environment"]["command"] in note
    assert note.split("\n\n")[1] in done.stdout, "the .md holds the printed table"
    return result


def tiny_options(benchmark: Any) -> argparse.Namespace:
    common = benchmark("common")
    parser = common.parser("")
    common.add_shape_options(parser)
    return parser.parse_args(TINY)


@pytest.mark.slow
def test_step_pair_update_reports_after_its_check(tmp_path: Path) -> None:
    result = run("step_pair_update", *TINY, f"--json={tmp_path / 'r.json'}")
    assert result["check"]["loss_relative_error"] <= 1e-4
    assert result["check"]["gradient_relative_error"] <= 1e-4
    # 3 steps of 8 tokens and 3 branches of 3; six rows padded to 24.
    assert result["tokens"] == {"tree": 33, "padded": 144, "ratio": 144 / 33}
    assert {"tree", "padded", "ratio"} <= set(result["seconds"])
    assert min(result["peak_bytes"].values()) >= 0
    assert result["shape"]["parameters"] > 0


def test_tree_and_padded_batch_compute_one_loss_and_gradient(benchmark: Any) -> None:
    module = benchmark("step_pair_update")
    gradients, losses = {}, {}
    for side in module.SIDES:
        update = module.Update(tiny_options(benchmark))
        losses[side] = update.run(module.LOSSES[side])
        gradients[side] = {name: p.grad for name, p in update.model.named_parameters()}
    assert losses["tree"] == pytest.approx(losses["padded"], rel=1e-5)
    assert losses["tree"] != pytest.approx(np.log(2), rel=1e-3), "a loss that rewards do move"
    assert module.gradient_error(gradients["tree"], gradients["padded"]) < 1e-4
    assert module.gradient_error(gradients["tree"], gradients["tree"]) == 0


def test_gradient_error_is_relative_to_each_parameter(benchmark: Any) -> None:
    error = benchmark("step_pair_update").gradient_error
    padded = {"large": torch.full((4,), 100.0), "small": torch.full((4,), 1e-3)}
    tree = {"large": padded["large"] * 1.001, "small": padded["small"] * 1.5}
    assert error(tree, padded) == pytest.approx(0.5)


@pytest.mark.slow
def test_inspection_reports_identical_tokens_for_every_length(tmp_path: Path) -> None:
    result = run("inspection", *TINY, "--sweep", "2", f"--json={tmp_path / 'r.json'}")
    assert [point["steps"] for point in result["points"]] == [2, 3]
    for point in result["points"]:
        rivals = {"state by state"} | ({"padded batch"} if point["steps"] == 3 else set())
        assert set(point["same_tokens_as_inspect"]) == rivals
        ways = {"inspect", "one forward"} | rivals
        for clock in ("wall", "cpu"):
            assert set(point[clock]["seconds"]) == ways
            assert point[clock]["speedup"]["inspect"] == 1
    assert set(result["samples"]["cpu"]["cost"]) == {"k = 1", "k = 2", "k = 4", "k = 8"}
    assert (tmp_path / "r.png").stat().st_size > 0


def test_inspection_refuses_other_tokens(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options = benchmark("inspection"), tiny_options(benchmark)
    model = module.common.llama(options).eval()
    trunk, _ = module.common.trajectory(options)
    decoders = module.ways(model, trunk, options.action_tokens)
    other = decoders["inspect"]().copy()
    other[1, -1] += 1
    decoders["padded batch"] = lambda: other
    monkeypatch.setattr(module, "ways", lambda *_: decoders)
    with pytest.raises(SystemExit, match="padded batch: other tokens than inspect at 1 states"):
        module.compare(model, options, options.steps)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_rollouts_reports_ratios_after_its_check(tmp_path: Path) -> None:
    shape = ["--environments=3", "--episodes=4", "--steps=2", "--layers=1", "--hidden=32"]
    result = run("rollouts", *shape, "--repeats=1", f"--json={tmp_path / 'r.json'}")
    assert result["check"]["episodes_identical"]
    assert result["steps"] == 8
    assert set(result["ratio"]) == {"one", "batch", "workers"}
    assert result["ratio"]["one"] == 1


def test_rollouts_refuses_other_episodes(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark("rollouts")
    options = argparse.Namespace(
        env="babyai:GoToLocalS6N2", environments=2, workers=0, episodes=2, steps=2,
        action_tokens=2, layers=1, hidden=32, threads=1, repeats=1,
    )  # fmt: skip
    rolls = module.ways(module.model_policy(options), options)
    monkeypatch.setattr(module, "ways", lambda *_: rolls | {"batch": other})

    def other() -> Any:
        episodes = rolls["one"]()
        episodes[1].rewards[0] += 1
        return episodes

    with pytest.raises(SystemExit, match="batch: other episodes than one at a time"):
        module.compare(options)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_trees_reports_ratios_after_its_checks(tmp_path: Path) -> None:
    shape = ["--steps", "2", "3", "--observation-tokens", "70", "5", "--action-tokens=3"]
    result = run(
        "trees", *shape, "--growth", "2", "4", "--repeats=1", f"--json={tmp_path / 'r.json'}"
    )
    # T = 3: 3 × (5 + 3 + 3) unique tokens; TRL forks one earlier, three times, and ends two apart.
    assert result["trees"][1]["tokens"] == {"given": 96, "stepagent": 33, "TRL": 38}
    for point in result["trees"]:
        assert set(point["ratio"]) == {"pack_step_pairs", "pack_sequences", "TRL"}
    assert [point["tokens"] for point in result["block_masks"]] == [152, 33]
    assert [point["steps"] for point in result["growth"]] == [2, 4]
    assert result["check"]["attention_error"] <= 1e-5
    assert (tmp_path / "r.png").stat().st_size > 0


def test_trees_refuses_a_tree_that_sees_too_much(benchmark: Any) -> None:
    module = benchmark("trees")
    case = module.Case(3, 5, 3)
    tree = case.pack_sequences()
    module.check_tree(case, tree, "packed")
    module.check_trl(case, module.trl_row(case.samples()), tree)
    tree.subtree_end[:] = len(tree.input_ids)
    with pytest.raises(SystemExit, match="packed: a token sees another sequence"):
        module.check_tree(case, tree, "packed")


@pytest.mark.slow
def test_masks_reports_bytes_and_a_ratio_after_its_checks(tmp_path: Path) -> None:
    shape = ["--steps=2", "--layers=1", "--hidden=64", "--threads=1", "--repeats=1"]
    sizes = ["--tokens", "300", "600", "--largest-dense=400"]
    result = run("masks", *shape, *sizes, f"--json={tmp_path / 'r.json'}")
    small, large = result["memory"]
    assert small["bytes"]["additive"] == 2 * small["tokens"] ** 2
    assert large["bytes"]["block"] < large["bytes"]["additive"]
    assert [sorted(point["seconds"]) for point in (small, large)] == [
        ["additive", "block"],
        ["block"],
    ]
    assert large["blocks"]["laid out"][1] > large["blocks"]["own order"][1]
    assert result["update"]["loss_relative_error"] <= 1e-5
    assert result["update"]["seconds"]["ratio"] > 0


def test_masks_refuses_masks_that_differ(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("masks")
    options = argparse.Namespace(
        observation_tokens=8, action_tokens=3, largest_dense=400, repeats=1
    )
    block_mask = TokenTree.block_mask
    monkeypatch.setattr(TokenTree, "block_mask", lambda tree: block_mask(tree, window=1))
    with pytest.raises(SystemExit, match="the masks differ"):
        module.measure_memory(50, options)


@pytest.mark.slow
def test_packing_reports_ratios_and_says_where_verl_is_missing(tmp_path: Path) -> None:
    shape = ["--items=32", "--parts=4", "--sequences=50", "--capacity=64", "--seeds=2"]
    (tmp_path / "verl" / "utils").mkdir(parents=True)
    # What the benchmark takes out of verl: its two functions, whatever else the module imports.
    (tmp_path / "verl" / "utils" / "seqlen_balancing.py").write_text(
        "import nowhere\n"
        "def karmarkar_karp(costs, parts):\n"
        "    return [list(range(part, len(costs), parts)) for part in range(parts)]\n"
        "def get_seqlen_balanced_partitions(costs, parts, equal_size):\n"
        "    return karmarkar_karp(costs, parts)\n"
    )
    path = f"--json={tmp_path / 'r.json'}"
    result = run("packing", *shape, "--repeats=1", f"--verl={tmp_path}", path)
    assert result["bins"]["bins"]["stepagent"] <= result["bins"]["bins"]["TRL"]
    for point in result["balance"]:
        assert point["ratio"] > 0
        assert all(s["stepagent"] <= s["verl"] for s in point["spreads"])
    if importlib.util.find_spec("verl") is None:
        result = run("packing", *shape, "--repeats=1", path)
        assert [point["ratio"] for point in result["balance"]] == [None, None]
        assert "not found" in (tmp_path / "r.md").read_text()


def test_agent_actions_differ_from_the_experts(benchmark: Any) -> None:
    common, options = benchmark("common"), tiny_options(benchmark)
    trunk, agent = common.trajectory(options)
    assert trunk.action_spans.tolist() == [[5, 8], [13, 16], [21, 24]]
    for (start, stop), action in zip(trunk.action_spans, agent, strict=True):
        assert (action != trunk.input_ids[start:stop]).all()
        assert action.min() >= 1
        assert action.max() < common.VOCABULARY


@pytest.mark.slow
def test_alignment_reports_equal_distances(tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz")
    options = ("--lengths", "90", "--segments=50", "--repeats=1")
    result = run("alignment", *options, f"--json={tmp_path / 'r.json'}")
    ways = {"stepagent", "rapidfuzz, lists", "rapidfuzz, array('q')"}
    assert [set(point["seconds"]) for point in result["edit_distance"]] == [ways] * 4
    assert [point["cutoff"] for point in result["edit_distance"]] == [None, 64] * 2
    assert [point["distance"] for point in result["edit_distance"]] == [90, 65, 1, 1]
    tokens = result["align_tokens"]
    assert tokens["pairs"] + tokens["seams"] <= min(tokens["tokens"]) + 1
    assert set(tokens["seconds"]) == {"stepagent", "numpy"}


def test_alignment_refuses_other_distances(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("alignment")
    calls = {"stepagent": lambda: 3, "rapidfuzz, lists": lambda: 4}
    monkeypatch.setattr(module, "distance_calls", lambda *_: calls)
    with pytest.raises(SystemExit, match="random, 5 ids, cutoff None: the distances differ"):
        module.compare_distances("random", 5, None, 1)
    monkeypatch.setattr(module, "pairs_in_numpy", lambda *_: np.zeros((1, 2), np.int32))
    with pytest.raises(SystemExit, match="find other pairs"):
        module.compare_tokens(50, 1)


@pytest.mark.slow
def test_import_time_finds_no_heavy_module(tmp_path: Path) -> None:
    result = run("import_time", "--repeats=1", f"--json={tmp_path / 'r.json'}")
    assert "triton" in result["check"]["not_loaded"]
    assert {"import torch", "import stepagent", "every name"} <= set(result["medians"])
    assert result["medians"]["stepagent train --help"]["wall"] > 0
    assert not any(name.split(".")[0] == "triton" for name in result["modules_added"])


def test_heavy_modules_are_found_with_their_submodules_only(benchmark: Any) -> None:
    heavy = benchmark("import_time").heavy_modules
    assert heavy(["torch", "transformers", "tritonclient", "torch.triton"]) == []
    assert heavy(["triton.language", "transformers.trainer"]) == ["triton", "transformers.trainer"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None
    or importlib.util.find_spec("pybind11") is None,
    reason="builds without the network, with scikit-build-core and pybind11 from the dev extra",
)
def test_wheel_is_small_complete_and_imports_without_a_compiler(tmp_path: Path) -> None:
    result = run("wheel", "--no-build-isolation", f"--json={tmp_path / 'r.json'}")
    assert result["bytes"] < 1_000_000
    assert "stepagent/kernels/token_logprobs.py" in result["files"]
    assert "stepagent/py.typed" in result["files"]
    assert not any("torch" in name for name in result["extension_links"])


def test_wheel_without_a_kernel_is_refused(benchmark: Any, tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "stepagent.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("stepagent/__init__.py", "")
    with pytest.raises(SystemExit, match=r"the wheel lacks .*stepagent/kernels/token_logprobs\.py"):
        benchmark("wheel").check_contents(path)


def test_weights_moved_tells_bfloat16_from_float32(tmp_path: Path) -> None:
    tiny_agent().save_pretrained(tmp_path / "model")
    babyai_tokenizer().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    result = run("weights_moved", model, "--steps=2", f"--json={tmp_path / 'moved.json'}")
    kept, whole = (result["results"][dtype] for dtype in ("checkpoint", "float32"))
    assert (kept["dtype"], whole["dtype"]) == ("torch.bfloat16", "torch.float32")
    assert kept["moved"] == kept["moved_in_bfloat16"] < 0.1
    assert whole["moved"] > 0.5


@pytest.mark.slow
def test_a_step_of_dpo_in_trl_has_one_loss_in_all_three_trainers(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "hosts.json"
    command = [sys.executable, str(FOLDER / "hosts.py"), *TINY, f"--json={out}"]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["check"]["error"] <= 1e-5
    assert set(result["check"]["loss"]) == {"dpo", "rows", "tree"}


def test_trajectory_pairs_reports_after_its_check(tmp_path: Path) -> None:
    given = [*TINY, "--shares", "0", "0.5", f"--json={tmp_path / 'r.json'}"]
    cells = run("trajectory_pairs", *given)["cells"]
    # 24 tokens a side; they part at the first token of step 0 or 1, whose state's last is repeated.
    assert [cell["tokens"] for cell in cells] == [
        {"tree": 44, "padded": 48},
        {"tree": 36, "padded": 48},
        {"tree": 80, "padded": 96},
    ]
    assert max(cell["loss_relative_error"] for cell in cells) <= 1e-4
    assert max(cell["gradient_relative_error"] for cell in cells) <= 1e-4
