"""Tiny real Hugging Face models, and the slow way to score and to decode with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from stepagent.data.encoding import Trunk

torch.set_num_threads(1)  # for models of this size a second thread only waits

VOCAB = 97
END = 2
# The window of those models that have one: shorter than the trees of the tests are deep.
WINDOW = 7

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_OPTIONS = {
    "gpt2": {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": END, **_GPT2, **_DROPOUT},
    "mistral": {"sliding_window": WINDOW},
    # Two layers of either kind, and attention that takes an additive mask.
    "gemma2": {
        "sliding_window": WINDOW,
        "attn_implementation": "eager",
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
}


def tiny_model(name: str, *, seed: int = 0, **options: object) -> PreTrainedModel:
    """An untrained model of this type, in float32, with weights so large that contexts matter."""
    shape = {} if name == "gpt2" else _SHAPE
    options = {**shape, **_OPTIONS.get(name, {}), "initializer_range": 0.3, **options}
    attention = options.pop("attn_implementation", None)
    config = AutoConfig.for_model(name, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()


def random_trunks(
    rng: np.random.Generator, count: int = 3, vocab: int = VOCAB, samples: int = 2
) -> tuple[list[Trunk], list[list[list[np.ndarray]]]]:
    """Trunks of 1, 2, … steps and unequal lengths, with branches of 0 to 5 tokens.

    Each last step also has its own action and its first branch a second time.
    """

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(3, vocab, int(rng.integers(low, high)))

    trunks, branches = [], []
    for steps in range(1, count + 1):
        ids, spans, tried = np.zeros(0, int), [], []
        for _ in range(steps):
            observation, action = tokens(4, 9), tokens(1, 5)
            start = len(ids) + len(observation)
            ids = np.concatenate([ids, observation, action])
            spans.append((start, start + len(action)))
            tried.append([tokens(0, 6) for _ in range(samples)])
        tried[-1] += [ids[slice(*spans[-1])], tried[-1][0]]
        trunks.append(Trunk(np.concatenate([ids, tokens(0, 3)]), spans))
        branches.append(tried)
    return trunks, branches


def separate_logprobs(
    model: torch.nn.Module, trunks: Sequence[Trunk], branches: Sequence[Sequence[Sequence]]
) -> torch.Tensor:
    """Log-probs of every action's tokens, each action in a forward of its own.

    In the order of ``pack_step_pairs``: by trunk, by step, the trunk's own action first.
    """
    logps = []
    for trunk, steps in zip(trunks, branches, strict=True):
        for (start, stop), tried in zip(trunk.action_spans, steps, strict=True):
            for action in [trunk.input_ids[start:stop], *tried]:
                ids = np.concatenate([trunk.input_ids[:start], action]).astype(np.int64)
                tokens = torch.from_numpy(ids)
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, start - 1 : -1]
                table = logits.log_softmax(-1)
                logps.append(table.gather(1, tokens[start:, None]).squeeze(1))
    return torch.cat(logps)


def generate(
    model: PreTrainedModel, prefix: np.ndarray, max_new_tokens: int, end: int | list[int] = END
) -> list[int]:
    """What ``model.generate`` writes greedily after ``prefix``, the end token included."""
    ids = torch.from_numpy(np.asarray(prefix, dtype=np.int64))[None]
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=0,
    )
    return written[0, ids.shape[1] :].tolist()


CHAT = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def babyai_tokenizer(chat_template: str = CHAT) -> PreTrainedTokenizerFast:
    """One token a word of BabyAI's text, in ChatML; token 2 ends a turn."""
    from stepagent.envs.babyai import VOCABULARY

    words = ["<pad>", "<unk>", "<|im_end|>", "<|im_start|>", "user", "assistant", *VOCABULARY]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(WordLevel(dict(zip(words, range(len(words)), strict=True)), "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def tiny_agent(name: str = "llama", **options: object) -> PreTrainedModel:
    """An untrained model for :func:`babyai_tokenizer`, with room for an episode."""
    positions = {"n_positions": 1024} if name == "gpt2" else {"max_position_embeddings": 1024}
    return tiny_model(name, **{"vocab_size": len(babyai_tokenizer()), **positions, **options})
