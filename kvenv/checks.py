"""Arguments that mean nothing are refused, whatever their type; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_integer(name: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises
    ------
    ValueError
        Naming argument and value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


def check_choice(name: str, value: object, known: Sequence[str | None]) -> None:
    """Refuse what isn't one of a few names.

    Raises
    ------
    ValueError
        Naming argument, value, and what is known.
    """
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(f"unknown {name} {value!r}: known are {', '.join(map(str, known))}")


def check_options(options: object, known: Sequence[str]) -> Mapping[str, Any]:
    """Return the options of a reset, none if not given.

    Raises
    ------
    ValueError
        If they are no mapping, or one is unknown.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"options must be a dict of {', '.join(known)}, not {options!r}")
    for name in options:
        check_choice("option", name, known)
    return options
