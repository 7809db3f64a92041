"""What a layer asks of those below it, apart from all else that it holds: mostly little or nothing.

Pure. So that a layer that stands already need not be looked at whole to be put on another base.
"""

from engine.diff import outline as outlines
from engine.diff.layer import Folder, folders
from engine.diff.outline import Outline

__all__ = ["asked", "asks_of"]


def asks_of(root: Folder) -> bytes:
    """Return the folders of a layer that hide, are opaque or implied, on their ways, as bytes.

    b"" where more counts: what a root that hides all hides depends on every name in it.
    """
    if root.is_opaque:
        return b""
    copies = {root: _copy(None, root)}
    for folder in folders(root):
        if folder.depth and (folder.attributes is None or folder.is_opaque or folder.hidden):
            way = [folder]
            while way[-1] not in copies:
                way.append(way[-1].parent)
            for place in reversed(way[:-1]):
                made = copies[place] = _copy(copies[place.parent], place)
                made.parent.names[made.name] = made
    return b"".join(outlines.encode(Outline(copies[root], 0, 0)))


def _copy(parent: Folder | None, folder: Folder) -> Folder:
    made = Folder(parent, folder.name)
    made.attributes, made.is_opaque, made.hidden = folder.attributes, folder.is_opaque, folder.hidden
    return made


def asked(data: bytes) -> Folder:
    """Return the tree of what `asks_of` returned. Raises DataLoss."""
    return outlines.decode(data).root
