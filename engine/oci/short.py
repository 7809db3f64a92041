"""Digests as people read and type them: the first digits, as many as tell them apart.

Pure.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from engine.errors import InvalidArgument, printable

__all__ = ["LENGTHS", "Beginning", "beginnings", "short_forms", "the_one"]

_USUAL = 12
_SHOWN = 5
_SIZES = {"sha256": 64, "sha512": 128}
LENGTHS = tuple(len(f"{name}:") + size for name, size in _SIZES.items())
"""How long digests are, in characters."""

# Four digits at least, as in git: what is shorter is a slip, and may name something by accident.
_PATTERN = re.compile(r"(?:(sha256|sha512):)?([0-9a-f]{4,})\Z")


class Beginning(NamedTuple):
    """What a digest begins with, and how many characters it has in all."""

    text: str
    size: int


def beginnings(text: str) -> list[Beginning]:
    """Return what the digests that `text` may stand for begin with; nothing if it is no digits."""
    match = _PATTERN.match(text)
    if match is None:
        return []
    algorithm, digits = match.groups()
    return [
        Beginning(f"{name}:{digits}", len(name) + 1 + size)
        for name, size in _SIZES.items()
        if algorithm in {None, name} and len(digits) <= size
    ]


def the_one(found: Iterable[str], text: str, what: str) -> str | None:
    """Return the only one of the digests that `text` was found to begin; InvalidArgument for several."""
    names = sorted(set(found))
    if len(names) > 1:
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(printable(name) for name in names[:_SHOWN])
        raise InvalidArgument(f"{text} begins {len(names)} {what} ({shown}{more}); type more digits")
    return names[0] if names else None


def short_forms(names: Iterable[str]) -> dict[str, str]:
    """Return each digest's first 12 digits, or as many as no other begins with; other names whole."""
    digits = {name: _digits(name) for name in names}
    ordered: Sequence[str] = sorted(filter(None, digits.values()))
    needed = dict.fromkeys(ordered, _USUAL)
    for one, next_one in pairwise(ordered):
        alike = next((at for at, (a, b) in enumerate(zip(one, next_one, strict=False)) if a != b), 0)
        needed[one] = max(needed[one], alike + 1)
        needed[next_one] = max(needed[next_one], alike + 1)
    return {name: found[: needed[found]] if found else name for name, found in digits.items()}


def _digits(name: str) -> str:
    algorithm, _, digits = name.partition(":")
    return digits if len(digits) == _SIZES.get(algorithm) else ""
