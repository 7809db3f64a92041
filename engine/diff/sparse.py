"""Sparse files in archives: which parts of a file are there; what is between them are holes.

Pure. GNU tar's type S, and its forms 0.0, 0.1 and 1.0 over pax, each as Go's archive/tar reads it: parts
in order and apart, within the file's size, together exactly the bytes that the archive has for it. Where
Go sees no sparse file, in a form that it does not know or in 0.0 without parts, is an error: others do.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

from engine import limits
from engine.errors import Refused, printable

__all__ = [
    "KEYS",
    "MAP",
    "NAME",
    "PAIR",
    "SIZES",
    "Parts",
    "blocks",
    "checked",
    "is_in_data",
    "joined",
    "parts_in_data",
    "parts_in_pax",
    "placed",
]

Parts = Sequence[int]
"""Offset and length of each part, one after the other; an array, as a map may have a million."""

_DIGITS = 19  # of the largest number, 2**63 - 1
_FORM = (b"GNU.sparse.major", b"GNU.sparse.minor")
MAP, NAME = b"GNU.sparse.map", b"GNU.sparse.name"
_COUNT = b"GNU.sparse.numblocks"
SIZES = (b"GNU.sparse.size", b"GNU.sparse.realsize")
"""How large the file is; the first that is there counts."""
KEYS = frozenset((*_FORM, MAP, _COUNT, NAME, *SIZES))
PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
"""The records of form 0.0, of which each part has both."""


def joined(records: list[tuple[bytes, bytes]]) -> bytes:
    """Return records of form 0.0 as the map of form 0.1."""
    for number, (key, value) in enumerate(records):
        if key != PAIR[number % 2] or b"," in value:
            raise _malformed()
    return b",".join(value for _, value in records)


def is_in_data(pax: Mapping[bytes, bytes]) -> bool:
    """Say whether the map comes before the data (1.0) and not in the records (0.0, 0.1)."""
    form = tuple(pax.get(key, b"") for key in _FORM)
    if form == (b"1", b"0"):
        return True
    if form in {(b"0", b"0"), (b"0", b"1")} or (form == (b"", b"") and pax.get(MAP)):
        return False
    raise Refused("archive has a sparse file of a form that is not known")


def parts_in_pax(pax: Mapping[bytes, bytes]) -> Parts:
    """Return the parts of forms 0.0 and 0.1."""
    text = pax.get(MAP)
    numbers = array("q", map(_number, text.split(b",") if text else ()))
    if len(numbers) != 2 * _number(pax.get(_COUNT, b"")):
        raise _malformed()
    return _bounded(numbers)


def parts_in_data(blocks_: Iterable[bytes]) -> Parts:
    """Return the parts of form 1.0: a number in each line, how many parts there are comes first."""
    numbers = array("q")
    wanted, rest = 1, b""
    for block in blocks_:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            numbers.append(_number(line))
            if len(numbers) == 1:
                wanted += 2 * min(numbers[0], limits.SPARSE_PARTS + 1)
            if len(numbers) == wanted:
                return _bounded(numbers[1:])
        if len(rest) > _DIGITS:
            break
    raise _malformed()


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > _DIGITS or (value := int(text)) >= 1 << 63:
        raise _malformed()
    return value


def _malformed() -> Refused:
    return Refused("archive has a sparse file with a malformed map")


def _bounded(parts: Parts) -> Parts:
    if len(parts) > 2 * limits.SPARSE_PARTS:
        raise Refused(f"archive has a sparse file of over {limits.SPARSE_PARTS} parts")
    return parts


def checked(parts: Parts, size: int, stored: int, name: bytes) -> Parts:
    """Return `parts` of a file of `size` bytes, of which the archive has `stored`. Raises Refused."""
    end = held = 0
    for offset, length in _pairs(parts):
        if offset < end or offset + length > size:
            raise Refused(f"sparse file {printable(name)!r} has parts that overlap or end beyond it")
        end = offset + length
        held += length
    if held != stored:
        raise Refused(f"sparse file {printable(name)!r} has {stored} bytes for parts of {held}")
    return parts


def _pairs(parts: Parts) -> Iterator[tuple[int, int]]:
    numbers = iter(parts)
    return zip(numbers, numbers, strict=True)


def blocks(parts: Parts, size: int) -> int:
    """Return how many blocks of `size` bytes the parts touch."""
    count, last = 0, -1
    for offset, length in _pairs(parts):
        if length:
            first, end = offset // size, (offset + length - 1) // size
            count += end - first + (first != last)
            last = end
    return count


def placed(parts: Parts, pieces: Iterator[memoryview]) -> Iterator[tuple[int, memoryview]]:
    """Yield the data of a sparse file in pieces, each with its offset in the file."""
    piece = memoryview(b"")
    for offset, length in _pairs(parts):
        while length:
            piece = piece or next(pieces)
            part = piece[:length]
            yield offset, part
            offset, length, piece = offset + len(part), length - len(part), piece[len(part) :]
