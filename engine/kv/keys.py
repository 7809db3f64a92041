"""Composite keys as length-prefixed bytes, so that no part can reach into the next.

Pure. A part is two bytes of length and the part itself; a part over 128 bytes is replaced by its
sha256 under a length no real part can have (LMDB keys end at 511 bytes). A record therefore always
carries its own names: a key finds, it does not tell.
"""

import hashlib
from collections.abc import Iterable

from engine.errors import InvalidArgument, printable

__all__ = ["LONGEST", "Part", "after", "encode", "first", "names_in", "number", "opening"]

Part = str | bytes | int

LONGEST = 128
_HASHED = b"\xff\xff"
_LENGTHS = [size.to_bytes(2, "big") for size in range(LONGEST + 1)]


def encode(parts: Iterable[Part]) -> bytes:
    """Return the key of `parts`; the key of a leading run of parts is a prefix of it."""
    key = b""
    for part in parts:
        try:
            raw = part.encode() if isinstance(part, str) else part
        except UnicodeEncodeError:
            raise InvalidArgument(f"{printable(str(part))!r} is no text in UTF-8") from None
        if isinstance(raw, int):
            key += number(raw)
        elif len(raw) > LONGEST:
            key += _HASHED + hashlib.sha256(raw).digest()
        else:
            key += _LENGTHS[len(raw)] + raw
    return key


def opening(parts: Iterable[Part], text: str, size: int) -> bytes:
    """Return how the keys begin that continue `parts` with one of `size` bytes that begins as `text`.

    Where so long a part is replaced, that is how all begin whose part is.
    """
    head = _HASHED if size > LONGEST else size.to_bytes(2, "big") + text.encode()
    return encode(parts) + head


def first(key: bytes) -> bytes:
    """Return the first part of a key, as it stands there."""
    length = hashlib.sha256().digest_size if key[:2] == _HASHED else int.from_bytes(key[:2], "big")
    return key[: 2 + length]


def after(beginning: bytes) -> bytes:
    """Return the least that sorts after all keys that begin so."""
    less = beginning.rstrip(b"\xff")
    return less[:-1] + bytes([less[-1] + 1])


def names_in(key: bytes) -> list[str]:
    """Return the parts of a key of names, for records that cannot tell their own."""
    names = []
    while key:
        length = int.from_bytes(key[:2], "big")
        if key[:2] == _HASHED:
            length, name = hashlib.sha256().digest_size, b"(a long name)"
        else:
            name = key[2 : 2 + length]
        names.append(name.decode("utf-8", "backslashreplace"))
        key = key[2 + length :]
    return names


def number(value: int) -> bytes:
    """Return a part that sorts as the number does."""
    return value.to_bytes(8, "big")
