"""A run's arguments for the chat template: one and the same wherever the agent is prompted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_server_policies import ChattingServer, chat
from tiny_models import END, babyai_tokenizer, tiny_agent
from transformers import AutoTokenizer

import stepagent as sa
from stepagent import Trajectory, encode
from stepagent.acting.policies import ExpertPolicy, ModelPolicy
from stepagent.acting.rollout import action_tokens, run_episodes
from stepagent.cli import main
from stepagent.data.arguments import parse_arguments, run_arguments, with_arguments

LEVEL = "babyai:GoToLocalS6N2"
HINT = {"hint": "red"}
# The prompt and what is written of a turn begin with a hint, if there is one.
HINTED = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' and hint -%}{{ hint + ' ' }}{%- endif -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' + (hint + ' ' if hint else '') }}
{%- endif -%}
"""


@pytest.fixture(scope="module")
def tokenizer():
    return babyai_tokenizer(HINTED)


@pytest.fixture(scope="module")
def shown() -> list[Trajectory]:
    return [e.trajectory() for e in run_episodes(LEVEL, ExpertPolicy(), [0, 1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, shown) -> Path:
    folder = tmp_path_factory.mktemp("hinted")
    agent = tiny_agent()
    agent.generation_config.eos_token_id = END
    agent.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sa.save_trajectories(folder / "expert.jsonl", shown)
    return folder


def prompts(tokenizer, trajectory: Trajectory, **arguments: Any) -> list[list[int]]:
    """What the agent is given at each step."""
    return [
        tokenizer.apply_chat_template(
            trajectory.messages[:index], add_generation_prompt=True, return_dict=False, **arguments
        )
        for index in trajectory.step_indices
    ]


def states(trunk) -> list[list[int]]:
    return [trunk.state_ids(t).tolist() for t in range(trunk.num_steps)]


def test_a_tokenizer_carries_a_runs_arguments_and_is_saved_with_them(tokenizer, shown, tmp_path):
    carrying = with_arguments(tokenizer, HINT)
    assert (run_arguments(carrying), run_arguments(tokenizer)) == (HINT, {})
    assert states(encode(shown[0], carrying)) == prompts(tokenizer, shown[0], **HINT)
    assert states(encode(shown[0], tokenizer)) == prompts(tokenizer, shown[0])
    carrying.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert run_arguments(loaded) == HINT
    assert states(encode(shown[0], loaded)) == prompts(tokenizer, shown[0], **HINT)
    assert run_arguments(with_arguments(loaded, {"hint": "blue"})) == {"hint": "blue"}
    assert len(action_tokens("left", carrying)) == len(action_tokens("left", tokenizer)) == 2


def test_a_trajectorys_arguments_must_be_the_runs_where_both_have_one(tokenizer, shown):
    own = Trajectory(shown[0].messages, id="t", chat_template_kwargs={"hint": "blue"})
    assert states(encode(own, tokenizer)) == prompts(tokenizer, own, hint="blue")
    assert encode(own, with_arguments(tokenizer, {"hint": "blue"})).num_steps == own.num_steps
    with pytest.raises(ValueError, match=r"'t': .*has hint='blue', which must be the run's 'red'"):
        encode(own, with_arguments(tokenizer, HINT))


def test_rollouts_and_the_experts_answers_have_the_arguments_of_the_tokenizer(tokenizer):
    model, options = tiny_agent(), {"max_new_tokens": 3, "eos_token_id": END}
    policies = [
        ModelPolicy(model, tokenizer, chat_template_kwargs=HINT, **options),
        ModelPolicy(model, with_arguments(tokenizer, HINT), **options),
    ]
    for policy in policies:
        (episode,) = run_episodes(LEVEL, policy, [3], max_steps=3)
        assert episode.chat_template_kwargs == HINT
        record = episode.trajectory()
        assert states(episode.trunk) == prompts(tokenizer, record, **HINT)
        assert encode(record, tokenizer).input_ids.tolist() == episode.trunk.input_ids.tolist()
    common = {"tokenizer": tokenizer, "seeds": [3], "max_steps": 2, "temperature": 0.0, **options}
    trunks, branches = sa.rollout_and_query(model, LEVEL, chat_template_kwargs=HINT, **common)
    assert "red" in tokenizer.decode(trunks[0].state_ids(0)[-1:])
    assert all(len(tried) == 1 for tried in branches[0])


def test_a_policy_goes_on_from_a_trajectory_of_the_same_arguments_alone(tokenizer, shown):
    model, options = tiny_agent(), {"max_new_tokens": 2, "eos_token_id": END}
    hinted = Trajectory(shown[0].messages, id="t", meta=shown[0].meta, chat_template_kwargs=HINT)
    tools = [{"type": "function", "function": {"name": "go"}}]
    tooled = Trajectory(shown[0].messages, id="t", meta=shown[0].meta, tools=tools)
    same = ModelPolicy(model, tokenizer, chat_template_kwargs=HINT, **options)
    for trajectory in (hinted, shown[0]):
        sa.continue_rollouts(same, LEVEL, [trajectory], samples=1, max_steps=2)
    for policy, trajectory, match in (
        (ModelPolicy(model, tokenizer, **options), hinted, "with 'hint', which the policy must be"),
        (
            ModelPolicy(model, tokenizer, chat_template_kwargs={"hint": "blue"}, **options),
            hinted,
            "hint='red', which must be the run's 'blue'",
        ),
        (same, tooled, "has tools, of which a policy"),
    ):
        with pytest.raises(ValueError, match=match):
            sa.continue_rollouts(policy, LEVEL, [trajectory], samples=1, max_steps=2)


def test_a_server_is_sent_the_arguments_and_its_episodes_record_them():
    with ChattingServer() as server:
        (episode,) = run_episodes(LEVEL, chat(server, chat_template_kwargs=HINT), [3], max_steps=1)
        assert server.requests[0]["chat_template_kwargs"] == HINT
    assert episode.trajectory().chat_template_kwargs == HINT


@pytest.mark.parametrize("given", ["{", "3", '["a"]', '{"tools": []}', "", [("a",)]])
def test_an_option_that_is_no_object_of_arguments_is_refused(given):
    with pytest.raises(ValueError, match="chat_template_kwargs must be a JSON object of the chat"):
        parse_arguments(given)


# ------------------------------------------------------------------ training and commands


def trainer(tokenizer, rows, tmp_path, **options: Any) -> sa.StepAgentTrainer:
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "cycles": 1}
    env = LEVEL if options.get("states") == "agent" else None
    config = sa.StepAgentConfig(**given | {"disable_tqdm": True} | options)
    return sa.StepAgentTrainer(tiny_agent(), config, rows, tokenizer, env=env)


@pytest.mark.parametrize("given", [HINT, json.dumps(HINT)])
def test_training_uses_the_arguments_and_saves_them_with_the_tokenizer(
    tokenizer, shown, tmp_path, given
):
    run = trainer(tokenizer, shown, tmp_path, chat_template_kwargs=given)
    assert [states(t) for t in run._trunks] == [prompts(tokenizer, t, **HINT) for t in shown]
    run.save_model()
    assert run_arguments(AutoTokenizer.from_pretrained(tmp_path)) == HINT
    assert run_arguments(tokenizer) == {}  # the caller's stays as it is


def test_what_all_trajectories_give_alike_becomes_the_runs(tokenizer, shown, tmp_path):
    own = [Trajectory(t.messages, meta=t.meta, chat_template_kwargs=HINT) for t in shown]
    assert run_arguments(trainer(tokenizer, own, tmp_path).processing_class) == HINT
    mixed = [own[0], shown[1]]
    assert run_arguments(trainer(tokenizer, mixed, tmp_path).processing_class) == {}
    match = r"rollouts prompt the agent alike everywhere, but train_dataset\[0\] does not"
    with pytest.raises(ValueError, match=match):
        trainer(tokenizer, mixed, tmp_path, states="agent")


def test_rollouts_of_training_are_prompted_so(tokenizer, shown, tmp_path):
    run = trainer(
        *(tokenizer, shown, tmp_path),
        **{"states": "agent", "rollouts": 1, "max_steps_per_episode": 2, "max_new_tokens": 2},
        chat_template_kwargs=HINT,
    )
    (comparison,) = run._collector.collect(run.model, 0, sharded=False)
    assert tokenizer.decode(comparison.trunk.state_ids(1)).split()[-1] == "red"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_use_record_and_save_them(folder, tokenizer, tmp_path):
    option = ("--chat-template-kwargs", json.dumps(HINT))
    model, data = folder / "model", folder / "expert.jsonl"
    checked = invoke("check", data, "--model", model, *option)
    assert "assistant red" in " ".join(checked.stdout.split())
    out = tmp_path / "steps.jsonl"
    done = invoke("inspect", "--model", model, "--data", data, "--output", out, *option)
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text().splitlines()[0])
    assert record["run"]["chat_template_kwargs"] == HINT
    trained = tmp_path / "trained"
    training = ("train", "--model", model, "--data", data, "--output_dir", trained, "--use_cpu")
    done = invoke(*training, "--method", "sft", "--max_steps", 1, *option)
    assert done.exit_code == 0, done.output
    evaluation = ("evaluate", "--env", LEVEL, "--episodes", 1, "--max-steps", 2)
    for policy, given in ((trained, ()), (model, option)):
        out = tmp_path / f"{policy.name}.jsonl"
        done = invoke(*evaluation, "--policy", policy, "--output", out, *given)
        assert done.exit_code == 0, done.output
        (row,) = sa.load_trajectories(out)
        assert row.chat_template_kwargs == HINT
        assert row.meta["run"].get("chat_template_kwargs") == (HINT if given else None)
        trunk = encode(row, tokenizer)
        assert states(trunk) == prompts(tokenizer, row, **HINT)
        assert np.array_equal(trunk.input_ids, row.meta["token_ids"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("evaluate", "--policy", "random"), "--chat-template-kwargs is of no use with --policy"),
        (("evaluate", "--policy", "expert"), "--chat-template-kwargs is of no use with --policy"),
    ],
)
def test_an_option_without_a_model_is_refused(command, message):
    done = invoke(*command, "--env", LEVEL, "--chat-template-kwargs", "{}")
    assert done.exit_code == 2
    assert message in done.stderr
    bad = invoke(*command, "--env", LEVEL, "--chat-template-kwargs", "[1]")
    assert bad.exit_code == 2
    assert "must be a JSON object" in bad.stderr
