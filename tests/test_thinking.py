"""Agents whose thoughts leave the history: each action on the state that was seen, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizers import THINKING, byte_level_bpe

from stepagent import Trajectory, Trunk, encode, inspect, pack_step_pairs
from stepagent.models import score_trees
from stepagent.ops import token_logprobs

END = "<|im_end|>"


def thinking_agent(turns):
    """A conversation of so many turns, with thoughts in each."""
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"You are in room {turn}. On the table you see an apple."},
            {
                "role": "assistant",
                "content": f"go to room {turn + 1}",
                "reasoning_content": f"the apple of room {turn} is not the one",
            },
        ]
    return Trajectory(messages)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_bpe(THINKING)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)


def own_logps(model, prompt, action):
    ids = torch.tensor([[*prompt, *action]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return token_logprobs(logits, ids[0, len(prompt) :]).numpy()


def test_every_state_is_its_prompt_and_every_action_thinks(tokenizer):
    trajectory = thinking_agent(6)
    trunk = encode(trajectory, tokenizer)
    assert len(trunk.rewinds) == 5
    for step, index in enumerate(trajectory.step_indices):
        prompt = tokenizer.apply_chat_template(
            trajectory.messages[:index], add_generation_prompt=True, return_dict=False
        )
        assert trunk.state_ids(step).tolist() == prompt
        start, stop = trunk.action_spans[step]
        message = trajectory.messages[index]
        assert tokenizer.decode(trunk.input_ids[start:stop]) == (
            f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}{END}"
        )


def test_tree_log_probs_are_those_of_each_steps_own_prompt(tokenizer, model):
    trajectory = thinking_agent(12)
    trunk = encode(trajectory, tokenizer)
    tried = [[tokenizer(f"look {t}{END}").input_ids] for t in range(trunk.num_steps)]
    (tree,) = pack_step_pairs([trunk], [tried])
    with torch.no_grad():
        logps = score_trees(model, [tree]).numpy()
    alone = []
    for step, (start, stop) in enumerate(trunk.action_spans.tolist()):
        prompt = trunk.state_ids(step).tolist()
        for action in (trunk.input_ids[start:stop].tolist(), *tried[step]):
            alone.append(own_logps(model, prompt, action))
    np.testing.assert_allclose(logps, np.concatenate(alone), atol=1e-4)
    separate = sum(
        len(trunk.state_ids(t)) + stop - start for t, (start, stop) in enumerate(trunk.action_spans)
    )
    assert len(trunk.input_ids) * 3 < separate


@pytest.mark.parametrize("calls", [False, True])
def test_under_qwen3s_own_template_a_tree_is_each_steps_own_prompt(calls):
    """Also where an agent calls tools, whose answers keep its thoughts in the history."""
    pytest.importorskip("trl")
    from conversations import TOOLS, tokenizer_of

    qwen = tokenizer_of("qwen3")
    model = tiny_model("qwen3", vocab_size=len(qwen), max_position_embeddings=8192)
    messages = thinking_agent(12).messages
    if calls:
        for turn in range(0, len(messages), 3 * 2):  # every third turn begins with a call
            call = {"function": {"name": "search", "arguments": {"q": f"key {turn}"}}}
            asked = {**messages[turn + 1], "content": "", "tool_calls": [call]}
            messages[turn + 1] = [asked, {"role": "tool", "content": "none"}, messages[turn + 1]]
        messages = [m for part in messages for m in (part if isinstance(part, list) else [part])]
    trajectory = Trajectory(messages, tools=TOOLS if calls else None)
    trunk = encode(trajectory, qwen)
    assert len(trunk.rewinds) == 11
    tried = [[qwen(f"look {t}{END}").input_ids] for t in range(trunk.num_steps)]
    (tree,) = pack_step_pairs([trunk], [tried])
    with torch.no_grad():
        logps = score_trees(model, [tree]).numpy()
    alone, separate = [], 0
    for step, index in enumerate(trajectory.step_indices):
        prompt = qwen.apply_chat_template(
            messages[:index],
            tools=trajectory.tools,
            add_generation_prompt=True,
            return_dict=False,
        )
        start, stop = trunk.action_spans[step]
        separate += len(prompt) + int(stop - start)
        for action in (trunk.input_ids[start:stop].tolist(), *tried[step]):
            alone.append(own_logps(model, prompt, action))
    np.testing.assert_allclose(logps, np.concatenate(alone), atol=1e-4)
    assert len(trunk.input_ids) * 3 < separate


@pytest.mark.parametrize("budget", [None, 64])
def test_inspection_of_a_branching_trunk_is_that_of_its_lines(tokenizer, model, budget):
    trunk = encode(thinking_agent(5), tokenizer)
    ends = [tokenizer.convert_tokens_to_ids(END)]
    options = {"max_new_tokens": 6, "temperature": 0.0, "eos_token_id": ends}
    (steps,) = inspect(model, [trunk], max_batch_tokens=budget, **options)
    alone = [step for line in trunk.lines() for step in inspect(model, [line], **options)[0]]
    assert len(steps) == len(alone) == 5
    for (branch,), (other,) in zip(steps, alone, strict=True):
        assert branch.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(branch.logps, other.logps, atol=1e-4)


@pytest.mark.parametrize(
    ("rewinds", "message"),
    [
        ([[4, 4]], r"rewinds\[0\] must go back.*, got \[4, 4\]"),
        ([[3, 1]], "must not lie in or just before the action"),
        ([[7, 1]], "no action follows"),
        ([[4, 1], [4, 0]], "must come after the one before it"),
        ([[4]], r"rewinds must be .*, got shape \(1, 1\)"),
    ],
)
def test_a_rewind_that_hangs_nothing_on_a_state_is_refused(rewinds, message):
    with pytest.raises(ValueError, match=message):
        Trunk([1, 2, 3, 4, 5, 6, 7, 8], [[2, 4], [5, 7]], rewinds)
