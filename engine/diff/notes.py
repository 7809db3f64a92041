"""What a layer asks of the layers below: noted while it is applied, settled when it is committed.

Sync. A layer is applied to an empty folder, in any order and without its parents. Three things have
to wait until they are known: whiteouts, opaque folders, and folders that the layer only implies,
which take their attributes from below. They are kept in a file beside the layer's folder.
"""

from pathlib import Path

import msgspec

__all__ = ["Notes", "load", "save"]


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """Paths are relative to the layer's folder, normalised, without a link on the way."""

    whiteouts: list[tuple[bytes, bytes]]
    """(parent, name): hide `name` of the layers below."""
    opaque: list[bytes]
    """Folders that hide all that the layers below have in them."""
    implied: list[bytes]
    """Folders without an entry of their own, parents before children."""
    size: int
    """Bytes on disk of the layer's own entries."""
    inodes: int


def save(notes: Notes, file: Path) -> None:
    """Write the notes of a layer."""
    file.write_bytes(msgspec.msgpack.encode(notes))


def load(file: Path) -> Notes | None:
    """Return the notes of a layer, None for a snapshot that was not made from one."""
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Notes)
    except FileNotFoundError:
        return None
