"""Several sources in turn, for one agent that is to work on all of them."""

from __future__ import annotations

from collections.abc import Sequence

from kvenv.traces.source import Trace, TraceSource


class MixtureSource(TraceSource):
    """Trace i is trace i // n of source i % n, for n endless sources.

    Parameters
    ----------
    sources : sequence of TraceSource
        Endless sources of one split.
    """

    size = None

    def __init__(self, sources: Sequence[TraceSource]) -> None:
        super().__init__("+".join(source.name for source in sources), sources[0].split)
        self.sources = sources

    @property
    def max_prompt_length(self) -> int:
        """The longest prompt of any of the sources, in tokens."""
        return max(source.max_prompt_length for source in self.sources)

    def make(self, trace_id: int) -> Trace:
        """Return the trace of the source whose turn it is."""
        number, turn = divmod(trace_id, len(self.sources))
        return self.sources[turn][number]

    def continuations(self, trace_id: int, cut: int, count: int) -> list[Trace]:
        """Return continuations from the source whose turn it is."""
        number, turn = divmod(trace_id, len(self.sources))
        return self.sources[turn].continuations(number, cut, count)
