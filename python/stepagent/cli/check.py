"""``stepagent check``: what would be scored of a file, before any training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .base import FILE, reports
from .loading import load_tokenizer, template_option
from .reading import Reading, on_error_option, read_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.trajectory import OnError
    from ..data.trunk import Trunk

_SHOWN = 600
"""Characters of a state or an action in a sample; what is in the middle of a longer one is not."""


@click.command()
@click.argument("file", type=FILE)
@click.option("--model", required=True, metavar="NAME_OR_PATH", help="Whose tokenizer to use.")
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="How many trajectories to print, from the first.",
)
@template_option
@on_error_option
@reports
def check(
    file: Path,
    model: str,
    show: int,
    chat_template_kwargs: dict[str, Any] | None,
    on_error: OnError,
) -> tuple[dict[str, Any], str]:
    """Tell what of FILE would be scored, and why what would not.

    Loads a tokenizer alone, no weights. With --on-error raise it fails where any row is refused.
    """
    tokenizer = load_tokenizer(model, chat_template_kwargs)
    reading = read_all(file, tokenizer)
    report = {"file": str(file), "model": model, **_counts(reading, tokenizer)}
    refused = len(reading.skipped)
    if refused and (on_error == "raise" or not reading.trunks):
        advice = "mend them, or leave them out with --on-error skip"
        report["failed"] = [f"{refused} of {reading.rows} rows are refused: {advice}"]
    if not reading.rows:
        raise ValueError(f"{file} holds no trajectories")
    return report, _text(report, reading, tokenizer, show)


def _counts(reading: Reading, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    import numpy as np

    from ..data.ends import ends_of

    scored = sum(int(np.diff(trunk.action_spans).sum()) for trunk in reading.trunks)
    tokens = sum(len(trunk.input_ids) for trunk in reading.trunks)
    assistants = sum(m["role"] == "assistant" for t in reading.trajectories for m in t.messages)
    steps = sum(trunk.num_steps for trunk in reading.trunks)
    kept = Counter(key for trajectory in reading.trajectories for key in trajectory.meta)
    return {
        "trajectories": len(reading.trunks),
        "steps": steps,
        "unscored_assistant_messages": assistants - steps,
        "scored_tokens": scored,
        "state_tokens": tokens - scored,
        "longest": max((int(t.position_ids.max()) + 1 for t in reading.trunks), default=0),
        "end_tokens": [_decode(tokenizer, [id]) for id in ends_of(reading.trunks)],
        "rewritten": sum(bool(len(trunk.rewinds)) for trunk in reading.trunks),
        "recorded": sum("token_ids" in t.meta for t in reading.trajectories),
        "with_reward": sum(t.reward is not None for t in reading.trajectories),
        "with_tools": sum(t.tools is not None for t in reading.trajectories),
        "meta": dict(kept),
        "refused": reading.records(),
    }


def _text(
    report: dict[str, Any], reading: Reading, tokenizer: PreTrainedTokenizerBase, show: int
) -> str:
    lines: list[str] = []
    for place, trajectory, trunk in zip(
        reading.places[:show], reading.trajectories, reading.trunks, strict=False
    ):
        name = "" if trajectory.id is None else f", {trajectory.id!r}"
        lines += [click.style(f"{place}{name}", underline=True), *_sample(trunk, tokenizer), ""]
    for row in report["refused"]:
        lines.append(click.style("refused ", fg="red") + f"{row['where']}: {row['reason']}")
    tokens = report["scored_tokens"] + report["state_tokens"]
    lines.append(
        f"{report['trajectories']} trajectories, {report['steps']} steps; "
        f"{report['scored_tokens']} of {tokens} tokens are scored, the others are state; "
        f"the longest sequence has {report['longest']} tokens"
    )
    if report["end_tokens"]:
        lines.append(f"An action ends with {', '.join(report['end_tokens'])}")
    for key, what in _REMARKS.items():
        if report[key]:
            lines.append(what.format(report[key]))
    if report["meta"]:
        lines.append(f"Kept in meta, part of no token: {', '.join(sorted(report['meta']))}")
    lines.append(f"Refused: {len(report['refused'])} of {reading.rows} rows")
    return "\n".join(lines)


_REMARKS = {
    "unscored_assistant_messages": "{} assistant messages are state only, as their loss flags say",
    "rewritten": "{} trajectories branch: the chat template rewrites their history",
    "recorded": "{} trajectories hold the token ids that were sampled, which are used as they are",
    "with_tools": "{} trajectories have tools",
    "with_reward": "{} trajectories have a reward",
}


def _sample(trunk: Trunk, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A trajectory as states and actions, line by line: of a state what is new, or rewritten."""
    lines: list[str] = []
    seen: list[int] = []  # all that the model saw until now, in the order in which it did
    stop = 0
    for step, (start, stop) in enumerate(trunk.action_spans.tolist()):
        state, action = trunk.state_ids(step).tolist(), trunk.input_ids[start:stop].tolist()
        same = _common_prefix(seen, state)
        if same < len(seen):
            lines.append(f"back   | to token {same}, from which the history is rewritten:")
        lines += _labelled("state ", _decode(tokenizer, state[same:]), dim=True)
        lines += _labelled("action", _decode(tokenizer, action[:-1]), fg="green", bold=True)
        lines[-1] += click.style(_printable(_decode(tokenizer, action[-1:])), reverse=True)
        seen = state + action
    return lines + _labelled(
        "state ", _decode(tokenizer, trunk.input_ids[stop:].tolist()), dim=True
    )


def _common_prefix(a: list[int], b: list[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def _labelled(label: str, text: str, **style: Any) -> list[str]:
    if len(text) > _SHOWN:
        left_out = len(text) - _SHOWN
        text = f"{text[: _SHOWN // 2]} […{left_out} characters…] {text[-_SHOWN // 2 :]}"
    rows = _printable(text).split("\n")
    return [f"{label} | {click.style(row, **style)}" for row in rows] if text else [f"{label} | "]


def _printable(text: str) -> str:
    """Control characters as escapes: a file must not write to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
