"""``stepagent evolve``: search over the text that an agent is told."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..address import is_url, without_secrets
from .base import FILE, NEW_FOLDER, POSITIVE, Interrupted, reports
from .episodes import HOW, WHERE
from .loading import import_from_here, is_hub_name
from .rolling import Rollout

if TYPE_CHECKING:
    from ..acting.policies import Policy
    from ..evolve import Evolved, Proposer

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# Of a model that is told the guideline; a function of one's own takes none of them.
_OF_MODELS = (
    *("system", "temperature", "instructions", "chat_template_kwargs", "served_model"),
    *("tokenizer", "server_timeout", "token_limit"),
)


def _is_function(text: str) -> bool:
    return _FUNCTION.fullmatch(text) is not None


def _check_policy(ctx: click.Context, param: click.Parameter, value: str) -> str:
    known = is_url(value) or _is_function(value) or Path(value).is_dir() or is_hub_name(value)
    if not known:
        raise click.BadParameter(
            f"{without_secrets(value)!r} is neither a server's URL nor a model's folder nor its "
            "name on the Hub (owner/name) nor your own module:function"
        )
    return value


def _check_proposer(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not (is_url(value) or Path(value).is_file() or _is_function(value)):
        raise click.BadParameter(
            f"{without_secrets(value)!r} is neither a server's URL nor a file of proposals nor "
            "your own module:function"
        )
    return value


_SEARCH = (
    click.option(
        "--episodes",
        type=POSITIVE,
        default=400,
        show_default=True,
        help="Pairs that judge a proposal.",
    ),
    click.option(
        "--held-out",
        type=click.IntRange(min=0),
        default=400,
        show_default=True,
        help="Episodes of each accepted guideline that decide nothing.",
    ),
    click.option(
        "--children",
        type=POSITIVE,
        default=8,
        show_default=True,
        help="Proposals in a row without one that is accepted, then it ends.",
    ),
    click.option(
        "--depth", type=POSITIVE, default=10, show_default=True, help="Accepted, at most."
    ),
    click.option(
        "--proposals", type=POSITIVE, default=100, show_default=True, help="Asked for, at most."
    ),
    click.option("--max-episodes", type=POSITIVE, help="To judge by, at most.  [default: any]"),
    click.option(
        "--payoff",
        type=click.Choice(("reward", "success", "progress_rate")),
        default="reward",
        show_default=True,
        help="Of an episode.",
    ),
    click.option(
        "--seed-start",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Environment seed of the first episode; no seed decides twice.",
    ),
    click.option("--proposer-model", metavar="NAME", help="Of several on the proposer's server."),
    click.option(
        "--proposer-tokens",
        type=POSITIVE,
        help="Longest answer of the proposer's server.  [default: 1024]",
    ),
)


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed((*_SEARCH, *HOW)):
        function = option(function)
    return function


@click.command()
@WHERE[0]
@WHERE[1]
@click.option(
    "--policy",
    metavar="URL|PATH|NAME|module:function",
    callback=_check_policy,
    required=True,
    help="Who follows a guideline: a model that is told it first, or what your function makes of "
    "its text.",
)
@click.option(
    "--propose",
    metavar="URL|FILE|module:function",
    callback=_check_proposer,
    required=True,
    help="Who proposes: a server that is shown failed episodes, a file of guidelines that lines "
    "of ===== part, or your function of a stepagent.evolve.Request.",
)
@click.option("--guideline", type=FILE, help="To begin with.  [default: none]")
@click.option(
    "--output", type=NEW_FOLDER, required=True, help="Folder of the journal and the guideline."
)
@_options
@reports
def evolve(
    env: str,
    split: str | None,
    policy: str,
    propose: str,
    guideline: Path | None,
    output: Path,
    proposer_model: str | None,
    proposer_tokens: int | None,
    depth: int,
    proposals: int,
    max_episodes: int | None,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """Improve an agent that cannot be trained: search over the text that it is told.

    A proposal is accepted where it is surely better than the guideline in whose place it would
    stand, on the same fresh seeds. What is proposed and what comes of it is written at once, and
    the same command continues where it was stopped.
    """
    search = ("episodes", "held_out", "children", "payoff", "seed_start")
    searching = {name: options.pop(name) for name in search}
    start = guideline.read_text(encoding="utf-8").strip() if guideline else ""
    import_from_here()
    seeds = [searching["seed_start"]]
    rollout = Rollout("evolve", env, split, policy, seeds, None, query_expert=False, **options)
    from .. import envs
    from ..evolve import Caps
    from ..evolve import evolve as look_for
    from ..records.provenance import sitting

    make = envs.factory(env, split)
    make().close()  # first: a wrong name need not wait for a model
    proposer = _proposer(propose, rollout, proposer_model, proposer_tokens)
    follow, told = _follower(rollout)
    how: dict[str, Any] = {"max_steps": rollout.max_steps, "split": split}
    how |= {"batch_size": rollout.batch_size, "workers": rollout.workers}
    how["timeout"] = rollout.step_timeout
    try:
        output.mkdir(parents=True, exist_ok=True)
        with sitting(output):
            found = look_for(
                make,
                follow,
                start,
                proposer,
                output,
                caps=Caps(depth, proposals, max_episodes),
                run={**told, "proposer": without_secrets(propose)},
                label="evolve",
                action_format=rollout.action_format,
                **searching,
                **how,
            )
    except KeyboardInterrupt as stop:
        note = f"what was judged is in {output}; the same command continues"
        raise Interrupted(note) from stop
    report = _report(rollout, output, found)
    return report, _text(report)


def _follower(rollout: Rollout) -> tuple[Callable[[str], Policy], dict[str, Any]]:
    """What makes the policy of a guideline, and all that its episodes depend on beside it."""
    if not _is_function(rollout.policy) or is_url(rollout.policy):
        from ..evolve import told

        return told(rollout.actor()), rollout.identity()
    for name in _OF_MODELS:
        if getattr(rollout, name) is not None:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} is of no use with --policy {rollout.policy}")
    identity: dict[str, Any] = {"env": rollout.shown_env, "policy": rollout.policy}
    identity |= {"split": rollout.split, "max_steps": rollout.max_steps}
    identity["action_format"] = rollout.action_format.name
    return _imported("--policy", rollout.policy), identity


def _proposer(
    propose: str, rollout: Rollout, model: str | None, max_new_tokens: int | None
) -> Proposer:
    from ..evolve import FileProposer, ServerProposer

    if not is_url(propose):
        for name, value in (("model", model), ("tokens", max_new_tokens)):
            if value is not None:
                raise click.UsageError(f"--proposer-{name} is of no use with --propose {propose}")
        if Path(propose).is_file():
            return FileProposer(Path(propose))
        return _imported("--propose", propose)
    from .. import envs
    from ..engines import Server

    with closing(envs.factory(rollout.env, rollout.split)()) as env:
        about = getattr(env, "instructions", "")
    server = Server(propose, model=model, api_key=os.environ.get("OPENAI_API_KEY"))
    return ServerProposer(server, about=about, max_new_tokens=max_new_tokens or 1024)


def _imported(option: str, name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (AttributeError, ImportError) as error:
        raise click.BadParameter(
            f"{name!r} cannot be imported: {error}", param_hint=f"'{option}'"
        ) from error
    if not callable(found):
        raise click.BadParameter(
            f"{name!r} must be a function, got {found!r}", param_hint=f"'{option}'"
        )
    return found  # type: ignore[no-any-return]


# ------------------------------------------------------------------ for a person


def _report(rollout: Rollout, output: Path, found: Evolved) -> dict[str, Any]:
    def told(interval: Any) -> dict[str, Any] | None:
        return None if interval is None else vars(interval)

    path = [
        {
            "number": one.number,
            "difference": told(one.difference),
            "held_out": told(found.held_out(one.number)),
            "held_out_gain": told(found.held_out(one.number, 0)) if one.number else None,
        }
        for one in found.path
    ]
    outcomes = [one.outcome for one in found.proposals[1:]]
    return {
        "environment": rollout.shown_env,
        "policy": rollout.shown_policy,
        "output": str(output),
        "reason": found.reason,
        "episodes": found.episodes,
        "proposals": {name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
        "problems": [one.problem for one in found.proposals if one.problem is not None],
        "path": path,
        "guideline": found.guideline,
    }


def _text(report: dict[str, Any]) -> str:
    counted = ", ".join(f"{count} {name}" for name, count in report["proposals"].items()) or "none"
    lines = [
        f"{report['policy']} in {report['environment']}: ended: {report['reason']}",
        f"{report['episodes']} episodes; proposals: {counted}",
    ]
    for one in report["path"]:
        name = f"number {one['number']}" if one["number"] else "the first"
        told = [
            f"{what} {_written(one[key], sign)}"
            for key, what, sign in (
                ("difference", "better by", "+"),
                ("held_out", "held out", ""),
                ("held_out_gain", "over the first", "+"),
            )
            if one[key] is not None
        ]
        lines.append(f"{name:<12}{'; '.join(told)}")
    if report["problems"]:
        lines.append(f"of no use, the first: {report['problems'][0]}")
    folder = report["output"]
    lines.append(f"Wrote the guideline to {folder}/guideline.txt, all of it to journal.jsonl there")
    return "\n".join(lines)


def _written(interval: dict[str, float | None], sign: str) -> str:
    ends = [end for end in (interval["low"], interval["high"]) if end is not None]
    bounds = f" (95 %: {' to '.join(f'{end:{sign}.3f}' for end in ends)})" if len(ends) == 2 else ""
    return f"{interval['mean']:{sign}.3f}{bounds}"
