"""A layer's tree as bytes: kept beside what was made of it until the layers below are known.

Pure. Three things have to wait for them: whiteouts, opaque folders, and folders that the layer only
implies, which take their attributes from below. Linear in what the layer holds, however deep: folders
are written one after the other with their depth, not as paths.
"""

import struct
from collections.abc import Iterator

import msgspec

from engine.diff.layer import Attributes, Folder, Leaf, folders
from engine.errors import DataLoss

__all__ = ["Outline", "decode", "encode"]

_LEAF = Leaf(0)  # of a leaf only the name matters to the layers above


class _Record(msgspec.Struct, array_like=True, gc=False):
    depth: int
    name: bytes
    attributes: Attributes | None
    is_opaque: bool
    hidden: list[bytes]
    leaves: list[bytes]


class Outline(msgspec.Struct, frozen=True):
    """A finished layer: its tree, and what it takes up on disk by itself (bytes, inodes)."""

    root: Folder
    size: int
    inodes: int


_HEAD = struct.Struct(">QQQ")  # size, inodes, records
_AT_ONCE = 4096  # names and folders: as objects they take ten times as much as here
_records = msgspec.msgpack.Decoder(list[_Record])


def encode(outline: Outline) -> Iterator[bytes]:
    """Yield an outline as bytes: a head, and records in pieces, each after its length."""
    yield _HEAD.pack(outline.size, outline.inodes, sum(1 for _ in folders(outline.root)))
    for piece in _batches(outline.root):
        data = msgspec.msgpack.encode(piece)
        yield len(data).to_bytes(4, "big")
        yield data


def _batches(root: Folder) -> Iterator[list[_Record]]:
    batch, held = [], 0
    for folder in folders(root):
        batch.append(_record(folder))
        held += 1 + len(folder.names)
        if held >= _AT_ONCE:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _record(folder: Folder) -> _Record:
    return _Record(
        folder.depth,
        folder.name,
        folder.attributes,
        folder.is_opaque,
        sorted(folder.hidden),
        [name for name, node in folder.names.items() if isinstance(node, Leaf)],
    )


def decode(data: bytes) -> Outline:
    """Return the outline in `data`. Raises DataLoss."""
    try:
        size, inodes, count = _HEAD.unpack_from(data)
        way: list[Folder] = []
        for record in _pieces(memoryview(data)[_HEAD.size :]):
            _add(way, record)
            count -= 1
        if count or not way:
            raise ValueError("records are missing")
    except (msgspec.MsgspecError, struct.error, ValueError, IndexError) as error:
        raise DataLoss(f"the outline of a layer cannot be read: {error}; unpack again") from error
    return Outline(way[0], size, inodes)


def _pieces(data: memoryview) -> Iterator[_Record]:
    while data:
        length = int.from_bytes(data[:4], "big")
        yield from _records.decode(data[4 : 4 + length])
        data = data[4 + length :]


def _add(way: list[Folder], record: _Record) -> None:
    """Put a record's folder below the last one of the depth above; `way` leads to it."""
    del way[record.depth :]
    folder = Folder(way[record.depth - 1] if record.depth else None, record.name)
    if way:
        way[-1].names[record.name] = folder
    way.append(folder)
    folder.attributes = record.attributes
    folder.is_opaque = record.is_opaque
    if record.hidden:
        folder.hidden = set(record.hidden)
    folder.names.update(dict.fromkeys(record.leaves, _LEAF))
