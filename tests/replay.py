"""A stand-in for CUDA graphs on any device: records the operations of a call and makes them again, on the same tensors.

What a captured call must not do fails here as there: Python doesn't run again, a tensor that was replaced is still the
old one, and whatever needs the host can't be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.test_dispatch import Watch

GONE = "a tensor that the call reads is gone"


class Recorder(Watch):
    """Records the operations within, with the very tensors that they read and write.

    Those of others are held weakly: a graph keeps alive only what was made while it was captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, list[Tensor]]] = []
        self._own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation, and remember it unless all it does is look at a tensor in another way."""
        arguments = tree_map_only(Tensor, self._held, (args, kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.offences:
            raise RuntimeError(f"operation not permitted when stream is capturing: {', '.join(self.offences)}")
        aliases = [returned.alias_info for returned in func._schema.returns]
        writes = any(alias is not None and alias.is_write for alias in aliases)
        made = [] if writes else [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._own |= {id(x): x for x in made}
        if writes or not any(aliases):
            self.operations.append((func, arguments, made))
        return result

    def spoil(self) -> None:
        """Leave nothing of what was computed while recording: a capture computes nothing."""
        for *_, made in self.operations:
            for x in made:
                x.fill_(torch.nan if x.is_floating_point() else 1)

    def replay(self) -> None:
        """Make all operations again; a result is copied to where the first one was."""
        for func, arguments, made in self.operations:
            args, kwargs = tree_map_only(ref, _alive, arguments)
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for mine, x in zip(made, again, strict=bool(made)):
                assert mine.shape == x.shape, f"{func} has a result whose shape depends on data"
                mine.copy_(x)

    def _held(self, x: Tensor) -> Tensor | ref[Tensor]:
        return x if id(x) in self._own else ref(x)


def _alive(held: ref[Tensor]) -> Tensor:
    """Return a tensor that is held weakly."""
    x = held()
    if x is None:
        raise ReferenceError(GONE)
    return x


class Replay:
    """What :class:`kvenv.graphs.Cuda` is, on the CPU."""

    device_type = "cpu"

    def aside(self, device: torch.device) -> AbstractContextManager[None]:
        """Nothing has a side here."""
        return nullcontext()

    def capture(
        self, call: Callable[[], dict[str, Tensor]], device: torch.device
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """Record a call."""
        with Recorder() as recorder:
            outputs = call()
        recorder.spoil()
        return recorder.replay, outputs
