"""A word-level tokenizer and an untrained small Llama, for where no weights can be downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer, Split, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.trajectory import Trajectory

_SPECIAL_TOKENS = ["<pad>", "<unk>", "<obs>", "<act>", "<end>"]
_CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<obs> {{ m['content'] }} "
    "{% else %}<act> {{ m['content'] }}<end> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<act> {% endif %}"
)


def word_tokenizer(
    trajectories: Sequence[Trajectory], *, punctuation_apart: bool = False
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of everything in ``trajectories``, with a chat template.

    Args:
        punctuation_apart: what stands around a word is a token of its own, so that the key of
            "You see a key." is the one of "take key".
    """
    split: PreTokenizer = WhitespaceSplit()
    if punctuation_apart:
        around = Split(Regex(r"(?<=\s|^)[^\w\s]+|[^\w\s]+(?=\s|$)"), "isolated")
        split = PreTokenizers([around, WhitespaceSplit()])
    texts = {message["content"] for t in trajectories for message in t.messages}
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL_TOKENS, *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<obs>", "<act>"],
        chat_template=_CHAT_TEMPLATE,
    )


def small_llama(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int
) -> LlamaForCausalLM:
    """An untrained Llama with four heads and tied embeddings; seed torch before."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)
