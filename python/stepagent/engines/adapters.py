"""The policy in training, on an engine that acts with it: its LoRA adapter, handed over each cycle.

Every hand-over has a name that was never used before: vLLM's prefix cache knows an adapter by its
name, and would go on with what it cached under other weights (vllm-project/vllm#42125).
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..data.trunk import Trunk
from .base import Engine, EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from peft import LoraConfig

    from ..data.branch import Branch

T = TypeVar("T")

# Options with which an adapter still is what engines serve: of some linear layers, one rank and one
# scale, a product of two matrices beside weights that are as they were.
_SERVED_OPTIONS = {
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "peft_version", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision", "runtime_config"),
}
# Of LoRA's `init_lora_weights`; the others change the base weights.
INITS_BESIDE_BASE = (True, False, "gaussian", "eva", "orthogonal")

_ANOTHER_POLICY = 0.5  # nats a token; ten times what bfloat16 was seen to do to coarse logits


def check_adapter(policy: nn.Module) -> None:
    """Refuse a policy that an engine would not act as.

    Raises:
        ValueError: unless all that is trained is one LoRA adapter, of a kind that engines serve.
    """
    what = "engine= acts with the LoRA adapter that is trained"
    configs = getattr(policy, "peft_config", {}) if hasattr(policy, "get_base_model") else {}
    if not configs:
        raise ValueError(
            f"{what}, but {type(policy).__name__} has none: give a peft_config, as "
            "LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear'), --lora-rank on the "
            "command line. Full weights are not sent to an engine"
        )
    if len(configs) > 1:
        raise ValueError(f"{what}, but there are {len(configs)}: {list(configs)}")
    (config,) = configs.values()
    if config.peft_type != "LORA":
        raise ValueError(f"{what}, but this one is of type {config.peft_type}")
    for name, value in _options(config).items():
        raise ValueError(f"{what}, and engines serve plain LoRA, without {name}={value!r}")
    frozen = [n for n, p in policy.named_parameters() if "lora_" in n and not p.requires_grad]
    if frozen:
        raise ValueError(f"{what}, but of this one {frozen[0]} is frozen")


def _options(config: LoraConfig) -> dict[str, Any]:
    """Those that make the adapter something else than engines serve."""
    plain = type(config)()
    changed = {
        name: value
        for name, value in vars(config).items()
        if name not in _SERVED_OPTIONS and value != getattr(plain, name, None)
    }
    if config.init_lora_weights not in INITS_BESIDE_BASE:
        changed["init_lora_weights"] = config.init_lora_weights
    return changed


class PolicyOnEngine:
    """What the processes of a run know of the engine: the adapter that is loaded there.

    Args:
        engine: all processes use it; the first one loads adapters.
        folder: where adapters are saved for the engine to read, one at a time.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.actor = engine  # with the adapter of the last hand-over
        self._engine = engine
        self._folder = folder.resolve()  # a server has a working directory of its own
        self._name: str | None = None

    def publish(self, policy: Any, cycle: int, act: Callable[[Engine], T]) -> T:
        """Have the engine act as ``policy`` does now; called by all processes, which wait.

        Args:
            policy: a PEFT model with one LoRA adapter, as it is or under FSDP2.
            act: asked of the first process, with the engine as it now acts.

        Returns:
            What ``act`` returned, in every process.

        Raises:
            EngineError: where the engine cannot be reached, refuses, or fails in ``act``.
            OSError: where the adapter cannot be saved. Both are raised in every process.
        """
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        tensors = get_model_state_dict(policy, options=options)
        outcome: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                name = self._hand_over(policy, tensors, cycle)
                outcome = [(name, act(self._engine.with_adapter(name)))]
            except (EngineError, OSError) as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        name, result = outcome[0]
        self.actor = self._engine.with_adapter(name)
        return result  # type: ignore[no-any-return]

    def _hand_over(self, policy: Any, tensors: Mapping[str, Any], cycle: int) -> str:
        self.withdraw()  # first: a server has room for one
        name = f"stepagent-{uuid.uuid4().hex[:12]}-cycle-{cycle}"
        (adapter,) = policy.peft_config
        policy.save_pretrained(self._folder / name, state_dict=tensors, save_embedding_layers=False)
        # PEFT's place for any other than its default.
        saved = self._folder / name / ("" if adapter == "default" else adapter)
        self._engine.load_adapter(name, saved)
        self._name = name
        return name

    def withdraw(self) -> None:
        """Unload what this process has loaded, and delete it; a warning where that fails."""
        if self._name is None:
            return
        try:
            self._engine.unload_adapter(self._name)
        except EngineError as error:
            warnings.warn(
                f"the engine may keep {self._name}, which is used no more: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        shutil.rmtree(self._folder / self._name, ignore_errors=True)
        self._name = None


def first_state(trunks: Sequence[Trunk]) -> Trunk:
    """The shortest state there is, with its action: where every policy can act."""
    trunk = min(trunks, key=lambda trunk: int(trunk.action_spans[0, 0]))
    return Trunk(trunk.input_ids[: trunk.action_spans[0, 1]], trunk.action_spans[:1])


def logp_gap(branches: Sequence[Branch], logps_N: NDArray[np.float32]) -> float:
    """Mean |Δ log π| of the tokens of ``branches``, the engine's against the policy's own.

    Args:
        branches: what an engine did at one state.
        logps_N: (N,) fp32 of the same tokens under the policy.

    Raises:
        EngineError: where it is so large that the engine acts as another policy.
    """
    engines_N = np.concatenate([branch.logps for branch in branches])
    gap = float(np.abs(engines_N - logps_N).mean())
    if not gap <= _ANOTHER_POLICY:
        raise EngineError(
            f"the engine acts as another policy: its log-probs differ from those here by {gap:.3g} "
            "nats a token; it must serve the model whose adapter is trained, with "
            "`--logprobs-mode raw_logprobs`, vLLM's default"
        )
    return gap
