"""A head whose vocabulary is spread over the ranks of a process group, in equal shards in order.

A custom operator takes no group, so it goes by its name; "" is a head that is whole.

Dimensions: n tokens, V vocabulary of one shard, G ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from stepagent.checks import IGNORE, check_shard
from stepagent.ops.blocks import Fold


def _ranks(group: str) -> ProcessGroup:
    # torch types a name as str, since 2.13 as a subclass of it.
    return distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]


def vocabulary(V: int, group: str) -> int:
    """Of all shards together."""
    return V * dist.get_world_size(_ranks(group)) if group else V


def local_labels(labels_n: Tensor, V: int, group: str) -> Tensor:
    """Labels as this rank's shard counts them; V, which no slice holds, for those of others."""
    if not group:
        return labels_n
    local_n = labels_n - dist.get_rank(_ranks(group)) * V
    absent_n = (labels_n != IGNORE) & ((local_n < 0) | (local_n >= V))
    return torch.where(labels_n == IGNORE, IGNORE, local_n).masked_fill_(absent_n, V)


def local_tokens(kept_NK: Tensor | None, V: int, group: str) -> Tensor | None:
    """Ids as this rank's shard counts them; those of others are outside [0, V)."""
    if not group or kept_NK is None:
        return kept_NK
    return kept_NK - dist.get_rank(_ranks(group)) * V


def merge(fold: Fold, labels_n: Tensor, V: int, group: str) -> Fold:
    """The folds of all shards, in the order of ranks."""
    shard_n = torch.full_like(fold.max_n, V)
    mine = torch.stack([fold.max_n, fold.sum_n, fold.moment_n, fold.label_n, shard_n])
    ranks = _ranks(group)
    states = [torch.empty_like(mine) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(states, mine, group=ranks)
    whole = Fold(labels_n, fold.max_n.dtype, fold.with_entropy)
    for max_n, sum_n, moment_n, _, shard_n in states:
        check_shard(shard_n, V)
        whole.absorb(max_n, sum_n, moment_n)
    owner_n = labels_n.div(V, rounding_mode="floor").clamp_(-1, len(states))
    known_n = (owner_n >= 0) & (owner_n < len(states))
    labels_Gn = torch.stack([state[3] for state in states])
    label_1n = labels_Gn.gather(0, torch.where(known_n, owner_n, 0)[None])
    whole.label_n = label_1n.squeeze(0).masked_fill_(~known_n, torch.nan)
    return whole


def sum_over(group: str, tensor: Tensor) -> None:
    if group:
        dist.all_reduce(tensor, group=_ranks(group))
