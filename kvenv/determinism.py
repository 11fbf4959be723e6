"""The same bits in every run: what PyTorch has to be told for that."""

from __future__ import annotations

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that says which buffers cuBLAS works in: with those of fixed size, results don't vary."""

FIXED = (":4096:8", ":16:8")
"""Its values for that."""


def set_deterministic(enabled: bool = True) -> None:
    """Let this process compute the same bits in every run on the same machine with the same number of threads.

    On a CPU it does anyway. On CUDA environments and rollouts do, too, but the gradients of learners add up atomically,
    in any order; then PyTorch takes slower ways that don't, and raises a RuntimeError where it has none. kvenv's own
    kernels add nothing atomically and stay.

    It holds for all that the process computes with PyTorch, models and environments that are there already included.

    Parameters
    ----------
    enabled : bool
        False goes back to PyTorch's defaults.

    Raises
    ------
    ValueError
        If cuBLAS is set up otherwise by ``CUBLAS_WORKSPACE_CONFIG``, or CUDA was used before without it.
    """
    if enabled:
        set_by_hand = os.environ.get(WORKSPACE)
        if set_by_hand is None and torch.cuda.is_initialized():
            raise ValueError(f"CUDA is in use already: call this before, or start Python with {WORKSPACE}={FIXED[0]}")
        if set_by_hand not in (None, *FIXED):
            raise ValueError(f"{WORKSPACE} {set_by_hand!r} lets cuBLAS vary: choose {' or '.join(FIXED)}")
        os.environ[WORKSPACE] = set_by_hand or FIXED[0]
    torch.use_deterministic_algorithms(enabled)
    # Whether cuDNN's attention is deterministic is documented nowhere; those that remain are, going forward.
    torch.backends.cuda.enable_cudnn_sdp(not enabled)
    torch.backends.cudnn.deterministic = enabled
