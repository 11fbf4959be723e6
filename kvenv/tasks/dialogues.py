"""Message trees of OpenAssistant (OASST2) as traces of several turns.

A message may have several replies, each of which goes on in its own way. A tree is flattened depth first, the
best-ranked reply first, so that every message comes once, behind the one that it answers or behind what became of a
better-ranked answer to that one. Taken are English trees that are ready for export; a message in another language, or
that was deleted or rejected in review, goes with all its replies.

Between two messages stands what the tokenizer's chat template has between messages of such roles, and a trace begins as
the template does, system prompt included; without a template a line each begins with ``User: `` or ``Assistant: ``.

A trace begins with a tree and is filled up with the next ones to exactly ``length`` tokens; the rest of the tree that
is cut there is left out, and so is the last, shorter trace unless it is the only one. (KVP speaks of OASST2-4k and
doesn't say how it was made.)

Locally ``oasst2.jsonl`` holds a message a line (``message_id``, ``parent_id``, ``text``, ``role``, ``lang``, and as far
as known ``rank``, ``deleted``, ``review_result``, ``tree_state``), as the data set on the hub does, or a tree a line
(``prompt`` with nested ``replies``), as OpenAssistant's ``.trees.jsonl`` does. A file is the same for every split.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvenv.tasks.base import TaskSetting
from kvenv.tasks.prompt import Framer
from kvenv.tasks.records import Record, Source, check_fields
from kvenv.tasks.texts import LazySource
from kvenv.traces.source import Trace

FILE, HUB, READY = "oasst2.jsonl", "OpenAssistant/oasst2", "ready_for_export"
HUB_SPLITS = {"train": "train", "validation": "validation[:50%]", "test": "validation[50%:]"}
"""The data set has no test split. A tree that the cut goes through loses the replies behind it."""

_CONTENTS = ("\u241e1", "\u241e2", "\u241e3")
"""Stand for messages while a chat template is filled in: no text has them."""


def dialogue_source(setting: TaskSetting) -> LazySource:
    """Return the dialogues, read when they are asked for; the first half of each trace is its prompt.

    Raises
    ------
    FileNotFoundError
        If the directory lacks the file, once the traces are asked for.
    ValueError
        If a record is malformed, or no tree can be taken, once the traces are asked for.
    """

    def read() -> list[Trace]:
        place = str(setting.data / FILE) if setting.data else HUB
        records = Source(FILE, HUB, (), split=HUB_SPLITS[setting.split]).read(setting.data)
        dialogues = (list(flatten(tree, place)) for tree in trees(records, place))
        traces = pack((messages for messages in dialogues if messages), setting)
        if not traces:
            raise ValueError(f"{place} holds no English tree that is ready for export")
        return traces

    return LazySource("oasst2", setting.split, read)


def trees(records: list[Record], place: str) -> Iterator[Record]:
    """Yield the first messages of trees that are ready, each with its ``replies``.

    Parameters
    ----------
    records : list of dict
        Messages or trees.
    place : str
        Where they come from, as errors name it.

    Raises
    ------
    ValueError
        If a record lacks a field.
    """
    if "prompt" in records[0]:
        for number, tree in enumerate(records, start=1):
            check_fields(tree, ("prompt",), f"{place}:{number}")
            if tree.get("tree_state", READY) == READY:
                yield tree["prompt"]
        return
    messages: dict[str, Record] = {}
    for number, record in enumerate(records, start=1):
        check_fields(record, ("message_id",), f"{place}:{number}")
        messages[record["message_id"]] = {**record, "replies": []}
    for message in messages.values():
        if message.get("parent_id") in messages:
            messages[message["parent_id"]]["replies"].append(message)
    for message in messages.values():
        if message.get("parent_id") is None and message.get("tree_state", READY) == READY:
            yield message


def flatten(tree: Record, place: str) -> Iterator[tuple[str, str]]:
    """Yield role and text of a tree's messages, depth first and the best-ranked reply first.

    Parameters
    ----------
    tree : dict
        The first message, with ``replies``.
    place : str
        Where it comes from, as errors name it.

    Raises
    ------
    ValueError
        If a message lacks a field or has an unknown role.
    """
    left = [tree]
    while left:
        message = left.pop()
        where = f"{place}: message {message.get('message_id')}" if isinstance(message, dict) else place
        check_fields(message, ("text", "role", "lang"), where)
        if message["role"] not in ("prompter", "assistant"):
            raise ValueError(f"{where}: role {message['role']!r} is unknown: known are prompter, assistant")
        if not isinstance(message["text"], str):
            raise ValueError(f"{where}: text must be a string, not {type(message['text']).__name__}")
        if message["lang"] == "en" and not message.get("deleted") and message.get("review_result") is not False:
            yield message["role"], message["text"].strip()
            replies = sorted(message.get("replies") or (), key=_rank)
            left += replies[::-1]


def _rank(message: object) -> float:
    """Return a message's rank among its siblings, 0 for the best; those without one come last."""
    rank = message.get("rank") if isinstance(message, dict) else None
    return float("inf") if rank is None else float(rank)


def marks(framer: Framer) -> tuple[str, dict[str, str]]:
    """Return what a dialogue begins with, and what stands before every other message, by role.

    Parameters
    ----------
    framer : Framer
        Says whether the tokenizer's chat template is used.
    """
    if not framer.chat:
        bos = getattr(framer.tokenizer, "bos_token", None) or ""
        return f"{bos}User: ", {"prompter": "\nUser: ", "assistant": "\nAssistant: "}
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": content} for role, content in zip(roles, _CONTENTS)]
    text = framer.tokenizer.apply_chat_template(turns, tokenize=False)
    begin, rest = text.split(_CONTENTS[0])
    to_assistant, rest = rest.split(_CONTENTS[1])
    return begin, {"prompter": rest.split(_CONTENTS[2])[0], "assistant": to_assistant}


def pack(dialogues: Iterator[list[tuple[str, str]]], setting: TaskSetting) -> list[Trace]:
    """Put dialogues one behind the other into traces of ``setting.length`` tokens, at most ``setting.num_examples``.

    Parameters
    ----------
    dialogues : iterator of list of (str, str)
        Role and text of their messages.
    setting : TaskSetting
        What the traces are for.
    """
    framer = Framer(setting.tokenizer, setting.chat)
    begin, before = marks(framer)
    packed: list[list[int]] = []
    ids: list[int] = []
    for dialogue in dialogues:
        for role, text in dialogue:
            ids += framer.encode((before[role] if ids else begin) + text)
        if len(ids) >= setting.length:
            packed.append(ids[: setting.length])
            ids = []
        if len(packed) == setting.num_examples:
            break
    if ids and not packed:
        packed.append(ids)
    return [
        Trace(np.array(tokens, dtype=np.int64), len(tokens) // 2, (), f"oasst2/{number}")
        for number, tokens in enumerate(packed)
    ]
