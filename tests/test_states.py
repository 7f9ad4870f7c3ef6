"""Whose states a cycle learns from: both kinds at once, and the teacher's share of the acting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import END, babyai_tokenizer, separate_logprobs, tiny_agent

from stepagent import reference
from stepagent.acting.askers import UnsureAsker
from stepagent.acting.asking import ask_again, most_worth, own_steps
from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import (
    action_tokens,
    queried_rollouts,
    rollout_and_query,
    run_episodes,
)
from stepagent.data.draws import uniforms
from stepagent.data.encoding import encode
from stepagent.data.trunk import Trunk
from stepagent.envs import ExpertUnavailable
from stepagent.envs.babyai import BabyAITextEnv
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.cycle import (
    Comparison,
    StepTable,
    load_comparisons,
    pack_comparisons,
    pack_with_steps,
    save_comparisons,
)
from stepagent.learning.inverse import InverseReflection
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.records.episodes import Episode

LEVEL = "babyai:GoToLocalS6N2"
TOKENIZER = babyai_tokenizer()
ROLLOUTS = {"env": LEVEL, "rollouts": 3, "max_steps_per_episode": 4}


@pytest.fixture(scope="module")
def demonstrations():
    episodes = run_episodes(LEVEL, ExpertPolicy(), range(20))
    shortest = sorted(episodes, key=lambda episode: len(episode.actions))[:4]
    return [episode.trajectory() for episode in shortest]


@pytest.fixture
def trainer(tmp_path, demonstrations):
    def make(model=None, *, folder="run", **options: Any) -> StepAgentTrainer:
        mine = {name: options.pop(name) for name in ("env", "expert", "asker") if name in options}
        defaults = {
            "output_dir": str(tmp_path / folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "seed": 3,
            "cycles": 2,
        }
        args = StepAgentConfig(**defaults | options)
        return StepAgentTrainer(model or tiny_agent(), args, demonstrations, TOKENIZER, **mine)

    return make


def rolled(share: float, **options: Any) -> list[Episode]:
    """Five episodes of a model whose actions are its own."""
    defaults: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "seeds": range(5),
        "max_new_tokens": 3,
        "temperature": 1.0,
        "eos_token_id": None,
        "seed": 11,
        "progress": False,
        "max_steps": 6,
        "teacher_share": share,
    }
    expert = options.pop("expert", None)
    model = options.pop("model", None) or tiny_agent(initializer_range=0.1)
    return queried_rollouts(model, LEVEL, expert, **defaults | options)


def acts(episode: Episode) -> list[bool]:
    """At which steps the expert acted."""
    return [ids is not None for ids in episode.overruled] or [False] * len(episode.actions)


def plain(episode: Episode) -> dict[str, Any]:
    meta = episode.trajectory().meta
    meta["logps"] = [np.round(step, 4).tolist() for step in meta["logps"]]
    return meta


def same(one: Comparison, other: Comparison) -> bool:
    tried = [[b.tolist() for b in step] for step in one.branches]
    return (
        one.trunk.input_ids.tolist() == other.trunk.input_ids.tolist()
        and tried == [[b.tolist() for b in step] for step in other.branches]
        and one.expert_T.tolist() == other.expert_T.tolist()
        and one.expert_trunk == other.expert_trunk
    )


# ------------------------------------------------------------------ the teacher's share of acting


def test_without_a_share_nothing_changes():
    for one in rolled(0.0):
        assert one.overruled == []
        assert all(len(logps) for logps in one.logps)
        assert "overruled" not in one.trajectory().meta


def test_a_share_of_one_gives_the_experts_trajectories():
    experts = run_episodes(LEVEL, ExpertPolicy(), range(5), max_steps=6)
    for one, expert in zip(rolled(1.0), experts, strict=True):
        assert one.actions == expert.actions == one.expert_actions
        assert one.success == expert.success
        assert one.trunk is not None
        trunk = encode(expert.trajectory(), TOKENIZER)
        assert one.trunk.input_ids.tolist() == trunk.input_ids.tolist()
        assert one.trunk.action_spans.tolist() == trunk.action_spans.tolist()
        assert all(ids is not None for ids in one.overruled)


def test_the_teacher_acts_where_the_draw_of_run_episode_and_step_says():
    acted = 0
    for one in rolled(0.5):
        expected = [uniforms(11, one.seed, t, -1) < 0.5 for t in range(len(one.actions))]
        assert acts(one) == expected
        for t, taught in enumerate(expected):
            start, stop = one.trunk.action_spans[t]
            if taught:
                acted += 1
                assert one.actions[t] == one.expert_actions[t]
                answer = action_tokens(one.expert_actions[t], TOKENIZER)
                assert one.trunk.input_ids[start:stop].tolist() == answer.tolist()
                assert len(one.logps[t]) == 0
            else:
                assert len(one.logps[t]) == stop - start
    assert acted > 5


def test_after_the_teacher_the_agent_samples_from_what_it_then_sees():
    """Log-probs of the actions, each scored in a sequence of its own, and greedy alternatives."""
    model = tiny_agent(initializer_range=0.1)
    for one in rolled(0.5, model=model, temperature=0.0):
        own = one.overruled or [None] * len(one.actions)
        branches = [[] if ids is None else [ids] for ids in own]
        scores = separate_logprobs(model, [one.trunk], [branches])
        lengths = [
            len(ids)
            for (start, stop), step in zip(one.trunk.action_spans, branches, strict=True)
            for ids in (one.trunk.input_ids[start:stop], *step)
        ]
        actions = iter(scores.split(lengths))
        for t, step in enumerate(branches):
            own = next(actions)
            if not step:
                torch.testing.assert_close(
                    torch.from_numpy(one.logps[t]), own.float(), atol=1e-4, rtol=0
                )
                continue
            with torch.no_grad():  # what a greedy agent would have said at this state
                ids = one.trunk.input_ids[: one.trunk.action_spans[t][0]].tolist()
                for token in step[0].tolist():
                    logits = model(torch.tensor([ids])).logits[0, -1]
                    assert logits[token] == pytest.approx(logits.max().item(), abs=1e-4)
                    ids.append(token)
            next(actions)


REWRITING = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{{- 'red ' if message['role'] == 'assistant' and not loop.last else '' }}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def test_under_a_template_that_rewrites_earlier_turns_the_agent_sees_what_the_teacher_did():
    tokenizer, model = babyai_tokenizer(REWRITING), tiny_agent(initializer_range=0.1)
    episodes = rolled(0.5, model=model, tokenizer=tokenizer)
    for one in episodes:
        messages = one.trajectory().messages
        for step, (start, stop) in enumerate(one.trunk.action_spans.tolist()):
            prompt = tokenizer.apply_chat_template(
                messages[: 2 * step + 1], add_generation_prompt=True, return_dict=False
            )
            assert one.trunk.state_ids(step).tolist() == prompt
            if acts(one)[step]:
                continue
            ids = torch.tensor([[*prompt, *one.trunk.input_ids[start:stop].tolist()]])
            with torch.no_grad():
                logps_QV = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logps_QV.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            np.testing.assert_allclose(one.logps[step], expected.numpy(), atol=1e-4)
        assert len(one.trunk.rewinds) == len(one.actions) - 1
    assert any(any(acts(one)) for one in episodes)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2, "workers": 2}])
def test_any_batch_and_workers_give_the_same_mixture(options):
    for one, other in zip(rolled(0.4), rolled(0.4, **options), strict=True):
        assert plain(one) == plain(other)


def test_where_the_expert_has_no_answer_the_agent_acts():
    def mute(env):
        raise ExpertUnavailable("no answer")

    free = rolled(0.0)
    for one, other in zip(rolled(1.0, expert=mute), free, strict=True):
        assert one.overruled == []
        assert one.actions == other.actions


def test_an_episode_with_a_teacher_comes_back_from_its_record():
    for one in rolled(0.5):
        back = Episode.of(one.trajectory())
        assert plain(back) == plain(one)
        assert acts(back) == acts(one)


def test_the_public_rollouts_have_the_experts_answer_as_the_branch_everywhere():
    options = {"tokenizer": TOKENIZER, "seeds": range(3), "max_new_tokens": 3, "max_steps": 4}
    trunks, branches = rollout_and_query(tiny_agent(), LEVEL, teacher_share=1.0, **options)
    for trunk, steps in zip(trunks, branches, strict=True):
        for (start, stop), step in zip(trunk.action_spans, steps, strict=True):
            assert [ids.tolist() for ids in step] == [trunk.input_ids[start:stop].tolist()]
    with pytest.raises(ValueError, match=r"teacher_share must be in \[0, 1\], got 1\.5"):
        rollout_and_query(tiny_agent(), LEVEL, teacher_share=1.5, **options)


# ------------------------------------------------------------------ what is compared


def taught() -> Comparison:
    """The agent acts, the expert acts, the agent acts; an answer, an alternative, no answer."""
    trunk = Trunk([1, 2, 3, 4, 5, 6, 7], [(1, 2), (3, 5), (6, 7)])
    branches = [[np.array([8, 9])], [np.array([4, 5])], []]
    return Comparison(trunk, branches, False, teacher_T=np.array([False, True, False]))


def test_a_table_has_the_sides_of_each_step():
    demonstration = Comparison(Trunk([1, 2], [(1, 2)]), [[np.array([3])]], True)
    for limit in (100, 12):
        trees = pack_comparisons([taught(), demonstration], limit)
        table = StepTable.of(trees, torch.tensor([False, True, False, True]))
        # Steps: 0 â₁ | 1 a₁ | 2 a₂ | 3 â₂ | 4 â₃ || 5 a₁ | 6 â₁
        assert table.expert_S.tolist() == [False, True, True, False, False, True, False]
        assert table.expert_P.tolist() == [1, 2, 5]
        assert table.agent_P.tolist() == [0, 3, 6]
        assert table.same_P.tolist() == [False, True, False]
        # Of the agent's 0, 3, 4, 6: what it did in the rollout together, the others alone.
        order, offsets = table.agent_runs()
        assert order.tolist() == [0, 2, 1, 3]
        assert offsets.tolist() == [0, 2, 3, 4]
        values = torch.arange(10.0)  # tokens: 0 | 1 2 | 3 4 | 5 6 | 7 || 8 | 9
        assert table.expert_nll(values, 5) == -(1 + 2 + 3 + 4 + 8) / 5
    _, packed = pack_with_steps([taught(), demonstration], 100)
    assert packed.expert_S.tolist() == table.expert_S.tolist()


def test_the_experts_answers_are_those_it_was_asked_for():
    assert taught().expert_answers == 2
    assert Comparison(*parts(taught()), True).expert_answers == 0
    assert Comparison(*parts(taught()), False).expert_answers == 2


def parts(one: Comparison) -> tuple[Trunk, list]:
    return one.trunk, one.branches


def test_a_cycle_file_keeps_who_acted_and_an_old_one_still_loads(tmp_path):
    kept = [taught(), Comparison.demonstration(taught().trunk)]
    save_comparisons(tmp_path / "cycle", kept, {"cycle": 1})
    back, _ = load_comparisons(tmp_path / "cycle")
    assert all(same(one, other) for one, other in zip(kept, back, strict=True))

    arrays = load_file(tmp_path / "cycle")
    old = {name: value for name, value in arrays.items() if "teacher" not in name}
    assert len(old) == len(arrays) - 2
    save_file(old, tmp_path / "old", metadata={"progress": "{}"})
    back, _ = load_comparisons(tmp_path / "old")
    assert [one.expert_T.tolist() for one in back] == [[False] * 3, [True] * 3]


def test_a_rollouts_returns_are_over_the_agents_own_steps(tmp_path):
    """The step at which the expert acted is no part of it, and what was not done stands alone."""
    good, bad = 9, 20
    ids = [1, bad, END, 2, good, END, 3, good, END, 4, bad, END]
    spans = [(1, 3), (4, 6), (7, 9), (10, 12)]
    tried = [[good], [bad], [bad], [good]]
    branches = [[np.array([token, END], np.int32) for token in step] for step in tried]
    one = Comparison(
        Trunk(ids, spans),
        branches,
        False,
        old_logps=np.full(16, -1.0, np.float32),
        teacher_T=np.array([False, True, False, False]),
    )
    args = StepAgentConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        method="inverse",
        states="mixed",
        gamma=0.5,
        gae_lambda=1.0,
    )
    reflection = InverseReflection(tiny_agent(), args)
    (prepared,), _ = reflection.prepare([one], 0)
    _, steps = pack_with_steps([one], 4096)
    logits_ES, _, _ = reflection._judge([one], steps)
    agent = torch.tensor([0, 3, 4, 6])  # done, tried, done, done
    raw = reference.inverse_step_reward(logits_ES[0, agent])
    rewards = (raw - raw.mean()) / raw.std(correction=0)
    done, _ = reference.step_gae(
        rewards[[0, 2, 3]], torch.zeros(3), torch.tensor([0, 3]), gamma=0.5, lam=1.0
    )
    expected = torch.stack([done[0], rewards[1], done[1], done[2]])
    advantages = torch.from_numpy(prepared.advantages).double()
    torch.testing.assert_close(advantages[agent], expected.double(), atol=1e-5, rtol=0)
    assert advantages[[1, 2, 5, 7]].tolist() == [0.0] * 4


def slow_implicit_loss(model, ref_model, comparisons: list[Comparison]) -> torch.Tensor:
    """−log σ(r_E − r_A), each action of each pair in a sequence of its own."""
    policy, ref = (
        iter(
            separate_logprobs(m, [c.trunk for c in comparisons], [c.branches for c in comparisons])
        )
        for m in (model, ref_model)
    )
    losses = []
    for c in comparisons:
        sides = zip(c.trunk.action_spans, c.branches, c.expert_T, strict=True)
        for (start, stop), step, taught in sides:
            rewards = [
                sum(next(policy) - next(ref).detach() for _ in range(length))
                for length in (stop - start, *map(len, step))
            ]
            for tried in rewards[1:]:
                margin = rewards[0] - tried if taught else tried - rewards[0]
                losses.append(-torch.nn.functional.logsigmoid(margin))
    return torch.stack(losses).mean()


def test_the_loss_of_a_mixed_cycle_with_a_teacher_is_the_slow_one(trainer):
    model, other = (tiny_agent(seed=seed, initializer_range=0.1) for seed in (0, 1))
    made = trainer(model, states="mixed", samples=2, teacher_share=0.5, **ROLLOUTS)
    made._scorer._ref_model = other
    made.begin_epoch(0)
    comparisons = list(made.train_dataset.items)
    assert len({bool(flag) for c in comparisons if not c.expert_trunk for flag in c.expert_T}) == 2
    loss = made.compute_loss(model, made._collate(comparisons))
    expected = slow_implicit_loss(model, other, comparisons)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------ which states are asked about


def told(logps: list[list[float]], **other: Any) -> Episode:
    trunk = Trunk([1] * 9, [(2 * t + 1, 2 * t + 2) for t in range(len(logps))])
    arrays = [np.array(step, np.float32) for step in logps]
    return Episode("env", 0, actions=["a"] * len(logps), logps=arrays, trunk=trunk, **other)


def test_the_agent_is_least_sure_where_its_action_was_least_probable():
    first = told([[-0.1], [-1.0, -1.0], [-3.0]])
    taught = told([[-2.5], [], [-0.5]], overruled=[None, np.array([1]), None])
    lost = told([[-9.0]], crashed="lost")
    episodes, asker = [first, taught, lost], UnsureAsker()
    assert most_worth(asker, episodes, 1) == [[2], [], []]
    assert most_worth(asker, episodes, 2) == [[2], [0], []]
    assert most_worth(asker, episodes, 3) == [[1, 2], [0], []]
    assert most_worth(asker, episodes, 9) == [[0, 1, 2], [0, 2], []]
    assert most_worth(asker, [told([[-1.0], [-1.0]])], 1) == [[0]]  # of equals the first
    assert most_worth(asker, [lost], 1) == [[]]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "workers": 2}])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_an_expert_asked_afterwards_answers_as_at_the_time(share, options):
    whole, silent = rolled(share), rolled(share, only_to_act=True)
    for one, other in zip(whole, silent, strict=True):
        assert one.actions == other.actions
        pairs = zip(one.expert_actions, acts(one), strict=True)
        assert other.expert_actions == [a if taught else None for a, taught in pairs]
    steps = [own_steps(one) for one in silent]
    for one, other in zip(
        whole, ask_again(LEVEL, None, silent, steps, max_steps=6, **options), strict=True
    ):
        assert plain(one) == plain(other)

    few = [own[-2:-1] for own in steps]
    for one, other, own in zip(
        whole, ask_again(LEVEL, None, silent, few, max_steps=6), few, strict=True
    ):
        pairs = enumerate(zip(one.expert_actions, acts(one), strict=True))
        expected = [a if taught or t in own else None for t, (a, taught) in pairs]
        assert other.expert_actions == expected


def test_answers_without_an_action_are_replayed_as_they_were():
    silent = rolled(0.0, action_format="react", only_to_act=True)
    assert any(None in one.taken for one in silent)
    steps = [own_steps(one) for one in silent]
    again = ask_again(LEVEL, None, silent, steps, max_steps=6, action_format="react")
    for one, other in zip(rolled(0.0, action_format="react"), again, strict=True):
        assert plain(one) == plain(other)


class Forgetful(BabyAITextEnv):
    """Another episode each time, whatever the seed."""

    resets = 0

    def reset(self, seed):
        Forgetful.resets += 1
        return super().reset(Forgetful.resets)


def test_an_environment_that_does_not_repeat_itself_is_named():
    silent = rolled(0.0, only_to_act=True)
    with pytest.raises(ValueError, match=r"must show the same again .* got at step 0 of seed 0"):
        ask_again(
            lambda: Forgetful("BabyAI-GoToLocalS6N2-v0"), None, silent, [[0]] * 5, max_steps=6
        )
    with pytest.raises(ValueError, match="seed 0 is over before step 5: take ask='always'"):
        ask_again(LEVEL, None, silent, [[5]] * 5, max_steps=2)


def test_a_cycle_asks_where_the_agent_was_least_sure(trainer):
    calls = []

    def expert(env):
        calls.append(env)
        return env.expert_action()

    model = tiny_agent(initializer_range=0.1)
    options = {"states": "agent", "expert": expert, **ROLLOUTS}
    always = trainer(model, **options)
    always.begin_epoch(0)
    assert len(calls) == always._cycle_log["expert_answers"] == 12
    del calls[:]
    some = trainer(model, ask="unsure", ask_share=0.25, **options)
    some.begin_epoch(0)
    assert len(calls) == some._cycle_log["expert_answers"] == 3

    asked, sure = [], []
    for one, other in zip(some._comparisons, always._comparisons, strict=True):
        assert one.trunk.input_ids.tolist() == other.trunk.input_ids.tolist()
        scores = separate_logprobs(model, [one.trunk], [[[]] * one.trunk.num_steps])
        for own, step, answer in zip(
            scores.split(np.diff(one.trunk.action_spans).ravel().tolist()),
            one.branches,
            other.branches,
            strict=True,
        ):
            (asked if step else sure).append(own.sum().item())
            assert not step or step[0].tolist() == answer[0].tolist()
    assert len(asked) == 3
    assert max(asked) < min(sure)


@pytest.mark.parametrize("method", ["sft", "inverse"])
def test_all_asked_afterwards_is_the_cycle_asked_at_the_time(trainer, method):
    options = {"method": method, "states": "agent", "teacher_share": 0.3, **ROLLOUTS}
    then, after = trainer(**options), trainer(ask="unsure", **options)
    for made in (then, after):
        made.train()
    assert all(same(a, b) for a, b in zip(then._comparisons, after._comparisons, strict=True))
    for one, other in zip(then.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------ both kinds in one cycle


def test_a_mixed_cycle_is_the_two_lists(trainer):
    both = trainer(states="mixed", samples=2, **ROLLOUTS)
    both.begin_epoch(0)
    expert = trainer(samples=2)
    agent = trainer(states="agent", **ROLLOUTS)
    for one in (expert, agent):
        one.begin_epoch(0)
    apart = [*expert._comparisons, *agent._comparisons]
    assert len(both.train_dataset.items) == len(both._comparisons) == 4 + 3
    assert all(same(one, other) for one, other in zip(both._comparisons, apart, strict=True))
    assert both._cycle_log["expert_answers"] == agent._cycle_log["expert_answers"] == 3 * 4
    assert expert._cycle_log["expert_answers"] == 0


@pytest.mark.parametrize("method", ["sft", "implicit", "inverse"])
def test_every_answer_counts_whoever_acts(trainer, method):
    states = "agent" if method == "sft" else "mixed"
    made = trainer(method=method, states=states, teacher_share=1.0, teacher_decay=0.5, **ROLLOUTS)
    made.train()
    logged = [entry for entry in made.state.log_history if "cycle" in entry]
    fresh = made._comparisons[-3:]
    assert [c.expert_answers for c in fresh] == [c.trunk.num_steps for c in fresh]
    assert logged[1]["expert_answers"] == sum(c.trunk.num_steps for c in fresh)
    share = np.concatenate([c.expert_T for c in fresh])
    seeds = np.repeat([3, 4, 5], [c.trunk.num_steps for c in fresh])
    steps = np.concatenate([np.arange(c.trunk.num_steps) for c in fresh])
    # The second cycle's: half of the first one's share, of its own random numbers.
    assert share.tolist() == (uniforms(3 * 1_000_003 + 1, seeds, steps, -1) < 0.5).tolist()


def test_the_first_cycle_of_a_full_share_learns_the_experts_own_episodes(trainer):
    made = trainer(method="sft", states="agent", teacher_share=1.0, **ROLLOUTS)
    made.begin_epoch(0)
    experts = run_episodes(LEVEL, ExpertPolicy(), range(3), max_steps=4)
    for one, expert in zip(made._comparisons[4:], experts, strict=True):
        trunk = encode(expert.trajectory(), TOKENIZER)
        assert one.trunk.input_ids.tolist() == trunk.input_ids.tolist()
        assert one.expert_T.all()


@pytest.mark.parametrize(
    "own",
    [{"method": "implicit", "ask": "unsure", "ask_share": 0.5}, {"method": "inverse"}],
)
def test_a_resumed_run_equals_an_undisturbed_one(trainer, own):
    options = {
        **own,
        "states": "mixed",
        "teacher_share": 0.5,
        "save_strategy": "steps",
        "save_steps": 1,
        "epochs_per_cycle": 2,
        **ROLLOUTS,
    }
    whole = trainer(**options)
    whole.train()
    again = trainer(folder="again", **options)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5")
    assert all(same(a, b) for a, b in zip(whole._comparisons, again._comparisons, strict=True))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": "mixed"}, "states='mixed' needs env"),
        ({"states": "mixed", "method": "sft", **ROLLOUTS}, "method='sft' compares none"),
        (
            {"states": "mixed", "method": "inverse", "samples": 2, "baseline": "group", **ROLLOUTS},
            "take baseline='value'",
        ),
        ({"teacher_share": 0.5}, "teacher_share=0.5 needs states='agent' or 'mixed', got 'expert'"),
        ({"states": "agent", "teacher_share": 1.5}, r"teacher_share must be in \[0, 1\], got 1\.5"),
        ({"ask": "unsure"}, "ask='unsure' needs states='agent' or 'mixed', got 'expert'"),
        ({"states": "agent", "ask_share": 0.5}, "ask_share=0.5 needs ask='unsure', 'worth'"),
        ({"states": "agent", "ask": "unsure", "ask_share": 0.0}, r"ask_share must be in \(0, 1\]"),
        (
            {"states": "agent", "ask": "rarely"},
            r"ask must be one of \('always', 'unsure', 'random', 'worth'\), got",
        ),
        ({"states": "agent", "teacher_decay": 0.5}, "teacher_decay=0.5 needs a teacher_share > 0"),
    ],
)
def test_what_would_not_be_followed_is_refused(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)
