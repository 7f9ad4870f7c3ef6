"""Blackjack without a language model: rules that can be read, who follows them, who changes them.

    Against 2 to 6: stand on hard 13 or more.
    Against 9 to ace: stand on soft 19 or more.

The last rule that fits a hand decides: stand from its sum on, hit below. Where none fits, a coin
decides, so that the empty guideline is random play. Lines that begin with # are remarks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..envs.blackjack import ACTIONS, Hand, card_name, read_hand

if TYPE_CHECKING:
    from ..data.trajectory import Trajectory
    from ..envs.base import TextEnv
    from .proposers import Request

_RULE = re.compile(
    r"Against (?P<low>\w+)(?: to (?P<high>\w+))?: stand on (?P<kind>hard|soft) (?P<least>\d+) "
    r"or more\."
)
_CARDS = {**{str(card): card for card in range(2, 11)}, "ace": 11}
_LEAST, _MOST = 12, 21


@dataclass(frozen=True)
class Rule:
    """Against the dealer's cards low … high (2 to 11): stand from ``least`` on."""

    low: int
    high: int
    soft: bool
    least: int

    def __str__(self) -> str:
        names = [card_name(card).removeprefix("an ") for card in (self.low, self.high)]
        cards = " to ".join(dict.fromkeys(names))
        return f"Against {cards}: stand on {'soft' if self.soft else 'hard'} {self.least} or more."

    def fits(self, hand: Hand) -> bool:
        """Whether it says what to do with this hand."""
        return self.soft == hand.soft and self.low <= hand.dealer <= self.high


def read_rules(guideline: str) -> list[Rule]:
    """The rules of a guideline; ValueError, naming the line, for a line that is none."""
    rules = []
    for number, line in enumerate(guideline.splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = _RULE.fullmatch(text)
        low, high = (_CARDS.get(found[name] or "") for name in ("low", "high")) if found else (0, 0)
        if found is not None and found["high"] is None:
            high = low
        if found is None or low is None or high is None or low > high:
            raise ValueError(
                f"line {number} must be a rule such as {str(Rule(2, 6, False, 13))!r}, got {text!r}"
            )
        rules.append(Rule(low, high, found["kind"] == "soft", int(found["least"])))
    return rules


class Follower:
    """Plays by the rules; ``seed`` is the coin's."""

    name = "rules"
    exact = True

    def __init__(self, rules: Sequence[Rule], seed: int = 0) -> None:
        self._rules, self._seed = list(rules)[::-1], seed

    def begin(self, seeds: Sequence[int]) -> None:
        """A coin for each hand."""
        self._coins = [np.random.default_rng((self._seed, seed)) for seed in seeds]

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """As `begin`: what came before decides nothing."""
        self.begin(seeds)

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str]:
        """What the rules say of each hand."""
        hands = [read_hand(observation) for observation in observations]
        return [self._decide(*pair) for pair in zip(hands, self._coins, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the coins of the hands that ended."""
        self._coins = [self._coins[row] for row in rows]

    def _decide(self, hand: Hand, coin: np.random.Generator) -> str:
        rule = next((rule for rule in self._rules if rule.fits(hand)), None)
        if rule is None:
            return ACTIONS[int(coin.integers(2))]
        return "stand" if hand.total >= rule.least else "hit"


def follow(guideline: str) -> Follower:
    """The policy that follows a guideline; ValueError for a line that is no rule."""
    return Follower(read_rules(guideline))


def mutate(request: Request) -> str:
    """Add a rule, or change or drop one, at random: it knows nothing of the game."""
    return mutation(read_rules(request.guideline), np.random.default_rng(request.number))


def mutation(rules: Sequence[Rule], rng: np.random.Generator) -> str:
    """The rules with one of them added, changed or dropped."""
    changed, what = list(rules), rng.integers(4) if rules else 0
    place = int(rng.integers(len(rules))) if rules else 0
    if what <= 1:
        changed.append(_any_rule(rng))
    elif what == 2:
        changed[place] = _nudged(changed[place], rng)
    else:
        del changed[place]
    return "\n".join(map(str, changed))


def _any_rule(rng: np.random.Generator) -> Rule:
    low, high = sorted(int(card) for card in rng.integers(2, 12, size=2))
    return Rule(low, high, bool(rng.integers(2)), int(rng.integers(_LEAST, _MOST + 1)))


def _nudged(rule: Rule, rng: np.random.Generator) -> Rule:
    step = int(rng.choice((-1, 1)))
    what = rng.integers(3)
    if what == 0:
        return replace(rule, low=min(max(rule.low + step, 2), rule.high))
    if what == 1:
        return replace(rule, high=max(min(rule.high + step, 11), rule.low))
    return replace(rule, least=min(max(rule.least + step, _LEAST), _MOST))
