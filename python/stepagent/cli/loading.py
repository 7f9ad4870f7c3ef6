"""Models and tokenizers, as the commands load them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: str | Path,
    device: str | None = None,
    attn_implementation: str | None = None,
    dtype: torch.dtype | str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer; None: the attention that transformers chooses.

    Args:
        dtype: of the weights; "auto": the checkpoint's.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    with _loading(path):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,
            device_map=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
    return model, tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer, which must know how to write a chat."""
    from transformers import AutoTokenizer

    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {str(path)!r} must have a chat template, it has none")
    return cast("PreTrainedTokenizerBase", tokenizer)


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # which may not name what was asked for
        raise ValueError(
            f"{str(path)!r} must be a folder with a model and its tokenizer, "
            f"or a name on the Hugging Face Hub: {error}"
        ) from error


def device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # that of accelerate launch and torchrun
