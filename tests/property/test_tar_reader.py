"""The tar reader reads valid archives as `tarfile` does, however the bytes are cut into pieces."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from engine.diff.budget import Budget
from engine.diff.rules import Rules
from engine.diff.sparse import placed
from engine.diff.tar import Entry, TarReader
from engine.errors import Refused
from engine.testing.archives import (
    SPARSE_FORMS,
    archive,
    checksummed,
    extended,
    member,
    pax_record,
    sparse_member,
)

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


@st.composite
def sparse_members(draw: st.DrawFn) -> bytes:
    end, parts = 0, []
    for _ in range(draw(st.integers(1, 30))):
        offset = end + draw(st.sampled_from([0, 1, 511, 4096, 10_000]))
        data = draw(st.sampled_from([b"", b"a", b"bc" * 300]))
        parts.append((offset, data))
        end = offset + len(data)
    size = end + draw(st.sampled_from([0, 1, 5000]))
    return sparse_member(draw(st.sampled_from(SPARSE_FORMS)), draw(NAMES).encode()[:90], size, parts)


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
            content(entry, reader.payload()),
        )
        for entry in reader
    ]


def content(entry: Entry, payload: Iterator[memoryview]) -> bytes:
    if entry.parts is None:
        return b"".join(payload)
    whole = bytearray(entry.size)
    for offset, piece in placed(entry.parts, payload):
        whole[offset : offset + len(piece)] = piece
    return bytes(whole)


def theirs(data: bytes) -> list[tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        return [
            (
                info.name.encode("utf-8", "surrogateescape").rstrip(b"/"),
                tarfile.REGTYPE if info.isreg() else info.type,
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


@given(st.lists(sparse_members(), min_size=1, max_size=4), st.lists(st.integers(0, 700), max_size=20))
def test_reads_sparse_files_as_tarfile_does(found: list[bytes], sizes: list[int]) -> None:
    data = archive(*(part for one in found for part in (one, member("between", data=b"b"))))
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


KINDS = st.sampled_from("00000000123456SSLKxxgV7\0N")
FIELDS = st.dictionaries(
    # Where a header has numbers and marks, and anywhere.
    st.sampled_from([100, 108, 116, 124, 136, 257, 329, 337, 345, 386, 398, 482, 483])
    | st.integers(0, 511),
    st.sampled_from(
        [b"\x80" + bytes(7) + b"\5", b"\xff" * 8, b"0000010\0", b" 7 \0", b"ustar  \0", b"\1"]
    )
    | st.binary(min_size=1, max_size=12),
    max_size=2,
)
EXTENSIONS = st.lists(
    st.builds(
        pax_record,
        st.sampled_from(["path", "linkpath", "size", "uid", "mtime", "SCHILY.xattr.user.x"]).map(
            str.encode
        )
        | st.sampled_from(
            ["major", "minor", "name", "map", "numblocks", "size", "offset", "numbytes"]
        ).map(lambda key: b"GNU.sparse." + key.encode()),
        st.sampled_from([b"", b"0", b"1", b"7", b"0,0", b"0,1", b"-1", b"name"]) | st.binary(max_size=5),
    ),
    max_size=4,
).map(b"".join)
BODIES = (
    st.sampled_from([b"", b"name\0", b"1\n0\n0\n".ljust(512, b"\0")])
    | EXTENSIONS
    | st.binary(max_size=700)
)


@st.composite
def wild(draw: st.DrawFn) -> bytes:
    """Return a member whose header has a good checksum, whatever else it says."""
    kind = draw(KINDS)
    body = draw(BODIES) if kind in "0SLKxgVN" else b""
    return member(
        draw(st.sampled_from(["f", "d/", "\xff"])), kind, body, fields=draw(st.just({}) | FIELDS)
    )


def test_any_bytes_are_read_or_refused() -> None:
    outcomes: Counter[str] = Counter()

    @given(st.lists(wild() | sparse_members(), min_size=1, max_size=8), st.binary(max_size=600))
    def check(found: list[bytes], after: bytes) -> None:
        data = b"".join(found) + after
        reader = TarReader([data])
        count, outcome = 0, "read to its end"
        try:
            for entry in reader:
                count += 1
                if entry.size < 1 << 24:
                    content(entry, reader.payload())
        except Refused:
            outcome = "refused"
        event(f"{outcome} after {count} entries")
        outcomes["all"] += 1
        outcomes[outcome] += 1
        outcomes["some entries"] += count > 0

    check()
    # Were most to end in their first header, nothing behind it would be looked at.
    assert outcomes["some entries"] > outcomes["all"] / 2
    assert min(outcomes["refused"], outcomes["read to its end"]) > outcomes["all"] / 10


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(511), b"x" * 512, b"x" * 511, b"\xff" * 1024])
def test_what_is_no_archive_is_empty_or_refused(data: bytes) -> None:
    try:
        assert not list(TarReader([data]))
    except Refused:
        assert data.strip(b"\0") or len(data) == 511


@given(st.binary(min_size=1, max_size=90).filter(lambda name: b"\0" not in name), st.integers(-600, 600))
def test_checksums_are_those_of_signed_or_unsigned_bytes(name: bytes, off: int) -> None:
    header = bytearray(member(name + b"\xff\x80"))
    blanked = header[:148] + b" " * 8 + header[156:512]
    good = {sum(blanked), sum(byte - 256 if byte > 127 else byte for byte in blanked)}
    for near in good:
        header[148:156] = b"%06o\0 " % (near + off)
        try:
            (entry,) = TarReader([archive(bytes(header))])
        except Refused:
            assert near + off not in good
        else:
            assert entry.name == name + b"\xff\x80"
            assert near + off in good


def test_all_pax_headers_before_an_entry_count() -> None:
    data = archive(
        extended({b"path": b"first", b"uid": b"7", b"SCHILY.xattr.user.a": b"1"}),
        extended({b"path": b"nobody's"}, "g"),
        extended({b"path": b"second", b"mtime": b"5"}),
        extended({b"SCHILY.xattr.user.b": b"2"}),
        member("header", uid=3, gid=4),
        member("next", uid=3),
    )
    one, two = TarReader([data])
    assert (one.name, one.uid, one.gid, one.mtime) == (b"second", 7, 4, 5_000_000_000)
    assert one.xattrs == {b"user.a": b"1", b"user.b": b"2"}
    assert (two.name, two.uid, two.xattrs) == (b"next", 3, {})


BEFORE_1970 = {
    "a second": (member("f", fields={136: b"\xff" * 12}), -1_000_000_000),
    "long ago": (member("f", fields={136: b"\xff" * 8 + bytes(4)}), -(1 << 32) * 1_000_000_000),
    "pax": (member("f", pax={b"mtime": b"-1"}), -1_000_000_000),
    "part of a second": (member("f", pax={b"mtime": b"-0.5"}), -500_000_000),
    "seconds and a part": (member("f", pax={b"mtime": b"-1.25"}), -1_250_000_000),
    "pax over a header": (member("f", mtime=5, pax={b"mtime": b"-7.000000001"}), -7_000_000_001),
}


@pytest.mark.parametrize(("data", "time"), BEFORE_1970.values(), ids=BEFORE_1970)
@pytest.mark.parametrize("kind", "0526")
def test_times_before_1970_are_read_and_become_1970(data: bytes, time: int, kind: str) -> None:
    last = bytearray(data[-512:])
    last[156:157] = kind.encode()
    last[157:158] = b"t"
    data = data[:-512] + checksummed(bytes(last))
    (entry,) = TarReader([archive(data)])
    assert entry.mtime == time
    rules = Rules(Budget(), name_bytes=255, whiteout_names=True)
    (operation,) = rules.operations(TarReader([archive(data)]))
    assert operation.entry.mtime == 0


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
