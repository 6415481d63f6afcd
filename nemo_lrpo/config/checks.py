"""Checks that end in a message a newcomer can act on: key, value, rule, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the key, the value and what is accepted."""


def check_choice(key: str, value: object, accepted: Iterable[object]) -> None:
    """Refuse `value` unless it is one of `accepted`."""
    options = list(accepted)
    if value not in options:
        raise ConfigError(f"{key}={value!r} is not known; accepted: {', '.join(map(repr, options))}.")


def check_range(
    key: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse a number outside the interval given by inclusive (at_*) and exclusive (above, below) bounds."""
    rules = []
    if at_least is not None:
        rules.append((value >= at_least, f">= {at_least}"))
    if above is not None:
        rules.append((value > above, f"> {above}"))
    if at_most is not None:
        rules.append((value <= at_most, f"<= {at_most}"))
    if below is not None:
        rules.append((value < below, f"< {below}"))
    # NaN fails every comparison and is refused by that.
    if not all(holds for holds, _ in rules):
        raise ConfigError(f"{key}={value!r} is out of range; it must be {' and '.join(text for _, text in rules)}.")


def check_file(key: str, value: str | None, remedy: str = "give the path of an existing file") -> Path:
    """Refuse a path that is not a file; returns it."""
    if not value:
        raise ConfigError(f"{key} is not set; {remedy}.")
    path = Path(value)
    if not path.is_file():
        raise ConfigError(f"{key}={value!r}: no such file; {remedy}.")
    return path


def check_directory(key: str, value: str | None, remedy: str = "give the path of an existing directory") -> Path:
    """Refuse a path that is not a directory; returns it."""
    if not value:
        raise ConfigError(f"{key} is not set; {remedy}.")
    path = Path(value)
    if not path.is_dir():
        raise ConfigError(f"{key}={value!r}: no such directory; {remedy}.")
    return path


def unknown_key_message(key: str, known: Collection[str], where: str) -> str:
    """`key` is not among `known`: say so, with the nearest known names."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{where}: unknown key {key!r}.{hint} Accepted: {', '.join(sorted(known))}."
