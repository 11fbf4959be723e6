"""What the fuzz tests share: a count of what each tried, and a small store."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvenv.models import LoadedModel
from kvenv.recording import Recording, record
from kvenv.store import StoreWriter
from tests.fuzz.counted import TRIED
from tests.policies import kvenv_model, random_traces


@pytest.fixture(autouse=True)
def _count(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Put what a test tried into its report, which travels between processes."""
    TRIED.clear()
    yield
    record_property("tried", dict(TRIED))


@pytest.fixture(scope="session")
def rank_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a small store."""
    directory, model = tmp_path_factory.mktemp("store"), kvenv_model()
    made = Recording.of(LoadedModel("random", model, None), traces="random", split="train", trace_length=40, interval=6)
    writer = StoreWriter(directory, made)
    for lengths in ([30, 40], [23]):
        writer.add(record(model, random_traces(lengths), 6))
    return str(directory)
