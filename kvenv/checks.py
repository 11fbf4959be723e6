"""Arguments, and what JSON says of them: what means nothing is refused, whatever its type. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def check_integer(name: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises
    ------
    ValueError
        Naming argument and value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises
    ------
    ValueError
        Naming argument and value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


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


def fits(value: object, hint: Any) -> bool:
    """Return whether a JSON value is how a field of that type hint is written."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (tuple, list):
        return isinstance(value, list) and all(fits(one, arguments[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (str if hint is Path else hint)
