"""The model of the system's measurements, its step pairs, and how a call is timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import stepagent
from stepagent import TokenTree, Trunk

END = 0  # the token that ends an action; never in a trunk, so actions have their full length


@dataclass(frozen=True)
class Scale:
    """Sizes of everything; `TINY` is for a dry run on a CPU."""

    model: dict[str, int]
    dtype: torch.dtype
    observation: int  # tokens
    action: int
    mask_steps: tuple[int, ...]  # trajectories of which one tree each is scored
    padded_steps: tuple[int, ...]  # those whose pairs are scored padded too
    padded_tokens: int  # of one batch of padded pairs
    trunks: int  # inspected
    trunk_steps: int
    new_tokens: int
    budgets: tuple[int, ...]  # max_batch_tokens
    generate_rows: int  # states that `generate` takes at once
    profile_shape: tuple[int, int, int]  # N, H, V
    repeats: int


# Llama 3 8B; a step of 256 tokens of a tree, so that 16 and 64 steps make 4k and 16k.
FULL = Scale(
    model={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    dtype=torch.bfloat16,
    observation=200,
    action=28,
    mask_steps=(16, 64),
    padded_steps=(16, 32),
    padded_tokens=2**14,
    trunks=8,
    trunk_steps=16,
    new_tokens=32,
    budgets=(2**13, 2**17),
    generate_rows=32,
    profile_shape=(8192, 4096, 128256),
    repeats=2,
)
TINY = Scale(
    model={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
    dtype=torch.float32,
    observation=8,
    action=4,
    mask_steps=(2, 4),
    padded_steps=(2, 3),
    padded_tokens=64,
    trunks=3,
    trunk_steps=2,
    new_tokens=4,
    budgets=(64, 256),
    generate_rows=4,
    profile_shape=(32, 16, 500),
    repeats=1,
)


def build(scale: Scale, device: torch.device) -> PeftModel:
    """Random weights, made on the device; LoRA on the attention, gradients checkpointed."""
    config = LlamaConfig(
        **scale.model,
        max_position_embeddings=2**17,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(
            config, dtype=scale.dtype, attn_implementation="sdpa"
        )
        lora = LoraConfig(
            r=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,  # as after some training: both factors count
        )
        model = get_peft_model(base, lora).to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class Pairs:
    """A random trajectory and an action of the agent's at each of its steps."""

    def __init__(self, scale: Scale, steps: int, seed: int = 0) -> None:
        random, V = np.random.default_rng(seed), scale.model["vocab_size"]
        turn = scale.observation + scale.action
        self.starts = np.arange(steps) * turn + scale.observation
        spans = np.stack([self.starts, self.starts + scale.action], axis=1)
        self.trunk = Trunk(random.integers(1, V, steps * turn).astype(np.int32), spans)
        expert = np.stack([self.trunk.input_ids[start:stop] for start, stop in spans])
        shifts = random.integers(1, V - 1, expert.shape)
        self.agent = ((expert + shifts - 1) % (V - 1) + 1).astype(np.int32)  # never the expert's

    def tree(self) -> TokenTree:
        (tree,) = stepagent.pack_step_pairs([self.trunk], [[[action] for action in self.agent]])
        return tree

    def sequences(self) -> list[NDArray[np.int32]]:
        """A sequence for each action, after its state: expert's and agent's, step by step."""
        ids, result = self.trunk.input_ids, []
        for start, agent in zip(self.starts, self.agent, strict=True):
            result.append(ids[: start + len(agent)])
            result.append(np.concatenate([ids[:start], agent]))
        return result


def head_logprobs(model: PeftModel, hidden_RH: Tensor, labels: Any, rows: Any) -> Tensor:
    weight_VH = model.get_base_model().get_output_embeddings().weight
    labels_N, rows_N = (torch.as_tensor(x, device=hidden_RH.device).long() for x in (labels, rows))
    return stepagent.linear_logprobs(hidden_RH, weight_VH, labels_N, rows_N=rows_N)


def decode(model: PeftModel, ids_BL: Tensor, **inputs: Any) -> Tensor:
    """Hidden rows (B, L, H), with whatever mask is given."""
    decoder = model.get_base_model().get_decoder()
    return decoder(input_ids=ids_BL, use_cache=False, **inputs).last_hidden_state


@dataclass(frozen=True)
class Timed:
    """Of some calls, after one to warm up."""

    seconds: list[float]
    peak_bytes: int  # above what was there before; 0 on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def figures(self, tokens: int) -> dict[str, Any]:
        return {
            "ms": 1e3 * self.median,
            "ms of each": [1e3 * seconds for seconds in self.seconds],
            "tokens": tokens,
            "tokens per second": tokens / self.median,
            "peak GB": self.peak_bytes / 1e9,
        }


def timed(
    work: Callable[[], object], repeats: int, device: torch.device, *, warm: bool = False
) -> Timed:
    """`warm`: it ran before, so that it need not run untimed."""
    cuda = device.type == "cuda"
    if not warm:
        work()
    gc.collect()
    before, seconds = 0, []
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return Timed(seconds, peak)


def learn(model: PeftModel, score: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs of a forward, and the gradient of their mean, in one piece."""
    logps_N = score()
    logps_N.mean().backward()
    return logps_N.detach(), taken_gradient(model)


def taken_gradient(model: PeftModel) -> Tensor:
    """In one piece; the parameters have none afterwards."""
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients)
