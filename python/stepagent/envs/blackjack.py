"""Blackjack in words: gymnasium's Blackjack-v1, with the basic strategy as the expert.

An episode is one hand, by the rules of Sutton and Barto (2020, example 5.1): an endless deck, the
dealer draws to 17, and one may hit or stand. Its seed fixes the cards in the order in which they
are drawn, so two policies that do the same have the same hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

try:
    import gymnasium
except ImportError as error:
    raise ImportError(
        f"Blackjack needs gymnasium ({error}): pip install 'stepagent[demo]'"
    ) from error

ACTIONS = ("hit", "stand")

INSTRUCTIONS = """\
You play one hand of Blackjack against a dealer, who draws until 17 or more. Each turn you either \
hit (take a card) or stand (take no more). Above 21 you lose at once; otherwise the higher sum \
wins. Picture cards count 10, an ace 11 or 1; a sum with an ace that counts 11 is called soft.
The actions are: hit, stand."""
"""Tells a model that was not trained on Blackjack what it may do."""

_ACE = 11
_DEALT = "You have {kind} {total}. The dealer shows {card}."
_ENDS = {1: "You win.", 0: "It is a draw.", -1: "You lose."}


class Hand(NamedTuple):
    """What a player sees: the sum, whether it is soft, and the dealer's card, 2 to 11 (an ace)."""

    total: int
    soft: bool
    dealer: int


def basic_strategy(hand: Hand) -> str:
    """What is best at each hand, where one may only hit or stand."""
    if hand.soft:
        least = 19 if hand.dealer >= 9 else 18
    elif hand.dealer > 6:
        least = 17
    else:
        least = 12 if hand.dealer > 3 else 13
    return "stand" if hand.total >= least else "hit"


def card_name(card: int) -> str:
    """As it is written: 2 to 10, or an ace, which is 11."""
    return "an ace" if card == _ACE else str(card)


def read_hand(observation: str) -> Hand:
    """The hand of an observation; ValueError for a text that shows none."""
    words = observation.replace(".", " ").split()
    try:
        place = words.index("have")
        kind, total = words[place + 1 : place + 3]
        shown = words[words.index("shows") + 1]
        return Hand(int(total), {"soft": True, "hard": False}[kind], _card(shown))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"observation must be of Blackjack, as {_DEALT!r}, got {observation!r}"
        ) from error


def _card(name: str) -> int:
    return _ACE if name == "an" else int(name)


class BlackjackTextEnv:
    """Blackjack as a `stepagent.envs.TextEnv`.

    The reward is 1 for a hand that is won, 0 for a draw and −1 for one that is lost; ``success`` is
    a win. ``info["task"]`` is ``soft`` or ``hard``, as the hand was dealt.
    """

    name = "blackjack"
    actions = ACTIONS
    instructions = INSTRUCTIONS
    max_steps = 20  # no hand has that many cards

    def __init__(self, task: str = "") -> None:
        if task:
            raise ValueError(f"task of Blackjack must be empty, as blackjack, got {task!r}")
        made = gymnasium.make("Blackjack-v1", sab=True, disable_env_checker=True)
        self._table: Any = made.unwrapped
        self._over = True

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Deal the hand of this seed."""
        self._hand = _seen(self._table.reset(seed=seed)[0])
        self._task = "soft" if self._hand.soft else "hard"
        self._over, self._steps = False, 0
        return self._shown(), self._info(valid=True, success=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act by one of `actions`."""
        self._require_running("step")
        self._steps += 1
        truncated = self._steps >= self.max_steps
        if action not in ACTIONS:
            self._over = truncated
            shown = f"Invalid action. {self._shown()}"
            return shown, 0.0, False, truncated, self._info(valid=False, success=False)
        seen, reward, terminated, _, _ = self._table.step(int(action == "hit"))
        self._over = terminated or truncated
        self._hand = _seen(seen)
        text = self._outcome(int(reward)) if terminated else self._shown()
        info = self._info(valid=True, success=reward > 0)
        return text, float(reward), terminated, truncated and not terminated, info

    def expert_action(self) -> str:
        """The basic strategy's action."""
        self._require_running("expert_action")
        return basic_strategy(self._hand)

    def close(self) -> None:
        """Close the table."""
        self._table.close()

    def _shown(self) -> str:
        kind = "soft" if self._hand.soft else "hard"
        return _DEALT.format(kind=kind, total=self._hand.total, card=card_name(self._hand.dealer))

    def _outcome(self, reward: int) -> str:
        dealer = sum(self._table.dealer)
        dealer += 10 if 1 in self._table.dealer and dealer <= _ACE else 0
        if self._hand.total > 21:
            return f"You have {self._hand.total}, more than 21. {_ENDS[reward]}"
        return f"You have {self._hand.total}, the dealer {dealer}. {_ENDS[reward]}"

    def _info(self, *, valid: bool, success: bool) -> dict[str, Any]:
        info = {
            "valid": valid,
            "success": success,
            "progress": float(success),
            "task": self._task,
        }
        return info if valid else {**info, "invalid": "unknown action"}

    def _require_running(self, call: str) -> None:
        if self._over:
            raise RuntimeError(f"{call} needs a running episode of {self.name}: call reset(seed)")


def _seen(observation: tuple[int, int, int]) -> Hand:
    total, dealer, soft = observation
    return Hand(int(total), bool(soft), _ACE if dealer == 1 else int(dealer))
