"""Models and tokenizers, as the commands load them."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ..data.actions import FORMATS, ActionFormat, action_format
from ..data.arguments import parse_arguments, with_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.attention import TreeAttention


# Of a model on the Hub; what else its folder has is not needed.
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a model's name on the Hub, ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def model_folder(name: str) -> Path:
    """The folder itself, or that of the model of this name on the Hub, fetched if missing."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with _loading(name):
        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES))


def import_from_here() -> None:
    """Let ``module:Class`` be found in the folder where the command runs, behind all else."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def parse_format(ctx: click.Context, param: click.Parameter, value: str) -> ActionFormat:
    """The action format of a name, or of a user's ``module:function``."""
    module, colon, function = value.partition(":")
    try:
        if not colon:
            return action_format(value)
        import_from_here()
        return action_format(getattr(importlib.import_module(module), function))
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise click.BadParameter(
            f"{value!r} is neither {', '.join(FORMATS)} nor your own module:function: {error}"
        ) from error


def _parse_arguments(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> dict[str, Any] | None:
    try:
        return parse_arguments(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


template_option = click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    callback=_parse_arguments,
    help="Arguments for the chat template, as '{\"enable_thinking\": false}'.  [default: those "
    "that a model was trained with here]",
)


def load_model(
    path: str | Path,
    device: str | None = None,
    attn_implementation: TreeAttention | None = None,
    dtype: torch.dtype | str = "auto",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer; None: the attention that transformers chooses.

    Args:
        dtype: of the weights; "auto": the checkpoint's.
        chat_template_kwargs: as `load_tokenizer` takes them.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path, chat_template_kwargs)
    with _loading(path):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,
            device_map=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
    return model, tokenizer


def load_tokenizer(
    path: str | Path, chat_template_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer, which must know how to write a chat.

    Args:
        chat_template_kwargs: a run's, which it carries beside those it was saved with.
    """
    from transformers import AutoTokenizer

    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {str(path)!r} must have a chat template, it has none")
    return with_arguments(cast("PreTrainedTokenizerBase", tokenizer), chat_template_kwargs)


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
