"""Inspection: at every step of a trajectory, what would the agent have done?

StepAgent (arXiv 2411.03817), section "Inspection": the agent acts at each state of the expert's
trajectory. Branch decoding: one prefill of the trunk gives the state at all T steps, and what comes
after every token of the trunk's own actions. As long as the agent samples just these, it follows
the trunk; from where it parts, the branches of all steps grow in lock-step, each seeing its own
prefix of the trunk and itself.

`stepagent.acting.forest` is how a batch of trunks grows its branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.branch import Branch
from ..data.draws import check_count, check_temperature
from ..data.ends import model_ends
from ..data.trunk import Trunk
from ..models import check_fits, check_tree_support, evaluation_mode, lm_head, text_config
from .decoding import make_truncations
from .forest import Forest, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engines import Engine

_BATCH_TOKENS = 8192
# A GPU waits for the host unless a forward has a few hundred rows.
_BATCH_TOKENS_CUDA = 131072
# Of the free memory; the rest is for logits, masks and the allocator.
_SHARE_OF_MEMORY = 0.7


@torch.no_grad()
def inspect(
    model: PreTrainedModel | Engine,
    trunks: Sequence[Trunk],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    first_trunk: int = 0,
    places: Sequence[int] | None = None,
    max_batch_tokens: int | None = None,
    progress: bool = False,
) -> list[list[list[Branch]]]:
    """The agent's actions at every state of ``trunks``: ``branches[i][t][k]``.

    Args:
        model: a model, or an engine of `stepagent.engines`, which does the same elsewhere.
        trunks: the trajectories.
        samples: actions per state. At ``temperature=0`` they are all the greedy one.
        max_new_tokens: an action longer than this is cut, without an end token.
        temperature: 0 is greedy.
        top_k: sample among so many of the likeliest tokens only. This and the next two are
            transformers' own, after the temperature and in this order, as in ``generate``.
        top_p: among the fewest tokens that have this probability together.
        min_p: among those that have at least this share of the likeliest's probability.
        eos_token_id: what ends an action; None: as ``model.generation_config`` says.
        seed: the tokens of (trunk, step, sample) depend on it, on the trunk's place in ``trunks``,
            and on nothing else in the batch beyond rounding.
        first_trunk: the place of ``trunks[0]``, where ``trunks`` are a part of more.
        places: the place of each trunk, where the part is not one that follows on.
        max_batch_tokens: bounds the slots (trunks × tokens) of one batch and the tokens of one
            forward. A trunk that needs more is read in chunks, and its branches grow in turns: it
            takes at most its own length and half of this, or one branch. None: as
            `default_batch_tokens` says.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: for an option out of range, no end token, or a model that a tree would make
            wrong (`stepagent.models.check_tree_support`).
        FloatingPointError: when the model's logits are not finite.
    """
    if places is None:
        places = range(first_trunk, first_trunk + len(trunks))
    if len(places) != len(trunks):
        raise ValueError(f"places must have {len(trunks)} entries, one a trunk, got {len(places)}")
    if not isinstance(model, nn.Module):
        for name, value in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None, got {value}: an engine samples from all tokens"
                )
        return model.inspect(
            trunks,
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=eos_token_id,
            seed=seed,
            places=places,
            progress=progress,
        )
    check_count("samples", samples)
    check_count("max_new_tokens", max_new_tokens)
    if max_batch_tokens is not None:
        check_count("max_batch_tokens", max_batch_tokens)
    check_temperature(temperature)
    truncations = make_truncations(top_k, top_p, min_p)
    ends = model_ends(model, eos_token_id)
    check_tree_support(model)
    for i, trunk in enumerate(trunks):
        starts = trunk.position_ids[trunk.action_spans[:, 0]]
        deepest = max(int(trunk.position_ids.max()) + 1, int(starts.max()) + max_new_tokens)
        what = f"trunks[{i}] with max_new_tokens={max_new_tokens}"
        check_fits(model, what, trunk.input_ids, deepest)
    sampler = Sampler(lm_head(model), temperature, truncations, ends, seed)
    budget = default_batch_tokens(model) if max_batch_tokens is None else max_batch_tokens
    branches: list[list[list[Branch]]] = [[] for _ in trunks]
    bar = tqdm(total=len(trunks), desc="inspect", disable=not progress)
    with evaluation_mode(model), bar:
        for batch in _batches(trunks, samples * (max_new_tokens - 1), budget):
            chosen, where = [trunks[i] for i in batch], [places[i] for i in batch]
            forest = Forest(chosen, where, samples, max_new_tokens, sampler)
            forest.grow(model, budget)
            for i, steps in zip(batch, forest.collect(), strict=True):
                branches[i] = steps
            bar.update(len(batch))
    return branches


def default_batch_tokens(model: PreTrainedModel) -> int:
    """``max_batch_tokens`` where none is given: 8192 on the CPU.

    On CUDA 131072, or what the free memory has room for, and never less than 8192.
    """
    if model.device.type != "cuda":
        return _BATCH_TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    fitting = int(_SHARE_OF_MEMORY * free / _bytes_per_token(model))
    return max(_BATCH_TOKENS, min(_BATCH_TOKENS_CUDA, fitting))


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Of the key-value cache, and of what one layer's forward holds at a time."""
    config = text_config(model)
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    cache = 2 * config.num_hidden_layers * kv_heads * head_dim
    attention = (4 * heads + 2 * kv_heads) * head_dim
    numbers = cache + attention + 4 * hidden + 3 * intermediate
    return int(numbers * model.dtype.itemsize)


def _batches(trunks: Sequence[Trunk], per_step: int, budget: int) -> list[list[int]]:
    """Indices of trunks, of similar length together, whose padded slots stay under ``budget``."""
    slots = [int(t.action_spans[-1, 1]) + t.num_steps * per_step for t in trunks]
    batches: list[list[int]] = []
    for i in sorted(range(len(trunks)), key=slots.__getitem__):
        if batches and (len(batches[-1]) + 1) * slots[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
