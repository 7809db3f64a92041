"""Steps that the compatibility tests share: a peer's tree, ours, and the comparison of both."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.stores import host_platform, open_stores
from engine.testing.trees import TreeEntry, differences, read_tree
from tests.command import lamina, lamina_json
from tests.compat.differences import KNOWN
from tests.conftest import peer
from tests.support import branches
from tests.union_reader import read_union

__all__ = ["Tree", "assert_same", "our_tree", "removed", "run", "umoci_tree"]

Tree = dict[bytes, TreeEntry]


def run(*command: object, **options: object) -> str:
    """Run a peer's program and return what it wrote; its messages are in the error if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return str(done.stdout)


@contextmanager
def removed(folder: Path) -> Iterator[Path]:
    """Give a folder that goes at once: pytest would keep several gigabytes for three runs."""
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def umoci_tree(layout: Path, target: Path) -> Tree:
    """Return the tree that umoci unpacks from the tag `latest` of an OCI layout."""
    run(peer("umoci"), "raw", "unpack", "--image", f"{layout}:latest", target)
    return read_tree(target)


def our_tree(root: Path, image: str, backend: str, target: Path) -> Tree:
    """Return the tree of an unpacked image: mounted by the command line, or for aufs its branches."""
    if backend == "aufs":
        # Mainline kernels have no aufs: a reader stands in for it.
        top = lamina_json(root, "image", "inspect", image)["unpacked"]["aufs"]
        with open_stores(root, "default", host_platform()) as stores:
            return read_union(branches(stores, top))
    target.mkdir(exist_ok=True)
    lamina(root, "mount", "--snapshotter", backend, image, target)
    try:
        return read_tree(target)
    finally:
        lamina(root, "umount", target)


def assert_same(ours: Tree, theirs: Tree, tool: str) -> None:
    """Check that two trees differ exactly where `KNOWN` says."""
    known = KNOWN[tool]
    assert ours, "an empty tree shows nothing"
    unexpected = differences(
        {name: entry for name, entry in ours.items() if name not in known},
        {name: entry for name, entry in theirs.items() if name not in known},
    )
    assert not unexpected, "\n".join(unexpected)
    gone = [name for name in known if ours.get(name) == theirs.get(name)]
    assert not gone, f"listed as different, but equal: {gone}"
