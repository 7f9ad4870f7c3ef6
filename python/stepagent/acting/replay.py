"""A step that is the same every time, replayed as a CUDA graph."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)


class Replay:
    """Runs a step that works on tensors which keep their place and asks the host nothing.

    The first call runs it as it is, the second captures it, and from then on it is replayed: one
    launch instead of some thousand. Where that cannot be, it is run as it is every time, which is
    logged with the reason.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm, self._possible = False, device.type == "cuda"

    def __call__(self, step: Callable[[], Tensor]) -> Tensor:
        """The result of ``step``, the same one in every call, able to run again after a failure."""
        if not self._possible:
            return step()
        try:
            if not self._warm:
                return self._first(step)
            if self._graph is None:
                self._graph, self._result = self._capture(step)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except RuntimeError as failure:
            self._possible = False
            _warn(str(failure).partition("\n")[0])
            return step()
        self._graph.replay()
        return self._result

    def _first(self, step: Callable[[], Tensor]) -> Tensor:
        """A warm-up: what is compiled or made at first use must be there before the capture.

        A capture that fails leaves torch in disorder, so what would make it fail fails here.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        try:
            result = step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        self._warm = True
        return result

    def _capture(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # The first context brings the stream back where a capture fails: the second then does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            result = step()
        return graph, result


@functools.cache
def _warn(reason: str) -> None:
    """Once."""
    _log.warning("decoding runs without a CUDA graph, and slower: %s", reason)


def can_replay(model: nn.Module) -> bool:
    """All of the model is on one CUDA device, in plain tensors: nothing is gathered or moved."""
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    return (
        len(devices) == 1
        and devices.pop().type == "cuda"
        and not any(hasattr(parameter, "device_mesh") for parameter in parameters)
    )
