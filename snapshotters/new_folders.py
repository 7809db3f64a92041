"""Makes folders of snapshots so that nothing is inherited, and so that they last. Sync."""

import os
from contextlib import suppress
from pathlib import Path

from engine.diff import acl
from engine.fs.durable import flush_names

__all__ = ["make_lasting", "make_root"]


def make_lasting(folder: Path) -> None:
    """Make a folder, and be sure of its name before anything in it is recorded."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    flush_names(folder.parent)  # also of another's: who made it may have died before this


def make_root(tree: Path) -> None:
    """Make the root of a tree: 0755 0:0 whatever it would inherit from a setgid bit or an ACL."""
    tree.mkdir(mode=0o755)
    os.chown(tree, 0, 0)
    for key in (acl.ACCESS, acl.DEFAULT):
        with suppress(OSError):  # there is none, as nearly always
            os.removexattr(tree, key)
    tree.chmod(0o755)
