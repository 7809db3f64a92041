"""What images that are meant to cost time or memory do cost: `python -m benchmarks hostile`.

Each case runs in a process of its own. It may end well or be refused; over a second, or over 150 MB in
one process, is too much.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from benchmarks import hostile_images
from engine import limits
from engine.archive.contents import find_images
from engine.archive.opening import open_source
from engine.diff.tar import TarReader
from engine.errors import EngineError
from engine.limits import MIB
from engine.oci.documents import parse_config, parse_index
from engine.testing.archives import END, member

__all__ = ["CASES", "Case", "main"]

_SECONDS, _PEAK = 1.0, 150e6
_GIVEN_UP = 120  # seconds


@dataclass(frozen=True)
class Case:
    """A name, what puts the input into an empty folder, and what is measured on that folder."""

    name: str
    make: Callable[[Path], object]
    run: Callable[[Path], object]


def _file(pieces: Callable[[], Iterable[bytes]], name: str = "input") -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.writelines(pieces())

    return make


# -- layers: the reader alone -----------------------------------------------------------------


def _read_layer(folder: Path) -> None:
    with (folder / "input").open("rb") as file:
        for _ in TarReader(iter(lambda: file.read(MIB), b"")):
            pass


def _layer(name: str, *members: bytes, size: int = 64 * MIB) -> Case:
    """Return the case of a layer of `size` bytes that is `members` again and again."""
    unit = b"".join(members)
    return Case(name, _file(lambda: [*repeat(unit, size // len(unit)), END]), _read_layer)


def _signed() -> bytes:
    """Return a header whose checksum is the one of signed bytes."""
    header = bytearray(member(b"\xff" * 99))
    blanked = header[:148] + b" " * 8 + header[156:512]
    header[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in blanked)
    return bytes(header)


_F = member("f")
LAYERS = (
    _layer("ordinary empty files", _F),
    _layer("ordinary files with a time in pax", member("f", pax={b"mtime": b"1234567890.123456789"})),
    _layer("pax records of 5 bytes", member("x", "x", b"5 x=\n" * (MIB // 5)), _F),
    _layer("pax records of 8 bytes that count", member("x", "x", b"8 uid=1\n" * (MIB // 8)), _F),
    _layer("100 pax records for each file", member("x", "x", b"5 x=\n" * 100), _F, size=16 * MIB),
    _layer("global pax records of 5 bytes", member("x", "g", b"5 x=\n" * (MIB // 5)), _F),
    _layer("a pax record of 1 MiB", member("x", "x", b"1048570 x=%s\n" % (b"x" * 1048559)), _F),
    _layer("GNU names of 1 MiB, 15 in a row", *repeat(member("x", "L", b"n" * MIB), 15), _F),
    _layer("GNU labels, 15 in a row", member("v", "V") * 15, _F),
    _layer("signed checksums", _signed()),
)

# -- documents --------------------------------------------------------------------------------


def _text(size: int, unit: bytes, before: bytes = b"[", after: bytes = b"0]") -> bytes:
    """Return a text of at most `size` bytes, of `unit` again and again."""
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def _keys(size: int) -> bytes:
    members = ",".join(f'"{number:x}":0' for number in range(limits.JSON_TOKENS // 3 - 1))
    return b"{" + members.encode().ljust(size - 2) + b"}"


def _padded(size: int, unit: bytes, tokens: int) -> bytes:
    """Return a text just within the bound on tokens, of which `unit` has so many."""
    return _text(len(unit) * (limits.JSON_TOKENS // tokens - 1), unit).ljust(size)


SHAPES: dict[str, Callable[[int], bytes]] = {
    "numbers": lambda size: _text(size, b"0,"),
    "empty arrays": lambda size: _text(size, b"[],"),
    "empty objects": lambda size: _text(size, b"{},"),
    "empty strings": lambda size: _text(size, b'"",'),
    "objects, just within": lambda size: _padded(size, b'{"":0},', 4),
    "nested, just within": lambda size: _padded(size, b'[{"":[{"":{}}]}],', 10),
    "keys, just within": _keys,
    "one string of escapes": lambda size: _text(size, b"\\n", b'"', b'"'),
    "one string, one wide character": lambda size: _text(size, b"x", b'"\\ud83d\\ude00', b'"'),
    "quotes without an end": lambda size: _text(size, b'\\"', b'"', b""),
    "long numbers": lambda size: _text(size, b"9" * 4300 + b","),
    "one key of control characters": lambda size: _text(size, b"\\n", b'{"', b'":0}'),
}


def _find(folder: Path) -> None:
    with open_source(folder, folder, lambda _total, _done: None) as source:
        find_images(source.files, str(folder), "")


def _documents() -> Iterator[Case]:
    for shape, text in SHAPES.items():
        yield Case(
            f"manifest.json of 20 MiB: {shape}",
            _file(lambda text=text: [text(20 * MIB)], "manifest.json"),
            _find,
        )
        yield Case(
            f"config of 8 MiB: {shape}",
            _file(lambda text=text: [text(limits.CONFIG)]),
            lambda folder: parse_config((folder / "input").read_bytes(), 1),
        )


def _large_index() -> Iterable[bytes]:
    platform = {"architecture": "arm64", "os": "linux", "variant": "v8"}
    entries = [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": f"sha256:{number:064x}",
            "size": 1234,
            "platform": platform,
            "annotations": {"org.opencontainers.image.ref.name": f"v{number}"},
        }
        for number in range(limits.INDEX_ENTRIES)
    ]
    yield json.dumps({"schemaVersion": 2, "manifests": entries}, separators=(",", ":")).encode()


def _large_docker() -> Iterable[bytes]:
    layers = [f"blobs/sha256/{number:064x}" for number in range(100)]
    images = [
        {"Config": f"{number:064x}.json", "RepoTags": [f"a/b:{number}"], "Layers": layers}
        for number in range(1_000)
    ]
    yield json.dumps(images).encode()


DOCUMENTS = (
    *_documents(),
    Case(
        "an ordinary index of 10,000 entries",
        _file(_large_index),
        lambda folder: parse_index((folder / "input").read_bytes()),
    ),
    Case(
        "an ordinary manifest.json, 1,000 images of 100 layers",
        _file(_large_docker, "manifest.json"),
        _find,
    ),
)

# -- archives: finding their members ----------------------------------------------------------


def _open(folder: Path) -> None:
    with open_source(folder / "input", folder, lambda _total, _done: None):
        pass


def _members(count: int, name: Callable[[int], str]) -> Callable[[Path], object]:
    return _file(lambda: [*(member(name(number)) for number in range(count)), END])


def _twins(folder: Path) -> None:
    """Write two members of one name and 8 GiB, all holes."""
    header = member("f", fields={124: b"\x80" + (8 << 30).to_bytes(11, "big")})
    with (folder / "input").open("wb") as file:
        for _ in range(2):
            file.write(header)
            file.seek(8 << 30, os.SEEK_CUR)
        file.write(END)


ARCHIVES = (
    Case(
        "an ordinary archive of 90,000 blobs",
        _members(90_000, lambda n: f"blobs/sha256/{n:064x}"),
        _open,
    ),
    Case("archive, 20,000 names of 8 KiB", _members(20_000, lambda n: f"{n:08192x}"), _open),
    Case("archive, 20,000 names of 4 KiB", _members(20_000, lambda n: f"{n:04096x}"), _open),
    Case("archive, names of 2,000 parts", _members(20_000, lambda n: "a/" * 2000 + str(n)), _open),
    Case("archive, names just within", _members(97_000, lambda n: f"{n:0160x}"), _open),
    Case("archive, one name twice, 8 GiB of holes", _twins, _open),
)

IMAGES = tuple(Case(*parts) for parts in hostile_images.cases())

CASES = {case.name: case for case in (*LAYERS, *DOCUMENTS, *ARCHIVES, *IMAGES)}


# -- measuring --------------------------------------------------------------------------------


def _measure(case: Case, folder: Path) -> dict[str, object]:
    start = time.perf_counter()
    try:
        case.run(folder)
        outcome = "done"
    except EngineError as error:
        outcome = str(error).replace(f"{folder}/", "")
    seconds = time.perf_counter() - start
    # Not ru_maxrss of itself, which keeps the peak of whoever started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": seconds, "peak_bytes": max(own, workers) * 1024, "outcome": outcome}


def _apart(case: Case) -> dict[str, object]:
    """Make a case's input and run it in another process."""
    # In memory, because the speed of a shared disk is not ours to measure.
    with tempfile.TemporaryDirectory(prefix="lamina-hostile-", dir="/dev/shm") as holder:
        case.make(Path(holder))
        command = [sys.executable, "-m", __spec__.name, case.name, holder]
        try:
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=_GIVEN_UP)
        except subprocess.TimeoutExpired:
            return {"seconds": float(_GIVEN_UP), "peak_bytes": 0, "outcome": "given up"}
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main(arguments: list[str]) -> int:
    """Run the cases whose names hold one of the words asked for; return 1 if any costs too much."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks hostile", description=__doc__)
    parser.add_argument("words", nargs="*", help="only the cases whose names hold one of these")
    words = parser.parse_args(arguments).words
    too_much = False
    for case in CASES.values():
        if words and not any(word in case.name for word in words):
            continue
        found = _apart(case)
        seconds, peak = float(str(found["seconds"])), float(str(found["peak_bytes"]))
        over = seconds > _SECONDS or peak > _PEAK
        too_much |= over
        mark = "!" if over else " "
        print(f"{mark} {seconds:7.2f} s {peak / 1e6:5.0f} MB  {case.name}: {found['outcome']:.70}")
    return int(too_much)


if __name__ == "__main__":
    print(json.dumps(_measure(CASES[sys.argv[1]], Path(sys.argv[2]))))
