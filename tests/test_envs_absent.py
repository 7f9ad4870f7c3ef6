"""ALFWorld and WebShop, whose data no machine of ours has: what is said, and what needs no data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stepagent import envs
from stepagent.envs.alfworld import game_files
from stepagent.envs.webshop import SPLITS, invalid_kind


def test_without_games_an_error_names_the_folder_and_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"alfworld-download.*ALFWORLD_DATA") as raised:
        envs.make("alfworld", "valid_seen")
    assert str(tmp_path / "json_2.1.1" / "valid_seen") in str(raised.value)
    with pytest.raises(ValueError, match="split of environment 'alfworld' must be one of train"):
        envs.make("alfworld", "test")


def test_the_games_of_a_split_are_sorted_and_of_one_task_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    names = {
        "valid_seen": ["pick_heat-Egg-1/trial_2", "pick_heat-Egg-1/trial_1", "look-Bowl-2/trial_3"],
        "train": [
            "pick_heat-EggSliced-1/trial_4",
            "pick_movable-Egg-1/t",
            "look-Cup-3/trial_5",
        ],
    }
    for split, games in names.items():
        for game in games:
            folder = tmp_path / "json_2.1.1" / split / game
            folder.mkdir(parents=True)
            (folder / "game.tw-pddl").touch()
    found = [path.parts[-3:-1] for path in game_files("", "valid_seen")]
    trials = [("pick_heat-Egg-1", "trial_1"), ("pick_heat-Egg-1", "trial_2")]
    assert found == [("look-Bowl-2", "trial_3"), *trials]
    assert [path.parts[-3:-1] for path in game_files("pick_heat", "valid_seen")] == trials
    assert [path.parts[-2] for path in game_files("", "train")] == ["trial_5"]
    with pytest.raises(FileNotFoundError, match="pick_cool"):
        game_files("pick_cool", "train")
    monkeypatch.setitem(sys.modules, "alfworld", None)
    with pytest.raises(ImportError, match="pip install alfworld"):
        envs.make("alfworld", "train")


def test_without_webshop_an_error_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "web_agent_site", None)
    with pytest.raises(ImportError, match="its own package and data"):
        envs.make("webshop", "test")
    with pytest.raises(ValueError, match="task of webshop must be empty, got 'shoes'"):
        envs.make("webshop:shoes")


def test_webshops_splits_are_disjoint_and_all() -> None:
    parts = [range(6910)[SPLITS[split]] for split in ("test", "dev", "train")]
    assert [goal for part in parts for goal in part] == list(range(6910))
    assert [len(part) for part in parts] == [500, 1000, 5410]


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("search[red shoes]", None),
        ("click[B078GWRC1J]", None),
        ("click[Next >]", None),
        ("click[search]", "nothing to click"),
        ("click[blue]", "nothing to click"),
        ("search[]", "unknown action"),
        ("Search[red shoes]", "unknown action"),
        ("buy", "unknown action"),
        ("", "unknown action"),
    ],
)
def test_what_webshop_would_ignore_is_invalid(action: str, kind: str | None) -> None:
    page: dict[str, Any] = {
        "has_search_bar": True,
        "clickables": ["search", "next >", "b078gwrc1j"],
    }
    assert invalid_kind(action, page) == kind
    if action.startswith("search[r"):
        assert invalid_kind(action, {**page, "has_search_bar": False}) == "no search bar"
