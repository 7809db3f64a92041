"""A layer's tree as bytes: kept beside what was made of it until the layers below are known.

Pure. Three things have to wait for them: whiteouts, opaque folders, and folders that the layer only
implies, which take their attributes from below. Linear in what the layer holds, however deep: folders
are written one after the other with their depth, not as paths.
"""

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


class _Saved(msgspec.Struct):
    records: list[_Record]
    size: int
    inodes: int


class Outline(msgspec.Struct, frozen=True):
    """A finished layer: its tree, and what it takes up on disk by itself (bytes, inodes)."""

    root: Folder
    size: int
    inodes: int


_decoder = msgspec.msgpack.Decoder(_Saved)


def encode(outline: Outline) -> bytes:
    """Return an outline as bytes."""
    records = [
        _Record(
            folder.depth,
            folder.name,
            folder.attributes,
            folder.is_opaque,
            sorted(folder.hidden),
            [name for name, node in folder.names.items() if isinstance(node, Leaf)],
        )
        for folder in folders(outline.root)
    ]
    return msgspec.msgpack.encode(_Saved(records, outline.size, outline.inodes))


def decode(data: bytes) -> Outline:
    """Return the outline in `data`. Raises DataLoss."""
    try:
        saved = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise DataLoss(f"the outline of a layer cannot be read: {error}") from error
    way: list[Folder] = []
    for record in saved.records:
        del way[record.depth :]
        folder = Folder(way[-1] if way else None, record.name)
        if way:
            way[-1].names[record.name] = folder
        way.append(folder)
        folder.attributes = record.attributes
        folder.is_opaque = record.is_opaque
        folder.hidden = set(record.hidden)
        folder.names.update(dict.fromkeys(record.leaves, _LEAF))
    return Outline(way[0], saved.size, saved.inodes)
