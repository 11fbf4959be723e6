"""Tracking: variables are assigned, overwritten, copied and dropped; those that the header names are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvenv.traces.draw import Draw
from kvenv.traces.family import Family, Sentence, State
from kvenv.traces.words import Pool, phrasings

FOLLOWED, OTHERS = 5, 5  # variables that are asked, variables that never are
FILLER, ASK, SET, CHANGE, COPY = 0.20, 0.30, 0.30, 0.08, 0.08  # shares of the sentences; the rest drop a variable
OTHER = 0.45  # share of the plain assignments that go to variables that are never asked


class Held(NamedTuple):
    """What a variable holds, and the id of the fact that says so."""

    value: str
    number: int


@dataclass
class TrackingState(State):
    """The variables, and what they hold now."""

    followed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    held: dict[str, Held] = field(default_factory=dict)


class Tracking(Family):
    """The answer is always the latest value; an old one is stale, whatever attention it drew."""

    name = "tracking"
    tables = {
        "header": phrasings(
            "|now|so|please",
            "follow|watch|track|mind",
            "only|just",
            "{a} , {b} , {c} , {d} and {e}",
            "|today|here|always",
            ".",
        ),
        "set": phrasings(
            "|next|then|soon",
            "{x} is {v}|{x} becomes {v}|{x} turns to {v}|{x} holds {v}|turn {x} to {v}",
            "|again|here|today",
            ".",
        ),
        "change": phrasings(
            "|next|then|soon",
            "{x} goes|{x} shifts|{x} turns|shift {x}|turn {x}",
            "|again|here|today",
            "from {OLD} to {v} .",
        ),
        "copy": phrasings(
            "|next|then|soon", "{x} copies {y}|{x} repeats {y}", ",|:", "so it|which", "is|becomes|holds", "{V} ."
        ),
        "drop": phrasings(
            "|next|then|soon", "{x} is gone|{x} ends|drop {x}|forget {x}|{x} is empty", "|again|here|today", "."
        ),
        "ask": phrasings(
            "|and|so|please",
            "what is {x}|what does {x} hold|tell us {x}|tell {x}|show {x}",
            "|now|by now",
            "?|:",
            "{V} .",
        ),
    }

    def start(self, rng: Draw, split: str) -> TrackingState:
        pool = Pool.draw(rng, split)
        recent: dict[str, None] = {}
        names = tuple(pool.fresh(rng, recent) for _ in range(FOLLOWED + OTHERS))
        a, b, c, d, e = names[:FOLLOWED]
        header = self.say("header", split, rng, a=a, b=b, c=c, d=d, e=e)
        return TrackingState(pool, header, recent, followed=names[:FOLLOWED], others=names[FOLLOWED:])

    def word(self, state: TrackingState, rng: Draw) -> str:
        """Draw a value that is no variable's name."""
        while (word := state.word(rng)) in state.followed or word in state.others:
            pass
        return word

    def sentence(self, state: TrackingState, rng: Draw) -> Sentence:
        split, held, chance = state.pool.split, state.held, rng.random()
        known = [name for name in state.followed if name in held]
        if chance < FILLER:
            return self.filler(split, rng)
        if len(known) < 2:
            chance = FILLER + ASK  # too little to ask, change or copy: assign
        if chance < FILLER + ASK:
            name = rng.pick(known)
            return self.say("ask", split, rng, used=(held[name].number,), x=name, v=held[name].value)
        chance -= FILLER + ASK
        if chance < SET:
            return self._set(state, rng)
        if chance < SET + CHANGE:
            name, new = rng.pick(known), Held(self.word(state, rng), state.number())
            old, held[name] = held[name], new
            used = (old.number,)
            return self.say("change", split, rng, told=new.number, used=used, x=name, old=old.value, v=new.value)
        if chance < SET + CHANGE + COPY:
            source = rng.pick(known)
            name = rng.pick([other for other in state.followed if other != source])
            value, used = held[source].value, (held[source].number,)
            held[name] = Held(value, state.number())
            return self.say("copy", split, rng, told=held[name].number, used=used, x=name, y=source, v=value)
        name = rng.pick(known)
        del held[name]
        return self.say("drop", split, rng, x=name)

    def _set(self, state: TrackingState, rng: Draw) -> Sentence:
        name = rng.pick(state.others if rng.random() < OTHER else state.followed)
        new = state.held[name] = Held(self.word(state, rng), state.number())
        return self.say("set", state.pool.split, rng, told=new.number, x=name, v=new.value)
