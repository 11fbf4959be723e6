"""Calls captured in CUDA graphs: the device gets all their kernels at once, and waits for no Python between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

Call = Callable[..., dict[str, Tensor]]

WARM_UP_CALLS = 3
"""Calls before a capture, in which libraries make what they make once: handles, workspaces, choices of kernels."""


class Cuda:
    """How calls are captured on a GPU; in tests a stand-in for it runs anywhere."""

    device_type = "cuda"

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """Let what is called within run on a side stream, and wait for it at the end."""
        with torch.cuda.device(device):
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(main)
            try:
                with torch.cuda.stream(side):
                    yield
            finally:
                torch.cuda.synchronize()

    def capture(
        self, call: Callable[[], dict[str, Tensor]], device: torch.device
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """Capture a call; return what replays it, and the tensors in which each replay leaves the results.

        Other threads may use the device meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        # On a stream of its own, cuBLAS takes its workspace from the graph's memory, and nobody else frees it.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
        ):
            outputs = call()
        return graph.replay, outputs


backend = Cuda()


@dataclass(frozen=True)
class Recording:
    """A captured call.

    Attributes
    ----------
    inputs : tuple of Tensor
        Where a replay reads its arguments.
    replay : callable
        Makes the call.
    outputs : dict of Tensor
        Where it leaves the results.
    """

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    outputs: dict[str, Tensor]


class Graphs:
    """Captures calls when they are first made, and replays them from then on.

    A replay runs the same kernels on the same addresses, and no Python. So a call's shapes are fixed, what it reads and
    writes beside its arguments are tensors that stay where they are, and it asks the device nothing.

    Parameters
    ----------
    device : torch.device
        Where the calls run.
    state : sequence of Tensor
        All tensors that they change.

    Attributes
    ----------
    warm_up_seconds, capture_seconds : float
        What the captures took so far.
    """

    def __init__(self, device: torch.device, state: Sequence[Tensor] = ()) -> None:
        self.warm_up_seconds = self.capture_seconds = 0.0
        self._device, self._state = device, tuple(state)
        self._recordings: dict[tuple[object, ...], Recording] = {}

    def run(self, name: str, call: Call, *inputs: Tensor) -> dict[str, Tensor]:
        """Make a call.

        Parameters
        ----------
        name : str
            The call's: another call of that name on such inputs would replay the first.
        call : callable
            Maps the inputs to tensors by name.
        *inputs : Tensor
            Its arguments; other shapes or dtypes make another recording.

        Returns
        -------
        dict of Tensor
            Its results, in memory of their own.
        """
        signature = (name, *((x.shape, x.dtype) for x in inputs))
        recording = self._recordings.get(signature)
        if recording is None:
            recording = self._recordings[signature] = self._record(call, inputs)
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.replay()
        return {key: x.clone() for key, x in recording.outputs.items()}

    def _record(self, call: Call, inputs: tuple[Tensor, ...]) -> Recording:
        """Warm up and capture, and leave the state as it was."""
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), kept(self._state):
            mine = tuple(x.clone() for x in inputs)
            began = time.perf_counter()
            with backend.aside(self._device):
                for _ in range(WARM_UP_CALLS):
                    call(*mine)
            warm = time.perf_counter()
            replay, outputs = backend.capture(lambda: call(*mine), self._device)
        self.warm_up_seconds += warm - began
        self.capture_seconds += time.perf_counter() - warm
        return Recording(mine, replay, outputs)


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Take tensors back, at the end, to what they were, even if what is called within fails."""
    before = [x.clone() for x in tensors]
    try:
        yield
    finally:
        for x, was in zip(tensors, before, strict=True):
            x.copy_(was)


def refuse_what_cannot_be_captured(model: PreTrainedModel, periodic: bool) -> None:
    """Refuse steps that can't be captured.

    Parameters
    ----------
    model : PreTrainedModel
        What decodes.
    periodic : bool
        Whether every step decodes one window.

    Raises
    ------
    ValueError
        If steps differ in shape, or the model isn't on a CUDA device or reads back what it is fed.
    """
    if not periodic:
        raise ValueError(
            "cuda_graph=True needs steps of one shape, and those of schedule 'prefill' decode what is left of a trace: "
            "take schedule 'periodic' or cuda_graph=False"
        )
    if model.device.type != backend.device_type:
        raise ValueError(
            f"cuda_graph=True needs the model on a CUDA device, not on {str(model.device)!r}: take device='cuda' or "
            "cuda_graph=False"
        )
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        raise ValueError(
            f"cuda_graph=True needs a model that asks the device nothing, and {type(model).__name__} with rotary type "
            "'dynamic' looks at its positions: take cuda_graph=False"
        )
