"""Stand-ins for the benchmarks, for LLMs that know the trace families and no other text: the bundled one.

They have the benchmarks' types and schedules, so that what runs a benchmark runs its stand-in, with scores that mean
something:

- ``ruler``: the last answer of a trace of ``recall`` or ``tracking`` is generated; the sentence that asks for it is the
  question, all before it the context.
- ``zeroshot``: the last answer of a ``dialogue`` is chosen among four values that the trace told.
- ``reasoning``: the last answer of a trace of ``reasoning`` is generated under periodic eviction.
- ``perplexity``: traces of ``dialogue`` and ``recall``, the first half of each the prompt.
- ``entropy``: traces of all four families.
"""

from __future__ import annotations

from typing import Any

from kvenv.tasks.base import (
    Builder,
    Choice,
    ChoiceTask,
    Examples,
    Question,
    QuestionTask,
    Score,
    TaskSetting,
    TraceTask,
)
from kvenv.tasks.scoring import string_match_all
from kvenv.traces import FAMILIES
from kvenv.traces.draw import Draw
from kvenv.traces.family import FamilySource
from kvenv.traces.words import WORDS

OPTIONS = 4  # of a choice
MORE = 2  # tokens generated beyond an answer's own
SAMPLE = "Ask 7 Bakers, or 25 of them: is 12.5 > 3?"


def spells_text(tokenizer: Any) -> bool:
    """Return whether a tokenizer gives plain text back, but for its spaces: digits, capitals and signs."""
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return "".join(text.split()) == "".join(SAMPLE.split())


def first_word(prediction: str, references: tuple[str, ...]) -> float:
    """Return 1 if the first word of a prediction is a reference, else 0."""
    return float(prediction.split()[:1] == [references[0]])


def _ruler(setting: TaskSetting) -> list[QuestionTask]:
    return [_questions("ruler", family, "prefill", string_match_all, setting) for family in ("recall", "tracking")]


def _reasoning(setting: TaskSetting) -> list[QuestionTask]:
    return [_questions("reasoning", "reasoning", "periodic", first_word, setting)]


def _zeroshot(setting: TaskSetting) -> list[ChoiceTask]:
    source = _source("dialogue", "prefill", setting)
    choices = Examples(setting.num_examples, lambda i: _choice(source, i))
    return [ChoiceTask("zeroshot/dialogue", "prefill", choices, note=_note("zeroshot", "dialogue"))]


def _perplexity(setting: TaskSetting) -> list[TraceTask]:
    return [_traces("perplexity", family, "prefill", setting) for family in ("dialogue", "recall")]


def _entropy(setting: TaskSetting) -> list[TraceTask]:
    return [_traces("entropy", family, "periodic", setting, entropy=True) for family in FAMILIES]


BUILDERS: dict[str, Builder] = {
    "ruler": _ruler,
    "perplexity": _perplexity,
    "reasoning": _reasoning,
    "zeroshot": _zeroshot,
    "entropy": _entropy,
}
"""What makes the stand-ins of a benchmark, by its name."""


def _note(benchmark: str, family: str) -> str:
    return f"a stand-in: traces of {family} instead of {benchmark}'s own text, which this tokenizer can't spell"


def _source(family: str, schedule: str, setting: TaskSetting) -> FamilySource:
    return FamilySource(
        FAMILIES[family],
        split=setting.split,
        tokenizer=setting.tokenizer,
        trace_length=setting.length,
        schedule=schedule,
    )


def _traces(benchmark: str, family: str, schedule: str, setting: TaskSetting, entropy: bool = False) -> TraceTask:
    schedule = setting.schedule or schedule
    source, note = _source(family, schedule, setting), _note(benchmark, family)
    return TraceTask(f"{benchmark}/{family}", schedule, source, entropy, note=note)


def _questions(benchmark: str, family: str, schedule: str, score: Score, setting: TaskSetting) -> QuestionTask:
    source, name = _source(family, schedule, setting), f"{benchmark}/{family}"

    def make(i: int) -> Question:
        tokens = source[i].tokens.tolist()
        asked, begin, end = _last_question(source, i)
        answer = setting.tokenizer.decode(tokens[begin:end]).strip()
        context, question = tuple(tokens[:asked]), tuple(tokens[asked:begin])
        return Question(f"{name}/{i}", context, question, (answer,), end - begin + MORE)

    return QuestionTask(name, schedule, Examples(setting.num_examples, make), score, note=_note(benchmark, family))


def _last_question(source: FamilySource, trace_id: int) -> tuple[int, int, int]:
    """Return where the sentence with the last answer begins, and the answer's span."""
    spans = [span for span in source[trace_id].answers if span[1] + MORE <= source.trace_length]
    if not spans:
        raise ValueError(f"length={source.trace_length} is too short for a question of {source.name}: choose 512")
    begin, end = spans[-1]
    asked = max(start for _, start, _ in source.sentences(trace_id) if start < begin)
    return asked, begin, end


def _choice(source: FamilySource, trace_id: int) -> Choice:
    """Return the last answer of a dialogue, to be chosen among values that were told before."""
    name, tokens, encoder = f"zeroshot/{source.name}/{trace_id}", source[trace_id].tokens.tolist(), source.encoder
    asked, begin, end = _last_question(source, trace_id)
    told = [sentence.words for sentence, _, stop in source.sentences(trace_id) if stop <= asked]
    values = {word: encoder.word(word) for words in told for word in words if word in WORDS[source.split]}
    right = tokens[begin:end]
    others = [ids for _, ids in sorted(values.items()) if ids != right]
    if len(others) < OPTIONS - 1:
        raise ValueError(f"length={source.trace_length} is too short for a choice of {source.name}: choose 512")
    draw = Draw(name, source.split)
    options = draw.some([right, *draw.some(others, OPTIONS - 1)], OPTIONS)
    return Choice(
        name,
        tuple(tokens[:asked]),
        tuple(tokens[asked:begin]),
        tuple(tuple(ids) for ids in options),
        options.index(right),
        (1,) * OPTIONS,
    )
