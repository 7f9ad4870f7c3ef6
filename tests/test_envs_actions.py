"""ReAct texts as actions, and expert files in the three shapes that ETO published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepagent import load_trajectories
from stepagent.envs import parse_action


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Thought: I need a pan.\nAction: take pan 1 from stove 1", "take pan 1 from stove 1"),
        ("Thought:\nI need it.\n\nAction:\nclick[Buy Now]", "click[Buy Now]"),
        ("Action: search[red shoes, size 8]", "search[red shoes, size 8]"),
        ("look around", "look around"),
        ("  look around\n", "look around"),
        ("Thought: My Action: line is next.\nAction: wait", "wait"),
        ("Thought: first\nAction: open door\nThought: no\nAction: wait1", "open door"),
        ("Action: left\nObservation: done\nThought: x\nAction: right", "left"),
        ("left\nObservation: done", "left"),
        ("Thought: none\nAction:", ""),
        ("Reaction: none", "Reaction: none"),
        ("", ""),
    ],
)
def test_the_action_is_what_stands_after_the_first_action_line(text: str, action: str) -> None:
    assert parse_action(text) == action


def rows() -> dict[str, dict[str, Any]]:
    """One made-up row of each file: WebShop's with a reward, ALFWorld's with its game."""

    def talk(task: str, *actions: str) -> list[dict[str, str]]:
        turns = [("human", "You are an agent. Reply with Thought and Action."), ("gpt", "OK")]
        turns.append(("human", task))
        for action in actions:
            turns += [("gpt", f"Thought: next.\nAction: {action}"), ("human", "Observation: ok")]
        return [{"from": speaker, "value": value} for speaker, value in turns[:-1]]

    return {
        "webshop": {
            "id": 3,
            "conversations": talk("Instruction: [SEP] shoes", "search[shoes]", "click[Buy Now]"),
            "reward": 0.75,
        },
        "sciworld": {"id": "boil_12", "conversations": talk("Boil water.", "open door", "wait")},
        "alfworld": {
            "id": "trial_7",
            "game_file": "json_2.1.1/train/pick_and_place/trial_7/game.tw-pddl",
            "conversations": talk("Put a pan on the stove.", "go to stove 1", "take pan 1"),
        },
    }


@pytest.mark.parametrize("name", ["webshop", "sciworld", "alfworld"])
def test_an_expert_file_is_read_with_all_that_it_holds(name: str, tmp_path: Path) -> None:
    row = rows()[name]
    path = tmp_path / f"{name}_sft.json"
    path.write_text(json.dumps([row, row]))
    trajectory, _ = load_trajectories(path)
    assert trajectory.id == str(row["id"])
    assert trajectory.reward == row.get("reward")
    assert trajectory.meta == ({"game_file": row["game_file"]} if name == "alfworld" else {})
    assert [message["content"] for message in trajectory.messages] == [
        turn["value"] for turn in row["conversations"]
    ]
    said = [m["content"] for m in trajectory.messages if m["role"] == "assistant"]
    expected = {
        "webshop": ["search[shoes]", "click[Buy Now]"],
        "sciworld": ["open door", "wait"],
        "alfworld": ["go to stove 1", "take pan 1"],
    }[name]
    assert [parse_action(text) for text in said] == ["OK", *expected]
