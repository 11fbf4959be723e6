"""The surface that all trace families share: made-up words, phrasings and filler, each split three ways.

Made-up words serve as names and as values, so that what is asked later and what never is look alike. A word is a first
syllable and a second one. The test words are all pairs from a block of 20 first and 20 second syllables, the validation
words from a block of 12 and 12, the training words all other pairs: training sees every syllable, but no test word.
A phrasing (a sentence with its placeholders open) or a filler sentence belongs to the split that a hash of it says.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass

from kvenv.traces.draw import Draw

SPLITS = ("train", "validation", "test")

# CV syllables without the English words among them (be, do, go, he, me, no, so, to), so that no token has two meanings.
FIRST = (
    "ba bi bo bu da de di du fa fe fi ga ge gi gu ka ke ki ko la le li lo "
    "ma mi mo mu na ne ni nu pa pe pi po ra re ri ro ta te ti tu va ve vi zo"
).split()
SECOND = (
    "ba be bi bo da de di do fa fe fi ga ge gi go ka ke ki ko la le li lo "
    "ma me mi mo na ne ni no pa pe pi po ra re ri ro ta te ti to va ve vi zu"
).split()
BLOCKS = {"test": (range(0, 20), range(0, 20)), "validation": (range(20, 32), range(20, 32))}
BLOCK = 16  # syllables of each kind that one trace draws its words from: equally crowded in every split
RECENT = 96  # a word is not drawn again until this many others were

ROLES = "miller baker smith tailor farmer sailor weaver doctor hunter painter singer porter".split()
PEOPLE = "anna boris clara edwin fritz greta julia karl oskar petra stefan ulrich".split()
PLACES = (
    "garden harbor kitchen market castle forest bridge school tower island stable cellar chapel palace tavern meadow "
    "orchard valley village desert"
).split()
COLOURS = "green white black yellow brown purple orange silver golden grey".split()

_ADJECTIVES = "old quiet small cold early bright heavy gentle broken distant".split()
_THINGS = "river mill horse wind window train stone lamp clock cloud boat road".split()
_VERBS = "runs waits stands turns drifts sleeps shines rests".split()
_RELATIONS = "near behind under beside past above".split()

_DIGITS = "0123456789"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
PUNCTUATION = list(".,:;?!'\"()-=+*/")

Phrasing = tuple[str, ...]


def split_of(text: str) -> str:
    """Return the split that a phrasing or filler sentence belongs to: 70% train, 10% validation, 20% test."""
    bucket = zlib.crc32(text.encode()) % 10
    return "train" if bucket < 7 else "validation" if bucket == 7 else "test"


def phrasings(*parts: str) -> dict[str, list[Phrasing]]:
    """Return every combination of the parts' alternatives, by split.

    Parameters
    ----------
    *parts : str
        Alternatives separated by ``|``; one may be empty. Words in braces are placeholders, capital ones are answers.

    Returns
    -------
    dict of str to list of tuple of str
        Split -> phrasings as tuples of words.
    """
    found: dict[str, list[Phrasing]] = {split: [] for split in SPLITS}
    for choice in itertools.product(*(part.split("|") for part in parts)):
        words = tuple(" ".join(choice).split())
        found[split_of(" ".join(words))].append(words)
    if not all(found.values()):
        raise ValueError(f"phrasings {parts!r} leave a split empty: add alternatives")
    return found


def _filler_sentences() -> dict[str, list[Phrasing]]:
    # Every fifth of the combinations: enough variety, and a list that is built in milliseconds.
    found: dict[str, list[Phrasing]] = {split: [] for split in SPLITS}
    everything = itertools.product(_ADJECTIVES, _THINGS, _VERBS, _RELATIONS, _THINGS)
    for adjective, thing, verb, relation, other in itertools.islice(everything, 0, None, 5):
        words = ("the", adjective, thing, verb, relation, "the", other, ".")
        found[split_of(" ".join(words))].append(words)
    return found


FILLER = _filler_sentences()


def split_of_word(word: str) -> str:
    """Return the split that a made-up word of four letters belongs to.

    Raises
    ------
    ValueError
        If it is not one of the made-up words.
    """
    if word[:2] not in FIRST or word[2:] not in SECOND:
        raise ValueError(
            f"{word!r} is not a made-up word: those are a first and a second syllable of kvenv.traces.words"
        )
    first, second = FIRST.index(word[:2]), SECOND.index(word[2:])
    for split, (firsts, seconds) in BLOCKS.items():
        if first in firsts and second in seconds:
            return split
    return "train"


@dataclass(frozen=True)
class Pool:
    """The made-up words of one trace: pairs of ``firsts`` and ``seconds`` that belong to its split."""

    split: str
    firsts: tuple[str, ...]
    seconds: tuple[str, ...]

    @classmethod
    def draw(cls, rng: Draw, split: str) -> Pool:
        """Draw the syllables of one trace."""
        size = range(len(FIRST)), range(len(SECOND))
        firsts, seconds = BLOCKS.get(split, size)
        return cls(
            split,
            tuple(FIRST[i] for i in rng.some(firsts, min(BLOCK, len(firsts)))),
            tuple(SECOND[i] for i in rng.some(seconds, min(BLOCK, len(seconds)))),
        )

    def fresh(self, rng: Draw, recent: dict[str, None]) -> str:
        """Draw a word that is not among ``recent`` and note it there (oldest first, at most ``RECENT`` are kept)."""
        while True:
            word = rng.pick(self.firsts) + rng.pick(self.seconds)
            if word not in recent and word in WORDS[self.split]:
                break
        recent[word] = None
        if len(recent) > min(RECENT, len(self.firsts) * len(self.seconds) // 2):
            del recent[next(iter(recent))]
        return word


WORDS: dict[str, frozenset[str]] = {
    split: frozenset(a + b for a in FIRST for b in SECOND if split_of_word(a + b) == split) for split in SPLITS
}


def vocabulary(sentences: list[dict[str, list[Phrasing]]]) -> list[str]:
    """Return the tokens of the bundled LLM's WordPiece tokenizer, specials excluded, in a fixed order.

    Parameters
    ----------
    sentences : list of dict
        Every table of phrasings that the families use.

    Returns
    -------
    list of str
        One token for every common word and syllable, then single characters so that any lower-case text has tokens.

    Raises
    ------
    ValueError
        If a common word would change how a made-up word is cut into its two syllables.
    """
    common = {*ROLES, *PEOPLE, *PLACES, *COLOURS}
    for table in [*sentences, FILLER]:
        common.update(word for options in table.values() for words in options for word in words if "{" not in word)
    common -= set(PUNCTUATION)
    for word in sorted(common):
        clash = word[:2] in FIRST and (len(word) == 2 or any(word[2:] == s[: len(word) - 2] for s in SECOND))
        if clash:
            raise ValueError(f"common word {word!r} begins made-up words: choose another one")
    tokens = [*PUNCTUATION, *_DIGITS, *_LETTERS, *FIRST, *(f"##{s}" for s in SECOND), *sorted(common)]
    tokens += [f"##{c}" for c in _DIGITS + _LETTERS]
    return list(dict.fromkeys(tokens))
