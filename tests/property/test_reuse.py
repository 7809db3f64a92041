"""A layer's data that is reused on another base shows what applying the layer there shows."""

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.diff.apply import apply_layer
from engine.kv.schema import SNAPSHOTS
from engine.oci.digest import digest_of
from engine.oci.identity import chain_ids
from engine.root import Root
from engine.snapshots import Commit, Snapshotter
from engine.stores import Stores
from engine.testing.trees import TreeEntry, differences, read_tree
from tests.conftest import AMD64
from tests.property.layer_model import Member, describe
from tests.property.test_layer_stacks import expected_tree, layers, packed
from tests.support import tree_of

_UNIONS = ("overlay", "aufs")
_ROUNDS = itertools.count()
_BASES = st.lists(st.lists(layers(), max_size=2), min_size=2, max_size=3)


def stacked(
    backend: Snapshotter, stack: Sequence[bytes], *, prefix: str = "", at_once: bool = False
) -> list[bool]:
    """Commit a stack of layers, reusing what can be; return which were reused."""
    diff_ids = [digest_of(layer) for layer in stack]
    steps: list[Commit] = []
    reused = []
    for position, name in enumerate(chain_ids(diff_ids)):
        step = Commit(
            name=prefix + name,
            key=f"{prefix}key {position}",
            parent=steps[-1].name if steps else None,
            diff_id=diff_ids[position],
        )
        steps.append(step)
        if any(info.key == step.name for info in backend.walk()):
            reused.append(False)
            continue
        reused.append(not prefix and backend.reuse(step.key, step.diff_id) is not None)
        if not reused[-1]:
            backend.prepare(step.key)
            apply_layer([stack[position]], backend.sink(step.key), diff_id=step.diff_id)
        if not at_once:
            backend.commit(step)
    if at_once:
        there = {info.key for info in backend.walk()}
        backend.commit(*(step for step in steps if step.name not in there))
    return reused


def folder_of(backend: Snapshotter, root: Root, name: str) -> Path:
    with root.meta.read() as txn:
        record = SNAPSHOTS.get(txn, backend.name, "default", name)
    assert record is not None
    return root.snapshots / backend.name / str(record.id) / "fs"


def on_disk(folder: Path) -> dict[bytes, TreeEntry]:
    """Return what is in the folder of a layer; when a marker was made does not matter."""
    return {
        path: replace(entry, mtime=0)
        if entry.detail == "0:0" or os.path.basename(path).startswith(b".wh.")
        else entry
        for path, entry in read_tree(folder).items()
    }


def names_of(stack: Sequence[bytes]) -> list[str]:
    return list(chain_ids([digest_of(layer) for layer in stack]))


@pytest.mark.root
@settings(max_examples=20)
@given(bases=_BASES, upper=st.lists(layers(), min_size=1, max_size=2), at_once=st.booleans())
def test_on_any_base_the_data_of_a_layer_shows_what_the_layer_would(
    bases: list[list[list[Member]]],
    upper: list[list[Member]],
    at_once: bool,
    tmp_path: Path,
    umask_0: None,
) -> None:
    trees = [expected_tree([*base, *upper]) for base in bases]
    stacks = [[packed(layer) for layer in (*base, *upper)] for base in bases]
    tops = {names_of(stack)[-1] for stack in stacks}
    if any(tree is None for tree in trees) or len(tops) < len(stacks):
        event("refused, or one stack twice")
        return
    here = tmp_path / str(next(_ROUNDS))
    with Root(here) as root:
        stores = Stores(root, "default", AMD64)
        for name in _UNIONS:
            backend = stores.snapshotter(name)
            for stack, tree in zip(stacks, trees, strict=True):
                reused = stacked(backend, stack, at_once=at_once)
                event(f"reused: {any(reused)}")
                assert tree is not None
                top = names_of(stack)[-1]
                found = tree_of(stores, name, top, tmp_path / "mnt")
                assert not differences(found, describe(tree)), name
                # On disk it is what it would be too: nothing else can be told from an applied one.
                stacked(backend, stack, prefix="plain ")
                for one in names_of(stack):
                    folders = [folder_of(backend, root, prefix + one) for prefix in ("", "plain ")]
                    assert not differences(*map(on_disk, folders)), name
                    assert backend.usage(one) == backend.usage("plain " + one)
            for at, (stack, tree) in enumerate(zip(stacks, trees, strict=True)):
                assert tree is not None
                found = tree_of(stores, name, names_of(stack)[-1], tmp_path / "mnt")
                assert not differences(found, describe(tree)), name
                rest = {name for other in stacks[at + 1 :] for name in names_of(other)}
                for one in reversed(names_of(stack)):
                    if one not in rest:
                        backend.remove(one)
                        backend.remove("plain " + one)
                assert backend.cleanup() == []
            assert list((root.snapshots / name).iterdir()) == []
        stores.close()
    shutil.rmtree(here)
