"""RULER's 13 tasks, generated for any tokenizer and length (Hsieh et al., COLM 2024, arXiv 2404.06654).

Templates, constants and scores are those of NVIDIA/RULER (Apache-2.0) as of 2024, which the published results are of:
with "assgined" and without line breaks around the assignments of variable tracking, and without a space in front of the
one-shot answer of common words. RULER's later versions differ in these. A prompt with what is generated fills the
length without exceeding it. What comes before the question, one-shot examples included, is the context that a held-out
question doesn't belong to.

What is different:

- Random numbers are numpy's, seeded by task, split and example. The tasks keep their distributions, not their samples.
- Prompts fill the length to about one in a hundred; RULER takes steps of 25 lines, 500 words or 10 documents. Its
  frequent words exceed the length by the answer; ours don't.
- RULER never ends, or never fits, where a length is too short. Here that is an error.
- Sentences of essays end at ``.``, ``!`` or ``?`` and a space, where RULER asks nltk. Essays that are too short for a
  length begin again, as in RULER's later versions. A needle at their beginning or end has no space on its outer side.
- Keys of one prompt are all different, as are its variables and coded words; RULER lets keys recur by chance.
- The example in front of variable tracking has 10 lines of noise, RULER's number for usual tokenizers, and is drawn
  anew for each prompt, value and places included; RULER draws only its names anew.
- Frequent words come from at least 6 coded words and are at least 74, or which are the top three would not be defined.
- Questions of SQuAD and HotpotQA are dealt to the splits in turn, where RULER asks the first ones. Documents are added
  by characters, so that prompts are equally long.
- RULER replaces control characters in what was generated before it looks for the answers, none of which has any.

Essays, SQuAD and HotpotQA are not generated. They are read from the directory of the data, under the names that RULER's
scripts give them; SQuAD and HotpotQA can come from the ``datasets`` package.
"""

from __future__ import annotations

from kvenv.tasks.base import Examples, QuestionTask, TaskSetting
from kvenv.tasks.ruler.documents import HOTPOTQA, SQUAD, Documents, hotpotqa, squad
from kvenv.tasks.ruler.needles import Essays, Needles
from kvenv.tasks.ruler.recipe import Maker, Recipe
from kvenv.tasks.ruler.variables import VariableTracking
from kvenv.tasks.ruler.words import CommonWords, FrequentWords

NEEDLES = {
    "niah_single_1": ("noise", "word", "number", 1, 1, 1),
    "niah_single_2": ("essay", "word", "number", 1, 1, 1),
    "niah_single_3": ("essay", "word", "uuid", 1, 1, 1),
    "niah_multikey_1": ("essay", "word", "number", 4, 1, 1),
    "niah_multikey_2": ("needle", "word", "number", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuid", "uuid", 1, 1, 1),
    "niah_multivalue": ("essay", "word", "number", 1, 4, 1),
    "niah_multiquery": ("essay", "word", "number", 4, 1, 4),
}
"""Haystack, kind of keys, kind of values; how many keys, values of each, keys asked for."""


def build(setting: TaskSetting) -> list[QuestionTask]:
    """Return RULER's tasks, in its order.

    One whose data are missing, or whose prompts don't fit into the length, raises when its questions are asked for.
    """
    essays = Essays(setting.data)
    recipes: dict[str, Recipe] = {name: Needles(*kinds, essays) for name, kinds in NEEDLES.items()}
    recipes |= {
        "vt": VariableTracking(),
        "cwe": CommonWords(setting.length),
        "fwe": FrequentWords(setting.length),
        "qa_1": Documents(SQUAD, squad, setting.data, setting.split),
        "qa_2": Documents(HOTPOTQA, hotpotqa, setting.data, setting.split),
    }
    return [_task(f"ruler/{name}", recipe, setting) for name, recipe in recipes.items()]


def _task(name: str, recipe: Recipe, setting: TaskSetting) -> QuestionTask:
    """Return a task whose questions are made when they are asked for."""
    questions = Examples(lambda: recipe.count(setting.num_examples), Maker(name, recipe, setting))
    return QuestionTask(name, "prefill", questions, recipe.score, missing=recipe.missing)
