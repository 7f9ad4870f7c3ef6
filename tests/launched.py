"""The command line under ``accelerate launch``, with FSDP where there is no GPU.

accelerate takes FSDP for processes with GPUs alone; torch shards on CPUs as well. All else is
accelerate's own: its configuration, its groups, its checkpoints.
"""

from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

from stepagent.cli import main

_init = AcceleratorState.__init__


def _with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_fsdp
    main(prog_name="stepagent")
