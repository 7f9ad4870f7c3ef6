"""Episodes: a policy in an environment, and the expert's answers at the policy's own states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from . import envs as environments
from .decoding import check_count
from .encoding import Trunk, encode
from .envs.base import ExpertUnavailable, TextEnv
from .policies import ModelPolicy, Policy
from .trajectory import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EnvFactory = Callable[[], TextEnv]
Expert = Callable[[TextEnv], str]


@dataclass
class Episode:
    """What happened in one episode, step by step."""

    environment: str
    seed: int
    observations: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    expert_actions: list[str | None] = field(default_factory=list)  # empty unless queried
    success: bool = False
    trunk: Trunk | None = None  # of a model's episode: its token ids as sampled

    def trajectory(self) -> Trajectory:
        """The episode as chat messages; the last observation, after the last action, is dropped."""
        messages = []
        for observation, action in zip(self.observations, self.actions, strict=True):
            messages.append({"role": "user", "content": observation})
            messages.append({"role": "assistant", "content": action})
        return Trajectory(
            messages=messages,
            reward=sum(self.rewards),
            id=f"{self.environment}/{self.seed}",
            meta={"environment": self.environment, "seed": self.seed, "success": self.success},
        )


def run_episodes(
    env: str | EnvFactory,
    policy: Policy,
    seeds: Sequence[int],
    *,
    expert: Expert | None = None,
    max_steps: int | None = None,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[Episode]:
    """One episode per seed, ``batch_size`` at a time in lock-step; in the order of ``seeds``.

    :param env: a name for :func:`stepagent.envs.make`, or a function that makes an environment.
    :param expert: asked at every state for its action, which is recorded and not taken.
    :param max_steps: ends an episode sooner than the environment would.
    :param progress: the label of a progress bar on stderr; None: no bar.
    """
    check_count("batch_size", batch_size)
    if max_steps is not None:
        check_count("max_steps", max_steps)
    episodes: list[Episode] = []
    with tqdm(total=len(seeds), desc=progress, disable=progress is None) as bar:
        for first in range(0, len(seeds), batch_size):
            batch = seeds[first : first + batch_size]
            episodes += _run_batch(env, policy, batch, expert, max_steps, bar)
    return episodes


def _run_batch(
    env: str | EnvFactory,
    policy: Policy,
    seeds: Sequence[int],
    expert: Expert | None,
    max_steps: int | None,
    bar: Any,
) -> list[Episode]:
    with _environments(env, len(seeds)) as running:
        episodes = [Episode(e.name, seed) for e, seed in zip(running, seeds, strict=True)]
        observations = [e.reset(seed)[0] for e, seed in zip(running, seeds, strict=True)]
        policy.begin(seeds)
        active = list(range(len(seeds)))
        while active:
            if expert is not None:
                for row in active:
                    episodes[row].expert_actions.append(_ask(expert, running[row]))
            actions = policy.act(
                [observations[row] for row in active], [running[r] for r in active]
            )
            done = [
                _step(running[row], episodes[row], observations, row, action)
                or len(episodes[row].actions) == max_steps
                for row, action in zip(active, actions, strict=True)
            ]
            if isinstance(policy, ModelPolicy):
                for place, row in enumerate(active):
                    if done[place]:
                        episodes[row].trunk = policy.trunk(place)
            going = [place for place, ended in enumerate(done) if not ended]
            active = [active[place] for place in going]
            if len(going) < len(done):
                bar.update(len(done) - len(going))
                policy.keep(going)
    return episodes


def _step(env: TextEnv, episode: Episode, observations: list[str], row: int, action: str) -> bool:
    """Take one action and record it; True when the episode has ended."""
    episode.observations.append(observations[row])
    episode.actions.append(action)
    observations[row], reward, terminated, truncated, info = env.step(action)
    episode.rewards.append(reward)
    episode.valid.append(info["valid"])
    episode.progress.append(info["progress"])
    episode.success = info["success"]
    return terminated or truncated


def _ask(expert: Expert, env: TextEnv) -> str | None:
    try:
        answer: object = expert(env)
    except ExpertUnavailable:
        return None  # recorded as unanswered, counted by the caller
    if not isinstance(answer, str):
        raise TypeError(
            f"the expert answered {answer!r} in {env.name}; an answer must be a str, "
            "or ExpertUnavailable where it has none"
        )
    return answer


@contextmanager
def _environments(env: str | EnvFactory, count: int) -> Iterator[list[TextEnv]]:
    made: list[TextEnv] = []
    try:
        for _ in range(count):
            made.append(environments.make(env) if isinstance(env, str) else env())
        yield made
    finally:
        for one in made:
            one.close()


def rollout_and_query(
    model: PreTrainedModel,
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
    progress: bool = False,
) -> tuple[list[Trunk], list[list[list[NDArray[np.int32]]]]]:
    """Beyond the paper: roll the agent out, and ask the expert at each of the agent's own states.

    The agent's rollout is the trunk, the expert's answer the branch: ``branches[i][t]`` holds one
    action, or none where the expert has no answer. :func:`stepagent.pack_step_pairs` takes both.

    :param max_steps: ends a rollout sooner than the environment would.
    :param expert: asked for its action in an environment; None: the environment's own expert.
    """
    policy = ModelPolicy(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_token_id=eos_token_id,
        seed=seed,
    )
    episodes = run_episodes(
        env,
        policy,
        seeds,
        expert=expert or (lambda env: env.expert_action()),
        max_steps=max_steps,
        batch_size=batch_size,
        progress="rollout" if progress else None,
    )
    tokens = {
        action: action_tokens(action, tokenizer)
        for action in sorted({a for e in episodes for a in e.expert_actions if a is not None})
    }
    trunks = [episode.trunk for episode in episodes if episode.trunk is not None]
    branches = [
        [[] if action is None else [tokens[action]] for action in episode.expert_actions]
        for episode in episodes
    ]
    return trunks, branches


def action_tokens(action: str, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
    """The token ids (n,) of ``action`` as an assistant turn, end-of-turn included."""
    turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": action}]
    trunk = encode(Trajectory(messages=turn), tokenizer)
    start, stop = trunk.action_spans[0]
    return trunk.input_ids[start:stop]
