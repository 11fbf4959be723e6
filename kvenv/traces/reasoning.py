"""Reasoning: steps that make a new result out of two earlier ones and use them up."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvenv.traces.draw import Draw
from kvenv.traces.family import Family, Sentence, State
from kvenv.traces.tracking import Held
from kvenv.traces.words import COLOURS, WORDS, Pool, phrasings

USED, OTHERS = 2, 2  # colours of stones that are used, colours that never are
LIVE = (4, 8)  # below the first number nothing is joined, at the second nothing new is given
FILLER, DECOY, GIVE, JOIN, CHECK = 0.20, 0.20, 0.22, 0.18, 0.17  # shares of the sentences; the rest drop a stone


@dataclass
class ReasoningState(State):
    """The colours in use, those that are not, and what every unused stone holds."""

    colours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    held: dict[str, Held] = field(default_factory=dict)


class Reasoning(Family):
    """Joining two stones gives one that holds the first half of one value and the second half of the other.

    What was joined is used up and never asked again; a check asks for a value and leaves it; stones of other colours
    than the header's are never used. Results stay within the split's words.
    """

    name = "reasoning"
    tables = {
        "header": phrasings(
            "|now|so|please",
            "use|pick|join|need",
            "only|just",
            "the|all",
            "{a} and {b} stones",
            "|today|here|always",
            ".",
        ),
        "give": phrasings(
            "|first|also|then",
            "the|this|that",
            "{c} stone {x}",
            "is|holds|carries|shows|means",
            "{v}",
            "|here|today",
            ".",
        ),
        "join": phrasings(
            "|first|also|then",
            "join|link|blend",
            "{x} with {y}|{x} and {y}",
            ":|,",
            "{z}",
            "is|holds|carries|shows|means",
            "{V} .",
        ),
        "check": phrasings(
            "|first|also|then", "check|what is|tell us|show|tell", "{x}|stone {x}", "|now|here|again", "? {V} ."
        ),
        "drop": phrasings("|first|also|then", "drop|crush|lose|break", "{x}|stone {x}", "|now|here|again", "."),
    }

    def start(self, rng: Draw, split: str) -> ReasoningState:
        colours = tuple(rng.some(COLOURS, USED + OTHERS))
        header = self.say("header", split, rng, a=colours[0], b=colours[1])
        return ReasoningState(Pool.draw(rng, split), header, colours=colours[:USED], others=colours[USED:])

    def sentence(self, state: ReasoningState, rng: Draw) -> Sentence:
        split, held, chance = state.pool.split, state.held, rng.random()
        if chance < FILLER:
            return self.filler(split, rng)
        chance -= FILLER
        if chance < DECOY:
            colour = rng.pick(state.others)
            return self.say("give", split, rng, told=state.number(), c=colour, x=state.word(rng), v=state.word(rng))
        chance -= DECOY
        if len(held) < LIVE[0] or (chance < GIVE and len(held) < LIVE[1]):
            name, new = state.word(rng), Held(state.word(rng), state.number())
            held[name] = new
            colour = rng.pick(state.colours)
            return self.say("give", split, rng, told=new.number, c=colour, x=name, v=new.value)
        chance -= GIVE
        if chance < JOIN and (pair := self._pair(state, rng)):
            return self._join(state, rng, *pair)
        name = rng.pick(list(held))
        if chance < JOIN + CHECK:
            return self.say("check", split, rng, used=(held[name].number,), x=name, v=held[name].value)
        del held[name]
        return self.say("drop", split, rng, x=name)

    def _pair(self, state: ReasoningState, rng: Draw) -> tuple[str, str] | None:
        words = WORDS[state.pool.split]
        pairs = [
            (a, b)
            for a, one in state.held.items()
            for b, two in state.held.items()
            if a != b and one.value[:2] + two.value[2:] in words
        ]
        return rng.pick(pairs) if pairs else None

    def _join(self, state: ReasoningState, rng: Draw, a: str, b: str) -> Sentence:
        one, two = state.held.pop(a), state.held.pop(b)
        name, new = state.word(rng), Held(one.value[:2] + two.value[2:], state.number())
        state.held[name] = new
        used = (one.number, two.number)
        return self.say("join", state.pool.split, rng, told=new.number, used=used, x=a, y=b, z=name, v=new.value)
