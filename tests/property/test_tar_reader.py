"""The tar reader reads valid archives as `tarfile` does, however the bytes are cut into pieces."""

import io
import tarfile
from collections.abc import Iterator

from hypothesis import example, given
from hypothesis import strategies as st

from engine.diff.tar import TarReader
from engine.errors import Refused

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
