"""Any stack of layers gives the same tree on every backend, and that of the reference model."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from engine.errors import Refused
from engine.root import Root
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.testing.trees import differences
from tests.conftest import AMD64
from tests.property.layer_model import Folder, Impossible, Member, apply, describe, merge
from tests.support import BACKENDS, apply_stack, tree_of

# Few names, so that layers meet; some of them odd, none that only some backends can hold.
NAMES = st.sampled_from([b"a", b"b", b"c", b"d e", b"\xff\n", b"-", b".wh", "é".encode()])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(tuple)
TARGETS = st.builds(
    lambda root, parts: root + b"/".join(parts),
    st.sampled_from([b"", b"/"]),
    st.lists(st.one_of(NAMES, st.sampled_from([b"..", b"."])), min_size=1, max_size=4),
)
MODES = st.sampled_from([0o644, 0o755, 0o4755, 0o2775, 0o1777, 0o600, 0])
OWNERS = st.sampled_from([(0, 0), (1000, 0), (0, 50), (65534, 65534)])
TIMES = st.sampled_from([0, 1, 1_600_000_000])
NOTES = st.sampled_from([b"", b"", b"a note"])
DATA = st.sampled_from([b"", b"x", b"longer\n" * 1000])

FOLDERS = st.builds(Member, PATHS, st.just("5"), MODES, OWNERS, TIMES, note=NOTES)
FILES = st.builds(Member, PATHS, st.just("0"), MODES, OWNERS, TIMES, DATA, note=NOTES)
SYMLINKS = st.builds(Member, PATHS, st.just("2"), owner=OWNERS, mtime=TIMES, link=TARGETS)
FIFOS = st.builds(Member, PATHS, st.just("6"), MODES, OWNERS, TIMES)
HARDLINKS = st.builds(Member, PATHS, st.just("1"), link=PATHS.map(b"/".join))
WHITEOUTS = PATHS.map(lambda path: Member((*path[:-1], b".wh." + path[-1]), "0"))
OPAQUE = st.lists(NAMES, max_size=3).map(lambda path: Member((*path, b".wh..wh..opq"), "0"))
MEMBERS = st.one_of(FOLDERS, FILES, FILES, SYMLINKS, FIFOS, HARDLINKS, WHITEOUTS, OPAQUE)


@st.composite
def layers(draw: st.DrawFn) -> list[Member]:
    """Return a layer: mostly one that can be applied, with hard links to what it has."""
    layer: list[Member] = []
    keeps_the_impossible = draw(st.integers(0, 9)) == 0
    for found in draw(st.lists(MEMBERS, max_size=12)):
        targets = [
            m.path for m in layer if m.kind in {"0", "2", "6"} and not m.path[-1].startswith(b".wh.")
        ]
        if found.kind == "1" and targets:
            found = replace(found, link=b"/".join(draw(st.sampled_from(targets))))
        try:
            apply([*layer, found])
        except Impossible:
            if not keeps_the_impossible:
                continue
        layer.append(found)
    return layer


STACKS = st.lists(layers(), min_size=1, max_size=4)


def packed(layer: list[Member]) -> bytes:
    return archive(
        *(
            member(
                b"./" + b"/".join(m.path),
                m.kind,
                m.data,
                mode=m.mode,
                uid=m.owner[0],
                gid=m.owner[1],
                mtime=m.mtime,
                link=m.link,
                pax={b"SCHILY.xattr.user.note": m.note} if m.note else None,
            )
            for m in layer
        )
    )


def expected_tree(stack: list[list[Member]]) -> Folder | None:
    """Return what the model says of a stack, None if it is to be refused."""
    tree = Folder(None)
    try:
        for layer in stack:
            tree = merge(tree, apply(layer))
    except Impossible:
        return None
    return tree


ROUNDS = itertools.count()


@pytest.mark.root
@given(stack=STACKS)
def test_every_backend_agrees_with_the_model(
    stack: list[list[Member]], tmp_path: Path, umask_0: None
) -> None:
    expected = expected_tree(stack)
    event("refused" if expected is None else "applied")
    here = tmp_path / str(next(ROUNDS))
    with Root(here) as root:
        stores = Stores(root, "default", AMD64)
        for name in BACKENDS:
            layers = [packed(layer) for layer in stack]
            if expected is None:
                with pytest.raises(Refused):
                    apply_stack(stores.snapshotter(name), layers)
                continue
            top = apply_stack(stores.snapshotter(name), layers)
            tree = tree_of(stores, name, top, tmp_path / "mnt")
            assert not differences(tree, describe(expected)), name
        stores.close()
    shutil.rmtree(here)


@pytest.mark.root
@given(data=st.data())
def test_the_order_of_markers_does_not_matter(
    data: st.DataObject, tmp_path: Path, umask_0: None
) -> None:
    # Without two entries of one name and without links, a layer is a set.
    base = data.draw(st.lists(st.one_of(FOLDERS, FILES), max_size=8))
    layer = data.draw(
        st.lists(st.one_of(FOLDERS, FILES, WHITEOUTS, OPAQUE), max_size=8, unique_by=lambda m: m.path)
    )
    shuffled = data.draw(st.permutations(layer))
    if expected_tree([base, layer]) is None or expected_tree([base, shuffled]) is None:
        return
    paths = {m.path for m in layer if m.kind != "5"}
    if any(m.path[:n] in paths for m in layer for n in range(1, len(m.path))):
        return  # a file where another entry needs a folder: the last wins, so order counts
    assert not differences(
        describe(expected_tree([base, layer]) or Folder(None)),
        describe(expected_tree([base, shuffled]) or Folder(None)),
    )
    here = tmp_path / str(next(ROUNDS))
    with Root(here) as root:
        stores = Stores(root, "default", AMD64)
        for name in BACKENDS:
            trees = []
            for order in (layer, shuffled):
                top = apply_stack(stores.snapshotter(name), [packed(base), packed(order)])
                trees.append(tree_of(stores, name, top, tmp_path / "mnt"))
                for key in (top, stores.snapshotter(name).stat(top).parent):
                    stores.snapshotter(name).remove(key)
            assert not differences(*trees), name
        stores.close()
    shutil.rmtree(here)
