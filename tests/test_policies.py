"""Policies and rollouts in BabyAI: tokens as sampled, states as seen, answers as given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers
import torch
from tiny_models import END, babyai_tokenizer, generate, tiny_agent
from transformers import PreTrainedModel

from stepagent import envs
from stepagent.acting.policies import ExpertPolicy, ModelPolicy, RandomPolicy
from stepagent.acting.rollout import Episode, action_tokens, rollout_and_query, run_episodes
from stepagent.data.encoding import encode
from stepagent.envs import ExpertUnavailable
from stepagent.ops import token_logprobs
from stepagent.trees.tree import pack_step_pairs

LEVEL = "babyai:GoToLocalS6N2"
SEEDS = [3, 1, 4, 15, 9]
NEW = 4


class Steered:
    """A BabyAI level in which the expert's action is taken, whatever the policy says.

    So an untrained model's episodes go on and end at different steps.
    """

    def __init__(self) -> None:
        self._env = envs.make(LEVEL)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self._env.step(self._env.expert_action())


def model_policy(model=None, tokenizer=None, **options: Any) -> ModelPolicy:
    return ModelPolicy(
        model or tiny_agent(),
        tokenizer or babyai_tokenizer(),
        **{"max_new_tokens": NEW, "eos_token_id": END} | options,
    )


def mover() -> PreTrainedModel:
    """An untrained agent that says the words of real actions, and ends about half of them."""
    model, tokenizer = tiny_agent("phi", initializer_range=0.05), babyai_tokenizer()
    words = tokenizer.convert_tokens_to_ids(["left", "right", "forward"])
    with torch.no_grad():
        model.lm_head.bias[words] = 10.0
        model.lm_head.bias[END] = 11.0
    return model


def conversation(episode: Episode, steps: int) -> list[dict[str, str]]:
    """The messages before the action of this step, or all of them."""
    messages = []
    for observation, action in zip(episode.observations, episode.actions, strict=True):
        messages.append({"role": "user", "content": observation})
        messages.append({"role": "assistant", "content": action})
    return messages[: 2 * steps + 1]


def actions_of(episode: Episode) -> list[list[int]]:
    assert episode.trunk is not None
    return [episode.trunk.input_ids[a:b].tolist() for a, b in episode.trunk.action_spans]


# ------------------------------------------------------------------ the model as a policy


@pytest.mark.parametrize("batch_size", [64, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_greedy_actions_are_what_generate_writes_after_the_conversation(name, batch_size):
    tokenizer, ended = babyai_tokenizer(), set()
    for end_weight in (1, 3):  # the greater, the more actions end
        model = tiny_agent(name, seed=1)
        with torch.no_grad():
            model.get_output_embeddings().weight[END] *= end_weight
        policy = model_policy(model, tokenizer)
        episodes = run_episodes(Steered, policy, SEEDS, batch_size=batch_size)
        assert len({len(episode.actions) for episode in episodes}) > 2
        for episode in episodes:
            for t, action in enumerate(actions_of(episode)):
                rendered = tokenizer.apply_chat_template(
                    conversation(episode, t), tokenize=False, add_generation_prompt=True
                )
                ids = tokenizer(rendered, add_special_tokens=False).input_ids
                assert action == generate(model, np.array(ids), NEW)
                ended.add(action[-1] == END)
    assert ended == {True, False}  # the template has closed what the model did not


def test_a_trunk_is_the_conversation_and_its_spans_are_the_actions():
    tokenizer = babyai_tokenizer()
    ended = []
    for episode in run_episodes(LEVEL, model_policy(mover(), temperature=1.0), SEEDS, max_steps=6):
        ids = actions_of(episode)
        ended += [action[-1] == END for action in ids]
        texts = [tokenizer.decode(action).removesuffix("<|im_end|>").strip() for action in ids]
        assert texts == episode.actions
        messages = conversation(episode, len(ids))
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        # The last turn stays open where the model has not ended it.
        close = "" if ended[-1] else "<|im_end|>"
        whole = tokenizer.decode(episode.trunk.input_ids) + close
        assert "".join(whole.split()) == "".join(rendered.split())
    assert {True, False} == set(ended)


def test_expert_actions_taken_by_a_policy_encode_as_its_trunk():
    """Tokens kept from sampling are those of `encode` where every action has been ended."""
    tokenizer = babyai_tokenizer()
    policy = Scripted(tiny_agent(), tokenizer)
    for episode in run_episodes(LEVEL, policy, SEEDS, max_steps=6):
        expected = encode(episode.trajectory(), tokenizer)
        trunk = episode.trunk
        assert trunk.action_spans.tolist() == expected.action_spans.tolist()
        assert trunk.input_ids.tolist() == expected.input_ids[: len(trunk.input_ids)].tolist()
        assert episode.success == (episode.rewards[-1] > 0)


class Scripted(ModelPolicy):
    """A model policy whose model has been replaced by the environment's expert."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer, max_new_tokens=NEW, eos_token_id=END)

    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str]:
        tokens = [action_tokens(env.expert_action(), self._tokenizer).tolist() for env in envs]
        for dialogue, observation, ids in zip(self._dialogues, observations, tokens, strict=True):
            self._observe(dialogue, observation)
            dialogue.action_spans.append((len(dialogue.token_ids),) * 2)
            dialogue.token_ids += ids
        return [self._close(dialogue) for dialogue in self._dialogues]


def test_episodes_do_not_depend_on_the_batch_they_ran_in():
    model = tiny_agent()

    def sampled(batch_size=64, seeds=SEEDS, **options):
        policy = model_policy(model, temperature=1.0, **options)
        return run_episodes(Steered, policy, seeds, batch_size=batch_size)

    first = sampled()
    assert [episode.seed for episode in first] == SEEDS
    for again in (sampled(batch_size=2), sampled(batch_size=1)):
        assert [vars_of(e) for e in again] == [vars_of(e) for e in first]
    assert [vars_of(e) for e in sampled(seeds=SEEDS[::-1])] == [vars_of(e) for e in first[::-1]]
    assert [e.actions for e in sampled(seed=1)] != [e.actions for e in first]


def vars_of(episode: Episode) -> dict[str, Any]:
    """All but the log-probs, which are rounded as the batch has it."""
    plain = {name: value for name, value in vars(episode).items() if name not in ("trunk", "logps")}
    trunk = episode.trunk
    return plain | ({} if trunk is None else {"ids": trunk.input_ids.tolist()})


def test_keep_goes_on_with_the_rows_it_was_given():
    model, tokenizer = tiny_agent(), babyai_tokenizer()
    observations = ["red ball ahead 2", "walls left 1 right 3 , blue key ahead 1", "nothing"]
    everyone, some = model_policy(model, tokenizer), model_policy(model, tokenizer)
    for policy in (everyone, some):
        policy.begin([1, 2, 3])
        policy.act(observations, [None] * 3)
    some.keep([2, 0])
    actions = everyone.act(["walls ahead 1", "nothing", "red"], [None] * 3)
    assert some.act(["red", "walls ahead 1"], [None] * 2) == [actions[2], actions[0]]
    assert some.record(0)[0].input_ids.tolist() == everyone.record(2)[0].input_ids.tolist()
    some.keep([])


def test_acting_leaves_the_model_in_its_mode():
    model = tiny_agent().train()
    run_episodes(LEVEL, model_policy(model), [0], max_steps=1)
    assert model.training


def test_a_template_that_puts_spaces_around_actions_is_followed():
    """Llama 2's closes a turn by ' </s>', and begins an action by a space that no prompt has."""
    tokenizer = tiny_tokenizers.metaspace_bpe(tiny_tokenizers.LLAMA2)
    model = tiny_agent(vocab_size=len(tokenizer), seed=2)
    end = tokenizer.eos_token_id
    policy = ModelPolicy(model, tokenizer, max_new_tokens=3, eos_token_id=end)
    policy.begin([0])
    policy.act(["look"], [None])
    dialogue = policy._dialogues[0]
    # As a trained model would have written it: a space, the end.
    (start, _) = dialogue.action_spans[0]
    written = tokenizer(" go </s>", add_special_tokens=False).input_ids
    dialogue.token_ids[start:] = written
    dialogue.action_spans[0] = (start, start + len(written))
    dialogue.messages[-1]["content"] = "go"
    policy._observe(dialogue, "look")
    text = "".join(tokenizer.decode(dialogue.token_ids).split())
    assert text == "<s>[INST]look[/INST]go</s><s>[INST]look[/INST]"


REWRITING = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + ('' if loop.last else 'left ') }}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def test_under_a_template_that_rewrites_earlier_turns_each_state_is_its_own_prompt():
    tokenizer = babyai_tokenizer(REWRITING)
    policy = model_policy(tokenizer=tokenizer)
    (episode,) = run_episodes(LEVEL, policy, [0], max_steps=4)
    trunk = episode.trunk
    assert len(trunk.rewinds) == 3
    messages = episode.trajectory().messages
    for step, (start, stop) in enumerate(trunk.action_spans.tolist()):
        prompt = tokenizer.apply_chat_template(
            messages[: 2 * step + 1], add_generation_prompt=True, return_dict=False
        )
        assert trunk.state_ids(step).tolist() == prompt
        alone = torch.tensor([[*prompt, *trunk.input_ids[start:stop].tolist()]])
        with torch.no_grad():
            logits = policy._model(alone).logits[0, len(prompt) - 1 : -1]
        logps = token_logprobs(logits, alone[0, len(prompt) :])
        np.testing.assert_allclose(logps.numpy(), episode.logps[step], atol=1e-4)
    assert Episode.of(episode.trajectory()).trunk.rewinds.tolist() == trunk.rewinds.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
        ({"temperature": -0.5}, r"temperature must be finite and >= 0, got -0\.5"),
        ({"eos_token_id": []}, "no token ends an action"),
    ],
)
def test_a_policys_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        model_policy(**options)


def test_an_episode_longer_than_the_model_ends_and_the_others_go_on():
    policy = model_policy(tiny_agent())
    free = run_episodes(LEVEL, policy, SEEDS, max_steps=6)
    lengths = [episode.trunk.action_spans[:, 0] + policy._max_new_tokens for episode in free]
    limit = int(min(starts[-1] for starts in lengths))  # the longest of them do not fit
    episodes = run_episodes(
        LEVEL, model_policy(tiny_agent(max_position_embeddings=limit)), SEEDS, max_steps=6
    )
    reasons = [episode.terminate_reason for episode in episodes]
    assert set(reasons) == {"context_limit", "max_steps"}
    for one, whole, starts in zip(episodes, free, lengths, strict=True):
        fitting = int((starts <= limit).sum())
        assert one.actions == whole.actions[:fitting]
        assert one.crashed is None
        stop = whole.trunk.action_spans[fitting - 1, 1]
        np.testing.assert_array_equal(one.trunk.input_ids, whole.trunk.input_ids[:stop])


def test_an_episode_whose_first_prompt_does_not_fit_takes_no_step():
    model = tiny_agent(max_position_embeddings=10)
    episodes = run_episodes(LEVEL, model_policy(model), SEEDS)
    assert {(e.terminate_reason, len(e.actions), e.trunk) for e in episodes} == {
        ("context_limit", 0, None)
    }


def test_words_beyond_the_models_vocabulary_are_named():
    model = tiny_agent(vocab_size=10)
    with pytest.raises(ValueError, match=r"seed 3 must hold tokens below vocab_size=10, got \d+"):
        run_episodes(LEVEL, model_policy(model), SEEDS)


def test_nan_weights_stop_the_episode():
    model = tiny_agent()
    policy = model_policy(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        run_episodes(LEVEL, policy, [0])


# ------------------------------------------------------------------ the expert and chance


def test_the_expert_succeeds_and_its_episodes_encode():
    episodes = run_episodes(LEVEL, ExpertPolicy(), SEEDS)
    assert all(episode.success for episode in episodes)
    assert [episode.seed for episode in episodes] == SEEDS
    assert all(episode.trunk is None for episode in episodes)
    trajectory = episodes[0].trajectory()
    assert trajectory.id == f"{LEVEL}/{SEEDS[0]}"
    assert trajectory.meta["seed"] == SEEDS[0]
    assert trajectory.reward == sum(episodes[0].rewards) > 0
    assert encode(trajectory, babyai_tokenizer()).num_steps == len(episodes[0].actions)


def test_chance_is_the_same_for_the_same_seed_and_any_batch():
    def episodes(seed, **options):
        return run_episodes(LEVEL, RandomPolicy(seed), SEEDS, max_steps=10, **options)

    first = [vars_of(e) for e in episodes(0)]
    assert [vars_of(e) for e in episodes(0, batch_size=2)] == first
    assert [vars_of(e) for e in episodes(1)] != first
    assert all(all(episode["valid"]) for episode in first)


class Fake:
    """Two steps of one word; actions of any text."""

    name, actions, max_steps = "fake", (), 2
    closed = 0

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self._step = 0
        return "red", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._step += 1
        info = {"valid": True, "success": False, "progress": 0.0}
        return "ball", 0.0, False, self._step == 2, info

    def expert_action(self) -> str:
        if self._step:
            raise ExpertUnavailable("no answer")
        return "left"

    def close(self) -> None:
        Fake.closed += 1


def test_chance_needs_a_finite_set_of_actions():
    with pytest.raises(ValueError, match="fake must have a finite set of actions"):
        run_episodes(Fake, RandomPolicy(), [0])


# ------------------------------------------------------------------ episodes


def test_episodes_come_in_the_order_of_their_seeds_and_stop_at_max_steps():
    full = run_episodes(LEVEL, ExpertPolicy(), SEEDS)
    cut = run_episodes(LEVEL, ExpertPolicy(), SEEDS, max_steps=3, batch_size=2)
    for whole, short in zip(full, cut, strict=True):
        assert short.seed == whole.seed
        assert short.actions == whole.actions[:3]
        assert short.observations == whole.observations[:3]
        assert short.success == (len(whole.actions) <= 3)
    assert run_episodes(LEVEL, ExpertPolicy(), []) == []


@pytest.mark.parametrize("option", ["batch_size", "max_steps"])
def test_counts_of_zero_are_named(option):
    with pytest.raises(ValueError, match=f"{option} must be a whole number >= 1, got 0"):
        run_episodes(LEVEL, ExpertPolicy(), SEEDS, **{option: 0})


def test_environments_are_closed_after_an_error():
    Fake.closed = 0
    with pytest.raises(ValueError, match="must have a finite set"):
        run_episodes(Fake, RandomPolicy(), [0, 1, 2])
    assert Fake.closed == 3


def test_the_expert_is_asked_and_not_obeyed():
    episodes = run_episodes(
        LEVEL, RandomPolicy(), SEEDS, expert=lambda env: env.expert_action(), max_steps=5
    )
    for episode in episodes:
        env = envs.make(LEVEL)
        env.reset(episode.seed)
        for action, answer in zip(episode.actions, episode.expert_actions, strict=True):
            assert env.expert_action() == answer
            env.step(action)


def test_an_expert_without_an_answer_is_recorded_as_none():
    (episode,) = run_episodes(Fake, SaysLeft(), [0], expert=lambda env: env.expert_action())
    assert episode.expert_actions == ["left", None]


class SaysLeft(ExpertPolicy):
    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str]:
        return ["left" for _ in envs]


@pytest.mark.parametrize("answer", [None, 3, ["left"]])
def test_an_answer_that_is_no_text_is_an_error(answer):
    with pytest.raises(TypeError, match=r"the expert's answer in fake must be a str, .*, got"):
        run_episodes(Fake, SaysLeft(), [0], expert=lambda env: answer)


def test_an_expert_policy_without_an_answer_gives_the_episode_up():
    (episode,) = run_episodes(Fake, ExpertPolicy(), [0], expert=lambda env: env.expert_action())
    assert (episode.actions, episode.expert_actions) == (["left"], ["left"])
    assert (episode.gave_up, episode.success, episode.crashed) == (True, False, None)
    (whole,) = run_episodes(LEVEL, ExpertPolicy(), [0])
    assert not whole.gave_up


def test_other_errors_of_an_expert_are_not_taken_for_no_answer():
    def broken(env):
        raise KeyError("my own bug")

    with pytest.raises(KeyError, match="my own bug"):
        run_episodes(Fake, SaysLeft(), [0], expert=broken)


# ------------------------------------------------------------------ rollout and query


@pytest.mark.parametrize("level", [LEVEL, "babyai:GoToObj"])
def test_branches_are_the_bots_answers_at_the_agents_states(level):
    tokenizer = babyai_tokenizer()
    trunks, branches = rollout_and_query(
        mover(),
        level,
        tokenizer=tokenizer,
        seeds=SEEDS,
        max_new_tokens=2,
        eos_token_id=END,
        max_steps=6,
    )
    assert [len(steps) for steps in branches] == [trunk.num_steps for trunk in trunks]
    states = set()
    for seed, trunk, steps in zip(SEEDS, trunks, branches, strict=True):
        env = envs.make(level)
        env.reset(seed)
        for (start, stop), answers in zip(trunk.action_spans, steps, strict=True):
            assert [tokenizer.decode(ids) for ids in answers] == [
                f"{env.expert_action()} <|im_end|>"
            ]
            ids = trunk.input_ids[start:stop]
            action = tokenizer.decode(ids[:-1] if ids[-1] == END else ids).strip()
            states.add(env.step(action)[0])
    assert len(states) > 2 * len(SEEDS)  # the agent has moved about
    trees = pack_step_pairs(trunks, branches)
    assert sum(len(tree.step_branch) for tree in trees) == 2 * sum(t.num_steps for t in trunks)


def test_a_step_without_an_answer_has_no_branch():
    trunks, branches = rollout_and_query(
        tiny_agent(),
        Fake,
        tokenizer=babyai_tokenizer(),
        seeds=[0, 1],
        max_new_tokens=NEW,
        eos_token_id=END,
    )
    assert [[len(step) for step in steps] for steps in branches] == [[1, 0], [1, 0]]
    pack_step_pairs(trunks, branches)


def test_another_expert_can_be_asked():
    tokenizer = babyai_tokenizer()
    _, branches = rollout_and_query(
        tiny_agent(),
        LEVEL,
        lambda env: "toggle",
        tokenizer=tokenizer,
        seeds=[0],
        max_new_tokens=NEW,
        eos_token_id=END,
        max_steps=2,
    )
    assert [tokenizer.decode(ids) for (ids,) in branches[0]] == ["toggle <|im_end|>"] * 2


def test_action_tokens_are_those_of_the_turn():
    tokenizer = babyai_tokenizer()
    (episode,) = run_episodes(LEVEL, ExpertPolicy(), [0])
    trunk = encode(episode.trajectory(), tokenizer)
    for action, (start, stop) in zip(episode.actions, trunk.action_spans, strict=True):
        assert action_tokens(action, tokenizer).tolist() == trunk.input_ids[start:stop].tolist()
