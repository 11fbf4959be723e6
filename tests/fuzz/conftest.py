"""What the fuzz tests report: how many examples each property tried, on which commit."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator

import pytest

from experiments.runs import commit
from kvenv.models import LoadedModel
from kvenv.store import Recording, StoreWriter, record
from tests.fuzz.counted import FACTOR, TRIED
from tests.policies import kvenv_model, random_traces


@pytest.fixture(autouse=True)
def _count(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Put what a test tried into its report, which travels between processes."""
    TRIED.clear()
    yield
    record_property("tried", dict(TRIED))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts."""
    tried = {
        report.nodeid: dict(report.user_properties)["tried"]
        for reports in terminalreporter.stats.values()
        for report in reports
        if "tried" in dict(getattr(report, "user_properties", ()))
    }
    total = sum(counts.get("examples", 0) for counts in tried.values())
    terminalreporter.section(f"{total:,} examples (KVENV_FUZZ={FACTOR}), {datetime.date.today()}, commit {commit()}")
    for name, counts in sorted(tried.items()):
        told = ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items(), reverse=True))
        terminalreporter.write_line(f"{name.removeprefix('tests/fuzz/')}: {told or 'nothing drawn'}")


@pytest.fixture(scope="session")
def rank_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a small store."""
    directory, model = tmp_path_factory.mktemp("store"), kvenv_model()
    made = Recording.of(LoadedModel("random", model, None), traces="random", split="train", trace_length=40, interval=6)
    writer = StoreWriter(directory, made)
    for lengths in ([30, 40], [23]):
        writer.add(record(model, random_traces(lengths), 6))
    return str(directory)
