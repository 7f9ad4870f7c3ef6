"""bitsandbytes: what its layers do that neither a tree nor a gradient survives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def prepare_quantised(model: nn.Module) -> str | None:
    """See that gradients go through 4-bit layers below an adapter; the layers are left exact.

    Returns:
        Why the model's log-probs on a tree would be others than on separate sequences, if so.
    """
    layers = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes.")]
    thresholds = {float(getattr(getattr(m, "state", None), "threshold", 0.0)) for m in layers}
    if largest := max(thresholds, default=0.0):
        return (
            "its 8-bit layers round a row by the outliers of all rows beside it, "
            f"llm_int8_threshold={largest:g}; load it with "
            "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
        )
    adapted = hasattr(model, "peft_config")
    if adapted and any(parameter.requires_grad for parameter in model.parameters()):
        _keep_gradients(layers)
    return None


def _keep_gradients(layers: list[Any]) -> None:
    """A 4-bit layer on a CPU packs itself at the first forward without gradients, where the CPU has
    bfloat16 products; no gradient goes through what is packed, and nothing says so."""
    for layer in layers:
        weight_state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if getattr(weight_state, "packing_format_for_cpu", False):
            raise ValueError(
                "a model in 4 bits must not have run in evaluation mode before it is trained on a "
                "CPU: bitsandbytes has packed its layers, and gradients no longer go through "
                "them. Load it anew"
            )
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
