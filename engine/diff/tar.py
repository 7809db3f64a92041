"""The tar reader: entries and their payloads from pieces of bytes, strictly.

Pure. Reads ustar, pax, GNU and old archives. Where readers of the field disagree on bytes, so that an
archive could show one tree to a scanner and another to us, the bytes are refused: bad checksums and
numbers, sizes on entries that have no body, malformed or oversized extension headers, unknown types,
a zero block in the middle. Names stay bytes. Global pax headers apply to nothing, as
in Go's archive/tar, which containerd and umoci read with.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from zlib import adler32

import msgspec

from engine import limits
from engine.diff import pax, sparse
from engine.errors import Refused, printable

__all__ = [
    "BLOCK_DEVICE",
    "CHAR_DEVICE",
    "DIRECTORY",
    "FIFO",
    "FILE",
    "HARDLINK",
    "SYMLINK",
    "Entry",
    "TarReader",
]

BLOCK = 512
_ZEROS = bytes(BLOCK)

FILE, HARDLINK, SYMLINK = b"0", b"1", b"2"
CHAR_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO = b"3", b"4", b"5", b"6"
_GNU_SPARSE = b"S"
_SPARSE_BYTE = _GNU_SPARSE[0]
_BODILESS = frozenset((HARDLINK, SYMLINK, CHAR_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO))
_KNOWN = _BODILESS | {FILE}
_SAME_AS_FILE = frozenset((b"\0", b"7", _GNU_SPARSE))  # before POSIX; "contiguous"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_LABEL = b"x", b"g", b"L", b"K", b"V"

_HIGH = bytes(range(128, 256))


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One member of an archive, as its headers say it; `mtime` is in nanoseconds.

    Of a sparse file the payload has only the `parts`; `size` is what it has with its holes.
    """

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link: bytes
    major: int
    minor: int
    xattrs: dict[bytes, bytes]
    parts: sparse.Parts | None = None


class TarReader:
    """Iterates over the entries of an archive given in pieces.

    After an entry its payload may be taken with `payload`; what is left of it is skipped. After the
    last entry everything up to the end of the bytes has been taken from the pieces.
    """

    def __init__(self, pieces: Iterable[bytes], *, jump: Callable[[int], None] | None = None) -> None:
        """Read from `pieces`; `jump`, if given, makes them go on so many bytes further on."""
        self._pieces = iter(pieces)
        self._jump = jump
        self._passed = 0  # bytes before the current piece
        self._piece = b""
        self._view = memoryview(b"")  # of the piece
        self._at = 0
        self._left = 0  # bytes of the current payload not taken yet
        self._padding = 0
        self._entries = 0
        self._records = 0  # of pax, looked at one by one

    # -- bytes --------------------------------------------------------------------------------

    def _next_piece(self) -> bool:
        for piece in self._pieces:
            if piece:
                self._passed += len(self._piece)
                self._piece = piece
                self._view = memoryview(piece)
                self._at = 0
                return True
        return False

    def _take(self, count: int, what: str) -> bytes:
        at = self._at
        end = at + count
        if end <= len(self._piece):
            self._at = end
            return self._piece[at:end]
        taken = bytearray(self._piece[at:])
        while len(taken) < count:
            if not self._next_piece():
                raise Refused(f"archive is cut off within {what}")
            self._at = count - len(taken)
            taken += self._piece[: self._at]
        self._at = min(self._at, len(self._piece))
        return bytes(taken)

    def _block(self) -> bytes | None:
        """Return the next header block, None at the end of the bytes."""
        block = self._piece[self._at : self._at + BLOCK]
        if len(block) == BLOCK:
            self._at += BLOCK
            return block
        if self._at == len(self._piece) and not self._next_piece():
            return None
        return self._take(BLOCK, "a header")

    def payload(self) -> Iterator[memoryview]:
        """Give the body of the current entry in parts."""
        end = self._at + self._left
        if not self._left or end > len(self._piece):
            return self._parts()
        part = self._view[self._at : end]
        self._at, self._left = end, 0
        return iter((part,))

    def _parts(self) -> Iterator[memoryview]:
        while self._left:
            if self._at == len(self._piece) and not self._next_piece():
                raise Refused("archive is cut off within a file")
            part = self._view[self._at : self._at + self._left]
            self._at += len(part)
            self._left -= len(part)
            yield part

    @property
    def position(self) -> int:
        """How many bytes have been taken: where the payload of a new entry begins."""
        return self._passed + self._at

    def _skip_body(self) -> None:
        if self._jump and self._left > len(self._piece) - self._at:
            beyond = self._left - (len(self._piece) - self._at)
            self._passed += len(self._piece) + beyond
            self._piece, self._view, self._at, self._left = b"", memoryview(b""), 0, 0
            self._jump(beyond)
        if self._left:
            for _ in self.payload():
                pass
        if self._padding:
            self._pass_over(self._padding)
            self._padding = 0

    def _pass_over(self, count: int) -> None:
        """Pass over padding. `umoci insert` ends without the last, which Go's archive/tar takes."""
        while count > (there := len(self._piece) - self._at):
            count -= there
            self._at = len(self._piece)
            if not self._next_piece():
                return
        self._at += count

    def _begin_body(self, size: int) -> None:
        self._left = size
        self._padding = -size % BLOCK

    # -- entries ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Entry]:
        while (header := self._header()) is not None:
            block, records, name, link = header
            entry = _entry(block, records, name, link)
            self._begin_body(entry.size)
            if block[156] == _SPARSE_BYTE or (records and not sparse.KEYS.isdisjoint(records)):
                entry = self._sparse(entry, block, records)
            self._entries += 1
            yield entry
            self._skip_body()
        self._finish()

    def _sparse(self, entry: Entry, block: bytes, records: dict[bytes, bytes]) -> Entry:
        """Return the entry of a sparse file; what is left of its body then are its parts."""
        name, size = entry.name, entry.size
        if block[156:157] == _GNU_SPARSE:
            size, parts = _number(block[483:495], "size"), self._old_sparse_parts(block)
        elif sparse.is_in_data(records):
            parts = sparse.parts_in_data(self._blocks_of_body())
        else:
            parts = sparse.parts_in_pax(records)
        if not sparse.KEYS.isdisjoint(records):
            if entry.type != FILE or block[156:157] == _GNU_SPARSE:
                raise Refused(f"archive has {printable(name)!r} as a sparse file, which it cannot be")
            name = records.get(sparse.NAME) or name
            for key in reversed(sparse.SIZES):
                size = pax.number(records, key, size)
        parts = sparse.checked(parts, size, self._left, name)
        return msgspec.structs.replace(entry, name=name, size=size, parts=parts)

    def _blocks_of_body(self) -> Iterator[bytes]:
        while self._left >= BLOCK:
            self._left -= BLOCK
            yield self._take(BLOCK, "a file")

    def _old_sparse_parts(self, block: bytes) -> sparse.Parts:
        """Return the map of GNU's old format: in the header, and in blocks between it and the body."""
        if block[257:265] != b"ustar  \0":
            raise Refused("archive has a sparse file in a header that is not GNU's")
        numbers = array("q")
        fields, is_extended = block[386:482], block[482]
        while True:
            for at in range(0, len(fields), 24):
                if not fields[at]:
                    break  # as in GNU tar: further blocks may follow all the same
                offset, length = fields[at : at + 12], fields[at + 12 : at + 24]
                numbers.extend((_number(offset, "size"), _number(length, "size")))
            if len(numbers) > 2 * limits.SPARSE_PARTS:
                raise Refused(f"archive has a sparse file of over {limits.SPARSE_PARTS} parts")
            if not is_extended:
                return numbers
            further = self._take(BLOCK, "a map of a sparse file")
            fields, is_extended = further[:504], further[504]

    def _header(self) -> tuple[bytes, dict[bytes, bytes], bytes | None, bytes | None] | None:
        """Return the next real header and the extensions before it, None at the end."""
        records: dict[bytes, bytes] | None = None
        name: bytes | None = None
        link: bytes | None = None
        for _ in range(limits.EXTENSIONS_IN_ROW):
            block = self._block()
            if block is None or block == _ZEROS:
                if records is not None or name is not None or link is not None:
                    raise Refused("archive ends after an extension header")
                if block is not None:
                    self._second_zero_block()
                return None
            _check_sum(block)
            kind = block[156:157]
            if kind in _KNOWN:
                return block, records or pax.NONE, name, link
            if kind == _PAX:
                records = {} if records is None else records
                self._pax(self._extension(block), records)
            elif kind == _PAX_GLOBAL:
                self._pax(self._extension(block), {})
            elif kind == _GNU_NAME:
                name = _until_nul(self._extension(block))
            elif kind == _GNU_LINK:
                link = _until_nul(self._extension(block))
            elif kind == _GNU_LABEL:
                self._begin_body(_number(block[124:136], "size"))
                self._skip_body()
            else:
                return block, records or pax.NONE, name, link
        raise Refused(f"archive has over {limits.EXTENSIONS_IN_ROW} extension headers in a row")

    def _extension(self, block: bytes) -> bytes:
        size = _number(block[124:136], "size")
        if size > limits.EXTENSION:
            raise Refused(f"archive has an extension header over {limits.EXTENSION} bytes")
        return self._take(size + -size % BLOCK, "an extension header")[:size]

    def _pax(self, body: bytes, into: dict[bytes, bytes]) -> None:
        self._records += pax.read_records(body, into)
        if self._records > limits.PAX_RECORDS * (self._entries + 1000):
            raise Refused(f"archive has over {limits.PAX_RECORDS} pax records for each entry")

    def _second_zero_block(self) -> None:
        block = self._block()
        if block is not None and block != _ZEROS:
            raise Refused("archive goes on after a single zero block")

    def _finish(self) -> None:
        """Take what follows the end of the archive: it counts for the digest, nothing else."""
        after = len(self._piece) - self._at
        self._at = len(self._piece)
        while self._next_piece():
            after += len(self._piece)
            self._at = len(self._piece)
            if after > limits.AFTER_END:
                raise Refused(f"archive has over {limits.AFTER_END} bytes after its end")


def _check_sum(block: bytes) -> None:
    field = block[148:156]
    stored = _signed(field, "checksum")
    # The sum of all bytes with the field itself as spaces. adler32's low half is 1 + the sum of the
    # bytes modulo 65521, at a tenth of the cost; 512 bytes of ASCII, or any 256, never wrap.
    if block.isascii():
        total = (adler32(block) & 0xFFFF) - (adler32(field) & 0xFFFF) + 256
        high = 0
    else:
        blanked = block[:148] + b"        " + block[156:]
        total = (adler32(blanked[:256]) & 0xFFFF) + (adler32(blanked[256:]) & 0xFFFF) - 2
        high = len(blanked) - len(blanked.translate(None, _HIGH))
    # Some old writers summed signed chars.
    if stored != total and stored != total - 256 * high:
        raise Refused("archive has a header with a wrong checksum")


def _number(field: bytes, what: str) -> int:
    """Return a number written in octal, or in base 256 as GNU and star do."""
    value = _signed(field, what)
    if value < 0:
        raise Refused(f"archive has a {what} out of range")
    return value


def _signed(field: bytes, what: str) -> int:
    digits = field.strip(b" \0")
    # int() would take signs, underscores and prefixes.
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:
            pass
    elif field[0] & 0x80:
        value = int.from_bytes(field, "big")
        value -= 1 << (len(field) * 8 - (field[0] != 0xFF))
        if value > pax.LARGEST:
            raise Refused(f"archive has a {what} out of range")
        return value
    elif not digits:
        return 0
    raise Refused(f"archive has a malformed {what}: {printable(field)!r}")


def _until_nul(field: bytes) -> bytes:
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


@lru_cache(maxsize=64)  # the files of a layer have few
def _permissions(fields: bytes) -> tuple[int, int, int]:
    """Return mode, uid and gid."""
    mode = _signed(fields[:8], "mode") & 0o7777
    return mode, _number(fields[8:16], "uid"), _number(fields[16:], "gid")


def _entry(block: bytes, records: dict[bytes, bytes], name: bytes | None, link: bytes | None) -> Entry:
    kind = block[156:157]
    if name is None:
        name = _ustar_name(block)
    if link is None:
        link = _until_nul(block[157:257]) if block[157] else b""
    size = _number(block[124:136], "size")
    mode, uid, gid = _permissions(block[100:124])
    mtime = _signed(block[136:148], "time") * 1_000_000_000
    xattrs = pax.NONE
    if records:
        # A value in pax wins over GNU's and over the header's own.
        # An empty value takes a record back (POSIX pax).
        if text := records.get(b"mtime"):
            mtime = pax.time(text)
        if not text or len(records) > 1:  # mostly there is nothing else
            name = records.get(b"path") or name
            link = records.get(b"linkpath") or link
            size = pax.number(records, b"size", size)
            uid = pax.number(records, b"uid", uid)
            gid = pax.number(records, b"gid", gid)
            xattrs = pax.xattrs(records)
    if kind == FILE:
        return Entry(name, kind, mode, uid, gid, size, mtime, link, 0, 0, xattrs)
    if kind in _SAME_AS_FILE:
        kind = DIRECTORY if kind == b"\0" and name.endswith(b"/") else FILE
    elif kind not in _KNOWN:
        raise Refused(f"archive has an entry of unknown type {printable(kind)!r}")
    if size and kind in _BODILESS:
        raise Refused(f"archive gives a size to {printable(name)!r}, which can have no body")
    major = minor = 0
    if kind in (CHAR_DEVICE, BLOCK_DEVICE):
        major = _number(block[329:337], "device number")
        minor = _number(block[337:345], "device number")
    return Entry(name, kind, mode, uid, gid, size, mtime, link, major, minor, xattrs)


def _ustar_name(block: bytes) -> bytes:
    name = _until_nul(block[:100])
    if block[345] and block[257:263] == b"ustar\0":
        # star keeps times at the end of the prefix field and says so in the last four bytes.
        end = 476 if block[508:512] == b"tar\0" else 500
        return _until_nul(block[345:end]) + b"/" + name
    return name
