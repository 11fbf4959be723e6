"""What all tests share: one thread per worker, hypothesis profiles, the models."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported, here and in the commands that tests start: workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel

from tests.fuzz.counted import print_counts
from tests.models import ARCHITECTURES, random_model

torch.set_num_threads(1)

# CI always tries the same examples: a red build means that the change broke something.
settings.register_profile("default", deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _one_thread_and_no_leaked_settings() -> Iterator[None]:
    """Fail the test that leaves torch with another default dtype or thread count to its successors."""
    yield
    assert torch.get_default_dtype() is torch.float32, "the test changed torch's default dtype"
    assert torch.get_num_threads() == 1, "the test changed torch's number of threads"


@pytest.fixture(params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random float64 model of each supported architecture in turn."""
    return random_model(request.param)


@pytest.fixture(scope="session")
def tiny_model() -> PreTrainedModel:
    """The bundled LLM."""
    from kvenv.models import load_model

    return load_model("tiny")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the fuzz tests tried."""
    print_counts(terminalreporter)
