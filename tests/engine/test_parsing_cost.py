"""What is parsed costs what its bytes are worth: counted in steps and bytes of memory, not by the clock.

`python -m benchmarks hostile` gives the seconds.
"""

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import limits
from engine.archive.contents import find_images
from engine.archive.intake import Intake, Nobody
from engine.archive.opening import open_source
from engine.archive.source import TarSource
from engine.diff.tar import Entry, TarReader
from engine.errors import Refused, printable
from engine.fs.room import Room
from engine.limits import MIB
from engine.oci.documents import decode_json, parse_config, parse_index
from engine.progress import silent
from engine.testing.archives import archive, member
from tests.engine.image_files import AMD64, MANIFEST, docker_files, tar_of

F = member("f")
A = f"sha256:{'a' * 64}"


@contextmanager
def memory_below(bound: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < bound
    finally:
        tracemalloc.stop()


def steps(call: Callable[[], object]) -> int:
    """Return how many lines of Python a call goes through."""
    count = 0

    def trace(_frame, _event, _argument):
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def read(*members: bytes) -> list[Entry]:
    return list(TarReader([archive(*members)]))


# -- archives ---------------------------------------------------------------------------------

_FEW = 1000  # steps: some 100 for each header and file


@pytest.mark.parametrize("kind", "xg")
@pytest.mark.parametrize(
    "record", [b"5 x=\n", b"6 xy=\n", b"7 x==\n\n", b"9 path2=\n", b"31 %s=\n" % (b"k" * 26)]
)
def test_t_04_short_records_that_mean_nothing_cost_no_step_each(kind, record):
    header = member("pax", kind, record * (MIB // len(record)))
    assert steps(lambda: read(header, F)) < _FEW


def test_t_04_records_that_count_are_bounded_over_the_layer():
    """Also where each header has few enough."""
    records = b"8 uid=1\n" * 2 * limits.PAX_RECORDS
    with pytest.raises(Refused, match="pax records for each entry"):
        read(*[member("pax", "x", records) + F] * 1500)


def test_t_04_headers_in_a_row_are_not_copied_again_and_again():
    xattrs = [b"25 SCHILY.xattr.k%06d=\n" % number for number in range(20_000)]
    headers = [member("pax", "x", b"".join(xattrs))] + [member("pax", "x", xattrs[0])] * 14
    with memory_below(12 * MIB):
        (entry,) = read(*headers, F)
    assert len(entry.xattrs) == 20_000


def test_what_tools_write_is_far_within():
    """bsdtar writes some 20 records for a file, and one for each xattr."""
    times = {
        b"atime": b"1.5",
        b"ctime": b"2.5",
        b"LIBARCHIVE.creationtime": b"3.5",
        b"SCHILY.nlink": b"1",
    }
    xattrs = {b"SCHILY.xattr.user.%d" % number: b"v" for number in range(limits.XATTRS)}
    entries = read(*[member("f", pax={**times, **xattrs})] * 3000)
    assert all(len(entry.xattrs) == limits.XATTRS for entry in entries)


def test_t_09_signed_checksums_cost_no_step_for_each_byte():
    header = bytearray(member(b"\xff" * 99))
    blanked = header[:148] + b" " * 8 + header[156:512]
    header[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in blanked)
    assert steps(lambda: read(bytes(header))) < _FEW


# -- documents --------------------------------------------------------------------------------

_SIZE = 20 * MIB
_OVER = {
    "numbers": b"0,",
    "arrays": b"[],",
    "objects": b"{},",
    "strings": b'"",',
    "members": b'{"a":0},',
    "not even JSON": b"[{",
    "quotes": b'"',
}


@pytest.mark.parametrize("unit", _OVER.values(), ids=_OVER)
def test_m_03_a_document_of_many_values_is_refused_before_it_is_decoded(unit):
    data = b"[" + unit * (_SIZE // len(unit) - 1)
    with memory_below(MIB), pytest.raises(Refused, match="over 700000"):
        decode_json(data, "it", _SIZE)


def test_m_03_characters_outside_ascii_are_not_blown_up():
    for text in (b'"\\ud83d\\ude00' + b"x" * limits.JSON_WIDE + b'"', "😀".encode() * (3 * MIB)):
        with memory_below(MIB), pytest.raises(Refused, match="not plain ASCII"):
            decode_json(text, "it", _SIZE)


def test_m_03_a_string_without_an_end_is_passed_over_once():
    """Tried anew from each of its quotes, it would take hours."""
    with pytest.raises(Refused, match="Unterminated"):
        decode_json(b'"' + b'\\"' * (10 * MIB - 1), "it", _SIZE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: "{" + ",".join(f'"{n:x}":0' for n in range(limits.JSON_TOKENS // 3)) + "}",
        lambda: "[" + '[{"":[{}]}],' * (limits.JSON_TOKENS // 7 - 1) + "0]",
    ],
    ids=["keys", "nested"],
)
def test_m_03_what_is_just_within_takes_little_memory(make):
    data = make().encode().ljust(_SIZE)
    with memory_below(100 * MIB):
        decode_json(data, "it", _SIZE)
    with pytest.raises(Refused, match="over 700000"):
        decode_json(data.rstrip()[:-1] + b"," * 8, "it", _SIZE)


def test_large_documents_of_real_tools_are_read(tmp_path):
    entry = {
        "mediaType": MANIFEST,
        "digest": A,
        "size": 1234,
        "platform": {"architecture": "arm64", "os": "linux", "variant": "v8", "os.version": "1"},
        "annotations": {f"org.opencontainers.{key}": "x" for key in range(4)},
    }
    index = {"schemaVersion": 2, "manifests": [entry] * limits.INDEX_ENTRIES}
    data = json.dumps(index, separators=(",", ":")).encode()
    assert len(parse_index(data).manifests) == limits.INDEX_ENTRIES

    step = {
        "created": "2026-01-01T00:00:00Z",
        "created_by": "RUN " + "a, b: {c}; " * 50,
        "empty_layer": True,
    }
    config = {**AMD64, "history": [step] * 5000, "rootfs": {"type": "layers", "diff_ids": []}}
    assert parse_config(json.dumps(config).encode(), 0).rootfs.type == "layers"

    layers = [f"blobs/sha256/{number:064x}" for number in range(limits.LAYERS)]
    images = [
        {"Config": f"blobs/sha256/{n:064x}", "RepoTags": [f"a/b:{n}"], "Layers": layers}
        for n in range(500)
    ]
    data = json.dumps(images, separators=(",", ":")).encode()
    assert len(data) > 0.95 * _SIZE
    assert len(found(tar_of(tmp_path / "image.tar", {"manifest.json": data}))) == 500


def test_m_03_images_of_a_docker_archive_are_bounded(tmp_path, monkeypatch):
    files = docker_files()
    (image,) = json.loads(files["manifest.json"])
    files["manifest.json"] = json.dumps([image] * 50).encode()
    path = tar_of(tmp_path / "image.tar", files)
    assert len(found(path)) == 50
    monkeypatch.setattr(limits, "INDEX_ENTRIES", 49)
    with pytest.raises(Refused, match="over 49 images"):
        found(path)


def test_m_03_documents_are_bounded_over_all_images(tmp_path, stores, monkeypatch):
    files = docker_files()
    monkeypatch.setattr(limits, "ARCHIVE_DOCUMENTS", 3 * len(files["config.json"]))
    with open_source(tar_of(tmp_path / "image.tar", files), tmp_path, quiet) as source:
        intake = Intake(source.files, stores.content, "lease", silent, Room(tmp_path), Nobody())
        for _ in range(3):
            intake.small("config.json", limits.CONFIG)
        with pytest.raises(Refused, match="documents of all images have over"):
            intake.small("config.json", limits.CONFIG)


def test_a_name_in_an_error_costs_what_is_shown_of_it():
    for name in ("\n" * 5_000_000, b"\xff" * 5_000_000):
        with memory_below(MIB):
            assert len(printable(name)) == 120


@pytest.mark.parametrize(
    "name", ["é" * 119 + "ab", "a" * 120, "😀" * 121, b"\xff" * 29 + b"abcd", "é" * 130]
)
def test_a_name_in_an_error_is_cut_as_before(name):
    whole = printable(name, 10_000)
    assert printable(name) == (whole if len(whole) <= 120 else whole[:119] + "…")


# -- files in an archive ----------------------------------------------------------------------


def quiet(_total: int, _done: int) -> None:
    pass


def found(path: Path) -> object:
    with open_source(path, path.parent, quiet) as source:
        return find_images(source.files, str(path), "").images


def opened(path: Path) -> None:
    with open_source(path, path.parent, quiet):
        pass


def names(path: Path, count: int, form: str) -> Path:
    with path.open("wb") as file:
        file.writelines(member(form.format(number)) for number in range(count))
    return path


_NAMES = {
    "8 KiB": "{:08192x}",
    "4 KiB": "{:04096x}",
    "many parts": "a/" * 2000 + "{}",
    "in and out": "a/../" * 800 + "{}",
    "not ASCII": "😀" * 1000 + "{}",
}


@pytest.mark.parametrize("form", _NAMES.values(), ids=_NAMES)
def test_m_16_names_are_bounded_over_the_archive(tmp_path, form):
    path = names(tmp_path / "a.tar", 5000, form)
    with memory_below(30 * MIB), pytest.raises(Refused, match="bytes"):
        opened(path)


def test_m_16_links_count_as_names(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ARCHIVE_NAMES", 1000)
    (tmp_path / "a.tar").write_bytes(archive(*(member(str(n), "1", link="x" * 99) for n in range(11))))
    with pytest.raises(Refused, match="over 1000 bytes of names"):
        opened(tmp_path / "a.tar")


def test_m_16_members_of_real_archives_take_little_memory(tmp_path):
    path = names(tmp_path / "a.tar", 20_000, "blobs/sha256/{:064x}")
    with memory_below(12 * MIB):
        opened(path)


@pytest.mark.parametrize("size", [1 << 40, (1 << 63) - 1])
def test_m_04_a_label_beyond_the_end(tmp_path, size):
    """What is skipped was not held against the file's size, nor against what a seek can take."""
    label = member("v", "V", fields={124: b"\x80" + size.to_bytes(11, "big")})
    (tmp_path / "a.tar").write_bytes(archive(label, F))
    with pytest.raises(Refused, match="cut off"):
        opened(tmp_path / "a.tar")


def test_m_16_files_that_repeat_a_name_are_compared_within_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ARCHIVE_TWINS", 3 * MIB)
    twin = member("f", data=bytes(MIB))
    (tmp_path / "a.tar").write_bytes(archive(*[twin] * 4))
    opened(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(archive(*[twin] * 5))
    with pytest.raises(Refused, match="repeats over"):
        opened(tmp_path / "a.tar")


class _StopError(Exception):
    pass


@pytest.mark.parametrize("packed", [False, True])
def test_reading_an_archive_can_be_ended_after_any_piece(tmp_path, packed):
    data = archive(*(member(f"{number}", data=bytes(MIB)) for number in range(20)))
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    told: list[tuple[int, int]] = []

    def report(total: int, done: int) -> None:
        told.append((total, done))
        if len(told) == stop_at:
            raise _StopError

    stop_at = 0
    with open_source(path, tmp_path, report):
        pass
    assert len(told) >= 20 * (1 + packed)
    assert all(0 <= done <= total for total, done in told)
    for stop_at in (1, len(told)):
        told.clear()
        with pytest.raises(_StopError), open_source(path, tmp_path, report):
            pass
        assert len(told) == stop_at
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


def test_comparing_can_be_ended(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(archive(member("f", data=bytes(8 * MIB)), member("f", data=bytes(8 * MIB))))
    told: list[int] = []
    with path.open("rb") as file:
        TarSource(file.fileno(), lambda _total, done: told.append(done))
    assert len([done for done in told if done > 8 * MIB]) >= 8
