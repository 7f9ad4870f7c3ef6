"""Tiny real fast tokenizers, trained in a moment, and chat templates to set on them."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "[UNK]",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
)

CORPUS = (
    "Thought: I should go to the kitchen and look for the apple.\nAction: go to kitchen\n",
    "Observation: You are in the kitchen. On the table you see an apple, a knife and a mug.\n",
    "Thought: the apple is on the table.\nAction: take apple from table\n\nassistant user system\n",
    "You are a helpful agent. Assistant: go User: look search[red shoes] click[buy now]\n",
)

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

GENERATION = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

LLAMA3 = """\
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ '<s>[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] | trim + ' </s>' }}
{%- endif -%}
{%- endfor -%}
"""

GEMMA = """\
{{- '<bos>' -}}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

QWEN3 = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' -%}
{%- if '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if loop.last -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}
{{ content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# As Qwen3's: thoughts are written in the newest turn alone.
THINKING = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' and loop.last and message['reasoning_content'] -%}
{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

NO_END_OF_TURN = """\
{%- for message in messages -%}
{{ '<|im_start|>' if loop.first }}{{ message['role'] + '\n' + message['content'] + '\n' }}
{%- endfor -%}
"""

SPACED = """\
{%- for message in messages -%}
{{ message['role'] + ': ' + message['content'] + '</s>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}
"""


@cache
def _byte_level(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # for the training only: Llama 2 has no pre-tokenizer, though its merges never cross a "▁"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=[*SPECIAL_TOKENS, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL_TOKENS]
    return Tokenizer.from_str(json.dumps(state))


@cache
def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(tokenizer.to_str())  # callers may change what they get
    fast = PreTrainedTokenizerFast(
        tokenizer_object=copy, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = chat_template
    return fast


def byte_level_bpe(
    chat_template: str | None = CHATML, *, trim_offsets: bool = True
) -> PreTrainedTokenizerFast:
    """GPT-2's kind; trim_offsets (GPT-2's default) hides the space of 'Ġgo' from its offsets."""
    return _wrap(_byte_level(trim_offsets), chat_template)


def metaspace_bpe(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Llama 2's kind: '▁' for spaces, one more put before each piece of text, byte fallback."""
    return _wrap(_metaspace(), chat_template)


def word_level(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a word of CORPUS, spaces in no token, [UNK] for every other word."""
    return _wrap(_word_level(), chat_template)
