"""Makes a layer anew from where it stands already, as it was before it was settled on what is below.

Sync; one thread. For a layer that has to be settled otherwise on another base. What the standing one was
marked with, and what its folders inherited, is left behind; bytes are shared where the file system can.
"""

import os
from contextlib import ExitStack
from pathlib import Path

from engine.diff.layer import Attributes, Folder, folders
from engine.errors import DataLoss
from engine.fs.attributes import folder_descriptor
from engine.fs.room import Room
from snapshotters.attributes import give_attributes
from snapshotters.descriptors import OpenFolders
from snapshotters.filling import Copying
from snapshotters.folder_sink import OUTLINE

__all__ = ["remake"]


def remake(standing: Path, tree: Path, root: Folder) -> None:
    """Make the layer `root` in the empty folder `tree` from the tree `standing` that has it too.

    DataLoss if that has lost something: then nothing is made of it any more.
    """
    with ExitStack() as inside:
        top = inside.enter_context(folder_descriptor(tree))
        source = inside.enter_context(folder_descriptor(standing))
        sources, targets = (inside.enter_context(OpenFolders(one)) for one in (source, top))
        try:
            _copy(sources, targets, Copying(top, Room(tree.parent)), root)
        except (FileNotFoundError, NotADirectoryError):
            # So that the next attempt applies the layer instead.
            standing.with_name(OUTLINE).unlink(missing_ok=True)
            raise DataLoss(
                f"{standing} is damaged: run `lamina fsck --repair`, then the command again"
            ) from None
        for folder in folders(root):
            if folder.depth:
                targets.trim()
                attributes = folder.attributes or Attributes()
                give_attributes(targets.get(folder), attributes, folder.name)
        os.utime(top, ns=(0, 0))


def _copy(sources: OpenFolders, targets: OpenFolders, copying: Copying, root: Folder) -> None:
    for folder in folders(root):
        sources.trim()
        targets.trim()
        old, new = sources.get(folder), targets.get(folder)
        for name in folder.names:
            copying.copy(old, new, folder, name)
