"""The command line, invoked: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from completions_server import ModelServer
from hostile_envs import Labelled, hostile

from stepagent import __version__, envs, load_trajectories
from stepagent.cli import main
from stepagent.optional import EXTRAS
from stepagent.tools.demo import Settings

pytest.importorskip("minigrid")

ENV = "babyai:GoToLocalS6N2"
TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}<obs> {{ m['content'] }} "
    "{% else %}<act> {{ m['content'] }}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<act> {% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models on a shared machine: threads that wait for each other are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``: a tiny Llama that speaks BabyAI's words. ``expert.jsonl``: six episodes."""
    folder = tmp_path_factory.mktemp("cli")
    save_agent(folder / "model", TEMPLATE)
    run("collect", "--env", ENV, "--episodes", 6, "--output", folder / "expert.jsonl")
    return folder


def save_agent(path: Path, template: str | None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from stepagent.envs.babyai import VOCABULARY

    words = ["<pad>", "<unk>", "<obs>", "<act>", "<end>", *VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<obs>", "<act>"],
    )
    fast.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=4,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(*arguments: object) -> str:
    """The stdout of a command that succeeds."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def report(*arguments: object) -> dict[str, Any]:
    """The JSON object that is all of a command's stdout."""
    return dict(json.loads(run(*arguments, "--json")))


def error(*arguments: object, exit_code: int = 1) -> str:
    """The error line of a command that fails, without a traceback and without a report."""
    result = invoke(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("Error: ")
    return last


def train(folder: Path, *arguments: object) -> tuple[object, ...]:
    data, model = folder / "expert.jsonl", folder / "model"
    return ("train", "--model", model, "--data", data, "--use_cpu", *arguments)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# ------------------------------------------------------------------ help, doctor


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    text = run("--help")
    commands = text.partition("Commands:")[2].split("\n")
    names = [line.split()[0] for line in commands if line.strip()]
    assert names == [
        "demo",
        "check",
        "collect",
        "train",
        "evaluate",
        "diagnose",
        "evolve",
        "inspect",
        "report",
        "subgoals",
        "behaviours",
        "bench",
        "warmup",
        "doctor",
    ]
    assert run("--version").strip().endswith(__version__)


@pytest.mark.parametrize("arguments", [["--help"], ["collect", "--help"], ["demo", "--help"]])
def test_help_loads_nothing_heavy_or_optional(arguments: list[str]) -> None:
    heavy = ("transformers.trainer", "minigrid", "gymnasium", "matplotlib", "peft", "triton")
    finished = python(
        "import sys\n"
        "from stepagent.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    assert "Usage:" in finished.stdout
    assert finished.stderr == "[]\n"


def test_train_help_shows_stepagents_own_options_and_where_the_rest_is() -> None:
    text = run("train", "--help")
    for option in ("--lora-rank", "--resume", "--method", "--beta", "--states"):
        assert option in text
    assert "#transformers.TrainingArguments" in text
    assert "--adam_beta1" not in text


def test_doctor_says_which_path_each_op_takes_and_why() -> None:
    found = report("doctor")
    steps = {"step_sums", "step_rewards", "step_pair_loss", "step_gae"}
    logprobs = {"linear_logprobs", "linear_logprob_diff", "token_logprobs", "logprob_diff"}
    assert set(found["ops"]) == logprobs | steps
    if not torch.cuda.is_available():
        expected = {"path": "torch", "why": "torch sees no CUDA device"}
        assert found["ops"]["token_logprobs"] == expected
        assert found["torch"]["devices"] == []
    assert found["core"]["error"] is None
    assert Path(found["core"]["path"]).exists()
    assert found["extras"]["demo"] == {"installed": True, "missing": [], "install": None}
    text = run("doctor")
    assert __version__ in text
    assert found["core"]["path"] in text


def test_doctor_survives_a_triton_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not importable: " in report("doctor")["triton"]["error"]


def test_doctor_knows_the_extras_of_pyproject() -> None:
    declared: dict[str, set[str]] = {extra: set() for extra in EXTRAS}
    for requirement in requires("stepagent") or []:
        name, _, marker = requirement.partition(";")
        extra = marker.partition("extra ==")[2].strip().strip("'\"")
        if extra in declared:
            declared[extra].add({"scikit-learn": "sklearn"}.get(name.strip(), name.strip()))
    assert declared == {extra: set(modules) for extra, modules in EXTRAS.items()}


# ------------------------------------------------------------------ demo


def test_demo_reports_its_metrics_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo itself takes minutes; this is what the command makes of it."""

    def run_demo(output: Path, settings: Settings, method: str) -> dict[str, Any]:
        print("a line that a library prints")
        return {"output": str(output), "seed": settings.seed, "method": method}

    monkeypatch.setattr("stepagent.tools.demo.run_demo", run_demo)
    monkeypatch.setattr("stepagent.report.demo.closing_table", lambda found: f"table of {found}")
    demo = ("demo", "--seed", 5, "--method", "inverse", "--output", tmp_path)
    metrics = {"output": str(tmp_path), "seed": 5, "method": "inverse"}
    assert report(*demo) == metrics
    text = run(*demo)
    assert text.startswith(f"table of {metrics}\nWrote ")
    assert str(tmp_path) in text


def test_an_interrupted_demo_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(output: Path, settings: Settings, method: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepagent.tools.demo.run_demo", run_demo)
    result = invoke("demo", "--output", tmp_path)
    assert result.exit_code == 130
    assert "Interrupted: the same command continues where it stopped" in result.stderr


# ------------------------------------------------------------------ collect, evaluate


def test_collect_keeps_the_experts_successes_and_says_what_it_dropped(tmp_path: Path) -> None:
    # Four steps are enough for some of these episodes.
    path = tmp_path / "made" / "some.jsonl"
    some = ("collect", "--env", ENV, "--episodes", 8, "--max-steps", 4, "--output", path)
    found = report(*some)
    assert 0 < found["kept"] < 8
    kept = found["kept"]
    assert found == {
        "path": str(path),
        "environment": ENV,
        "policy": "expert",
        "episodes": 8,
        "kept": kept,
        "success_rate": kept / 8,
    }
    trajectories = load_trajectories(path)
    assert len(trajectories) == kept
    assert all(trajectory.meta["success"] for trajectory in trajectories)
    text = run(*some)
    assert f"dropped {8 - kept} of 8 episodes" in text
    assert f"Wrote {kept} trajectories to {path}" in text


def test_collect_keeps_every_episode_of_another_policy(tmp_path: Path) -> None:
    path = tmp_path / "random.jsonl"
    options = ("--policy", "random", "--episodes", 3, "--max-steps", 2, "--seed-start", 7)
    found = report("collect", "--env", ENV, *options, "--output", path)
    assert found["kept"] == 3
    assert [trajectory.meta["seed"] for trajectory in load_trajectories(path)] == [7, 8, 9]


def test_collect_writes_nothing_when_no_episode_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    options = ("--env", "babyai:GoToLocal", "--episodes", 1, "--max-steps", 1)
    assert "none of 1 expert episodes" in error("collect", *options, "--output", path)
    assert not path.exists()


def test_evaluate_tells_the_expert_from_chance(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    common = ("evaluate", "--env", ENV, "--episodes", 6)
    expert = report(*common, "--policy", "expert", "--output", path)
    chance = report(*common, "--policy", "random", "--max-steps", 6)
    of_six = {"mean": 1, "low": pytest.approx(0.6097, abs=1e-4), "high": 1}  # Wilson's
    for name in ("success", "progress_rate", "grounding_accuracy"):
        assert expert["metrics"][name] == of_six
    assert (expert["episodes"], expert["environment"], expert["success_rate"]) == (6, ENV, 1)
    found = chance["metrics"]["success"]
    assert found["low"] <= found["mean"] <= found["high"]
    assert found["mean"] == chance["success_rate"] < 1
    assert chance["metrics"]["steps"]["mean"] <= 6
    assert len(chance["progress_curve"]) <= 7
    assert len(load_trajectories(path)) == 6
    assert chance == report(*common, "--policy", "random", "--max-steps", 6)


def test_evaluate_prints_its_figures_for_a_person(tmp_path: Path) -> None:
    text = run("evaluate", "--env", ENV, "--episodes", 2, "--policy", "expert")
    assert "success             100.0%  (95 %: 34.2% to 100.0%)" in text
    assert "2 episodes, seeds 0-1\n" in text


def test_seeds_say_which_episodes_are_run(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    common = ("evaluate", "--env", ENV, "--policy", "random", "--max-steps", 2)
    found = report(*common, "--seeds", "7-9,3", "--output", path)
    assert (found["episodes"], found["seeds"]) == (4, "7-9,3")
    assert [trajectory.meta["seed"] for trajectory in load_trajectories(path)] == [7, 8, 9, 3]
    alike = report(*common, "--seed-start", 7, "--episodes", 3)
    assert (alike["episodes"], alike["seeds"]) == (3, "7-9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "1-"), "'1-' is no list such as 0-99,200"),
        (("--seeds", "a"), "'a' is no list such as 0-99,200"),
        (("--seeds", "-3"), "'-3' is no list such as 0-99,200"),
        (("--seeds", "5-3"), "'5-3' must name at least one seed, and each once"),
        (("--seeds", "1,0-2"), "'1,0-2' must name at least one seed, and each once"),
        (("--seeds", "1", "--episodes", 3), "--seeds says which episodes; --episodes and"),
        (("--seeds", "1", "--seed-start", 0), "--seeds says which episodes; --episodes and"),
    ],
)
def test_wrong_seeds_are_named(options: tuple[object, ...], message: str) -> None:
    result = invoke("evaluate", "--env", ENV, "--policy", "random", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_expert_is_asked_where_chance_acts_and_workers_change_nothing() -> None:
    common = ("evaluate", "--env", ENV, "--policy", "random", "--episodes", 4, "--max-steps", 5)
    found = report(*common, "--query-expert")
    assert 0 < found["metrics"]["agreement"]["mean"] < 1
    assert found == report(*common, "--query-expert", "--workers", 2)
    assert "agreement" not in report(*common)["metrics"]


def test_two_policies_are_compared_pair_by_pair(tmp_path: Path) -> None:
    path = tmp_path / "chance.jsonl"
    common = ("evaluate", "--env", ENV, "--max-steps", 6)
    chance = report(*common, "--policy", "random", "--episodes", 6, "--output", path)
    expert = ("--policy", "expert", "--episodes", 6, "--against", path)
    found = report(*common, *expert)
    assert found["against"]["path"] == str(path)
    assert (found["against"]["pairs"], found["against"]["crashed"]) == (6, 0)
    for name, difference in found["against"]["differences"].items():
        both = found["metrics"][name]["mean"], chance["metrics"][name]["mean"]
        assert difference["mean"] == pytest.approx(both[0] - both[1])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert f"less {path}, 6 pairs of episodes\nsuccess             +" in run(*common, *expert)
    few = ("--policy", "expert", "--seeds", "4-7", "--against", path)
    assert (
        f"against must have the episodes of episodes, got none of {ENV} seed 6, {ENV} seed 7"
        in error(*common, *few)
    )


def test_what_an_environment_says_of_its_episodes_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(envs, "factory", lambda *_: Labelled)
    common = ("evaluate", "--env", "labelled:", "--policy", "expert", "--seeds", "3-5")
    found = report(*common)
    assert list(found["by_task"]) == ["task 3", "task 4", "task 5"]
    assert {name: group["episodes"] for name, group in found["by_difficulty"].items()} == {
        "easy": 1,
        "hard": 2,
    }
    assert found["by_difficulty"]["hard"]["metrics"]["success"]["mean"] == 1
    assert "difficulty hard: success 100.0%, progress rate 100.0% over 2 episodes" in run(*common)


# ------------------------------------------------------------------ train, inspect


def test_an_agent_is_trained_evaluated_and_inspected(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "agent"
    trained = report(
        *train(folder, "--method", "implicit", "--cycles", 2, "--output-dir", output),
        *("--learning_rate", 1e-3, "--seed=3"),
        *("--eval-data", folder / "expert.jsonl", "--eval-strategy", "epoch"),
        *(
            "--env",
            ENV,
            "--eval-episodes",
            2,
            "--eval-seed-start",
            50,
            "--max-steps-per-episode",
            1,
        ),
    )
    log = json.loads((output / "log.json").read_text())
    evaluations = [entry for entry in log if "eval_agreement" in entry]
    assert len(evaluations) == 2
    assert {"eval_nll", "eval_reward_margin", "eval_success_rate"} <= evaluations[0].keys()
    assert trained["output_dir"] == str(output)
    assert trained["method"] == "implicit"
    assert [cycle["cycle"] for cycle in trained["cycles"]] == [0, 1]
    assert {"agreement", "mean_loss", "reward_margin", "kl"} <= trained["cycles"][0].keys()
    assert trained["steps"] == 2

    model = ("--env", ENV, "--policy", output, "--episodes", 2, "--max-steps", 2)
    episodes = ("--max-new-tokens", 2, "--output", output / "episodes.jsonl")
    evaluated = report("evaluate", *model, *episodes)
    assert evaluated["metrics"]["steps"]["mean"] == 2

    page = tmp_path / "report.html"
    assert report("report", output, "--output", page)["runs"] == {"agent": 2}
    assert "Training, cycle by cycle" in page.read_text()

    path = tmp_path / "steps.jsonl"
    options = ("--data", folder / "expert.jsonl", "--output", path, "--samples", 2)
    options += ("--max-batch-tokens", 200)
    inspected = report("inspect", "--model", output, *options)
    trajectories = load_trajectories(folder / "expert.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert inspected["steps"] == sum(t.num_steps for t in trajectories)
    agreed = []
    for index, (record, trajectory) in enumerate(zip(records, trajectories, strict=True)):
        assert (record["index"], record["id"]) == (index, trajectory.id)
        assert record["run"]["max_batch_tokens"] == 200  # it decides the rounding
        experts = [m["content"] for m in trajectory.messages if m["role"] == "assistant"]
        for step, expert in zip(record["steps"], experts, strict=True):
            assert step["expert"] == expert
            assert len(step["samples"]) == 2
            for sample in step["samples"]:
                assert len(sample["logps"]) == len(sample["token_ids"])
                ended = sample["token_ids"][-1] == 4
                agreed.append(ended and sample["text"] == expert)
    assert inspected["agreement"] == pytest.approx(sum(agreed) / len(agreed))


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT 0.21 asks for it
def test_a_supervised_adapter_learns_the_experts_words(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    output = tmp_path / "adapter"
    options = ("--method", "sft", "--num_train_epochs", 2, "--lora-rank", 4)
    trained = report(*train(folder, *options, "--output_dir", output))
    assert trained["cycles"] == []
    assert (output / "adapter_model.safetensors").exists()
    path = tmp_path / "steps.jsonl"
    data = ("--data", folder / "expert.jsonl", "--output", path, "--temperature", 0)
    assert "agreement with the expert" in run("inspect", "--model", output, *data)


def test_a_teacher_is_given_by_name(folder: Path, tmp_path: Path) -> None:
    options = ("--method", "distillation", "--cycles", 1, "--output_dir", tmp_path / "agent")
    (cycle,) = report(*train(folder, *options, "--ref-model", folder / "model"))["cycles"]
    assert cycle["reverse_kl"] == pytest.approx(0, abs=1e-5)  # the agent is its own teacher


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_server_acts_with_the_adapter_in_training(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    options = ("--cycles", 2, "--lora-rank", 4, "--output_dir", tmp_path / "agent")
    with ModelServer(AutoModelForCausalLM.from_pretrained(folder / "model")) as server:
        trained = report(*train(folder, *options, "--engine", server.url))
    assert [verb for verb, _ in server.told] == ["load", "unload"] * 2
    assert all(cycle["engine_gap"] < 1e-4 for cycle in trained["cycles"])


def test_the_agents_own_states_are_answered_by_the_environments_expert(
    folder: Path, tmp_path: Path
) -> None:
    options = ("--states", "agent", "--cycles", 1, "--rollouts", 2, "--max_steps_per_episode", 2)
    trained = report(*train(folder, *options, "--env", ENV, "--output_dir", tmp_path / "agent"))
    assert len(trained["cycles"]) == 1


def test_an_interrupted_run_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepagent.learning.trainer import StepAgentTrainer

    begin = StepAgentTrainer.begin_epoch

    def interrupted(self: StepAgentTrainer, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        begin(self, epoch)

    command = train(folder, "--cycles", 2, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(StepAgentTrainer, "begin_epoch", interrupted)
        result = invoke(*command)
    assert result.exit_code == 130
    hint = f"Interrupted: the same command with --resume continues from {tmp_path}/checkpoint-1"
    assert hint in result.stderr
    assert "add --resume to continue it" in error(*command)
    trained = report(*command, "--resume")
    assert trained["steps"] == 2
    assert [cycle["cycle"] for cycle in trained["cycles"]] == [0, 1]


# ------------------------------------------------------------------ bad input


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    model = ("--model", folder / "model", "--data", missing)
    for command in ("train", *model), ("inspect", *model, "--output", tmp_path / "o"):
        assert str(missing) in error(*command, exit_code=2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "column 2"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "a message must be an assistant's"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "'robot'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(
    folder: Path, tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "bad.jsonl"
    good = (folder / "expert.jsonl").read_text().split("\n")[0]
    path.write_text(f"{good}\n{line}\n")
    model = ("--model", folder / "model", "--data", path)
    message = error("inspect", *model, "--output", tmp_path / "steps.jsonl")
    assert f"{path}:2" in message
    assert reason in message


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (("--bta", "1"), 2, "No such option '--bta'. (Did you mean"),
        (("--bta=1",), 2, "No such option '--bta'"),
        (("--sample", "2"), 2, "No such option '--sample'"),  # no abbreviations
        (("--method", "magic"), 2, "'--method': 'magic' is not one of 'sft'"),
        (("--beta", "much"), 2, "'--beta': 'much' is not a valid float"),
        (("--beta", "-1"), 1, "beta must be finite and > 0, got -1.0"),
        (("surplus",), 2, "unexpected extra argument (surplus)"),
        (("--env", ENV), 2, "--env is of no use with --states expert"),
        (("--states", "agent"), 1, "states='agent' needs env"),
        (("--lora-rank", "0"), 2, "'--lora-rank'"),
        (("--engine", "vllm"), 2, "'vllm' is no server's URL"),
        (("--engine", "http://localhost:1"), 1, "has none: give a peft_config"),
        (("--method", "distillation"), 1, "method='distillation' needs a ref_model: the teacher"),
        (("--resume",), 1, "there is no checkpoint in"),
        (("--max_tokens", "5"), 1, "max_tokens must be at least"),
    ],
)
def test_a_wrong_training_option_is_named(
    folder: Path, tmp_path: Path, options: tuple[str, ...], exit_code: int, message: str
) -> None:
    command = train(folder, "--output_dir", tmp_path / "agent", *options)
    assert message in error(*command, exit_code=exit_code)
    assert not (tmp_path / "agent" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (("--env", "chess"), 1, "environment must be one of "),
        (("--env", "babyai:GoHome"), 1, "level of BabyAI must be a known one"),
        (("--env", ENV, "--policy", "nowhere"), 2, "'nowhere' is neither 'expert' nor 'random'"),
        (("--env", ENV, "--episodes", "0"), 2, "'--episodes'"),
        (("--env", ENV, "--episode", "5"), 2, "'--episode'"),
    ],
)
def test_a_wrong_evaluation_option_is_named(
    options: tuple[str, ...], exit_code: int, message: str
) -> None:
    assert message in error("evaluate", "--policy", "random", *options, exit_code=exit_code)


def test_a_wrong_environment_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    assert "environment must be one of " in error(
        "evaluate", "--env", "chess", "--policy", tmp_path
    )


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    message = error("evaluate", "--env", ENV, "--policy", tmp_path)
    assert f"'{tmp_path}' must be a folder with a model and its tokenizer" in message


def test_a_tokenizer_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    save_agent(tmp_path, template=None)
    command = ("train", "--model", tmp_path, "--data", folder / "expert.jsonl")
    assert "must have a chat template, it has none" in error(*command)


def test_an_output_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "steps.jsonl"
    assert str(tmp_path / "file") in error("collect", "--env", ENV, "--output", path)


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("minigrid", ("demo",), "demo"),
        ("peft", ("train", "--lora-rank", 2), "train"),
    ],
)
def test_a_missing_extra_is_named(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    arguments: tuple[object, ...],
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    command, *options = arguments
    files = train(folder)[1:] if command == "train" else ("--output", tmp_path)
    message = error(command, *files, *options)
    assert f"needs {module}: pip install 'stepagent[{extra}]'" in message


def test_an_environment_without_its_package_names_the_extra() -> None:
    finished = python(
        "import sys; sys.modules['minigrid'] = None\n"
        "from stepagent.cli import main\n"
        f"main(['evaluate', '--env', '{ENV}', '--policy', 'random'])"
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert "Error: BabyAI environments need minigrid" in finished.stderr
    assert "pip install 'stepagent[demo]'" in finished.stderr


def test_ctrl_c_ends_with_130_and_writes_nothing() -> None:
    options = ("evaluate", "--env", ENV, "--policy", "expert", "--episodes", "100000")
    command = [sys.executable, "-m", "stepagent", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that starts tests in the background may have set Ctrl-C to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    os.read(process.stderr.fileno(), 1)  # the progress bar: episodes are running
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == b""
    assert stderr.endswith(b"Interrupted: nothing was written\n")


@pytest.mark.filterwarnings("ignore:.*crashed:RuntimeWarning")
@pytest.mark.parametrize("bad", [(6,), (5, 6, 7)])
def test_a_crashed_episode_is_neither_success_nor_failure(
    bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(envs, "factory", lambda *_: hostile("raises", *bad, at=0))
    options = ("--env", "hostile:x", "--policy", "expert", "--episodes", 3, "--seed-start", 5)
    if len(bad) == 3:
        assert "an episode must have ended, got 3 that crashed, the first: " in error(
            "evaluate", *options
        )
        return
    found = report("evaluate", *options, "--output", tmp_path / "episodes.jsonl")
    assert (found["episodes"], found["crashed"], found["success_rate"]) == (2, 1, 1.0)
    assert len(load_trajectories(tmp_path / "episodes.jsonl")) == 2
    text = run("evaluate", *options)
    assert "2 episodes, seeds 5-7; 1 more crashed" in text
    collected = report("collect", *options, "--output", tmp_path / "expert.jsonl")
    assert (collected["episodes"], collected["kept"]) == (3, 2)


@pytest.mark.filterwarnings("ignore:.*crashed:RuntimeWarning")
def test_what_a_crashed_episode_did_before_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(envs, "factory", lambda *_: hostile("raises", 7))
    path = tmp_path / "episodes.jsonl"
    options = ("evaluate", "--env", "hostile:x", "--policy", "expert", "--seeds", "5-7")
    found = report(*options, "--output", path)
    assert (found["episodes"], found["crashed"], found["written"]) == (2, 1, 3)
    assert [t.meta.get("crashed") for t in load_trajectories(path)] == [
        None,
        None,
        "step raised KeyError: 'lost my map'",
    ]
    assert f"Wrote 3 episodes to {path}" in run(*options, "--output", path)
