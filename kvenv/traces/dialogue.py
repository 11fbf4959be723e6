"""Dialogue: people tell what somebody wants for a place; questions come back to it until the place is closed."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvenv.traces.draw import Draw
from kvenv.traces.family import Family, Sentence, State
from kvenv.traces.tracking import Held
from kvenv.traces.words import PEOPLE, PLACES, Pool, phrasings

GROUP, OUTSIDERS = 3, 3  # people whose wishes are asked, people whose wishes never are
OPEN = (2, 4)  # open places: at least, at most
FILLER, ASK, CLOSE, OPENING = 0.12, 0.27, 0.05, 0.08  # shares of the sentences; the rest tell or change a wish
OUTSIDER = 0.5  # share of the wishes that are outsiders'


@dataclass
class DialogueState(State):
    """Who takes part, which places are open and who wants what for them."""

    group: tuple[str, ...] = ()
    outsiders: tuple[str, ...] = ()
    open: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    held: dict[tuple[str, str], Held] = field(default_factory=dict)


class Dialogue(Family):
    """Wishes, keyed by (person, place), go stale when they change or their place is closed; outsiders' never matter."""

    name = "dialogue"
    tables = {
        "header": phrasings(
            "today|here|tonight|again",
            "{a} , {b} and {c}",
            "will|can|may|must",
            "talk|meet|plan|speak",
            "|quietly|long|alone",
            ".",
        ),
        "open": phrasings(
            "{q} :", "|well|right|sure", "on to|next is|think of|speak of", "the {t}", "|now|then|please", "."
        ),
        "close": phrasings(
            "{q} :", "|well|right|sure", "enough of|done with|forget|leave", "the {t}", "|now|then|please", "."
        ),
        "tell": phrasings(
            "{q} :", "for the {t}|at the {t}|in the {t}", "{p}", "|now|still|also", "wants|picks|grabs|needs", "{v} ."
        ),
        "ask": phrasings(
            "{q} :",
            "|well|right|sure",
            "for the {t}|at the {t}|in the {t}",
            "what does {p}|which one does {p}",
            "want|pick|grab|need",
            "? {V} .",
        ),
    }

    def start(self, rng: Draw, split: str) -> DialogueState:
        people = rng.some(PEOPLE, GROUP + OUTSIDERS)
        a, b, c = people[:GROUP]
        header = self.say("header", split, rng, a=a, b=b, c=c)
        return DialogueState(
            Pool.draw(rng, split),
            header,
            group=tuple(people[:GROUP]),
            outsiders=tuple(people[GROUP:]),
            unused=rng.some(PLACES, len(PLACES)),
        )

    def sentence(self, state: DialogueState, rng: Draw) -> Sentence:
        split, chance = state.pool.split, rng.random()
        speaker = rng.pick(state.group)
        asked = [key for key in state.held if key[0] in state.group]
        if chance < FILLER:
            return self.filler(split, rng)
        chance -= FILLER
        if chance < ASK and len(asked) > 1:
            person, place = rng.pick(asked)
            value, number = state.held[person, place]
            return self.say("ask", split, rng, used=(number,), q=speaker, p=person, t=place, v=value)
        chance -= ASK
        if len(state.open) < OPEN[0] or (CLOSE < chance < CLOSE + OPENING and len(state.open) < OPEN[1]):
            place = rng.pick(state.unused[: len(PLACES) // 2])  # the longest closed half
            state.unused.remove(place)
            state.open.append(place)
            return self.say("open", split, rng, q=speaker, t=place)
        if 0 <= chance < CLOSE and len(state.open) > OPEN[0]:
            place = rng.pick(state.open)
            state.open.remove(place)
            state.unused.append(place)
            state.held = {key: held for key, held in state.held.items() if key[1] != place}
            return self.say("close", split, rng, q=speaker, t=place)
        person = rng.pick(state.outsiders if rng.random() < OUTSIDER else state.group)
        place = rng.pick(state.open)
        new = state.held[person, place] = Held(state.word(rng), state.number())
        return self.say("tell", split, rng, told=new.number, q=speaker, p=person, t=place, v=new.value)
