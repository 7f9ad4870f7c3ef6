"""What training can gain, told before any: a diagnosis of an agent beside its expert.

An agent that acts as the expert at each step stays on the expert's own way. So the **first
departure** of an episode is always at one of the expert's states, and training there can only make
it rarer. What the agent does after it is at states that no trajectory of the expert's shows. Hence
two questions: how often does the agent act as the expert at the expert's states, and could the
expert, put in the agent's place right after the first departure of a failed episode, still succeed?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..acting.inspection import inspect
from ..acting.lockstep import roll_out
from ..acting.policies import ExpertPolicy, ModelPolicy, Policy
from ..acting.runs import Options, Start, own_expert
from ..acting.server_policies import EnginePolicy
from ..data.actions import ActionFormat, FormatName
from ..data.actions import action_format as as_format
from ..data.arguments import with_arguments
from ..data.branch import Branch, action_of
from ..data.draws import check_count
from ..data.ends import ends_of, given_ends
from ..data.trunk import Trunk
from ..envs.pool import EnvFactory
from ..records.episodes import Episode
from .findings import Departure, Diagnosis, ExpertStates, GreedyEpisodes
from .statistics import Interval, rate_interval, share_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..engines import Engine


def diagnose(
    model: PreTrainedModel | Engine,
    trunks: Sequence[Trunk],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None = None,
    samples: int = 4,
    env: str | EnvFactory | None = None,
    seeds: Sequence[int] = (),
    max_steps: int | None = None,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    timeout: float | None = None,
    progress: bool = False,
) -> Diagnosis:
    """What training can gain, before any: at the expert's states, and at the agent's own.

    Args:
        model: a model, or an engine of `stepagent.engines`.
        trunks: held-out trajectories of the expert, as `stepagent.encode` gives them.
        max_new_tokens: of an answer; None: the longest action in ``trunks``.
        samples: answers a state at temperature 1.
        env: with an expert: a name for `stepagent.envs.make`, or a function that makes it. None:
            only the expert's states are looked at.
        seeds: of the episodes in ``env``, held out too.
        max_steps: ends an episode, the expert's too, sooner than the environment would.
        action_format: in which actions are written, in the trajectories and by the agent. What
            differs in the thought alone is the same action.
        eos_token_id: what ends an answer; None: what ends the actions in ``trunks``.
        seed: of the answers at temperature 1.
        system: the first message to the agent in ``env``.
        chat_template_kwargs: of the agent's prompts in ``env``.
        batch_size, workers, timeout: of the episodes, as `stepagent.rollout.run_episodes` has them.
        progress: show progress bars on stderr.

    Returns:
        The figures with 95 % intervals, a verdict and a recommendation.

    Raises:
        ValueError: for no trunks, none with an action of the format, ``env`` without ``seeds`` or
            the reverse, an environment whose expert has no answer in any of its episodes, and as
            `stepagent.inspect` and `stepagent.rollout.run_episodes`.
        RuntimeError: where every episode crashed.
    """
    if not trunks:
        raise ValueError("trunks must hold at least one, got none")
    check_count("samples", samples)
    if (env is None) != (not len(seeds)):
        raise ValueError(f"env and seeds must be given together, got env={env!r}, seeds={seeds!r}")
    ends = ends_of(trunks) if eos_token_id is None else given_ends(eos_token_id, "diagnose")
    form = as_format(action_format)
    read = partial(action_of, form=form, tokenizer=tokenizer, ends={*ends, *ends_of(trunks)})
    own = _own_actions(trunks, read, form)
    longest = max(int(np.diff(trunk.action_spans).max()) for trunk in trunks)
    asked: dict[str, Any] = {
        "max_new_tokens": longest if max_new_tokens is None else max_new_tokens
    }
    asked |= {"eos_token_id": ends, "seed": seed}
    episodes = None
    if env is not None:  # first: what is wrong with an environment shows before the model works
        told = with_arguments(tokenizer, chat_template_kwargs)
        policy = _policy(model, told, system=system, **asked)
        options = Options(None, max_steps, batch_size, workers, timeout, action_format=form)
        episodes = greedy_episodes(env, policy, seeds, options, progress=progress)
    asked["progress"] = progress
    greedy = inspect(model, trunks, temperature=0.0, **asked)
    sampled = inspect(model, trunks, temperature=1.0, samples=samples, **asked)
    return Diagnosis(_expert_states(own, greedy, sampled, read), episodes)


def _policy(
    model: PreTrainedModel | Engine, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Policy:
    """The greedy agent."""
    if isinstance(model, nn.Module):
        return ModelPolicy(model, tokenizer, **options)
    return EnginePolicy(model, tokenizer, **options)


# ------------------------------------------------------------------ at the expert's states

_Read = Callable[["NDArray[np.int32]"], str | None]


def _own_actions(
    trunks: Sequence[Trunk], read: _Read, form: ActionFormat
) -> list[list[str | None]]:
    """The expert's actions, ``[i][t]``; None for a text that holds none."""
    own = [
        [read(trunk.input_ids[start:stop]) or None for start, stop in trunk.action_spans]
        for trunk in trunks
    ]
    if not any(action for actions in own for action in actions):
        raise ValueError(
            f"trunks must hold actions in the action format {form.name!r}, got "
            f"{sum(map(len, own))} steps with none"
        )
    return own


def _expert_states(
    own: Sequence[Sequence[str | None]],
    greedy: Sequence[Sequence[Sequence[Branch]]],
    sampled: Sequence[Sequence[Sequence[Branch]]],
    read: _Read,
) -> ExpertStates:
    agreed, readable = _shares(own, greedy, read)
    agreed_sampled, readable_sampled = _shares(own, sampled, read)
    read_steps = [sum(action is not None for action in actions) for actions in own]
    return ExpertStates(
        trajectories=sum(steps > 0 for steps in read_steps),
        steps=sum(read_steps),
        unread=sum(map(len, own)) - sum(read_steps),
        samples=len(sampled[0][0]),
        greedy=agreed,
        sampled=agreed_sampled,
        readable=readable,
        readable_sampled=readable_sampled,
    )


def _shares(
    own: Sequence[Sequence[str | None]],
    branches: Sequence[Sequence[Sequence[Branch]]],
    read: _Read,
) -> tuple[Interval, Interval]:
    """Of the answers: whose action is the expert's, and which hold an action at all."""
    counts = []
    for actions, steps in zip(own, branches, strict=True):
        tried = [
            (expert, read(branch.token_ids) or None)
            for expert, answers in zip(actions, steps, strict=True)
            if expert is not None
            for branch in answers
        ]
        same = sum(expert == action for expert, action in tried)
        counts.append((same, sum(action is not None for _, action in tried), len(tried)))
    same_N, readable_N, answers_N = zip(*[count for count in counts if count[-1]], strict=True)
    return share_interval(same_N, answers_N), share_interval(readable_N, answers_N)


# ------------------------------------------------------------------ in the environment


def greedy_episodes(
    env: str | EnvFactory,
    policy: Policy,
    seeds: Sequence[int],
    options: Options,
    *,
    progress: bool = False,
) -> GreedyEpisodes:
    """The episodes of a policy beside the expert's on the same seeds, and what follows the first
    departure of those that failed. ``options`` of a rollout, without an expert."""

    def run(policy: Policy, starts: Sequence[Start], label: str, options: Options) -> list[Episode]:
        return roll_out(env, policy, starts, options, label if progress else None)

    starts = [Start(seed, seed) for seed in seeds]
    experts = run(ExpertPolicy(), starts, "expert", options)
    _check_expert(experts)
    agents = run(policy, starts, "agent", replace(options, expert=own_expert))
    trials = [
        _Trial(agent, expert, first_departure(agent))
        for agent, expert in zip(agents, experts, strict=True)
        if agent.crashed is None and expert.crashed is None
    ]
    lost = [trial for trial in trials if trial.departure is not None and not trial.agent.success]
    mended = run(ExpertPolicy(), [trial.after_departure() for trial in lost], "mend", options)
    for trial, episode in zip(lost, mended, strict=True):
        trial.mended = episode
    ended = [trial for trial in trials if trial.mended is None or trial.mended.crashed is None]
    if not ended:
        raise RuntimeError(f"all {len(seeds)} episodes crashed, of the agent or of the expert")
    return _summary(ended, crashed=len(seeds) - len(ended))


@dataclass
class _Trial:
    """One seed: the agent's episode, the expert's, and of a failure with a departure the episode in
    which the expert went on from right after it."""

    agent: Episode
    expert: Episode
    departure: int | None
    mended: Episode | None = None

    def after_departure(self) -> Start:
        """The environment once the agent has departed."""
        assert self.departure is not None
        seed, told = self.agent.seed, replace(self.agent, system=None, trunk=None, logps=[])
        return Start(seed, seed, told.trajectory(), self.departure + 1, f"the episode of {seed}")

    def described(self) -> Departure:
        """The departure of a failure."""
        assert self.departure is not None
        assert self.mended is not None
        expert = self.agent.expert_actions[self.departure]
        assert expert is not None
        return Departure(
            seed=self.agent.seed,
            step=self.departure,
            action=self.agent.done[self.departure],
            expert=expert,
            preventable=self.expert.success,
            mendable=self.mended.success,
        )


def first_departure(episode: Episode) -> int | None:
    """The first step at which the expert has an answer and it is not what the agent did.

    None for no such step.
    """
    for step, (done, answer) in enumerate(zip(episode.done, episode.expert_actions, strict=True)):
        if answer is not None and done != answer:
            return step
    return None


def _check_expert(episodes: Sequence[Episode]) -> None:
    """It has an answer at some first state."""
    begun = [episode for episode in episodes if episode.crashed is None]
    if not begun:
        raise RuntimeError(f"all {len(episodes)} episodes of the expert crashed, see the warning")
    if all(episode.gave_up and not episode.actions for episode in begun):
        raise ValueError(
            f"env must have an expert, got {begun[0].environment}, whose expert has no answer at "
            f"the start of any of {len(begun)} episodes: give another env, or none"
        )


def _summary(trials: Sequence[_Trial], *, crashed: int) -> GreedyEpisodes:
    failures = [trial for trial in trials if not trial.agent.success]
    departed = [trial.agent.success for trial in trials if trial.departure is not None]
    departures = tuple(trial.described() for trial in failures if trial.mended is not None)
    solved = [len(trial.expert.actions) for trial in trials if trial.expert.success]
    acted = [trial.agent.valid for trial in trials if trial.agent.valid]
    mendable = sum(one.mendable for one in departures)
    helped = sum(one.mendable or one.preventable for one in departures)
    no_mending = [False] * (len(failures) - mendable)
    return GreedyEpisodes(
        environment=trials[0].agent.environment,
        episodes=len(trials),
        crashed=crashed,
        success=rate_interval([trial.agent.success for trial in trials]),
        expert_success=rate_interval([trial.expert.success for trial in trials]),
        expert_steps=float(np.mean(solved)) if solved else None,
        valid=share_interval([sum(a) for a in acted], [len(a) for a in acted]) if acted else None,
        departed=rate_interval([trial.departure is not None for trial in trials]),
        recovered=rate_interval(departed) if departed else None,
        failures=len(failures),
        preventable=sum(one.preventable for one in departures),
        mendable=mendable,
        beyond=len(failures) - helped,
        mendable_share=rate_interval([True] * mendable + no_mending) if failures else None,
        departures=departures,
    )
