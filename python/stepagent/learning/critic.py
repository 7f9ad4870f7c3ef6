"""What judges steps in the inverse form: a decoder that reads token trees, with heads on its rows.

A discriminator's head reads the row of an action's last token, which has seen the state and the
whole action; the value head reads the row of a state's last token, which has seen no action. Expert
and agent actions of a trajectory are judged in one forward, on one tree.

The best discriminator is D* = π / (π + π_E), whose logit is log π − log π_E. How likely the agent's
action was is known and need not be learnt (AIRL, arXiv 1710.11248); for the expert's the decoder's
own likelihood q stands in, which begins as the policy's:

    logit of D = log π(a|s) − log q(a|s) + head(row),    log π(a|s) = Σ log π of the action's tokens

Of an action that follows a thought, log π(a|s) is a sum over all thoughts, which is not known:
there the logit is head(row).

S steps of the trees, E discriminators, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice
from ..models import read_trees, text_config, unwrapped
from ..ops import step_sums
from ..trees.tree import on_host
from .options.choices import BODIES, DiscriminatorBody

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trees.tree import TokenTree

_ADAPTER_RANK = 8


@dataclass(frozen=True)
class StepReading:
    """Of S steps: rows (S, H), fp32, of their actions and states, and log q (S,) of the actions."""

    action_SH: Tensor
    state_SH: Tensor
    logq_S: Tensor

    def at(self, steps: Tensor) -> StepReading:
        """Of these steps alone."""
        return StepReading(self.action_SH[steps], self.state_SH[steps], self.logq_S[steps])


class StepCritic(nn.Module):
    """E discriminators and a value function over steps, on the rows of one decoder."""

    def __init__(
        self, body: nn.Module, discriminators: int, diversity: float = 0.0, actors: int = 1
    ) -> None:
        """What requires a gradient in ``body`` is trained.

        ``actors``: how many, each with a value function of its own. ``diversity``: the scale of a
        fixed random function that is a part of each discriminator (prior functions, arXiv
        1806.03335). They can agree where they have learnt, and differ elsewhere.
        """
        super().__init__()
        width = int(text_config(body).hidden_size)
        self.body = body
        self.discriminators = nn.ModuleList(_head(width) for _ in range(discriminators))
        self.value = _head(width)
        self.priors = nn.ModuleList(
            _prior(width) for _ in range(discriminators if diversity else 0)
        )
        self.other_values = nn.ModuleList(_head(width) for _ in range(actors - 1))
        self._diversity = diversity
        self._body_learns = any(p.requires_grad for p in body.parameters())
        self.to(unwrapped(body).device)
        self.eval()  # without dropout, so that a resumed run draws what an undisturbed one would

    def read(self, trees: Sequence[TokenTree]) -> StepReading:
        """What the decoder makes of the trees' steps, in one forward."""
        rows = [[tree.action_rows(), tree.state_rows()] for tree in trees]
        with nullcontext() if self._body_learns else torch.no_grad():
            hidden_KH, logq_N = read_trees(
                self.body, trees, [np.concatenate(pair) for pair in rows]
            )
        parts = torch.split(hidden_KH.float(), [len(part) for pair in rows for part in pair])
        lengths_S = np.concatenate([np.diff(on_host(tree.step_offsets)) for tree in trees])
        offsets = torch.from_numpy(np.concatenate([[0], lengths_S.cumsum()]))
        return StepReading(
            action_SH=torch.cat(parts[0::2]),
            state_SH=torch.cat(parts[1::2]),
            logq_S=step_sums(logq_N, offsets.to(logq_N.device)),
        )

    def logits(self, reading: StepReading, logp_S: Tensor | None) -> Tensor:
        """(E, S) logits of D = P(agent | s, a).

        Args:
            logp_S: (S,) log π of each action under the policy that is judged; None where it is not
                known, as of an action after any thought: the heads have to learn all then.
        """
        heads_ES = self.heads(reading)
        if logp_S is None:
            return heads_ES
        return heads_ES + (logp_S.to(reading.logq_S) - reading.logq_S)

    def heads(self, reading: StepReading) -> Tensor:
        """(E, S), what the discriminators' heads make of the actions' rows alone."""
        rows_SH = reading.action_SH
        heads_ES = torch.stack([head(rows_SH).squeeze(1) for head in self.discriminators])
        if not len(self.priors):
            return heads_ES
        unit_SH = F.rms_norm(rows_SH, rows_SH.shape[-1:])
        priors_ES = torch.stack([prior(unit_SH).squeeze(1) for prior in self.priors])
        return heads_ES + self._diversity * priors_ES

    def values(self, state_SH: Tensor, actor: int = 0) -> Tensor:
        """(S,) values of states to an actor; no gradient flows into the body."""
        head = self.other_values[actor - 1] if actor else self.value
        values_S: Tensor = head(state_SH.detach()).squeeze(1)
        return values_S

    def trained(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def fixed_sums(self) -> dict[str, float]:
        """A number for each tensor of the body that is not trained, by which another body shows."""
        return {
            name: float(p.detach().double().sum())
            for name, p in self.named_parameters()
            if not p.requires_grad
        }


def _head(width: int) -> nn.Sequential:
    """0 for every input at first, so that V = 0, and D = ½ where q is the policy."""
    head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    nn.init.zeros_(cast("nn.Linear", head[2]).weight)
    nn.init.zeros_(cast("nn.Linear", head[2]).bias)
    return head


def _prior(width: int) -> nn.Sequential:
    """A random function that is not trained: of deviation 1, or a little less, over random rows."""
    prior = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    for layer, variance in ((prior[0], 1.0), (prior[2], 0.36)):  # E SiLU(x)² = 0.36, x normal
        nn.init.normal_(cast("nn.Linear", layer).weight, std=(variance * width) ** -0.5)
        nn.init.zeros_(cast("nn.Linear", layer).bias)
    return prior.requires_grad_(False)


def critic_body(policy: PreTrainedModel, kind: DiscriminatorBody) -> nn.Module:
    """A decoder to judge with, which starts as the policy is now.

    ``frozen``: never trained, the heads alone are; the weights that the policy does not train
    itself are shared with it, not copied. ``adapter``: the same with a LoRA adapter that is
    trained; where the policy is an adapter itself, a copy of it, so that what it has learnt is
    where the discriminator begins. ``own``: a copy of which all is trained that is trained of the
    policy.
    """
    check_choice("discriminator_body", kind, BODIES)
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    body: Any = copy.deepcopy(policy, dict(shared))
    if kind == "own" or (kind == "adapter" and hasattr(policy, "disable_adapter")):
        return cast("nn.Module", body)
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    return _with_adapter(body) if kind == "adapter" else cast("nn.Module", body)


def _with_adapter(body: PreTrainedModel) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "discriminator_body='adapter' needs PEFT: pip install 'stepagent[train]'"
        ) from error
    config = LoraConfig(
        r=_ADAPTER_RANK,
        lora_alpha=2 * _ADAPTER_RANK,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return cast("nn.Module", get_peft_model(body, config))
