"""What a cycle learns from: trunks, the actions tried at their steps, the reference's verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..data.trunk import Trunk
from ..trees.tree import TokenTree, pack_step_pairs
from .averages import Counts

TOKEN_SCORES = ("ref_logps", "old_logps")
SCORES = (*TOKEN_SCORES, "advantages")  # of a Comparison, in its order
PARTS = ("action_ids", "counted")  # what `learning/parts.py` says of a Comparison
_OPTIONAL = (*SCORES, *PARTS, "observed", "teacher_T", "sides")
# Of which side of a pair of trajectories a step is; their sum: of both, as its beginning.
CHOSEN = 1
REJECTED = 2


def _nothing() -> NDArray[np.float32]:
    return np.zeros(0, dtype=np.float32)


def _no_ids() -> NDArray[np.int32]:
    return np.zeros(0, dtype=np.int32)


def _no_sides() -> NDArray[np.int8]:
    return np.zeros(0, dtype=np.int8)


def _no_flags() -> NDArray[np.bool_]:
    return np.zeros(0, dtype=np.bool_)


@dataclass(frozen=True, eq=False)
class Comparison:
    """One trajectory of a cycle.

    The arrays are in the order of the trunk's tree, and empty where they are not needed.

    Args:
        branches: ``branches[t]`` the alternatives tried at step t, int32 arrays.
        expert_trunk: The trunk is a demonstration and the branches are the agent's; else it is a
            rollout of the agent's and the branches are the expert's answers.
        explored: It is a rollout of the run's explorer, not of the policy that is shipped.
        ref_logps: (N,) fp32 log-probs under the reference.
        old_logps: (N,) fp32 log-probs under the policy that acted.
        advantages: (S,) fp32 of the agent's steps, 0 for the expert's.
        observed: (T,) which of the trunk's own steps are no actions but observations to be
            predicted; empty where none is.
        teacher_T: (T,) bool, the steps of a rollout at which the expert acted in the agent's place:
            there the branch is what the agent would have done. Empty where it never did.
        action_ids: (S,) int32, steps of one state with one id are one action, whatever they say
            beside it; -1 for a step without an action. Empty: as many actions as texts.
        counted: (N,) bool, the tokens that losses cover; empty: all.
        sides: (K · T,) int8, of K pairs of trajectories in a trunk that has no branches: pair k
            compares the steps whose ``sides[k·T + t]`` is ``CHOSEN`` with those that are
            ``REJECTED``; the sum of both marks what they begin with, 0 what is of neither. See
            `stepagent.learning.trajectory_pairs`.
    """

    trunk: Trunk
    branches: list[list[NDArray[np.int32]]]
    expert_trunk: bool
    ref_logps: NDArray[np.float32] = field(default_factory=_nothing)
    old_logps: NDArray[np.float32] = field(default_factory=_nothing)
    advantages: NDArray[np.float32] = field(default_factory=_nothing)
    action_ids: NDArray[np.int32] = field(default_factory=_no_ids)
    counted: NDArray[np.bool_] = field(default_factory=_no_flags)
    observed: NDArray[np.bool_] = field(default_factory=_no_flags)
    teacher_T: NDArray[np.bool_] = field(default_factory=_no_flags)
    sides: NDArray[np.int8] = field(default_factory=_no_sides)
    explored: bool = False

    @classmethod
    def demonstration(cls, trunk: Trunk) -> Comparison:
        """The expert alone: no alternatives."""
        return cls(trunk, [[] for _ in range(trunk.num_steps)], expert_trunk=True)

    @property
    def expert_T(self) -> NDArray[np.bool_]:
        """(T,): the trunk's step is the expert's action, and the branches are the agent's; of
        pairs of trajectories, it is of a chosen one."""
        if len(self.sides):
            chosen: NDArray[np.bool_] = np.asarray((self.sides_KT & CHOSEN).any(axis=0))
            return chosen
        own = self.teacher_T
        if not len(own):
            own = np.full(self.trunk.num_steps, self.expert_trunk)
        return own & ~self.observed if len(self.observed) else own

    @property
    def sides_KT(self) -> NDArray[np.int8]:
        """(K, T), `sides` by pair and step."""
        return self.sides.reshape(-1, self.trunk.num_steps)

    @property
    def expert_answers(self) -> int:
        """What the expert was asked for: its answers at a rollout's states, followed or not."""
        if self.expert_trunk:
            return 0
        pairs = zip(self.expert_T, self.branches, strict=True)
        return sum(1 if taught else len(step) for taught, step in pairs)

    @property
    def tokens(self) -> int:
        """Tokens that its tree encodes, or a few more."""
        return len(self.trunk.input_ids) + sum(len(b) for step in self.branches for b in step)

    def step_tokens(self) -> list[NDArray[np.int32]]:
        """The tokens of each step, in the order of the tree: the trunk's own, then the branches."""
        return [
            action
            for (start, stop), tried in zip(self.trunk.action_spans, self.branches, strict=True)
            for action in (self.trunk.input_ids[start:stop], *tried)
        ]


def pack_comparisons(comparisons: Sequence[Comparison], max_tokens: int) -> list[TokenTree]:
    """The token trees of a batch, each under ``max_tokens``.

    A cycle's comparisons are packed wherever they are read, as the batches there differ in order
    and size. That takes a hundredth of a cycle at most (docs/training.md).
    """
    return pack_step_pairs(
        [c.trunk for c in comparisons], [c.branches for c in comparisons], max_tokens=max_tokens
    )


def split_by_trunk(
    values_N: NDArray[np.float32], trees: Sequence[TokenTree]
) -> list[NDArray[np.float32]]:
    """Values of scored tokens, in the order of ``trees``, as one array per trunk."""
    trunk_N = np.concatenate([np.repeat(t.step_trunk, np.diff(t.step_offsets)) for t in trees])
    # A trunk's tokens are neighbours and trunks keep their order in `pack_step_pairs`.
    return np.split(values_N, np.flatnonzero(np.diff(trunk_N)) + 1)


@dataclass(frozen=True, eq=False)
class StepTable:
    """The steps of a batch of trees, and which of them are compared.

    Attributes:
        offsets: (S+1,) into the tokens that count.
        trunk_S: The trajectory of each step.
        state_S: A number for its state, the same for all actions there.
        expert_S: True where the step is the expert's action; else the agent's, or observed.
        expert_P, agent_P: (P,) the two steps of each compared pair.
        same_P: True where both are the same action: the same tokens, or read as the same.
        counted_N: (N,) bool, those of the trees' scored tokens that count; None: all.
        sides: (M, 3), of pairs of trajectories: pair, step, and whose it is there, ``CHOSEN``,
            ``REJECTED`` or the sum of both. None where there are none.
    """

    offsets: Tensor
    trunk_S: Tensor
    state_S: Tensor
    expert_S: Tensor
    expert_P: Tensor
    agent_P: Tensor
    same_P: Tensor
    counted_N: Tensor | None = None
    sides: Tensor | None = None

    @classmethod
    def of(
        cls,
        trees: Sequence[TokenTree],
        expert: Tensor,
        *,
        action_ids_S: Tensor | None = None,
        counted_N: Tensor | None = None,
        sides: Tensor | None = None,
    ) -> StepTable:
        """The steps of ``trees``.

        Args:
            trees: Packed from trunks and branches.
            expert: bool per step of the trunks, one trunk after the other: the trunk's action
                there is the expert's and the branches are the agent's; else the reverse.
            action_ids_S, counted_N: as a `Comparison`'s, of all trunks.
            sides: as the table's.
        """

        def joined(name: str) -> Tensor:
            return torch.cat([torch.as_tensor(getattr(tree, name)).cpu() for tree in trees]).long()

        branch_S, trunk_S = joined("step_branch"), joined("step_trunk")
        state_S = (branch_S == 0).cumsum(0) - 1
        expert_own_S = expert.cpu()[state_S]
        lengths_S = torch.cat([torch.as_tensor(t.step_offsets).cpu().diff() for t in trees]).long()
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths_S.cumsum(0)])
        if counted_N is not None:
            before_N = torch.cat([torch.zeros(1, dtype=torch.long), counted_N.long().cumsum(0)])
            offsets = before_N[offsets]
        tried_P = torch.nonzero(branch_S > 0).squeeze(1)
        own_P = tried_P - branch_S[tried_P]
        swap_P = ~expert_own_S[tried_P]
        labels_N = joined("labels")
        actions = torch.split(labels_N, lengths_S.tolist())
        same_P = torch.tensor(
            [torch.equal(actions[a], actions[b]) for a, b in zip(tried_P, own_P, strict=True)],
            dtype=torch.bool,
        )
        if action_ids_S is not None:
            ids_P = action_ids_S[tried_P]
            same_P |= (ids_P >= 0) & (ids_P == action_ids_S[own_P])
        return cls(
            offsets=offsets,
            trunk_S=trunk_S,
            state_S=state_S,
            expert_S=(branch_S == 0) == expert_own_S,
            expert_P=torch.where(swap_P, tried_P, own_P),
            agent_P=torch.where(swap_P, own_P, tried_P),
            same_P=same_P,
            counted_N=counted_N,
            sides=sides,
        )

    def to(self, device: torch.device) -> StepTable:
        """A copy on ``device``."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return StepTable(**{name: value.to(device) for name, value in given.items()})

    def counting(self, values_N: Tensor) -> Tensor:
        """Of values of all scored tokens, those of the tokens that count; in order."""
        return values_N if self.counted_N is None else values_N[self.counted_N]

    def counts(self) -> Counts:
        """What there is to average over."""
        lengths_S = self.offsets.diff()
        expert_tokens = int(lengths_S[self.expert_S].sum())
        return Counts(
            pairs=len(self.expert_P) + self.trajectory_pairs,
            expert_tokens=expert_tokens,
            agent_steps=int((~self.expert_S).sum()),
            agent_tokens=int(lengths_S.sum()) - expert_tokens,
        )

    @property
    def trajectory_pairs(self) -> int:
        """K, the pairs of trajectories."""
        return 0 if self.sides is None else int(self.sides[:, 0].max()) + 1

    def side_sums(self, values_S: Tensor, *of: int) -> Tensor:
        """(K,), of each pair of trajectories the sum of values of its steps that are of these.

        Args:
            of: ``CHOSEN`` and ``REJECTED``: the steps of that side alone, so that in differences
                nothing is left of those that both have; ``CHOSEN | REJECTED``: those.
        """
        if self.sides is None:
            return values_S.new_zeros(0)
        pair_M, step_M, side_M = self.sides.unbind(1)
        own_M = torch.isin(side_M, torch.tensor(of, device=side_M.device))
        sums_K = values_S.new_zeros(self.trajectory_pairs)
        return sums_K.index_add(0, pair_M[own_M], values_S[step_M[own_M]])

    def agent_runs(self) -> tuple[Tensor, Tensor]:
        """The agent's steps as trajectories.

        What it did in a rollout is one, without the steps at which the expert acted: to the agent
        those are the environment's. An action that was tried and not taken is one by itself.

        Returns:
            order_A: the places among the A agent's steps, one trajectory after the other.
            offsets: (R+1,) into them.
        """
        taken_S = torch.diff(self.state_S, prepend=self.state_S.new_tensor([-1])) > 0
        alone_S = len(taken_S) + torch.arange(len(taken_S), device=taken_S.device)
        run_A, order_A = torch.sort(
            torch.where(taken_S, self.trunk_S, alone_S)[~self.expert_S], stable=True
        )
        lengths = torch.unique_consecutive(run_A, return_counts=True)[1]
        return order_A, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def expert_nll(self, logps_N: Tensor, total: float) -> Tensor:
        """−log π summed over the tokens of the expert's actions, / ``total``; a connected zero."""
        expert_N = self.expert_S.repeat_interleave(self.offsets.diff())
        return -logps_N[expert_N].sum() / (total or 1)


def pack_with_steps(
    comparisons: Sequence[Comparison], max_tokens: int
) -> tuple[list[TokenTree], StepTable]:
    """The trees of a batch and the table of their steps."""
    trees = pack_comparisons(comparisons, max_tokens)
    expert = np.concatenate([c.expert_T for c in comparisons])
    steps = StepTable.of(
        trees,
        torch.from_numpy(expert),
        action_ids_S=_of_all(comparisons, "action_ids", lambda step: np.full(1, -1, np.int32)),
        counted_N=_of_all(comparisons, "counted", lambda step: np.ones(len(step), dtype=bool)),
        sides=_sides_of_all(comparisons),
    )
    return trees, steps


def _sides_of_all(comparisons: Sequence[Comparison]) -> Tensor | None:
    """The `StepTable.sides` of a batch."""
    found, pairs, steps = [], 0, 0
    for c in comparisons:
        pair_M, step_M = np.nonzero(c.sides_KT)
        found.append(np.stack([pairs + pair_M, steps + step_M, c.sides_KT[pair_M, step_M]], 1))
        pairs += len(c.sides_KT)
        steps += c.trunk.num_steps + sum(map(len, c.branches))
    return torch.from_numpy(np.concatenate(found)).long() if pairs else None


def _of_all(
    comparisons: Sequence[Comparison],
    name: str,
    default: Callable[[NDArray[np.int32]], NDArray[Any]],
) -> Tensor | None:
    """One of the `PARTS` of all comparisons; None where none has it.

    Args:
        default: of a step, where a comparison is without.
    """
    if not any(len(getattr(c, name)) for c in comparisons):
        return None
    found = [
        part if len(part := getattr(c, name)) else np.concatenate([*map(default, c.step_tokens())])
        for c in comparisons
    ]
    return torch.from_numpy(np.concatenate(found))


def unique_tokens(comparisons: Sequence[Comparison], max_tokens: int) -> int:
    """Tokens that token trees encode."""
    return sum(len(tree.input_ids) for tree in pack_comparisons(comparisons, max_tokens))


def naive_tokens(comparisons: Sequence[Comparison]) -> int:
    """Tokens that pairs encode without a tree: each pair, its prefix with either action; of
    trajectories, either from its beginning."""
    total = 0
    for c in comparisons:
        for sides_T in c.sides_KT:
            total += sum(_side_tokens(c.trunk, sides_T & side) for side in (CHOSEN, REJECTED))
        depths = c.trunk.position_ids
        for (start, stop), step in zip(c.trunk.action_spans, c.branches, strict=True):
            state, own = int(depths[start]), int(stop - start)
            total += sum(2 * state + own + len(branch) for branch in step)
    return total


def _side_tokens(trunk: Trunk, of_T: NDArray[np.int8]) -> int:
    """Tokens of the sequences that hold these steps, one where each step sees the one before."""
    spans = trunk.action_spans[of_T > 0]
    lasts = spans[:, 1] - 1
    goes_on = np.append(spans[1:, 0] < trunk.subtree_end[lasts[:-1]], False)
    return int((trunk.position_ids[lasts[~goes_on]] + 1).sum())


def save_comparisons(
    path: Path, comparisons: Sequence[Comparison], progress: dict[str, Any]
) -> None:
    """Write a cycle as one safetensors file of flat arrays, so that an interrupted cycle resumes.

    Args:
        progress: What else the cycle's resumption needs, as JSON in the file's metadata.
    """
    steps = [step for c in comparisons for step in c.branches]
    branches = [branch for step in steps for branch in step]
    ids = [c.trunk.input_ids for c in comparisons]
    arrays: dict[str, NDArray[Any]] = {
        "trunk_ids": _flat(ids),
        "trunk_lengths": _lengths(ids),
        "action_spans": np.concatenate([c.trunk.action_spans for c in comparisons]),
        "trunk_steps": np.array([c.trunk.num_steps for c in comparisons]),
        "rewinds": np.concatenate([c.trunk.rewinds for c in comparisons]),
        "trunk_rewinds": np.array([len(c.trunk.rewinds) for c in comparisons]),
        "branch_counts": _lengths(steps),
        "branch_ids": _flat(branches),
        "branch_lengths": _lengths(branches),
        "expert_trunk": np.array([c.expert_trunk for c in comparisons]),
        "explored": np.array([c.explored for c in comparisons]),
    }
    for name in _OPTIONAL:
        scores = [getattr(c, name) for c in comparisons]
        arrays |= {name: np.concatenate(scores), f"{name}_lengths": _lengths(scores)}
    save_file(arrays, path, metadata={"progress": json.dumps(progress)})


def load_comparisons(path: Path) -> tuple[list[Comparison], dict[str, Any]]:
    """Read what `save_comparisons` wrote.

    Raises:
        FileNotFoundError: Naming the file; a checkpoint without it cannot be resumed.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: it holds the cycle that the checkpoint was in, without which the "
            "run cannot be resumed; take a checkpoint that has it, or start anew"
        )
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = json.loads(file.metadata()["progress"])
    spans = _split(arrays["action_spans"], arrays["trunk_steps"])
    branches = iter(_split(arrays["branch_ids"], arrays["branch_lengths"]))
    steps = iter([[next(branches) for _ in range(n)] for n in arrays["branch_counts"]])
    rewinds: Sequence[Any] = [()] * len(spans)  # a file of before has none
    if "rewinds" in arrays:
        rewinds = _split(arrays["rewinds"], arrays["trunk_rewinds"])
    # A file of before lacks some.
    explored = arrays.get("explored", np.zeros(len(spans), dtype=bool))
    optional = [name for name in _OPTIONAL if name in arrays]
    columns = zip(
        _split(arrays["trunk_ids"], arrays["trunk_lengths"]),
        spans,
        rewinds,
        arrays["expert_trunk"],
        explored,
        *(_split(arrays[name], arrays[f"{name}_lengths"]) for name in optional),
        strict=True,
    )
    comparisons = [
        Comparison(
            Trunk(ids, spans, backs),
            [next(steps) for _ in spans],
            bool(expert),
            explored=bool(second),
            **dict(zip(optional, values, strict=True)),
        )
        for ids, spans, backs, expert, second, *values in columns
    ]
    return comparisons, progress


def _lengths(parts: Sequence[object]) -> NDArray[np.int64]:
    return np.array([len(part) for part in parts], dtype=np.int64)  # type: ignore[arg-type]


def _flat(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts])


def _split(flat: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
