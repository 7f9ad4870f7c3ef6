"""Blackjack in words, against gymnasium's own table and against dynamic programming."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from stepagent import envs
from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes

gymnasium = pytest.importorskip("gymnasium")

from stepagent.envs.blackjack import Hand, basic_strategy, read_hand  # noqa: E402

CARDS = [*range(1, 10), 10, 10, 10, 10]


def raw_hand(seen: tuple[int, int, int]) -> Hand:
    total, dealer, soft = seen
    return Hand(total, bool(soft), 11 if dealer == 1 else dealer)


@pytest.mark.parametrize("seed", range(40))
def test_it_deals_and_pays_as_gymnasiums_table_does(seed: int) -> None:
    env, raw = envs.make("blackjack"), gymnasium.make("Blackjack-v1", sab=True)
    observation, info = env.reset(seed)
    seen, _ = raw.reset(seed=seed)
    assert info["task"] == ("soft" if seen[2] else "hard")
    rng, over = np.random.default_rng(seed), False
    while not over:
        assert read_hand(observation) == raw_hand(seen)
        hit = int(rng.integers(2))
        observation, reward, over, truncated, info = env.step(("stand", "hit")[hit])
        seen, paid, ended, _, _ = raw.step(hit)
        assert (reward, over, truncated) == (paid, ended, False)
    assert (info["success"], info["progress"]) == (paid > 0, float(paid > 0))
    assert observation.endswith({1: "win.", 0: "draw.", -1: "lose."}[int(paid)])
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("hit")


def test_another_word_costs_a_step_and_changes_nothing() -> None:
    env = envs.make("blackjack")
    shown, _ = env.reset(5)
    for step in range(1, env.max_steps + 1):
        observation, reward, over, truncated, info = env.step("double down")
        assert observation == f"Invalid action. {shown}"
        assert (reward, over, truncated) == (0.0, False, step == env.max_steps)
        assert info["invalid"] == "unknown action"


def test_what_shows_no_hand_is_refused_by_its_reader() -> None:
    for text in ("", "You have hard 12.", "You have soft X. The dealer shows 3.", "You have 12"):
        with pytest.raises(ValueError, match="observation must be of Blackjack"):
            read_hand(text)
    with pytest.raises(ValueError, match="task of Blackjack must be empty"):
        envs.make("blackjack:european")


# ------------------------------------------------ the expert, by dynamic programming


@cache
def hand_after(total: int, soft: bool, card: int) -> tuple[int, bool]:
    """Totals count an ace as 11 where that fits; soft says that one does."""
    hard = total - 10 if soft else total
    ace = soft or card == 1
    hard += card
    return (hard + 10, True) if ace and hard + 10 <= 21 else (hard, False)


@cache
def dealer_ends(total: int, soft: bool) -> tuple[tuple[int, float], ...]:
    """The dealer's last sum, 0 for more than 21, and how likely it is."""
    if total > 21:
        return ((0, 1.0),)
    if total >= 17:
        return ((total, 1.0),)
    ends: dict[int, float] = {}
    for card in CARDS:
        for end, share in dealer_ends(*hand_after(total, soft, card)):
            ends[end] = ends.get(end, 0.0) + share / len(CARDS)
    return tuple(ends.items())


@cache
def value_of(hand: Hand, action: str) -> float:
    if action == "stand":
        first = (11, True) if hand.dealer == 11 else (hand.dealer, False)
        return sum(s * np.sign(hand.total - end) for end, s in dealer_ends(*first))
    values = []
    for card in CARDS:
        total, soft = hand_after(hand.total, hand.soft, card)
        after = Hand(total, soft, hand.dealer)
        values.append(-1.0 if total > 21 else max(value_of(after, a) for a in ("hit", "stand")))
    return float(np.mean(values))


def test_the_expert_plays_what_is_best() -> None:
    for dealer in range(2, 12):
        for soft, totals in ((False, range(12, 22)), (True, range(12, 22))):
            for total in totals:
                hand = Hand(total, soft, dealer)
                best = max(("hit", "stand"), key=lambda action: value_of(hand, action))
                assert basic_strategy(hand) == best, hand


def test_the_floor_and_the_ceiling() -> None:
    paid = {
        policy.name: np.mean(
            [sum(e.rewards) for e in run_episodes("blackjack", policy, range(1500))]
        )
        for policy in (RandomPolicy(), ExpertPolicy())
    }
    assert -0.47 < paid["random"] < -0.32
    assert -0.12 < paid["expert"] < 0.03
