"""``stepagent check``, and ``--on-error`` of the commands that read the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_thinking import thinking_agent
from tiny_tokenizers import CHATML, LLAMA3, THINKING, byte_level_bpe

from stepagent import encode
from stepagent.cli import main

AGENTGYM = {
    "item_id": "webshop_1",
    "conversations": [
        {"from": "human", "loss": None, "value": "Look for red shoes."},
        {"from": "gpt", "loss": False, "value": "Ok."},
        {"from": "human", "loss": None, "value": "Page \x1b[31m 1"},
        {"from": "gpt", "loss": True, "value": "Thought: buy\nAction: click[buy]"},
    ],
    "success": True,
}
SHAREGPT = {
    "id": 2,
    "system": "act",
    "reward": 1.0,
    "conversations": [{"from": "human", "value": "go"}, {"from": "gpt", "value": "left"}],
}
BAD = {"id": 3, "conversations": [{"from": "human", "value": "go"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tokenizer alone: no weights lie there to be loaded."""
    return save(tmp_path_factory.mktemp("model"), CHATML, "<|im_end|>")


def save(folder, template, end):
    tokenizer = byte_level_bpe(template)
    tokenizer.eos_token = end
    tokenizer.save_pretrained(folder)
    return folder


def write(folder, *rows):
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def check(*arguments):
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def report(*arguments):
    result = check(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_it_counts_what_is_scored(tmp_path, model):
    code, counts = report(write(tmp_path, AGENTGYM, SHAREGPT), "--model", model)
    assert code == 0
    assert counts["trajectories"] == counts["steps"] == 2
    assert counts["unscored_assistant_messages"] == counts["with_reward"] == 1
    assert counts["end_tokens"] == ["<|im_end|>"]
    assert counts["meta"] == {"success": 1}
    tokenizer = byte_level_bpe(CHATML)
    action = "Thought: buy\nAction: click[buy]<|im_end|>"
    scored = sum(len(tokenizer(t).input_ids) for t in (action, "left<|im_end|>"))
    assert counts["scored_tokens"] == scored
    whole = (
        "<|im_start|>user\nLook for red shoes.<|im_end|>\n<|im_start|>assistant\nOk.<|im_end|>\n"
        f"<|im_start|>user\nPage \x1b[31m 1<|im_end|>\n<|im_start|>assistant\n{action}\n",
        "<|im_start|>system\nact<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n"
        "<|im_start|>assistant\nleft<|im_end|>\n",
    )
    tokens = sum(len(tokenizer(text).input_ids) for text in whole)
    assert counts["state_tokens"] == tokens - scored


def test_its_sample_shows_states_actions_and_the_end_and_nothing_writes_to_the_terminal(
    tmp_path, model
):
    path = write(tmp_path, AGENTGYM, SHAREGPT)
    text = check(path, "--model", model).stdout
    assert f"{path}: item 0, 'webshop_1'" in text
    assert "state  | Ok.<|im_end|>" in text
    assert "action | Thought: buy\naction | Action: click[buy]<|im_end|>" in text
    assert r"Page \x1b[31m 1" in text
    assert "\x1b" not in text
    assert "item 1" not in text
    assert "item 1, '2'" in check(path, "--model", model, "--show", 2).stdout
    coloured = CliRunner().invoke(main, ["check", str(path), "--model", str(model)], color=True)
    dim, bright, end = "\x1b[2m", "\x1b[32m\x1b[1m", "\x1b[7m"
    assert f"state  | {dim}Ok.<|im_end|>\x1b[0m" in coloured.stdout
    assert f"action | {bright}Action: click[buy]\x1b[0m{end}<|im_end|>" in coloured.stdout


def test_refused_rows_are_listed_and_fail_unless_skipped(tmp_path, model):
    path = write(tmp_path, BAD, SHAREGPT, {"text": "x"})
    code, counts = report(path, "--model", model)
    assert code == 1
    assert [row["where"] for row in counts["refused"]] == [f"{path}: item 0", f"{path}: item 2"]
    assert counts["refused"][0]["reason"].startswith("a message must be an assistant's, got none")
    assert "a text alone" in counts["refused"][1]["reason"]
    result = check(path, "--model", model)
    assert "Refused: 2 of 3 rows" in result.stdout
    assert "2 of 3 rows are refused: mend them, or leave them out with --on-error" in result.stderr
    code, counts = report(path, "--model", model, "--on-error", "skip")
    assert (code, counts["trajectories"], len(counts["refused"])) == (0, 1, 2)
    code, _ = report(write(tmp_path, BAD), "--model", model, "--on-error", "skip")
    assert code == 1  # nothing is left


def test_records_of_rollouts_are_told(tmp_path, model):
    tokenizer = byte_level_bpe(CHATML)
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "left"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text).input_ids[:-1]
    end = len(ids)
    start = end - 1 - len(tokenizer("left").input_ids)
    meta = {"token_ids": ids, "action_spans": [[start, end]]}
    code, counts = report(write(tmp_path, {"messages": messages, "meta": meta}), "--model", model)
    assert (code, counts["recorded"], counts["scored_tokens"]) == (0, 1, end - start)
    other = save(tmp_path / "other", LLAMA3, "<|eot_id|>")
    code, counts = report(tmp_path / "data.json", "--model", other)
    assert code == 1
    assert "made with another tokenizer, template or tools" in counts["refused"][0]["reason"]


def test_a_branching_trajectory_is_counted_and_shown_as_the_agent_sees_it(tmp_path):
    folder = save(tmp_path / "model", THINKING, "<|im_end|>")
    trajectory, tokenizer = thinking_agent(3), byte_level_bpe(THINKING)
    path = write(tmp_path, {"messages": trajectory.messages})
    code, counts = report(path, "--model", folder)
    trunk = encode(trajectory, tokenizer)
    steps = [
        (trunk.state_ids(t).tolist(), trunk.input_ids[a:b].tolist())
        for t, (a, b) in enumerate(trunk.action_spans)
    ]
    assert (code, counts["steps"], counts["rewritten"]) == (0, 3, 1)
    assert counts["scored_tokens"] == sum(len(action) for _, action in steps)
    beginnings = {tuple(s[: i + 1]) for s, _ in steps for i in range(len(s))}
    inner = {tuple(s + a[:i]) for s, a in steps for i in range(1, len(a) + 1)}
    behind = len(trunk.input_ids) - int(trunk.action_spans[-1, 1])
    assert counts["state_tokens"] == len(beginnings - inner) + behind  # each once, as in the tree
    assert counts["longest"] == max(len(s + a) for s, a in steps) + behind
    text = check(path, "--model", folder).stdout
    for turn, message in enumerate(trajectory.messages[1::2]):
        assert f"action | {message['reasoning_content']}\n" in text
        assert f"action | {message['content']}<|im_end|>\n" in text
        rewritten = f"state  | {message['content']}<|im_end|>\nstate  | <|im_start|>user\n"
        assert (rewritten in text) == (turn < 2)  # the next state has it without its thought
    kept = len(steps[0][0])
    assert f"back   | to token {kept}, from which the history is rewritten:" in text
    assert text.count("back   |") == 2
    assert "1 trajectories branch: the chat template rewrites their history" in text


@pytest.mark.parametrize("template", ["qwen2_5", "llama3", "phi3", "gemma"])
def test_real_templates(tmp_path, template):
    found = find_spec("trl")
    if found is None:
        pytest.skip("needs trl, for its templates")
    folder = Path(found.origin).parent / "chat_templates"
    tokenizer = byte_level_bpe((folder / f"{template}.jinja").read_text())
    end = {
        "qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>", "gemma": "<end_of_turn>"
    }[template]  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    if template == "qwen2_5":  # the others end a text with another token than a turn
        tokenizer.eos_token = end
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "left"}]}
    ]
    code, counts = report(write(tmp_path, *rows), "--model", tmp_path / "model")
    assert (code, counts["steps"], counts["end_tokens"]) == (0, 1, [end])


def test_the_command_itself_runs_on_a_tokenizer_alone(tmp_path, model):
    path = write(tmp_path, AGENTGYM)
    command = [sys.executable, "-m", "stepagent", "check", str(path), "--model", str(model)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["trajectories"] == 1


@pytest.mark.slow
def test_train_and_inspect_leave_bad_rows_out_when_told_to_and_list_them(tmp_path):
    pytest.importorskip("minigrid")
    from tiny_models import END, babyai_tokenizer, tiny_agent

    agent, folder = tiny_agent(), tmp_path / "model"
    agent.generation_config.eos_token_id = END
    agent.save_pretrained(folder)
    babyai_tokenizer().save_pretrained(folder)
    good = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "left"}]
    }
    data = write(tmp_path, good, BAD, good)
    inspect = ["inspect", "--output", tmp_path / "steps.jsonl", "--max-new-tokens", 2]
    train = ["train", "--output_dir", tmp_path / "run", "--method", "sft", "--max_steps", 1]
    for command in (inspect, train):
        whole = [*command, "--model", folder, "--data", data, "--json"]
        result = CliRunner().invoke(main, [str(word) for word in whole])
        assert result.exit_code == 1
        assert f"{data}: item 1: none of the 1 messages" in result.stderr
        whole += ["--on-error", "skip"]
        result = CliRunner().invoke(main, [str(word) for word in whole])
        assert result.exit_code == 0, result.stderr
        assert f"skipped {data}: item 1: none of the 1 messages" in result.stderr
        (skipped,) = json.loads(result.stdout)["skipped"]
        assert skipped["where"] == f"{data}: item 1"
