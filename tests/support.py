"""Pieces that tests of several folders share: apply layers without workers, read what came of it."""

from collections.abc import Sequence
from pathlib import Path

from engine.diff.apply import apply_layer
from engine.mount import mounted
from engine.oci.digest import Digest, digest_of
from engine.oci.identity import chain_ids
from engine.snapshots import Commit, Snapshotter
from engine.stores import Stores
from engine.testing.trees import TreeEntry, read_tree
from tests.union_reader import read_union

BACKENDS = ("overlay", "copy", "aufs")


def apply_stack(backend: Snapshotter, layers: Sequence[bytes]) -> str:
    """Apply uncompressed layers in this process and return the name of the topmost snapshot.

    The umask must be 0 (fixture `umask_0`). What fails leaves nothing behind.
    """
    diff_ids = [digest_of(layer) for layer in layers]
    parent = ""
    for position, (layer, chain_id) in enumerate(zip(layers, chain_ids(diff_ids), strict=True)):
        key = f"extract-{position} {chain_id}"
        backend.prepare(key)
        try:
            pieces = [layer[at : at + 1000] for at in range(0, len(layer), 1000)]
            target = backend.sink(key)
            applied = apply_layer(pieces, target, diff_id=Digest(diff_ids[position]))
            assert applied.diff_id == diff_ids[position]
            backend.commit(Commit(name=chain_id, key=key, parent=parent or None))
        except BaseException:
            backend.remove(key)
            backend.cleanup()
            raise
        parent = chain_id
    return parent


def applied(
    backend: Snapshotter, layers: Sequence[bytes], below: str = "", prefix: str = ""
) -> list[Commit]:
    """Apply uncompressed layers and return the commits, on `below`, that are to come."""
    steps: list[Commit] = []
    for number, layer in enumerate(layers):
        key = f"{prefix}key {number}"
        backend.prepare(key)
        apply_layer([layer], backend.sink(key), diff_id=digest_of(layer))
        parent = steps[-1].name if steps else below
        steps.append(Commit(name=f"done {key}", key=key, parent=parent or None))
    return steps


def commit_chain(
    backend: Snapshotter, layers: Sequence[bytes], prefix: str = "", below: str = ""
) -> str:
    """Apply layers, then commit them all at once; return the name of the topmost."""
    steps = applied(backend, layers, below, prefix)
    backend.commit(*steps)
    return steps[-1].name


def tree_of(stores: Stores, name: str, parent: str, target: Path) -> dict[bytes, TreeEntry]:
    """Return the tree of a committed snapshot: mounted, or for aufs read from its branches."""
    backend = stores.snapshotter(name)
    if name == "aufs":
        return read_union(branches(stores, parent))
    target.mkdir(exist_ok=True)
    mounts = backend.view("tree view", parent)
    try:
        with mounted(mounts, target):
            return read_tree(target)
    finally:
        backend.remove("tree view")
        backend.cleanup()


def branches(stores: Stores, name: str) -> list[Path]:
    """Return the folders of an aufs snapshot and its parents, the topmost first."""
    backend = stores.snapshotter("aufs")
    (mount,) = backend.view("branches view", name)
    backend.remove("branches view")
    backend.cleanup()
    if mount.type == "bind":
        return [Path(mount.source)]
    option = next(o for o in mount.options if o.startswith("br:"))
    return [Path(branch.partition("=")[0]) for branch in option[3:].split(":")]
