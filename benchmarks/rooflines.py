"""The limits of an image on this machine: each part of the work alone, on all cores.

What no tool can go below: inflating the layers, hashing what they unpack to, and making the files. A
layer is inflated and hashed from its first byte to its last, so that one layer keeps one core busy.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from benchmarks.contents import Contents, Entry, inflated
from benchmarks.cores import CORES, chunks, spread, timed_on_cores
from benchmarks.costs import Cost
from benchmarks.images import Image, Layer
from engine.oci.mediatypes import Compression

__all__ = ["rooflines"]

_PIECE = 1 << 20
_BYTES = memoryview(os.urandom(_PIECE))  # what is hashed and written: from the cache, as in a pipeline
_ENTRY_COST = 20_000  # an entry costs about as much as writing so many bytes

Roofline = Callable[[Path], Cost]
"""Takes an empty folder."""


def rooflines(image: Image, contents: Contents) -> Mapping[str, Roofline]:
    """Return what there is to measure of an image."""
    packed = [layer for layer in image.layers if layer.compression is not Compression.NONE]
    inflate = spread(packed, lambda layer: layer.size, CORES)
    sizes = spread([layer.size for layer in contents.layers], lambda size: size, CORES)
    found: dict[str, Roofline] = {
        "hash": lambda _: timed_on_cores([partial(_hash, share) for share in sizes]),
        "write": _write(contents),
    }
    if packed:
        found["inflate"] = lambda _: timed_on_cores([partial(_inflate, share) for share in inflate])
    return found


def _inflate(layers: Sequence[Layer]) -> None:
    buffer = memoryview(bytearray(_PIECE))
    for layer in layers:
        with inflated(layer) as archive:
            while archive.readinto(buffer):  # type: ignore[attr-defined]
                pass


def _hash(sizes: Sequence[int]) -> None:
    for size in sizes:
        state = hashlib.sha256()
        for piece in _pieces(size):
            state.update(piece)


def _pieces(size: int) -> Iterator[memoryview]:
    for start in range(0, size, _PIECE):
        yield _BYTES[: size - start]


# -- files, with as few system calls as make the same of them -----------------------------------


@dataclass(frozen=True)
class _Folder:
    """A folder of a layer, and what it holds but folders."""

    path: str
    entries: Sequence[Entry]

    @property
    def cost(self) -> int:
        """About how much work it is, in bytes."""
        return _ENTRY_COST * (1 + len(self.entries)) + sum(entry.size for entry in self.entries)


def _write(contents: Contents) -> Roofline:
    folders = [
        folder
        for number, layer in enumerate(contents.layers)
        for folder in _folders(number, layer.entries)
    ]
    late = [
        (number, entry)
        for number, layer in enumerate(contents.layers)
        for entry in layer.entries
        if entry.is_folder or entry.kind == tarfile.LNKTYPE
    ]
    shares = chunks(folders, lambda folder: folder.cost, CORES)
    late_shares = chunks(late, lambda _: 1, CORES)

    def run(target: Path) -> Cost:
        return timed_on_cores(
            [partial(_make_folders, target, share) for share in shares],
            # Links need their targets; and times of folders last only once they are full.
            [partial(_finish, target, share) for share in late_shares],
        )

    return run


def _folders(number: int, entries: Sequence[Entry]) -> Iterator[_Folder]:
    held = [(os.path.dirname(entry.path), entry) for entry in entries if not entry.is_folder]
    held.sort(key=lambda pair: pair[0])
    inside = {path: [entry for _, entry in group] for path, group in groupby(held, lambda pair: pair[0])}
    for path in sorted({*inside, *(entry.path for entry in entries if entry.is_folder)}):
        made = [entry for entry in inside.get(path, ()) if entry.kind != tarfile.LNKTYPE]
        yield _Folder(os.path.join(str(number), path), made)


def _make_folders(target: Path, folders: Sequence[_Folder]) -> None:
    os.umask(0)
    os.chdir(target)
    for folder in folders:
        try:
            os.mkdir(folder.path, 0o755)
        except (FileExistsError, FileNotFoundError):  # another core needed it, or nobody its parent yet
            os.makedirs(folder.path, 0o755, exist_ok=True)
        place = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY)
        for entry in folder.entries:
            if entry.kind == tarfile.REGTYPE:
                _make_file(place, os.path.basename(entry.path), entry)
            else:
                _make_special(place, os.path.basename(entry.path), entry)
        os.close(place)


def _make_file(place: int, name: str, entry: Entry) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, entry.mode, dir_fd=place)
    for piece in _pieces(entry.size):
        os.write(file, piece)
    if entry.owner != (0, 0):
        os.fchown(file, *entry.owner)
        os.fchmod(file, entry.mode)
    for key, value in entry.xattrs:
        os.setxattr(file, key, value)
    os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
    os.close(file)


def _make_special(place: int, name: str, entry: Entry) -> None:
    if entry.kind == tarfile.SYMTYPE:
        os.symlink(entry.link, name, dir_fd=place)
    else:
        os.mkfifo(name, entry.mode, dir_fd=place)  # a device costs as much
    if entry.owner != (0, 0):
        os.chown(name, *entry.owner, dir_fd=place, follow_symlinks=False)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=place, follow_symlinks=False)


def _finish(target: Path, entries: Sequence[tuple[int, Entry]]) -> None:
    os.chdir(target)
    for number, entry in entries:
        path = os.path.join(str(number), entry.path)
        if entry.kind == tarfile.LNKTYPE:
            os.link(os.path.join(str(number), entry.link.removeprefix("./")), path)
            continue
        if entry.owner != (0, 0):
            os.chown(path, *entry.owner)
        if entry.mode != 0o755:
            os.chmod(path, entry.mode)
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
