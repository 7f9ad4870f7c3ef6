"""Encoding: time for a token as conversations grow, and against another version; a thinking agent.

    python benchmarks/encoding.py [--before ../before/.venv/bin/python]

`encode` of plain chats under ChatML and Qwen3's template (TRL's copy), a byte-level tokenizer:
microseconds a token, the least of --repeats. With --before the same in another version, in turns.
Then a thinking agent under Qwen3's template: tokens of its tree against a sequence for each step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TURNS = (4, 16, 64, 256)


def chat(turns: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        seen = f"Observation {turn}: you are in the kitchen. On the table you see an apple. " * 4
        messages.append({"role": "user", "content": seen})
        messages.append({"role": "assistant", "content": f"Thought: go on.\nAction: go to {turn}"})
    return messages


def templates() -> dict[str, str]:
    import tiny_tokenizers
    import trl

    qwen3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return {"chatml": tiny_tokenizers.CHATML, "qwen3": qwen3}


def measure(repeats: int) -> dict[str, float]:
    import tiny_tokenizers

    from stepagent import Trajectory, encode

    found = {}
    for name, template in templates().items():
        tokenizer = tiny_tokenizers.byte_level_bpe(template)
        for turns in TURNS:
            trajectory, times = Trajectory(chat(turns)), []
            try:
                for _ in range(repeats + 1):
                    begun = time.process_time()
                    trunk = encode(trajectory, tokenizer)
                    times.append(time.process_time() - begun)
            except ValueError:  # the other version may refuse the template
                continue
            found[f"{name} {turns}"] = min(times[1:]) * 1e6 / len(trunk.input_ids)
    return found


def thinking(turns: int) -> tuple[int, int]:
    """Tokens of a thinking agent's trunk, and of a sequence for each of its steps."""
    import tiny_tokenizers

    from stepagent import Trajectory, encode

    messages = chat(turns)
    for message in messages[1::2]:
        message["reasoning_content"] = "The apple is on the table, so I need not look for it. " * 4
    tokenizer = tiny_tokenizers.byte_level_bpe(templates()["qwen3"])
    trunk = encode(Trajectory(messages), tokenizer)
    spans = trunk.action_spans.tolist()
    alone = sum(len(trunk.state_ids(t)) + stop - start for t, (start, stop) in enumerate(spans))
    return len(trunk.input_ids), alone


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--before", type=Path, help="a Python with the other version")
    parser.add_argument("--measure", action="store_true", help="this version alone, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.repeats)))
        return
    pythons = [sys.executable, *([str(options.before)] if options.before else [])]
    rounds: dict[str, list[dict[str, float]]] = {python: [] for python in pythons}
    for _ in range(3):
        for python in pythons:
            command = [python, __file__, "--measure", "--repeats", str(options.repeats)]
            rounds[python].append(json.loads(subprocess.check_output(command)))
    now, *before = ({k: min(r[k] for r in rs) for k in rs[0]} for rs in rounds.values())
    for name, micros in now.items():
        ratio = f"  {micros / before[0][name]:.2f}× before" if before and name in before[0] else ""
        print(f"{name:12} {micros:6.2f} µs a token{ratio}")
    for turns in TURNS[:-1]:
        tree, alone = thinking(turns)
        print(f"thinking, {turns:3} turns: {tree} tokens, {alone} apart: {alone / tree:.1f}×")


if __name__ == "__main__":
    main()
