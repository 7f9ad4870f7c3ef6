"""Bases that bitsandbytes has quantised, with LoRA: exact in values and gradients, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_heads import gradients
from test_ranks import trajectories
from test_trainer import cycles_of
from tiny_models import babyai_tokenizer, random_trunks, separate_logprobs, tiny_agent, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stepagent.learning.config import StepAgentConfig
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.models import check_tree_support, score_trees
from stepagent.trees.tree import pack_step_pairs

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*inputs will be cast"),
]
DATA = random_trunks(np.random.default_rng(0))
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"load_in_8bit": True, "llm_int8_threshold": 0.0}


SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def quantised(folder: Path, make: Any = tiny_model, **kind: Any) -> Any:
    make("llama", **SHAPE).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**kind),
        dtype=torch.float32,
        device_map="cpu",
    )


def adapted(model: Any) -> PeftModel:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(1)
    lora.init_lora_weights = False
    return get_peft_model(model, lora)


@pytest.mark.parametrize("evaluated", [False, True], ids=["at once", "after an evaluation"])
@pytest.mark.parametrize("kind", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_a_quantised_base_is_exact_against_separate_sequences(kind, evaluated, tmp_path):
    """Also in gradients, and after a forward without them: bitsandbytes alone would cut them."""
    model = adapted(quantised(tmp_path, **kind))
    if evaluated:
        with torch.no_grad():
            score_trees(model.eval(), pack_step_pairs(*DATA))
    model.train()
    logps, separate = score_trees(model, pack_step_pairs(*DATA)), separate_logprobs(model, *DATA)
    torch.testing.assert_close(logps, separate, rtol=0, atol=1e-4)
    fast, slow = gradients(model, logps), gradients(model, separate)
    assert len(fast) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert slow.norm() > 1
    assert (fast - slow).norm() < 1e-4 * slow.norm()


def test_a_base_whose_rows_depend_on_each_other_is_refused_by_name(tmp_path):
    model = quantised(tmp_path, load_in_8bit=True)
    with pytest.raises(ValueError, match=r"llm_int8_threshold=6; load it with .*threshold=0\.0\)$"):
        check_tree_support(model)


def test_a_base_that_lets_no_gradient_through_any_more_is_refused(tmp_path):
    base = quantised(tmp_path, **FOUR)
    with torch.no_grad():
        base.eval()(torch.arange(5)[None])
    states = [getattr(p, "quant_state", None) for p in base.parameters()]
    packed = [state for state in states if getattr(state, "packing_format_for_cpu", False)]
    if not packed:
        pytest.skip("bitsandbytes packs layers on CPUs with bfloat16 products only")
    score_trees(base, pack_step_pairs(*DATA))  # log-probs are what they were
    with pytest.raises(ValueError, match="must not have run in evaluation mode before it is"):
        check_tree_support(adapted(base))


def test_an_adapter_on_four_bits_learns_against_its_own_base(tmp_path):
    """One quantised copy in memory: at first both are one policy, then not."""
    base = quantised(tmp_path / "base", tiny_agent, **FOUR)
    options: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    options |= {"use_cpu": True, "cycles": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path)}
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    args = StepAgentConfig(**options)
    made = StepAgentTrainer(
        base, args, trajectories(), babyai_tokenizer(), ref_model=base, peft_config=lora
    )
    made.train()
    margins = [cycle["reward_margin"] for cycle in cycles_of(made)]
    assert abs(margins[0]) < 1e-4
    assert margins[1] > 1
    assert all(bool(p.any()) for n, p in made.model.named_parameters() if "lora_B" in n)
