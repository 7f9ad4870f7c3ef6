"""A step that is the same every time, replayed as a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)


class Replayed:
    """``step``, which works on tensors that keep their place and asks the host nothing.

    The first call runs it as it is, the second captures it, and from then on it is replayed: one
    launch instead of some thousand. Where that cannot be, it is run as it is every time, which is
    logged once with the reason.

    :param step: must be able to run again after it has failed half-way.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        self._step, self._device = step, device
        self._run = self._first

    def __call__(self) -> Tensor:
        return self._run()

    def _first(self) -> Tensor:
        """Also the warm-up: what is compiled or made at first use is there before the capture."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a capture that fails leaves torch in disorder
        try:
            result = self._step()
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except RuntimeError as failure:
            self._give_up(failure)
        else:
            self._run = self._capture
            return result
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return self._step()

    def _capture(self) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        try:
            # The first brings the stream back where a capture fails: the second then does not.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(
                    graph,
                    stream=torch.cuda.Stream(self._device),
                    capture_error_mode="thread_local",
                ),
            ):
                result = self._step()
        except RuntimeError as failure:
            self._give_up(failure)
            return self._step()

        def replay() -> Tensor:
            graph.replay()
            return result

        self._run = replay
        return replay()

    def _give_up(self, failure: RuntimeError) -> None:
        self._run = self._step
        _warn(str(failure).partition("\n")[0])


_warned: set[str] = set()


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
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
