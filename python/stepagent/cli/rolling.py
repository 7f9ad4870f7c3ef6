"""What ``collect`` and ``evaluate`` share: who acts, in which episodes, and the file they go to."""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import envs
from .base import Interrupted
from .loading import device, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..acting.policies import Policy
    from ..records.episodes import Episode


def is_url(policy: str) -> bool:
    """Whether a policy is that of a server."""
    return policy.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Rollout:
    """The options of a command that runs episodes; ``output`` is where they go, if anywhere."""

    command: str
    env: str
    split: str | None
    policy: str
    seeds: list[int]
    output: Path | None
    max_steps: int | None
    query_expert: bool
    max_new_tokens: int
    batch_size: int
    workers: int
    step_timeout: float
    served_model: str | None
    tokenizer: Path | None
    system: str | None

    def __post_init__(self) -> None:
        for name in ("served_model", "tokenizer", "system"):
            if getattr(self, name) is not None and not is_url(self.policy):
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} is of no use with --policy {self.policy}")
        if self.system is not None and self.tokenizer is not None:
            raise click.UsageError("--system is of no use with --tokenizer")

    def run(self, keep: Callable[[Episode], bool] = lambda _: True) -> list[Episode]:
        """The episodes, in the order of seeds; those of the file, where it has them.

        :param keep: which of them go to the file.
        """
        from ..records.episode_file import open_episodes
        from ..records.provenance import sitting

        if self.output is None:
            return self._run(self.seeds, None)
        with open_episodes(self.output, self._identity(), self.seeds) as file:
            missing = self._missing(file.ended)
            work = sitting(self.output) if missing else nullcontext()
            try:
                if file.ended:
                    click.echo(self._progress(len(file.ended)), err=True)
                with work:
                    run = self._run(missing, lambda e: file.append(e) if keep(e) else None)
            except BaseException as stop:
                if not file.ended:
                    raise
                note = f"{self._progress(len(file.ended))}; the same command goes on"
                if isinstance(stop, KeyboardInterrupt):
                    raise Interrupted(note) from stop
                click.echo(note, err=True)
                raise
            by_seed = {episode.seed: episode for episode in run} | file.ended
        return [by_seed[seed] for seed in self.seeds]

    def _run(self, seeds: list[int], on_end: Callable[[Episode], None] | None) -> list[Episode]:
        if not seeds:
            return []
        from ..acting.rollout import own_expert, run_episodes

        return run_episodes(
            envs.factory(self.env, self.split),
            self._actor(),
            seeds,
            expert=own_expert if self.query_expert else None,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            workers=self.workers,
            timeout=self.step_timeout,
            split=self.split,
            progress=self.command,
            on_end=on_end,
        )

    def _progress(self, ended: int) -> str:
        return f"{ended} of {len(self.seeds)} episodes are in {self.output}"

    @property
    def _is_model(self) -> bool:
        return self.policy not in ("expert", "random") and not is_url(self.policy)

    def _missing(self, ended: Container[int]) -> list[int]:
        """The seeds still to be run. A local model's batches run as a whole: they decide rounding,
        so that what is missing is what it would have been."""
        size = self.batch_size if self._is_model else 1
        batches = [self.seeds[i : i + size] for i in range(0, len(self.seeds), size)]
        return [s for batch in batches if any(t not in ended for t in batch) for s in batch]

    def _identity(self) -> dict[str, Any]:
        """All that an episode depends on beside its seed."""
        from ..records.branches import fingerprint

        run: dict[str, Any] = {
            "command": self.command,
            "env": self.env,
            "policy": self.policy,
            "max_steps": self.max_steps,
            "query_expert": self.query_expert,
        }
        if self.split is not None:
            run["split"] = self.split
        if self._is_model:
            run |= {"fingerprint": fingerprint(Path(self.policy)), "batch_size": self.batch_size}
        if self.tokenizer is not None:
            run["tokenizer"] = fingerprint(self.tokenizer)
        if is_url(self.policy):
            run |= {"served_model": self.served_model, "system": self.system}
        if self._is_model or is_url(self.policy):
            run["max_new_tokens"] = self.max_new_tokens
        return run

    def _actor(self) -> Policy:
        from ..acting.policies import ExpertPolicy, RandomPolicy

        if self.policy == "expert":
            return ExpertPolicy()
        if self.policy == "random":
            return RandomPolicy()
        return self._server() if is_url(self.policy) else self._model()

    def _model(self) -> Policy:
        action = self._some_action()  # first: a wrong name need not wait for a model
        from ..acting.policies import ModelPolicy

        model, tokenizer = load_model(self.policy, device())
        end = _end_of_turn(action, tokenizer)
        limit = self.max_new_tokens
        return ModelPolicy(model, tokenizer, max_new_tokens=limit, eos_token_id=end)

    def _server(self) -> Policy:
        from ..acting.server_policies import ChatPolicy, EnginePolicy
        from ..engines import CompletionsEngine, Server

        options: Any = {"max_new_tokens": self.max_new_tokens, "name": self.policy}
        if self.tokenizer is None:
            key = os.environ.get("OPENAI_API_KEY")
            server = Server(self.policy, model=self.served_model, api_key=key)
            return ChatPolicy(server, system=self.system, **options)
        tokenizer = load_tokenizer(self.tokenizer)
        engine = CompletionsEngine(self.policy, model=self.served_model)
        end = _end_of_turn(self._some_action(), tokenizer)
        return EnginePolicy(engine, tokenizer, eos_token_id=end, **options)

    def _some_action(self) -> str:
        with closing(envs.factory(self.env, self.split)()) as env:
            env.reset(seed=self.seeds[0])
            return env.actions[0] if env.actions else env.expert_action()


def _end_of_turn(action: str, tokenizer: PreTrainedTokenizerBase) -> int:
    from ..acting.rollout import action_tokens

    return int(action_tokens(action, tokenizer)[-1])
