"""Inspection: at every step of a trajectory, what would the agent have done?

StepAgent (arXiv 2411.03817), section "Inspection": the agent acts at each state of the expert's
trajectory. Branch decoding: one prefill of the trunk gives the state at all T steps; then the
branches of all steps grow in lock-step, each seeing its own prefix of the trunk and itself.

    slots   u o1 a1 o2 a2 | x1 x2 | y1 y2 | …      x, y: first, second tokens of the branches at
    x2 sees u o1 a1 o2      x2                     steps 1 and 2; a branch that ended asks no more
    y1 sees u o1            x1      y1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .decoding import (
    SlotCache,
    check_count,
    check_temperature,
    sample_tokens,
    uniforms,
)
from .encoding import Trunk
from .models import check_fits, check_tree_support, evaluation_mode, lm_head
from .ops import token_logprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from .engines import Engine


@dataclass(frozen=True, eq=False)
class Branch:
    """One action tried at a state: its tokens, int32, the end token included where it was produced,
    and the policy's log-prob of each (fp32, at temperature 1 whatever the sampling temperature)."""

    token_ids: NDArray[np.int32]
    logps: NDArray[np.float32]


@torch.no_grad()
def inspect(
    model: PreTrainedModel | Engine,
    trunks: Sequence[Trunk],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    first_trunk: int = 0,
    max_batch_tokens: int = 8192,
    progress: bool = False,
) -> list[list[list[Branch]]]:
    """The agent's actions at every state of ``trunks``: ``branches[i][t][k]``.

    :param model: a model, or an engine of :mod:`stepagent.engines`, which does the same elsewhere.
    :param samples: actions per state. At ``temperature=0`` they are all the greedy one.
    :param max_new_tokens: an action longer than this is cut, without an end token.
    :param eos_token_id: what ends an action; None: as ``model.generation_config`` says.
    :param seed: the tokens of (trunk, step, sample) depend on it, on the trunk's place in
        ``trunks``, and on nothing else in the batch beyond rounding.
    :param first_trunk: the place of ``trunks[0]``, where ``trunks`` are a part of more.
    :param max_batch_tokens: bounds the slots (trunks × tokens) of one batch; a single trunk may
        exceed it.
    :raises ValueError: for an option out of range, no end token, or a model that a tree would
        make wrong (:func:`stepagent.models.check_tree_support`).
    :raises FloatingPointError: when the model's logits are not finite.
    """
    if not isinstance(model, nn.Module):
        return model.inspect(
            trunks,
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=eos_token_id,
            seed=seed,
            first_trunk=first_trunk,
            progress=progress,
        )
    check_count("samples", samples)
    check_count("max_new_tokens", max_new_tokens)
    check_temperature(temperature)
    ends = end_tokens(model, eos_token_id)
    check_tree_support(model)
    for i, trunk in enumerate(trunks):
        deepest = max(len(trunk.input_ids), int(trunk.action_spans[-1, 0]) + max_new_tokens)
        what = f"trunks[{i}] with max_new_tokens={max_new_tokens}"
        check_fits(model, what, trunk.input_ids, deepest)
    branches: list[list[list[Branch]]] = [[] for _ in trunks]
    bar = tqdm(total=len(trunks), desc="inspect", disable=not progress)
    with evaluation_mode(model), bar:
        for batch in _batches(trunks, samples * max_new_tokens, max_batch_tokens):
            grower = _Branches(model, [trunks[i] for i in batch], samples)
            keys = first_trunk + np.asarray(batch)[grower.trunk], grower.step, grower.sample
            grower.grow(ends, max_new_tokens, temperature, seed, keys)
            for i, steps in zip(batch, grower.collect(), strict=True):
                branches[i] = steps
            bar.update(len(batch))
    return branches


def end_tokens(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The ids that end an action; an error when neither the caller nor the model names one."""
    if eos_token_id is None:
        generation_config = getattr(model, "generation_config", None)
        eos_token_id = getattr(generation_config, "eos_token_id", None)
    ends = [] if eos_token_id is None else [int(token) for token in np.atleast_1d(eos_token_id)]
    if not ends:
        raise ValueError(
            "no token ends an action: eos_token_id is not given and model.generation_config has "
            "none; pass the id of the end-of-turn token"
        )
    return ends


def _batches(trunks: Sequence[Trunk], per_step: int, budget: int) -> list[list[int]]:
    """Indices of trunks, of similar length together, whose padded slots stay under ``budget``."""
    slots = [len(t.input_ids) + t.num_steps * per_step for t in trunks]
    batches: list[list[int]] = []
    for i in sorted(range(len(trunks)), key=slots.__getitem__):
        if batches and (len(batches[-1]) + 1) * slots[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class _Branches:
    """All branches of a batch of trunks; branch n grows at ``step[n]`` of row ``trunk[n]``."""

    def __init__(self, model: PreTrainedModel, trunks: Sequence[Trunk], samples: int) -> None:
        self.samples = samples
        steps = np.array([trunk.num_steps for trunk in trunks])
        self.trunk = np.repeat(np.arange(len(trunks)), steps * samples)
        self.step = np.concatenate([np.repeat(np.arange(n), samples) for n in steps])
        self.sample = np.tile(np.arange(samples), int(steps.sum()))
        self.start = np.concatenate([np.repeat(t.action_spans[:, 0], samples) for t in trunks])
        self.tokens: list[list[int]] = [[] for _ in self.trunk]
        self.logps: list[list[float]] = [[] for _ in self.trunk]
        self._steps_of = steps
        self._head = lm_head(model)
        self._cache = SlotCache(model, len(trunks))
        self._prefill(trunks)

    def _prefill(self, trunks: Sequence[Trunk]) -> None:
        width = max(len(trunk.input_ids) for trunk in trunks)
        device = self._head.weight_VH.device
        tokens_BL = np.stack(
            [np.pad(t.input_ids, (0, width - len(t.input_ids))) for t in trunks]
        ).astype(np.int64)
        # A padding token lies behind all tokens of its row: causal attention hides it from them.
        hidden_BLH = self._cache.prefill(torch.from_numpy(tokens_BL).to(device))
        self._trunk_width = width
        self._owner_BS = torch.empty((len(trunks), 0), dtype=torch.long, device=device)
        self._hidden = hidden_BLH[self._on_device(self.trunk), self._on_device(self.start - 1)]

    def _on_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._head.weight_VH.device)

    def grow(
        self,
        ends: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        keys: tuple[NDArray[np.integer], ...],
    ) -> None:
        """Decode all branches, one token of each per turn, until each has ended."""
        active = np.arange(len(self.trunk))
        for position in range(max_new_tokens):
            logits = self._head.logits(self._hidden)
            draws = uniforms(seed, *(key[active] for key in keys), position)
            sampled = sample_tokens(logits, temperature, draws)
            logps = token_logprobs(logits, sampled).cpu().numpy()
            tokens = sampled.cpu().numpy()
            for n, token, logp in zip(active, tokens, logps, strict=True):
                self.tokens[n].append(int(token))
                self.logps[n].append(float(logp))
            going = ~np.isin(tokens, ends)
            active = active[going]
            if position + 1 == max_new_tokens or not len(active):
                return
            self._hidden = self._extend(active, tokens[going], self.start[active] + position)

    def _extend(
        self, active: NDArray[np.int64], tokens: NDArray[np.int64], depths: NDArray[np.int64]
    ) -> Tensor:
        """Encode the newest token of each active branch; its hidden row (active, H)."""
        rows = self.trunk[active]
        # Column of each branch in its row of the batch: branches of a row are neighbours.
        columns = np.arange(len(active)) - np.searchsorted(rows, rows)
        shape = (len(self._steps_of), int(columns.max()) + 1)

        def scatter(values: NDArray[np.integer], fill: int) -> Tensor:
            grid = np.full(shape, fill, dtype=np.int64)
            grid[rows, columns] = values
            return self._on_device(grid)

        owner_BQ = scatter(active, -1)
        # A filler token sees the trunk's first token: attention over nothing would be NaN.
        start_BQ = scatter(self.start[active], 1)
        self._owner_BS = torch.cat([self._owner_BS, owner_BQ], dim=1)
        trunk_slots = torch.arange(self._trunk_width, device=start_BQ.device)
        visible = torch.cat(
            [
                trunk_slots < start_BQ.unsqueeze(2),
                (self._owner_BS.unsqueeze(1) == owner_BQ.unsqueeze(2))
                & (owner_BQ >= 0).unsqueeze(2),
            ],
            dim=2,
        )
        hidden = self._cache.extend(scatter(tokens, 0), scatter(depths, 0), visible)
        return hidden[self._on_device(rows), self._on_device(columns)]

    def collect(self) -> list[list[list[Branch]]]:
        """``[trunk][step][sample]``."""
        flat = iter(
            Branch(np.array(t, dtype=np.int32), np.array(p, dtype=np.float32))
            for t, p in zip(self.tokens, self.logps, strict=True)
        )
        return [
            [[next(flat) for _ in range(self.samples)] for _ in range(n)] for n in self._steps_of
        ]
