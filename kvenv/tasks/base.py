"""What a task is: examples to be answered under a budget, or traces to be scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from kvenv.traces.source import TraceSource
from kvenv.traces.words import SPLITS

Score = Callable[[str, tuple[str, ...]], float]
"""From what was generated and what was expected to a score between 0 and 1."""

E = TypeVar("E")


@dataclass(frozen=True)
class Question:
    """A prompt to be continued freely.

    Attributes
    ----------
    name : str
        Where it comes from, e.g. ``"ruler/vt/17"``.
    context : tuple of int
        Token ids of what comes first: what a question that is held out doesn't belong to.
    question : tuple of int
        Token ids of the rest of the prompt.
    references : tuple of str
        Right answers, as the task's score reads them.
    max_new_tokens : int
        Most tokens to be generated.
    """

    name: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Choice:
    """A prompt with continuations of which the likeliest is chosen.

    Attributes
    ----------
    name, context, question
        As in :class:`Question`.
    options : tuple of tuple of int
        Token ids of each continuation.
    answer : int
        Which of them is right.
    lengths : tuple of int
        What the log-likelihoods are divided by before the likeliest is chosen: ones for plain accuracy, characters
        of the option's text for the normalised one.
    """

    name: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int
    lengths: tuple[int, ...]


class Examples(Sequence[E], Generic[E]):
    """Examples that are made when they are asked for.

    Parameters
    ----------
    count : int or callable
        How many there are; a function where that is known only once the data are read.
    make : callable
        Makes the i-th; the same one whenever it is asked.
    """

    def __init__(self, count: int | Callable[[], int], make: Callable[[int], E]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        if callable(self._count):
            self._count = self._count()
        return self._count

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[E]: ...
    def __getitem__(self, index: int | slice) -> E | Sequence[E]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} does not exist: there are 0 to {len(self) - 1}")
        return self._make(index)


@dataclass(frozen=True)
class _Task:
    """One line of a benchmark.

    Attributes
    ----------
    name : str
        What rows and tables call it, e.g. ``"ruler/vt"``.
    schedule : str
        How the paper that it is taken from evicts: ``"prefill"``, once behind the prompt, or ``"periodic"``.
    held_out : bool
        Whether the paper shows the question only after the one eviction.
    note : str
        What a reader of its scores must know, e.g. that it stands in for another one.
    missing : str
        Data or package without which it can't be run, if it isn't there.
    """

    name: str
    schedule: str
    held_out: bool = field(default=False, kw_only=True)
    note: str = field(default="", kw_only=True)
    missing: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class QuestionTask(_Task):
    """Answers are generated and scored by their text."""

    examples: Sequence[Question]
    score: Score


@dataclass(frozen=True)
class ChoiceTask(_Task):
    """The likeliest option is the answer."""

    examples: Sequence[Choice]


@dataclass(frozen=True)
class TraceTask(_Task):
    """Losses of teacher-forced traces.

    Attributes
    ----------
    entropy : bool
        Whether the losses are split by the tokens' entropy in the full cache.
    """

    source: TraceSource
    entropy: bool = False


Task = QuestionTask | ChoiceTask | TraceTask
"""What a benchmark consists of."""


@dataclass(frozen=True)
class TaskSetting:
    """What a benchmark is made for.

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The LLM's.
    length : int
        Most tokens of a prompt together with what is generated; of a trace.
    num_examples : int
        Most examples of each task.
    split : str
        ``"train"``, ``"validation"`` or ``"test"``, where a task has splits or makes its own examples.
    data : Path or None
        Directory of files that are read instead of what the ``datasets`` package would download.
    chat : bool
        Whether prompts are put into the tokenizer's chat template, if it has one.
    schedule : str or None
        How is evicted, if not as the tasks' papers do: traces need a prompt under ``"prefill"``.

    Raises
    ------
    ValueError
        If there is no tokenizer, a number is impossible or the split unknown.
    """

    tokenizer: Any
    length: int = 4096
    num_examples: int = 200
    split: str = "test"
    data: Path | None = None
    chat: bool = True
    schedule: str | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise ValueError("tasks are text and need a tokenizer, and this model has none: register it with one")
        if self.length < 2:
            raise ValueError(f"length={self.length} is too short: choose 2 or more")
        if self.num_examples < 1:
            raise ValueError(f"num_examples={self.num_examples} is too few: choose 1 or more")
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}: known are {', '.join(SPLITS)}")


Builder = Callable[[TaskSetting], Sequence[Task]]
"""Makes the tasks of a benchmark."""
