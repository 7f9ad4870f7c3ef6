"""A cycle's data: the agent acts, at the expert's states or in an environment at its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import DistributedType
from torch import Tensor

from ..acting.askers import Asker
from ..acting.asking import ask_again
from ..acting.inspection import inspect
from ..acting.lockstep import roll_out
from ..acting.rollout import Expert, policy_of, queried_rollouts, trunks_and_answers
from ..acting.runs import Options, Start
from ..acting.verifying import verify
from ..data.actions import FORMATS
from ..data.branch import Branch
from ..data.ends import ends_of
from ..data.trunk import Trunk
from ..engines import CompletionsEngine, Engine
from ..engines.adapters import PolicyOnEngine, first_state, logp_gap
from ..envs.pool import EnvFactory
from ..ranks import over_ranks
from ..records.cycle_file import ROLLOUTS, write_cycle
from ..records.episodes import Episode
from ..trees.tree import TokenTree, pack_step_pairs
from .cycle import Comparison
from .failures import Failure, with_alternatives
from .methods import method_class
from .questions import Questions
from .turns import As, in_turn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..acting.policies import ModelPolicy
    from ..acting.server_policies import EnginePolicy
    from .config import StepAgentConfig

_PROBES = 8  # actions at one state, by which an engine is found to be another policy
# Whose adapter is whole in each process; FSDP2's is gathered.
_TRAINED_WITH_ENGINE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Collector:
    """Has the policy, or the engine that acts for it, act where a cycle begins."""

    def __init__(
        self,
        trunks: Sequence[Trunk],
        tokenizer: PreTrainedTokenizerBase,
        args: StepAgentConfig,
        env: str | EnvFactory | None,
        expert: Expert | None,
        asker: Asker | None = None,
    ) -> None:
        self._trunks, self._tokenizer, self._args = trunks, tokenizer, args
        self._env, self._expert = env, expert
        self.end_tokens = ends_of(trunks)
        self.max_new_tokens = args.max_new_tokens or longest_action(trunks)
        self.count = len(trunks)
        self.rollouts = args.rollouts or len(trunks)  # of a cycle that has any
        self.per_cycle = method_class(args.method, args.states).items(args, len(trunks))
        self._on_engine: PolicyOnEngine | None = None
        self.questions = Questions(args, asker)
        self._verdicts: dict[str, float] = {}  # of the newest cycle
        self._acted: list[Episode] = []  # since `keep_rollouts`

    def figures(self) -> dict[str, float]:
        """Of the newest cycle, beside those of what it compares."""
        return self._verdicts | self.questions.figures()

    def act_on(self, engine: Engine | str, accelerator: Accelerator) -> None:
        """Let an engine act in place of the policy here.

        Raises:
            ValueError: where the processes of the run cannot all reach it or hand over the adapter.
        """
        if isinstance(engine, str):
            engine = CompletionsEngine(engine)
        kind, processes = accelerator.distributed_type, accelerator.num_processes
        if kind not in _TRAINED_WITH_ENGINE and not accelerator.is_fsdp2:
            raise ValueError(f"engine= takes adapters of DDP and of FSDP2, but this run is {kind}")
        if processes > 1 and not engine.shared:
            raise ValueError(
                f"{type(engine).__name__} is in one process, but {processes} train: "
                "start a server, which all can ask, and give its URL"
            )
        self._on_engine = PolicyOnEngine(engine, Path(str(self._args.output_dir), "engine"))

    def publish(
        self,
        policy: PreTrainedModel,
        cycle: int,
        score: Callable[[Sequence[TokenTree]], Tensor],
    ) -> dict[str, float]:
        """Have the engine, if any, act as the policy does now; see at one state that it does.

        Args:
            score: log-probs of trees under the policy.
        """
        if self._on_engine is None:
            return {}
        state = first_state(self._trunks)
        ((branches,),) = self._on_engine.publish(
            policy,
            cycle,
            lambda actor: inspect(
                actor,
                [state],
                samples=_PROBES,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.end_tokens,
                seed=cycle_seed(self._args, cycle),
            ),
        )
        trees = pack_step_pairs([state], [[[branch.token_ids for branch in branches]]])
        logps_N = score(trees)
        expert = len(state.input_ids) - int(state.action_spans[0, 0])  # its action comes first
        return {"engine_gap": logp_gap(branches, logps_N[expert:].float().cpu().numpy())}

    def withdraw(self) -> None:
        """Leave the engine, if any, without the adapter."""
        if self._on_engine is not None:
            self._on_engine.withdraw()

    def collect(
        self,
        policy: PreTrainedModel,
        cycle: int,
        *,
        sharded: bool,
        explorer: As | None = None,
    ) -> list[Comparison]:
        """What is compared in a cycle, the same on all processes.

        Args:
            sharded: a forward of the policy needs all processes at the same time.
            explorer: acts in every other rollout.
        """
        actor, alike = self._actor(policy, sharded)
        made = self._at_expert_states(actor, cycle, alike) if self._args.inspects else []
        if self._args.rolls_out:
            made += self._at_agent_states(actor, cycle, alike, explorer)
        return made

    def keep_rollouts(self, cycle: int) -> None:
        """Write down, with ``save_rollouts``, the episodes that the agent acted in."""
        if self._args.save_rollouts and self._args.should_save:
            write_cycle(Path(str(self._args.output_dir), ROLLOUTS), cycle, self._acted)
        self._acted = []

    def _actor(
        self, policy: PreTrainedModel, sharded: bool
    ) -> tuple[PreTrainedModel | Engine, bool]:
        """Who acts, and whether all processes have to act alike."""
        if self._on_engine is None:
            return policy, sharded
        return self._on_engine.actor, False

    def episodes(
        self,
        policy: PreTrainedModel,
        cycle: int,
        seeds: Sequence[int],
        *,
        samples: int,
        system: str | None,
        sharded: bool,
    ) -> list[list[Episode]]:
        """As `Acting.episodes`."""
        args, env = self._args, self._env
        assert env is not None  # the method has checked it
        agent, alike = self.agent(policy, cycle, system=system, sharded=sharded)
        places = [(seed, i * samples + n) for i, seed in enumerate(seeds) for n in range(samples)]
        options = Options(
            None, args.max_steps_per_episode, 64, 0, None, action_format=FORMATS[args.action_format]
        )

        def rolled_out(some: list[int]) -> list[Episode]:
            starts = [Start(*places[i]) for i in some]
            return roll_out(env, agent, starts, options, None if args.disable_tqdm else "rollout")

        found = over_ranks(rolled_out, np.ones(len(places)), alike=alike)
        self._acted += found
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    def agent(
        self, policy: PreTrainedModel, cycle: int, *, system: str | None, sharded: bool
    ) -> tuple[ModelPolicy | EnginePolicy, bool]:
        """Who acts in a cycle, and whether all processes have to act alike."""
        actor, alike = self._actor(policy, sharded)
        seed = cycle_seed(self._args, cycle)
        return self.policy_of(actor, self._args.temperature, seed, system), alike

    def policy_of(
        self, model: PreTrainedModel | Engine, temperature: float, seed: int, system: str | None
    ) -> ModelPolicy | EnginePolicy:
        """A model that acts as the agent does, in another temperature."""
        return policy_of(
            model,
            self._tokenizer,
            self.end_tokens,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            seed=seed,
            system=system,
        )

    def _at_expert_states(
        self, actor: PreTrainedModel | Engine, cycle: int, alike: bool
    ) -> list[Comparison]:
        branches = inspected(
            actor,
            self._trunks,
            self._args,
            samples=self._args.samples,
            temperature=self._args.temperature,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.end_tokens,
            seed=cycle_seed(self._args, cycle),
            alike=alike,
        )
        tried = [[[branch.token_ids for branch in step] for step in steps] for steps in branches]
        return [
            Comparison(t, b, expert_trunk=True) for t, b in zip(self._trunks, tried, strict=True)
        ]

    def _at_agent_states(
        self,
        actor: PreTrainedModel | Engine,
        cycle: int,
        alike: bool,
        explorer: As | None,
    ) -> list[Comparison]:
        env = self._env
        assert env is not None  # the trainer has checked it
        first = self._args.rollout_seed_start + cycle * self.rollouts

        def rolled_out(places: list[int]) -> list[Episode]:
            return queried_rollouts(
                actor,
                env,
                self._expert,
                tokenizer=self._tokenizer,
                seeds=[first + place for place in places],
                max_new_tokens=self.max_new_tokens,
                temperature=self._args.temperature,
                eos_token_id=self.end_tokens,
                seed=cycle_seed(self._args, cycle),
                max_steps=self._args.max_steps_per_episode,
                progress=not self._args.disable_tqdm,
                action_format=self._args.action_format,
                teacher_share=self._args.teacher_share * self._args.teacher_decay**cycle,
                only_to_act=self.questions.afterwards,
            )

        actors = [nullcontext] if explorer is None else [nullcontext, explorer]
        episodes = in_turn(actors, rolled_out, self.rollouts, alike=alike)
        explored = [place % len(actors) == 1 for place in range(self.rollouts)]
        if self.questions.afterwards:
            acted_in = episodes
            episodes = self.questions.choose(
                acted_in, cycle, lambda steps: self._asked(acted_in, steps)
            )
        self._acted += episodes
        form = FORMATS[self._args.action_format]
        trunks, answers = trunks_and_answers(episodes, self._tokenizer, form)
        ended = [e.crashed is None and e.trunk is not None for e in episodes]
        acted, explored = list(compress(episodes, ended)), list(compress(explored, ended))
        if self._args.verify:
            made, self._verdicts = self._verified(actor, alike, cycle, acted, trunks, answers)
            return made
        return [compared(*one) for one in zip(acted, trunks, answers, explored, strict=True)]

    def _verified(
        self,
        actor: PreTrainedModel | Engine,
        alike: bool,
        cycle: int,
        episodes: Sequence[Episode],
        trunks: Sequence[Trunk],
        answers: Sequence[list[list[NDArray[np.int32]]]],
    ) -> tuple[list[Comparison], dict[str, float]]:
        """The failures with the answers that turn them into successes, and figures."""
        args, env = self._args, self._env
        assert env is not None
        failed = [
            Failure.of(*one, FORMATS[args.action_format])
            for one in zip(episodes, trunks, answers, strict=True)
            if not one[0].success
        ]
        if args.alternatives:
            own = inspected(
                actor,
                [one.trunk for one in failed],
                args,
                samples=args.alternatives,
                temperature=args.temperature,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.end_tokens,
                seed=cycle_seed(args, cycle),
                alike=alike,
            )
            failed = with_alternatives(failed, own, self._tokenizer, self.end_tokens)
        policy = self.policy_of(actor, args.temperature, cycle_seed(args, cycle), None)

        def turned(places: list[int]) -> list[list[list[bool]]]:
            return verify(
                policy,
                env,
                [failed[i].episode for i in places],
                [failed[i].texts for i in places],
                tokens=[failed[i].tokens for i in places],
                samples=args.verify or 1,
                places=places,
                max_steps=args.max_steps_per_episode,
                action_format=args.action_format,
                progress=not args.disable_tqdm,
            )

        flags = over_ranks(turned, [one.tried for one in failed], alike=alike)
        made = [one.kept(own) for one, own in zip(failed, flags, strict=True)]
        kept = [one for one in made if any(one.branches)]
        if not kept:
            warnings.warn(
                f"cycle {cycle} has no answer that turns one of {len(failed)} failed rollouts into "
                "a success, so nothing is learnt at the agent's states",
                RuntimeWarning,
                stacklevel=2,
            )
        asked = [action for e in episodes for action in e.expert_actions]
        return kept, {
            "expert_answers": sum(action is not None for action in asked),
            "failures": len(failed),
            "answers_tried": sum(one.tried for one in failed),
            "answers_verified": sum(len(step) for one in kept for step in one.branches),
        }

    def _asked(self, episodes: Sequence[Episode], steps: Sequence[list[int]]) -> list[Episode]:
        """The rollouts with the expert's answers at these steps."""
        env = self._env
        assert env is not None

        def asked(places: list[int]) -> list[Episode]:
            chosen = [episodes[place] for place in places], [steps[place] for place in places]
            return ask_again(
                env,
                self._expert,
                *chosen,
                max_steps=self._args.max_steps_per_episode,
                action_format=self._args.action_format,
            )

        # No forward of the agent, so that the processes share these whatever it is sharded over.
        return over_ranks(asked, [len(e.actions) for e in episodes])


@dataclass(frozen=True)
class Acting:
    """The agent of a cycle, which a method has act: on all processes, with the same results."""

    collector: Collector
    policy: PreTrainedModel
    cycle: int
    sharded: bool

    def compared(self, explorer: As | None = None) -> list[Comparison]:
        """What it does at the states of the run's ``states``, beside what the expert does there.

        Args:
            explorer: acts in every other rollout.
        """
        return self.collector.collect(
            self.policy, self.cycle, sharded=self.sharded, explorer=explorer
        )

    def episodes(
        self, seeds: Sequence[int], *, samples: int = 1, system: str | None = None
    ) -> list[list[Episode]]:
        """``[i][n]``: ``samples`` episodes of its own from each of these environment seeds.

        Args:
            system: the first message to it.
        """
        return self.collector.episodes(
            self.policy, self.cycle, seeds, samples=samples, system=system, sharded=self.sharded
        )

    def agent(self, system: str | None = None) -> tuple[ModelPolicy | EnginePolicy, bool]:
        """It itself, as this process has it act, and whether all processes have to act alike."""
        return self.collector.agent(self.policy, self.cycle, system=system, sharded=self.sharded)

    def another(
        self, model: PreTrainedModel, *, temperature: float, seed: int, system: str | None = None
    ) -> tuple[ModelPolicy | EnginePolicy, bool]:
        """The same of another model: its adapter may be off, as in `reference_of`."""
        alike = self.sharded and model is self.policy
        return self.collector.policy_of(model, temperature, seed, system), alike


def compared(
    episode: Episode,
    trunk: Trunk,
    answers: Sequence[list[NDArray[np.int32]]],
    explored: bool = False,
) -> Comparison:
    """A rollout with the expert's answers, and the agent's actions where the expert acted."""
    if not episode.overruled:
        return Comparison(trunk, list(answers), expert_trunk=False, explored=explored)
    own = episode.overruled
    return Comparison(
        trunk,
        [answer if ids is None else [ids] for answer, ids in zip(answers, own, strict=True)],
        expert_trunk=False,
        teacher_T=np.array([ids is not None for ids in own]),
        explored=explored,
    )


def inspected(
    actor: PreTrainedModel | Engine,
    trunks: Sequence[Trunk],
    args: StepAgentConfig,
    *,
    first_trunk: int = 0,
    alike: bool,
    **options: Any,
) -> list[list[list[Branch]]]:
    """The actor's actions at every state of the trunks, shared over the processes of the run.

    Args:
        first_trunk: the place of the first one, for the random numbers.
        alike: a forward of the actor needs all processes at the same time.
        options: those of `stepagent.inspect`.
    """

    def some(places: list[int]) -> list[list[list[Branch]]]:
        return inspect(
            actor,
            [trunks[i] for i in places],
            places=[first_trunk + i for i in places],
            max_batch_tokens=args.inspect_batch_tokens,
            progress=not args.disable_tqdm,
            **options,
        )

    return over_ranks(some, [len(trunk.input_ids) for trunk in trunks], alike=alike)


def cycle_seed(args: StepAgentConfig, cycle: int) -> int:
    """Of all that is sampled in a cycle."""
    return args.seed * 1_000_003 + cycle


def longest_action(trunks: Sequence[Trunk]) -> int:
    """Tokens of the longest action of all."""
    return max(int(np.diff(trunk.action_spans).max()) for trunk in trunks)
