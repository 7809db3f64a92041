"""Sparse files: every form that tools write becomes the same file, holes stay holes, maps are strict."""

import errno
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.diff import sparse
from engine.diff.apply import apply_layer
from engine.diff.tar import TarReader
from engine.errors import Refused, ResourceExhausted
from engine.oci.digest import digest_of
from engine.stores import Stores
from engine.testing.archives import (
    SPARSE_FORMS,
    archive,
    extended,
    member,
    pax_record,
    sparse_member,
)
from tests.conftest import peer
from tests.support import BACKENDS, apply_stack, tree_of

Parts = Sequence[tuple[int, bytes]]
TIB = 1 << 40

# -- maps -------------------------------------------------------------------------------------


def _map(text: bytes, count: int = 1, **more: bytes) -> bytes:
    about = {b"map": text, b"numblocks": b"%d" % count}
    about |= {key.encode(): value for key, value in more.items()}
    return member("f", pax={b"GNU.sparse." + key: value for key, value in about.items()})


def _pairs(*keys: str, value: bytes = b"0") -> bytes:
    records = [pax_record(b"GNU.sparse." + key.encode(), value) for key in keys]
    count = pax_record(b"GNU.sparse.numblocks", b"1")
    return member("pax", "x", b"".join(records) + count) + member("f")


def _lines(body: bytes) -> bytes:
    return member("f", "0", body, pax={b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"})


_MALFORMED, _UNKNOWN, _OVERLAP = "malformed map", "form that is not known", "overlap or end beyond"
_IMPOSSIBLE = "which it cannot be"

REFUSED = {
    "no map in the data": (_lines(b""), _MALFORMED),
    "no count": (member("f", pax={b"GNU.sparse.map": b"0,0"}), _MALFORMED),
    "a larger count": (_map(b"0,0", 2), _MALFORMED),
    "a smaller count": (_map(b"0,0,0,0", 1), _MALFORMED),
    "half a part": (_map(b"0,0,0", 1), _MALFORMED),
    "half a pair": (_pairs("offset"), _MALFORMED),
    "a pair the other way": (_pairs("numbytes", "offset"), _MALFORMED),
    "two offsets": (_pairs("offset", "offset"), _MALFORMED),
    "a comma in a pair": (_pairs("offset", "numbytes", value=b"0,0"), _MALFORMED),
    "a negative number": (_map(b"-1,0"), _MALFORMED),
    "a number with a plus": (_map(b"+1,0"), _MALFORMED),
    "an empty number": (_map(b",0"), _MALFORMED),
    "a number with a space": (_map(b" 1,0"), _MALFORMED),
    "an octal number": (_map(b"0o7,0"), _MALFORMED),
    "a number beyond all": (_map(b"%d,0" % 2**63), _MALFORMED),
    "a long number": (_map(b"0" * 20 + b",0"), _MALFORMED),
    "a line without end": (_lines(b"1" * 1024), _MALFORMED),
    "lines that are missing": (_lines(b"9\n0\n0\n".ljust(512, b"\0")), _MALFORMED),
    "a count without lines": (_lines(b"%d\n".ljust(512, b"\0") % (2**62)), _MALFORMED),
    "a map that is no whole block": (_lines(b"1\n0\n0\n"), _MALFORMED),
    "too many parts": (sparse_member("1.0", b"f", 99, [(n, b"x") for n in range(11)]), "over 10 parts"),
    "too many parts in pax": (
        sparse_member("0.1", b"f", 99, [(n, b"x") for n in range(11)]),
        "over 10 parts",
    ),
    "too many of GNU's": (
        sparse_member("S", b"f", 99, [(n, b"x") for n in range(30)]),
        "over 10 parts",
    ),
    "less data than parts": (_map(b"0,9", size=b"9"), "has 0 bytes for parts of 9"),
    "more data than parts": (
        member("f", "0", b"xx", pax={b"GNU.sparse.map": b"0,1", b"GNU.sparse.numblocks": b"1"}),
        "has 2 bytes for parts of 1",
    ),
    "no size": (_map(b"0,9"), _OVERLAP),
    "parts beyond all numbers": (_map(b"%d,1" % (2**63 - 1), size=b"%d" % (2**63 - 1)), _OVERLAP),
    "an unknown form": (_map(b"0,0", major=b"2", minor=b"0"), _UNKNOWN),
    "half a form": (_map(b"0,0", major=b"1"), _UNKNOWN),
    "a count alone": (member("f", pax={b"GNU.sparse.numblocks": b"0"}), _UNKNOWN),
    "a size alone": (member("f", pax={b"GNU.sparse.size": b"9"}), _UNKNOWN),
    "a malformed size": (_map(b"0,0", size=b"-1"), "malformed pax GNU.sparse.size"),
    "a size beyond all numbers": (_map(b"0,0", size=b"%d" % 2**63), "malformed pax GNU.sparse.size"),
    "a folder": (
        member("d/", "5", pax={b"GNU.sparse.map": b"0,0", b"GNU.sparse.numblocks": b"1"}),
        _IMPOSSIBLE,
    ),
    "a hard link": (
        member("h", "1", link="f", pax={b"GNU.sparse.map": b"0,0", b"GNU.sparse.numblocks": b"1"}),
        _IMPOSSIBLE,
    ),
    "two maps": (
        extended({b"GNU.sparse.numblocks": b"0"}) + sparse_member("S", b"f", 1, []),
        _IMPOSSIBLE,
    ),
    "type S of another tar": (member("f", "S"), "a header that is not GNU's"),
    "GNU's map cut off": (sparse_member("S", b"f", 99, [(9, b"")] * 5)[:600], "cut off"),
    "GNU's with a bad number": (
        sparse_member("S", b"f", 99, [])[:386] + b"9" * 24 + sparse_member("S", b"f", 99, [])[410:],
        "malformed|checksum",
    ),
    **{
        f"{form}: {name}": (sparse_member(form, b"f", size, parts), _OVERLAP)
        for form in SPARSE_FORMS
        for name, (size, parts) in {
            "overlap": (2**20, [(0, b"abc"), (2, b"d")]),
            "out of order": (2**20, [(8192, b"a"), (0, b"b")]),
            "beyond the end": (4, [(2, b"abc")]),
            "an empty part beyond the end": (4, [(5, b"")]),
        }.items()
    },
}


@pytest.mark.parametrize(("data", "says"), REFUSED.values(), ids=REFUSED)
def test_a_bad_map_is_refused(data: bytes, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.limits.SPARSE_PARTS", 10)
    with pytest.raises(Refused, match=says):
        list(TarReader([data + archive()]))


def test_a_line_without_end_is_not_read_to_its_end() -> None:
    blocks = iter([b"1" * 512] * 1000)
    with pytest.raises(Refused, match=_MALFORMED):
        sparse.parts_in_data(blocks)
    assert len(list(blocks)) == 999


@st.composite
def holes(draw: st.DrawFn) -> tuple[int, Parts]:
    end, parts = 0, []
    for _ in range(draw(st.integers(0, 50))):
        offset = end + draw(st.sampled_from([0, 1, 511, 4096, 10_000]))
        data = draw(st.sampled_from([b"", b"a", b"bc" * 300]))
        parts.append((offset, data))
        end = offset + len(data)
    return end + draw(st.sampled_from([0, 1, 5000])), parts


@given(st.sampled_from(SPARSE_FORMS), holes(), st.integers(1, 700))
def test_every_form_is_read_to_the_same_parts(form: str, made: tuple[int, Parts], cut: int) -> None:
    size, parts = made
    parts = parts or [(size, b"")]  # as tar does: Go takes 0.x without parts for no sparse file
    data = archive(sparse_member(form, b"name", size, parts), member("next", data=b"n"))
    reader = TarReader(data[at : at + cut] for at in range(0, len(data), cut))
    entries = iter(reader)
    entry = next(entries)
    assert (entry.name, entry.type, entry.size) == (b"name", b"0", size)
    assert entry.parts is not None
    content = bytearray(size)
    for offset, piece in sparse.placed(entry.parts, reader.payload()):
        content[offset : offset + len(piece)] = piece
    expected = bytearray(size)
    for offset, part in parts:
        expected[offset : offset + len(part)] = part
    assert content == expected
    # What is not taken is passed over, the map before it too.
    assert next(entries).name == b"next"
    assert b"".join(reader.payload()) == b"n"
    touched = {at // 512 for offset, part in parts for at in range(offset, offset + len(part))}
    assert sparse.blocks(entry.parts, 512) == len(touched)


def test_of_names_and_sizes_those_of_the_sparse_file_count() -> None:
    about = {b"GNU.sparse.name": b"real", b"GNU.sparse.realsize": b"7", b"path": b"other"}
    (entry,) = TarReader([extended(about) + _map(b"0,0", size=b"")])  # two pax headers, one entry
    assert (entry.name, entry.size) == (b"real", 7)
    (entry,) = TarReader([extended(about) + _map(b"0,0", size=b"9")])
    assert (entry.name, entry.size) == (b"real", 9)


# -- trees ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files with holes: many small parts, none at all, one far away."""
    folder = tmp_path_factory.mktemp("holed") / "tree"
    folder.mkdir(mode=0o755)
    for name, size, parts in (
        ("many", 10_000_000, [(n * 100_000, b"x" * (n + 1)) for n in range(60)]),
        ("hole", 1 << 30, []),
        ("far", 1 << 31, [((1 << 31) - 5, b"far")]),
    ):
        with (folder / name).open("wb") as file:
            for offset, data in parts:
                file.seek(offset)
                file.write(data)
            file.truncate(size)
    (folder / "plain").write_bytes(b"plain")
    return folder


def _written_by(tool: str, folder: Path) -> bytes:
    words = ["-C", str(folder), "-cf", "-", *sorted(path.name for path in folder.iterdir())]
    if tool == "bsdtar":
        command = [peer("bsdtar"), "--format=pax", *words]
    elif tool == "S":
        command = [peer("tar"), "--sparse", "--format=gnu", *words]
    else:
        command = [peer("tar"), "--sparse", "--format=pax", f"--sparse-version={tool}", *words]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.root
@pytest.mark.compat
@pytest.mark.usefixtures("umask_0")
@pytest.mark.parametrize("tool", [*SPARSE_FORMS, "bsdtar"])
def test_what_tar_packs_is_unpacked_with_its_holes(
    tool: str, stores: Stores, holed: Path, tmp_path: Path
) -> None:
    layer = _written_by(tool, holed)
    assert len(layer) < 1 << 20
    backend = stores.snapshotter("overlay")
    top = apply_stack(backend, [layer])
    (mount,) = backend.view("view", top)
    here = Path(mount.source)
    for path in holed.iterdir():
        ours, theirs = (here / path.name).stat(), path.stat()
        assert (ours.st_size, ours.st_mtime_ns // 10**9) == (theirs.st_size, theirs.st_mtime_ns // 10**9)
        assert ours.st_blocks <= theirs.st_blocks
        assert _data(here / path.name) == _data(path)
    assert backend.usage(top).size < 1 << 20


def _data(path: Path) -> dict[int, bytes]:
    """Return all blocks of a file that are not zeros, without reading its holes."""
    found = {}
    with path.open("rb") as file:
        at = 0
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                return found
            block = os.pread(file.fileno(), 4096, at)
            if block.strip(b"\0"):
                found[at] = block
            at += 4096


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tebibyte_of_holes_costs_nothing(backend: str, stores: Stores) -> None:
    """Nor does it as the parent of another layer, which the copy backend copies."""
    parts = [(5, b"first"), (TIB, b"second")]
    layers = [archive(sparse_member("1.0", b"f", 2 * TIB, parts)), archive(member("g"), member("h/i"))]
    snapshotter = stores.snapshotter(backend)
    top = apply_stack(snapshotter, layers)
    assert sum(snapshotter.usage(info.key).size for info in snapshotter.walk()) < 200_000
    assert snapshotter.usage(snapshotter.stat(top).parent).size == 2 * 4096
    for place in sorted(stores.root.snapshots.glob("*/*/fs/f")):
        assert place.stat().st_size == 2 * TIB
        assert place.stat().st_blocks <= 4 * 8
        assert [block.strip(b"\0") for block in _data(place).values()] == [b"first", b"second"]


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
def test_a_file_system_that_cannot_hold_such_a_file_says_so(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_file: int, _size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", too_large)
    layer = archive(sparse_member("1.0", b"f", 8 * TIB, []))
    backend = stores.snapshotter("overlay")
    backend.prepare("key")
    with pytest.raises(ResourceExhausted, match="larger than the file system"):
        apply_layer([layer], backend.sink("key"), diff_id=digest_of(layer))


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
def test_a_sparse_file_is_replaced_and_linked_as_any_other(stores: Stores, tmp_path: Path) -> None:
    layer = archive(
        sparse_member("1.0", b"a", 9000, [(8192, b"end")]),
        member("b", "1", link="a"),
        sparse_member("S", b"c", 100_000, [(0, b"gone")]),
        sparse_member("0.1", b"c", 10_000, [(4096, b"stays")]),
    )
    backend = stores.snapshotter("overlay")
    top = apply_stack(backend, [layer])
    tree = tree_of(stores, "overlay", top, tmp_path / "mnt")
    assert {name: (entry.size, entry.links) for name, entry in tree.items()} == {
        b"a": (9000, (b"b",)),
        b"b": (9000, (b"a",)),
        b"c": (10_000, ()),
    }
    assert backend.usage(top).size == 2 * 4096
