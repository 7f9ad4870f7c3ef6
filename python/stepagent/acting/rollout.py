"""Episodes: a policy in an environment, the expert's answers at the policy's own states, and what a
policy makes of the states of a given trajectory (Monte-Carlo continuations).

All run in lock-step. An environment that crashes ends its own episode, which says so and has no
outcome: it is neither a failure nor a reward of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..data.actions import PLAIN, ActionFormat, FormatName
from ..data.actions import action_format as as_format
from ..data.arguments import with_arguments
from ..data.draws import check_count
from ..data.encoding import encode
from ..data.ends import given_ends
from ..data.trajectory import Trajectory
from ..data.trunk import Trunk
from ..envs.pool import EnvFactory
from ..records.episodes import Episode, split_system
from .askers import Asker, asker_of
from .asking import ask_again, ask_where_worth
from .lockstep import roll_out
from .named_askers import ASKS, Ask
from .policies import ModelPolicy, Policy
from .runs import Expert, Options, Start, Teacher, own_expert
from .server_policies import EnginePolicy

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..engines import Engine

__all__ = [
    "Continuations",
    "Episode",
    "Expert",
    "action_tokens",
    "continue_rollouts",
    "own_expert",
    "rollout_and_query",
    "run_episodes",
]


def run_episodes(
    env: str | EnvFactory,
    policy: Policy,
    seeds: Sequence[int],
    *,
    expert: Expert | None = None,
    max_steps: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    timeout: float | None = None,
    progress: str | None = None,
    split: str | None = None,
    on_end: Callable[[Episode], None] | None = None,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
) -> list[Episode]:
    """One episode per seed, ``batch_size`` at a time in lock-step; in the order of ``seeds``.

    Args:
        env: a name for `stepagent.envs.make`, or a function that makes an environment.
        expert: asked at every state for its action, which is recorded and not taken.
        max_steps: ends an episode sooner than the environment would.
        workers: processes that run the environments; 0: this one does. Episodes are the same.
        timeout: seconds after which an environment's call counts as hung; None: 60 in a worker,
            any time in this process. Here only what runs Python code or waits can be interrupted.
        progress: the label of a progress bar on stderr; None: no bar.
        split: the one that the environments are of, for the record.
        on_end: called with each episode as it ends or crashes, while others continue.
        action_format: how the policy writes an action: ``"plain"``, ``"react"``, ``"json"``,
            ``"tool_call"``, or a function from its text to the action, with ValueError for none.
            Answers without an action are refused in place of the environment, as invalid steps.

    Raises:
        ValueError: for a seed that the environment has no episode of, before any begins.
        RuntimeError: where ``CRASHES_IN_A_ROW`` environments crash and no episode ends between.
    """
    form = as_format(action_format)
    options = Options(expert, max_steps, batch_size, workers, timeout, split, on_end, form)
    starts = [Start(seed, seed) for seed in seeds]
    return roll_out(env, policy, starts, options, progress)


@dataclass(frozen=True)
class Continuations:
    """What a policy made of each of the T steps of a trajectory, N times.

    episodes: ``[t][n]``, each from the first observation to its end: the trajectory's actions up to
    and including step t, then the policy's. Their trunks begin with the trajectory's own tokens.
    """

    episodes: list[list[Episode]]

    @property
    def values(self) -> NDArray[np.float64]:
        """(T,), the mean of the final rewards R of those that did not crash, nan for none.

        IPR (arXiv 2406.11176): r(s_t, a_t) = 1/N Σ R, exact where the trajectory ended with a_t.
        """
        return np.array([np.mean(R) if len(R) else np.nan for R in self._returns()])

    @property
    def standard_errors(self) -> NDArray[np.float64]:
        """(T,), of `values`: the sample's standard deviation / √N, nan for less than two."""
        return np.array(
            [np.std(R, ddof=1) / len(R) ** 0.5 if len(R) > 1 else np.nan for R in self._returns()]
        )

    def _returns(self) -> list[list[float]]:
        return [[sum(e.rewards) for e in step if e.crashed is None] for step in self.episodes]


def continue_rollouts(
    policy: Policy,
    env: str | EnvFactory,
    trajectories: Sequence[Trajectory],
    *,
    samples: int = 5,
    steps: Sequence[Sequence[int]] | None = None,
    places: Sequence[int] | None = None,
    max_steps: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    timeout: float | None = None,
    progress: bool = False,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
) -> list[Continuations]:
    """After each action of each trajectory, let ``policy`` act to the end, ``samples`` times.

    Environments are brought to a state by replay: ``reset(meta["seed"])`` and the trajectory's
    actions, which must show the trajectory's observations. The tokens of (trajectory, step, sample)
    depend on the policy's seed, on these three places, and on nothing else beyond rounding. As
    sequences, ``e.trunk.input_ids`` with ``e.trunk.action_mask``, the episodes share their
    beginnings, which `stepagent.pack_sequences` packs once. Options: `run_episodes`.

    Args:
        trajectories: as `Episode.trajectory` gives them: turns of user and assistant, and the
            environment's seed in ``meta``.
        steps: the steps t of each trajectory that are continued after; None: all of them.
            `Continuations` then has these.
        places: the number of each trajectory in the random numbers; None: its place.

    Raises:
        ValueError: for another trajectory, for steps that it has not, and where a replay takes
            another course, naming the trajectory and the step.
    """
    check_count("samples", samples)
    after = [list(range(one.num_steps)) for one in trajectories] if steps is None else steps
    _check_steps(trajectories, after)
    numbers = range(len(trajectories)) if places is None else places
    starts = [
        Start(env_seed(i, trajectory), _key(number, t, n), trajectory, t + 1, f"trajectories[{i}]")
        for i, (trajectory, number) in enumerate(zip(trajectories, numbers, strict=True))
        for t in after[i]
        for n in range(samples)
    ]
    form = as_format(action_format)
    options = Options(None, max_steps, batch_size, workers, timeout, action_format=form)
    rolled = iter(roll_out(env, policy, starts, options, "continue" if progress else None))
    return [Continuations([[next(rolled) for _ in range(samples)] for _ in own]) for own in after]


def _check_steps(trajectories: Sequence[Trajectory], steps: Sequence[Sequence[int]]) -> None:
    if len(steps) != len(trajectories):
        raise ValueError(
            f"there must be steps for each of the {len(trajectories)} trajectories, got "
            f"{len(steps)}"
        )
    for i, (trajectory, own) in enumerate(zip(trajectories, steps, strict=True)):
        for t in own:
            if not 0 <= t < trajectory.num_steps:
                raise ValueError(
                    f"trajectories[{i}] ({trajectory.id!r}) steps must be in [0, "
                    f"{trajectory.num_steps}), got {t}"
                )


def env_seed(index: int, trajectory: Trajectory) -> int:
    name = f"trajectories[{index}] ({trajectory.id!r})"
    roles = [message["role"] for message in split_system(trajectory)[1]]
    if roles != ["user", "assistant"] * trajectory.num_steps:
        raise ValueError(f"{name} roles must be user, assistant in turn, got {roles}")
    seed = trajectory.meta.get("seed")
    if not isinstance(seed, int):
        raise ValueError(
            f"{name} must have the seed of its environment in meta['seed'], got {seed!r}"
        )
    return seed


def _key(*place: int) -> int:
    """A seed, in [0, 2⁶³), of its own for (trajectory, step, sample)."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)


def rollout_and_query(
    model: PreTrainedModel | Engine,
    env: str | EnvFactory,
    expert: Expert | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    timeout: float | None = None,
    progress: bool = False,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
    chat_template_kwargs: dict[str, Any] | None = None,
    teacher_share: float = 0.0,
    ask: Ask | Asker = "always",
    budget: int | None = None,
) -> tuple[list[Trunk], list[list[list[NDArray[np.int32]]]]]:
    """Beyond the paper: roll the agent out, and ask the expert at each of the agent's own states.

    The agent's rollout is the trunk, the expert's answer the branch: ``branches[i][t]`` holds one
    action, or none where the expert has no answer or was not asked; so the answers that were paid
    for are ``sum(len(step) for steps in branches for step in steps)``. `stepagent.pack_step_pairs`
    takes both. A rollout that crashed is left out, with a warning. Further options: `run_episodes`.

    Args:
        model: a model, or an engine of `stepagent.engines`, which needs ``eos_token_id``.
        expert: asked for its action in an environment; None: the environment's own expert. With
            ``workers`` it sees what a `stepagent.envs.TextEnv` shows.
        chat_template_kwargs: for the agent's prompts and the expert's answers alike.
        teacher_share: with this probability the expert's answer is what is done at a step, and so
            the trunk's action and the branch's (DAgger's β, Ross et al. 2011): decided by ``seed``,
            the episode's seed and the step alone. Where the expert has no answer, the agent acts.
        ask: where, with a budget: ``"unsure"``, ``"random"`` or ``"worth"``, or an asker of
            `stepagent.askers`, which goes on from what it has learnt in calls before; ``"always"``
            asks at all steps in their order, while it lasts.
        budget: at most this many answers. The rollouts come first; then they are replayed to the
            states that are asked about, so the environment must show the same again.

    Raises:
        ValueError: for a share that is not in [0, 1], for a budget that is used up (0), with a
            teacher_share or absent where ``ask`` needs one; for an environment that does not repeat
            itself.
        RuntimeError: where all rollouts crashed.
    """
    tokenizer = with_arguments(tokenizer, chat_template_kwargs)
    _check_budget(ask, budget, teacher_share)
    episodes = queried_rollouts(
        model,
        env,
        expert,
        tokenizer=tokenizer,
        seeds=seeds,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_token_id=eos_token_id,
        seed=seed,
        max_steps=max_steps,
        batch_size=batch_size,
        workers=workers,
        timeout=timeout,
        progress=progress,
        action_format=action_format,
        teacher_share=teacher_share,
        only_to_act=budget is not None,
    )
    if budget is not None:

        def again(steps: list[list[int]]) -> list[Episode]:
            return ask_again(
                env,
                expert,
                episodes,
                steps,
                max_steps=max_steps,
                batch_size=batch_size,
                workers=workers,
                timeout=timeout,
                action_format=action_format,
            )

        asker = ask if isinstance(ask, Asker) else asker_of(ask, seed)
        episodes, _ = ask_where_worth(asker, episodes, budget, again)
    return trunks_and_answers(episodes, tokenizer, as_format(action_format))


def _check_budget(ask: Ask | Asker, budget: int | None, teacher_share: float) -> None:
    if not isinstance(ask, Asker) and ask not in ASKS:
        raise ValueError(f"ask must be one of {ASKS} or an Asker, got {ask!r}")
    if budget is None:
        if ask != "always":
            raise ValueError(f"ask={ask!r} must have a budget of answers, got None")
        return
    check_count("budget", budget)
    if teacher_share:
        raise ValueError(
            f"teacher_share must be 0 with a budget, got {teacher_share}: the expert that acts is "
            "asked before it is known what its answers are worth"
        )


def queried_rollouts(
    model: PreTrainedModel | Engine,
    env: str | EnvFactory,
    expert: Expert | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int | Sequence[int] | None,
    seed: int,
    progress: bool,
    max_steps: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    timeout: float | None = None,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
    teacher_share: float = 0.0,
    only_to_act: bool = False,
) -> list[Episode]:
    """The episodes of `rollout_and_query`: what happens at a seed depends on no other.

    Args:
        only_to_act: the expert is asked at the steps at which it acts, and at no other.
    """
    form = as_format(action_format)
    teacher = Teacher(
        teacher_share, seed, functools.cache(lambda text: action_tokens(text, tokenizer))
    )
    options = Options(
        expert or own_expert,
        max_steps,
        batch_size,
        workers,
        timeout,
        action_format=form,
        teacher=teacher if teacher_share else None,
        asks=teacher.acts if only_to_act else None,
    )
    policy = policy_of(
        model,
        tokenizer,
        eos_token_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    starts = [Start(place, place) for place in seeds]
    return roll_out(env, policy, starts, options, "rollout" if progress else None)


def policy_of(
    model: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_id: int | Sequence[int] | None,
    **options: Any,
) -> ModelPolicy | EnginePolicy:
    """Of a model, or of an engine, which needs ``eos_token_id``; options are those of both."""
    if isinstance(model, nn.Module):
        return ModelPolicy(model, tokenizer, eos_token_id=eos_token_id, **options)
    ends = given_ends(eos_token_id, "an engine")
    return EnginePolicy(model, tokenizer, eos_token_id=ends, **options)


def trunks_and_answers(
    episodes: Sequence[Episode],
    tokenizer: PreTrainedTokenizerBase,
    form: ActionFormat = PLAIN,
) -> tuple[list[Trunk], list[list[list[NDArray[np.int32]]]]]:
    """What `rollout_and_query` gives, of its episodes: of those that took a step."""
    ended = [(e, e.trunk) for e in episodes if e.crashed is None and e.trunk is not None]
    if episodes and not ended:
        why = episodes[0].crashed or f"none took a step ({episodes[0].terminate_reason})"
        raise RuntimeError(f"all {len(episodes)} rollouts crashed: {why}")
    tokens = {
        action: action_tokens(form.written(action), tokenizer)
        for action in sorted({a for e, _ in ended for a in e.expert_actions if a is not None})
    }
    branches = [
        [[] if action is None else [tokens[action]] for action in episode.expert_actions]
        for episode, _ in ended
    ]
    return [trunk for _, trunk in ended], branches


def action_tokens(action: str, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
    """The token ids (n,) of ``action`` as an assistant turn, end-of-turn included, under the
    template arguments that the tokenizer carries."""
    turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": action}]
    trunk = encode(Trajectory(messages=turn), tokenizer)
    start, stop = trunk.action_spans[0]
    return trunk.input_ids[start:stop]
