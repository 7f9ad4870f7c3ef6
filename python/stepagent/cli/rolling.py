"""What ``collect`` and ``evaluate`` share: who acts, in which episodes, and the file they go to."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Container
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import envs
from ..address import TokenLimit, is_url, without_secrets
from ..data.actions import PLAIN, ActionFormat
from .base import Interrupted
from .loading import device, is_hub_name, load_model, load_tokenizer, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..acting.policies import Policy
    from ..records.episodes import Episode


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
    instructions: bool | None = None  # None: where the policy is not one that was trained here
    action_format: ActionFormat = PLAIN
    temperature: float | None = None
    server_timeout: float | None = None
    token_limit: TokenLimit | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        of_servers = ("served_model", "tokenizer", "server_timeout", "token_limit")
        of_models = ("system", "temperature", "instructions", "chat_template_kwargs")
        useless: tuple[str, ...] = () if is_url(self.policy) else of_servers
        useless += of_models if self.policy in ("expert", "random") else ()
        for name in useless:
            if getattr(self, name) is not None:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} is of no use with --policy {self.policy}")
        if self.token_limit is not None and self.tokenizer is not None:
            raise click.UsageError("--token-limit is of no use with --tokenizer")

    @property
    def shown_env(self) -> str:
        """For records and people, which are shown no password."""
        return envs.shown_name(self.env)

    @property
    def shown_policy(self) -> str:
        """For records and people, which are shown no password."""
        return without_secrets(self.policy) if is_url(self.policy) else self.policy

    def run(self, keep: Callable[[Episode], bool] = lambda _: True) -> list[Episode]:
        """The episodes, in the order of seeds; those of the file, where it has them.

        Args:
            keep: Which of them go to the file.
        """
        from ..records.episode_file import open_episodes
        from ..records.provenance import sitting

        if self.output is None:
            return self._run(self.seeds, None)
        with open_episodes(self.output, self.identity(), self.seeds) as file:
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
                note = f"{self._progress(len(file.ended))}; the same command continues"
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
            self.actor(),
            seeds,
            expert=own_expert if self.query_expert else None,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            workers=self.workers,
            timeout=self.step_timeout,
            split=self.split,
            progress=self.command,
            on_end=on_end,
            action_format=self.action_format,
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

    def identity(self) -> dict[str, Any]:
        """All that an episode depends on beside its seed."""
        from ..records.branches import fingerprint

        run: dict[str, Any] = {
            "command": self.command,
            "env": self.shown_env,
            "policy": self.shown_policy,
            "max_steps": self.max_steps,
            "query_expert": self.query_expert,
        }
        if self.split is not None:
            run["split"] = self.split
        if self._is_model:
            folder = model_folder(self.policy)
            run |= {"fingerprint": fingerprint(folder), "batch_size": self.batch_size}
        if self.tokenizer is not None:
            run["tokenizer"] = fingerprint(self.tokenizer)
        if is_url(self.policy):
            run |= {"served_model": self.served_model, "system": self._system}
        if self._is_model or is_url(self.policy):
            run["max_new_tokens"] = self.max_new_tokens
        # Named only where they are not as they always were, so that older files go on.
        if self._is_model and self._system is not None:
            run["system"] = self._system
        if self.temperature:
            run["temperature"] = self.temperature
        if self.chat_template_kwargs:
            run["chat_template_kwargs"] = self.chat_template_kwargs
        if self.action_format != PLAIN:
            run["action_format"] = self.action_format.name
        return run

    @functools.cached_property
    def _system(self) -> str | None:
        """The first message to the model: ``--system``, and the environment's instructions."""
        wanted = self.instructions
        if wanted is None:
            unknown = is_hub_name(self.policy) and not Path(self.policy).is_dir()
            asked_in_text = is_url(self.policy) and self.tokenizer is None
            wanted = self.system is None and (unknown or asked_in_text)
        parts = [self.system, *(self._instructions() if wanted else ())]
        return "\n\n".join(part for part in parts if part) or None

    def _instructions(self) -> list[str]:
        own = ""
        if not self.env.startswith("agentgym:"):  # whose servers have few, and no instructions
            with closing(envs.factory(self.env, self.split)()) as env:
                own = getattr(env, "instructions", "")
        if self.instructions and not own:
            raise click.UsageError(
                f"--instructions: {self.shown_env} has none; say them by --system"
            )
        return [own, self.action_format.instructions] if own else []

    def actor(self) -> Policy:
        """Who acts; a model is loaded now."""
        from ..acting.policies import ExpertPolicy, RandomPolicy

        if self.policy == "expert":
            return ExpertPolicy()
        if self.policy == "random":
            return RandomPolicy()
        return self._server() if is_url(self.policy) else self._model()

    def _model(self) -> Policy:
        action = self._some_action()  # first: a wrong name need not wait for a model
        from ..acting.policies import ModelPolicy

        folder, given = model_folder(self.policy), self.chat_template_kwargs
        model, tokenizer = load_model(folder, device(), chat_template_kwargs=given)
        end = _end_of_turn(action, tokenizer)
        policy = ModelPolicy(model, tokenizer, eos_token_id=end, **self._speaking)
        policy.name = self.policy
        return policy

    def _server(self) -> Policy:
        from ..acting.server_policies import ChatPolicy, EnginePolicy
        from ..engines import CompletionsEngine, Server

        patience: Any = {} if self.server_timeout is None else {"timeout": self.server_timeout}
        options: Any = {"name": self.shown_policy, **self._speaking}
        if self.tokenizer is None:
            key = os.environ.get("OPENAI_API_KEY")
            server = Server(self.policy, model=self.served_model, api_key=key, **patience)
            return ChatPolicy(server, token_limit=self.token_limit or "max_tokens", **options)
        tokenizer = load_tokenizer(self.tokenizer, self.chat_template_kwargs)
        engine = CompletionsEngine(self.policy, model=self.served_model, **patience)
        end = _end_of_turn(self._some_action(), tokenizer)
        return EnginePolicy(engine, tokenizer, eos_token_id=end, **options)

    @property
    def _speaking(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature or 0.0,
            "system": self._system,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def _some_action(self) -> str:
        from ..envs.base import check_seeds

        with closing(envs.factory(self.env, self.split)()) as env:
            check_seeds(env, self.seeds)
            env.reset(seed=self.seeds[0])
            try:
                return env.actions[0] if env.actions else env.expert_action()
            except envs.ExpertUnavailable:
                return "look"


def _end_of_turn(action: str, tokenizer: PreTrainedTokenizerBase) -> int:
    from ..acting.rollout import action_tokens

    return int(action_tokens(action, tokenizer)[-1])
