"""The tar reader: entries and their payloads from pieces of bytes, strictly.

Pure. Reads ustar, pax, GNU and old archives. Where readers of the field disagree on bytes, so that an
archive could show one tree to a scanner and another to us, the bytes are refused: bad checksums and
numbers, sizes on entries that have no body, malformed or oversized extension headers, unknown types,
a zero block in the middle. Names stay bytes. Global pax headers apply to nothing, as
in Go's archive/tar, which containerd and umoci read with.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from zlib import adler32

import msgspec

from engine import limits
from engine.diff import acl, sparse
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
_BODILESS = frozenset((HARDLINK, SYMLINK, CHAR_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO))
_KNOWN = _BODILESS | {FILE}
_SAME_AS_FILE = frozenset((b"\0", b"7", _GNU_SPARSE))  # before POSIX; "contiguous"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_LABEL = b"x", b"g", b"L", b"K", b"V"

_XATTR = b"SCHILY.xattr."
_ACL_TEXT = b"SCHILY.acl."  # as star and bsdtar write ACLs: named like xattrs, to be counted as left out
_READ = frozenset((b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")) | sparse.KEYS
_RECORD = re.compile(rb"([1-9][0-9]{0,19}) ([^=]+)=")
# A run of well-formed short records that mean nothing here. Short, so that the length can be part of
# the pattern: one by one they would cost fifteen times as much as any other bytes of an archive.
_PASSED_OVER = re.compile(
    rb"(?:%s)*+"
    % b"|".join(
        rb"%d (?!(?:path|linkpath|size|uid|gid|mtime)=|SCHILY\.(?:xattr|acl)\.|GNU\.sparse\.)"
        rb"(?=[^=\0]{1,%d}=)[^\0]{%d}\n" % (length, rest - 1, rest)
        for length in range(5, 32)
        if (rest := length - len(b"%d \n" % length))
    )
)
_HIGH = bytes(range(128, 256))
_LARGEST = (1 << 63) - 1


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


_NONE: dict[bytes, bytes] = {}


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
        if self._at == len(self._piece) and not self._next_piece():
            return None
        return self._take(BLOCK, "a header")

    def payload(self) -> Iterator[memoryview]:
        """Yield the body of the current entry."""
        while self._left:
            if self._at == len(self._piece) and not self._next_piece():
                raise Refused("archive is cut off within a file")
            part = memoryview(self._piece)[self._at : self._at + self._left]
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
            self._piece, self._at, self._left = b"", 0, 0
            self._jump(beyond)
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
            block, pax, name, link = header
            entry = _entry(block, pax, name, link)
            self._begin_body(entry.size)
            if block[156] == _GNU_SPARSE[0] or (pax and not sparse.KEYS.isdisjoint(pax)):
                entry = self._sparse(entry, block, pax)
            self._entries += 1
            yield entry
            self._skip_body()
        self._finish()

    def _sparse(self, entry: Entry, block: bytes, pax: dict[bytes, bytes]) -> Entry:
        """Return the entry of a sparse file; what is left of its body then are its parts."""
        name, size = entry.name, entry.size
        if block[156:157] == _GNU_SPARSE:
            size, parts = _size(block[483:495]), self._old_sparse_parts(block)
        elif sparse.is_in_data(pax):
            parts = sparse.parts_in_data(self._blocks_of_body())
        else:
            parts = sparse.parts_in_pax(pax)
        if not sparse.KEYS.isdisjoint(pax):
            if entry.type != FILE or block[156:157] == _GNU_SPARSE:
                raise Refused(f"archive has {printable(name)!r} as a sparse file, which it cannot be")
            name = pax.get(sparse.NAME) or name
            for key in reversed(sparse.SIZES):
                size = _pax_number(pax, key, size)
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
                numbers.extend((_size(fields[at : at + 12]), _size(fields[at + 12 : at + 24])))
            if len(numbers) > 2 * limits.SPARSE_PARTS:
                raise Refused(f"archive has a sparse file of over {limits.SPARSE_PARTS} parts")
            if not is_extended:
                return numbers
            further = self._take(BLOCK, "a map of a sparse file")
            fields, is_extended = further[:504], further[504]

    def _header(self) -> tuple[bytes, dict[bytes, bytes], bytes | None, bytes | None] | None:
        """Return the next real header and the extensions before it, None at the end."""
        pax: dict[bytes, bytes] | None = None
        name: bytes | None = None
        link: bytes | None = None
        for _ in range(limits.EXTENSIONS_IN_ROW):
            block = self._block()
            if block is None or block == _ZEROS:
                if pax is not None or name is not None or link is not None:
                    raise Refused("archive ends after an extension header")
                if block is not None:
                    self._second_zero_block()
                return None
            _check_sum(block)
            kind = block[156:157]
            if kind == _PAX:
                pax = {} if pax is None else pax
                self._pax(self._extension(block), pax)
            elif kind == _PAX_GLOBAL:
                self._pax(self._extension(block), {})
            elif kind == _GNU_NAME:
                name = _until_nul(self._extension(block))
            elif kind == _GNU_LINK:
                link = _until_nul(self._extension(block))
            elif kind == _GNU_LABEL:
                self._begin_body(_size(block[124:136]))
                self._skip_body()
            else:
                return block, pax or _NONE, name, link
        raise Refused(f"archive has over {limits.EXTENSIONS_IN_ROW} extension headers in a row")

    def _extension(self, block: bytes) -> bytes:
        size = _size(block[124:136])
        if size > limits.EXTENSION:
            raise Refused(f"archive has an extension header over {limits.EXTENSION} bytes")
        body = self._take(size, "an extension header")
        self._take(-size % BLOCK, "padding")
        return body

    def _pax(self, body: bytes, into: dict[bytes, bytes]) -> None:
        self._records += _pax_records(body, into)
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
    stored = _number(block[148:156], "checksum")
    # The sum of all bytes with the field itself as spaces. adler32's low half is 1 + the sum of the
    # bytes modulo 65521, at a tenth of the cost; the sum of 256 bytes never wraps.
    blanked = block[:148] + b"        " + block[156:]
    total = (adler32(blanked[:256]) & 0xFFFF) + (adler32(blanked[256:]) & 0xFFFF) - 2
    if stored == total:
        return
    # Some old writers summed signed chars.
    high = len(blanked) - len(blanked.translate(None, _HIGH))
    if stored != total - 256 * high:
        raise Refused("archive has a header with a wrong checksum")


def _number(field: bytes, what: str, *, signed: bool = False) -> int:
    """Return a number written in octal, or in base 256 as GNU and star do."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False)
        bits = len(field) * 8
        if field[0] == 0xFF:
            value -= 1 << bits
        else:
            value -= 1 << (bits - 1)
        if (value < 0 and not signed) or value > _LARGEST:
            raise Refused(f"archive has a {what} out of range")
        return value
    digits = field.strip(b" \0")
    if not digits:
        return 0
    # int() would take signs, underscores and prefixes.
    if not digits.isdigit():
        raise Refused(f"archive has a malformed {what}: {printable(field)!r}")
    try:
        return int(digits, 8)
    except ValueError:
        raise Refused(f"archive has a malformed {what}: {printable(field)!r}") from None


def _size(field: bytes) -> int:
    return _number(field, "size")


def _until_nul(field: bytes) -> bytes:
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


def _entry(block: bytes, pax: dict[bytes, bytes], name: bytes | None, link: bytes | None) -> Entry:
    kind = block[156:157]
    if name is None:
        name = _ustar_name(block)
    if link is None:
        link = _until_nul(block[157:257])
    size = _size(block[124:136])
    uid = _number(block[108:116], "uid")
    gid = _number(block[116:124], "gid")
    mtime = _number(block[136:148], "time", signed=True) * 1_000_000_000
    xattrs = _NONE
    if pax:
        # A value in pax wins over GNU's and over the header's own.
        # An empty value takes a record back (POSIX pax).
        name = pax.get(b"path") or name
        link = pax.get(b"linkpath") or link
        if text := pax.get(b"mtime"):
            mtime = _pax_time(text)
        size = _pax_number(pax, b"size", size)
        uid = _pax_number(pax, b"uid", uid)
        gid = _pax_number(pax, b"gid", gid)
        xattrs = _pax_xattrs(pax)
    if kind in _SAME_AS_FILE:
        kind = DIRECTORY if kind == b"\0" and name.endswith(b"/") else FILE
    elif kind not in _KNOWN:
        raise Refused(f"archive has an entry of unknown type {printable(kind)!r}")
    if size and kind in _BODILESS:
        raise Refused(f"archive gives a size to {printable(name)!r}, which can have no body")
    device = kind in (CHAR_DEVICE, BLOCK_DEVICE)
    return Entry(
        name,
        kind,
        _number(block[100:108], "mode", signed=True) & 0o7777,
        uid,
        gid,
        size,
        mtime,
        link,
        _number(block[329:337], "device number") if device else 0,
        _number(block[337:345], "device number") if device else 0,
        xattrs,
    )


def _ustar_name(block: bytes) -> bytes:
    name = _until_nul(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        # star keeps times at the end of the prefix field and says so in the last four bytes.
        end = 476 if block[508:512] == b"tar\0" else 500
        return _until_nul(block[345:end]) + b"/" + name
    return name


def _pax_records(body: bytes, into: dict[bytes, bytes]) -> int:
    """Check the records of an extended header, `length key=value newline`.

    Those that mean something here go `into` a dictionary; the last of a key wins. Returns how many were
    not passed over at once.
    """
    size, has_nul = len(body), b"\0" in body
    count = 0
    pairs: list[tuple[bytes, bytes]] = []
    at = _end_of_run(body, 0)
    while at < size:
        found = _RECORD.match(body, at)
        end = at + int(found[1]) if found else 0
        if not found or end > size or found.end() >= end or body[end - 1] != 0x0A:
            raise Refused("archive has a malformed pax record")
        key = found[2]
        is_xattr = key.startswith(_XATTR)
        if has_nul and (b"\0" in key or (not is_xattr and body.find(b"\0", at, end) >= 0)):
            raise Refused("archive has a NUL in a pax record")
        if is_xattr or key in _READ or key.startswith(_ACL_TEXT):
            into[key] = body[found.end() : end - 1]
        elif key in sparse.PAIR:
            pairs.append((key, body[found.end() : end - 1]))
        at = _end_of_run(body, end)
        count += 1
    if pairs:
        into[sparse.MAP] = sparse.joined(pairs)
    return count


def _end_of_run(body: bytes, at: int) -> int:
    run = _PASSED_OVER.match(body, at)
    return run.end() if run else at


def _pax_number(pax: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    text = pax.get(key)
    if not text:
        return otherwise
    if not text.isdigit() or len(text) > 19 or int(text) > _LARGEST:
        raise Refused(f"archive has a malformed pax {key.decode()}: {printable(text)!r}")
    return int(text)


def _pax_time(text: bytes) -> int:
    negative = text.startswith(b"-")
    seconds, _, fraction = text.removeprefix(b"-").partition(b".")
    if not (seconds + fraction).isdigit() or len(seconds) > 19:
        raise Refused(f"archive has a malformed pax time: {printable(text)!r}")
    time = int(seconds or b"0") * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -time if negative else time


def _pax_xattrs(pax: dict[bytes, bytes]) -> dict[bytes, bytes]:
    xattrs = {key[len(_XATTR) :]: value for key, value in pax.items() if key.startswith(_XATTR)}
    if acl.ACCESS not in xattrs and acl.DEFAULT not in xattrs:
        xattrs |= {key: value for key, value in pax.items() if key.startswith(_ACL_TEXT)}
    return xattrs or _NONE
