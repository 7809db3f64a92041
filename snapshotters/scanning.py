"""Reads a tree on disk as the value that an applied layer has: for one that was written by hand.

Sync.
"""

import os

from engine.diff.layer import Folder, Leaf
from engine.diff.outline import Outline
from engine.fs.usage import measure
from snapshotters.attributes import read_attributes
from snapshotters.descriptors import OpenFolders

__all__ = ["scan"]


def scan(tree: int) -> Outline:
    """Return the outline of the directory `tree` is a descriptor of; every folder is named in it."""
    root = Folder(None, b"")
    pending = [root]
    with OpenFolders(tree) as opened:
        while pending:
            folder = pending.pop()
            opened.trim()
            here = opened.get(folder)
            folder.attributes = read_attributes(here)
            with os.scandir(here) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    is_folder = entry.is_dir(follow_symlinks=False)
                    folder.names[name] = Folder(folder, name) if is_folder else Leaf(0)
            pending += [node for node in folder.names.values() if isinstance(node, Folder)]
    return Outline(root, *measure(tree))
