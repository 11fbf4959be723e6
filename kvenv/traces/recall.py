"""Recall: signs told by several people, of whom the header trusts some; each trusted sign is asked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvenv.traces.draw import Draw
from kvenv.traces.family import Family, Sentence, State
from kvenv.traces.words import ROLES, Pool, phrasings

LIVE = (4, 8)  # below the first number nothing is asked, at the second nothing new is told by trusted people
SPEAKERS, TRUSTED = 6, 3
FILLER, DECOY, TELL = 0.22, 0.22, 0.28  # shares of the sentences; the rest are questions
CONFLICT = 0.35  # share of the decoys that contradict a trusted fact that can still be asked


class Fact(NamedTuple):
    """A trusted fact that was not asked yet."""

    name: str
    value: str
    number: int


@dataclass
class RecallState(State):
    """Who is trusted, who is not, and what can still be asked."""

    trusted: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    live: list[Fact] = field(default_factory=list)


class Recall(Family):
    """Multi-key needle with decoys: facts of untrusted people are never asked, the others at most once.

    Some decoys give another value to a name that a trusted person spoke of, so that to answer is to know whom to trust.
    """

    name = "recall"
    tables = {
        "header": phrasings(
            "|now|so|please", "trust|believe|hear|follow", "only|just", "{a} , {b} and {c}", "|today|here|always", "."
        ),
        "tell": phrasings(
            "|later|today|then",
            "{s}",
            "says|notes|writes|reports|claims",
            "|that",
            "the sign of {x} is {v}|{x} bears the sign {v}|{x} bears {v}|the sign of {x} was {v}",
            ".",
        ),
        "ask": phrasings(
            "|now|so|please",
            "tell us|spell|recall|tell|show",
            "the sign of {x}|which sign {x} bears|the true sign of {x}|the sign that {x} bears",
            "?|:",
            "{V} .",
        ),
    }

    def start(self, rng: Draw, split: str) -> RecallState:
        people = rng.some(ROLES, SPEAKERS)
        a, b, c = people[:TRUSTED]
        header = self.say("header", split, rng, a=a, b=b, c=c)
        return RecallState(Pool.draw(rng, split), header, trusted=(a, b, c), others=tuple(people[TRUSTED:]))

    def sentence(self, state: RecallState, rng: Draw) -> Sentence:
        split, live, chance = state.pool.split, state.live, rng.random()
        if chance < FILLER:
            return self.filler(split, rng)
        if chance < FILLER + DECOY:
            conflict = live and rng.random() < CONFLICT
            name = rng.pick(live).name if conflict else state.word(rng)
            source = rng.pick(state.others)
            return self.say("tell", split, rng, told=state.number(), s=source, x=name, v=state.word(rng))
        tell = chance < FILLER + DECOY + TELL
        if len(live) < LIVE[0] or (tell and len(live) < LIVE[1]):
            fact = Fact(state.word(rng), state.word(rng), state.number())
            live.append(fact)
            source = rng.pick(state.trusted)
            return self.say("tell", split, rng, told=fact.number, s=source, x=fact.name, v=fact.value)
        fact = rng.pick(live)
        live.remove(fact)
        return self.say("ask", split, rng, used=(fact.number,), x=fact.name, v=fact.value)
