"""What a host asks for credentials with: the challenges of `WWW-Authenticate` (RFC 9110, 11.6.1).

Pure. A header that is malformed or beyond bounds asks for nothing: what can be read before is kept.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from engine import limits

__all__ = ["Challenge", "parse_challenges"]

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_BETWEEN = re.compile(r"[\s,]*+")
_PARAMETER = re.compile(rf'({_TOKEN})\s*+=\s*+(?:"((?:[^"\\]|\\.)*+)"|([^\s,"]++))')
_SCHEME = re.compile(rf"({_TOKEN})(?=[\s,]|\Z)")
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """A scheme, in lower case, and its parameters."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Return the challenges of all `WWW-Authenticate` headers of an answer, in order."""
    return [challenge for header in headers for challenge in _challenges(header)]


def _challenges(header: str) -> Iterator[Challenge]:
    if len(header) > limits.CHALLENGE or not header.isprintable() or not header.isascii():
        return
    now: Challenge | None = None
    position = 0
    while (position := _end(_BETWEEN.match(header, position), position)) < len(header):
        if now and (parameter := _PARAMETER.match(header, position)):
            name, quoted, bare = parameter.groups()
            value = bare if quoted is None else _ESCAPED.sub(r"\1", quoted)
            if name.lower() in now.parameters or len(now.parameters) >= limits.CHALLENGE_PARAMETERS:
                return  # which of two was meant is anybody's guess
            now.parameters[name.lower()] = value
            position = parameter.end()
        elif scheme := _SCHEME.match(header, position):
            if now:
                yield now
            now = Challenge(scheme[1].lower())
            position = scheme.end()
        else:
            break
    if now:
        yield now


def _end(match: re.Match[str] | None, position: int) -> int:
    return match.end() if match else position
