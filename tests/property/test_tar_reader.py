"""The tar reader reads valid archives as `tarfile` does, however the bytes are cut into pieces."""

import io
import tarfile
from collections.abc import Iterator

from hypothesis import example, given
from hypothesis import strategies as st

from engine.diff.tar import TarReader
from engine.errors import Refused
from engine.testing.archives import archive, member, pax_record

FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
PARTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40)
NAMES = st.lists(PARTS, min_size=1, max_size=6).map("/".join).filter(lambda n: n.strip("./ "))
TYPES = st.sampled_from(
    [
        tarfile.REGTYPE,
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
    ]
)


@st.composite
def members(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(draw(NAMES))
    info.type = draw(TYPES)
    info.mode = draw(st.integers(0, 0o7777))
    info.uid, info.gid = draw(st.integers(0, 0o7777777)), draw(st.integers(0, 0o7777777))
    info.mtime = draw(st.integers(0, 0o77777777777))
    data = draw(st.binary(max_size=1500)) if info.isreg() else b""
    info.size = len(data)
    if info.issym() or info.islnk():
        info.linkname = draw(NAMES)
    if info.isdev():
        info.devmajor, info.devminor = draw(st.integers(0, 4095)), draw(st.integers(0, 0o7777777))
    return info, data


def packed(format_: int, entries: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_, encoding="utf-8") as tar:
        for info, data in entries:
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:
                continue  # ustar cannot hold this name or number, and says so before it writes
    return file.getvalue()


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size
    yield data[at:]


def ours(pieces: Iterator[bytes]) -> list[tuple[object, ...]]:
    reader = TarReader(pieces)
    return [
        (
            entry.name.rstrip(b"/"),
            entry.type,
            entry.mode,
            entry.uid,
            entry.gid,
            entry.size,
            entry.mtime,
            entry.link,
            entry.major,
            entry.minor,
            b"".join(reader.payload()),
        )
        for entry in reader
    ]


def theirs(data: bytes) -> list[tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        return [
            (
                info.name.encode("utf-8", "surrogateescape").rstrip(b"/"),
                info.type,
                info.mode,
                info.uid,
                info.gid,
                info.size if info.isreg() else 0,
                int(info.mtime) * 1_000_000_000,
                info.linkname.encode("utf-8", "surrogateescape"),
                info.devmajor if info.isdev() and not info.isfifo() else 0,
                info.devminor if info.isdev() and not info.isfifo() else 0,
                tar.extractfile(info).read() if info.isreg() else b"",  # type: ignore[union-attr]
            )
            for info in tar
        ]


@given(FORMATS, st.lists(members(), max_size=6), st.lists(st.integers(0, 700), max_size=20))
def test_reads_what_tarfile_reads(
    format_: int, entries: list[tuple[tarfile.TarInfo, bytes]], sizes: list[int]
) -> None:
    data = packed(format_, entries)
    assert ours(cut(data, sizes)) == theirs(data)


@given(FORMATS, st.lists(members(), min_size=1, max_size=4), st.data())
def test_a_cut_archive_is_refused_or_shorter(
    format_: int, entries: list[tuple[tarfile.TarInfo, bytes]], data: st.DataObject
) -> None:
    whole = packed(format_, entries)
    length = data.draw(st.integers(0, len(whole)))
    expected = ours(iter([whole]))
    try:
        found = ours(iter([whole[:length]]))
    except Refused:
        return
    assert found == expected[: len(found)]
    # What ends between two members is an end; a cut within one must have been noticed.
    assert len(found) == len(expected) or length % 512 == 0


@given(st.binary(max_size=2000))
@example(b"\0" * 512)
@example(b"x" * 512)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        ours(iter([data]))
    except Refused:
        pass


@given(FORMATS, st.lists(members(), min_size=1, max_size=3), st.data())
def test_one_changed_bit_is_read_or_refused(
    format_: int, entries: list[tuple[tarfile.TarInfo, bytes]], data: st.DataObject
) -> None:
    whole = bytearray(packed(format_, entries))
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        ours(iter([bytes(whole)]))
    except Refused:
        pass


_MEANT = ("path", "linkpath", "size", "uid", "gid", "mtime", "SCHILY.xattr.a", "GNU.sparse.major")
KEYS = st.sampled_from(["x", "ab", "uname", "path2", "sizes", *_MEANT]).map(str.encode) | st.binary(
    min_size=1, max_size=4
)
RECORDS = st.builds(pax_record, KEYS, st.just(b"7") | st.binary(max_size=30))


def plainly_read(body: bytes) -> dict[bytes, bytes]:
    """Read pax records as their definition says it."""
    records: dict[bytes, bytes] = {}
    while body:
        digits, space, _ = body.partition(b" ")
        if not space or not digits.isdigit() or len(digits) > 20 or digits.startswith(b"0"):
            raise Refused("length")
        record, body = body[: int(digits)], body[int(digits) :]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != int(digits) or record[-1:] != b"\n" or not key or not equals:
            raise Refused("record")
        if len(record) <= len(digits) + 1 or key.startswith(b"GNU.sparse."):
            raise Refused("record")
        if b"\0" in key or (b"\0" in value and not key.startswith(b"SCHILY.xattr.")):
            raise Refused("NUL")
        records[key] = value
    return records


@given(st.lists(RECORDS, max_size=8), st.data())
def test_pax_records_are_read_as_they_are_defined(records: list[bytes], data: st.DataObject) -> None:
    """However the reader hurries over those that mean nothing: right ones, and with a byte changed."""
    body = b"".join(records)
    if body and data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(body) - 1))
        byte = data.draw(st.sampled_from(b"\0 =\n0159x") | st.integers(0, 255))
        body = body[:position] + bytes([byte]) + body[position + data.draw(st.integers(0, 1)) :]
    try:
        expected = plainly_read(body)
    except Refused:
        expected = None
    try:
        (entry,) = TarReader([archive(member("x", "x", body), member("f", uid=3, gid=4))])
    except Refused:
        # Well-formed, a record may still say a number that is none.
        assert expected is None or expected.keys() & {b"size", b"uid", b"gid", b"mtime"}
        return
    assert expected is not None
    assert entry.name == (expected.get(b"path") or b"f")
    assert entry.link == expected.get(b"linkpath", b"")
    assert (entry.uid, entry.gid) == tuple(
        int(expected.get(k) or n) for k, n in ((b"uid", 3), (b"gid", 4))
    )
    prefix = b"SCHILY.xattr."
    xattrs = {k.removeprefix(prefix): v for k, v in expected.items() if k.startswith(prefix)}
    assert entry.xattrs == xattrs
