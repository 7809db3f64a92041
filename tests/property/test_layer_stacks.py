"""Any stack of layers gives the same tree on every backend, and that of the reference model."""

import itertools
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, event, given, settings
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
def test_p9_every_backend_agrees_with_the_model(
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


FEW = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=2).map(tuple)
PLAIN = st.one_of(
    st.builds(Member, FEW, st.just("5"), st.sampled_from([0o755, 0o700]), OWNERS, TIMES),
    st.builds(Member, FEW, st.just("0"), data=DATA),
)


def possible(members: list[Member]) -> list[Member]:
    """Return a layer without the entries that would have it refused."""
    layer: list[Member] = []
    for found in members:
        with suppress(Impossible):
            apply([*layer, found])
            layer.append(found)
    return layer


@st.composite
def marked_layers(draw: st.DrawFn) -> tuple[list[Member], list[Member], list[Member]]:
    """Return a layer below, one with markers that change what shows of it, and that shuffled.

    Without two entries of one name, without links, and without a file where another entry needs a
    folder, a layer is a set.
    """
    base = possible(draw(st.lists(PLAIN, min_size=2, max_size=8)))
    there = sorted({m.path[:n] for m in base for n in range(1, len(m.path) + 1)})
    hit = st.sampled_from(there)
    markers = st.one_of(
        hit.map(lambda path: Member((*path[:-1], b".wh." + path[-1]), "0")),
        hit.map(lambda path: Member((*path, b".wh..wh..opq"), "0")),
        st.just(Member((b".wh..wh..opq",), "0")),
    )
    layer = draw(st.lists(markers, min_size=1, max_size=3, unique_by=lambda m: m.path))
    # Beside what is marked, so that there is an order to keep.
    beside = st.sampled_from([m.path[:-1] for m in layer] + [there[-1]])
    near = st.builds(lambda path, m: replace(m, path=(*path, m.path[-1])), beside, PLAIN)
    layer += draw(st.lists(near, min_size=1, max_size=4, unique_by=lambda m: m.path))
    files = {m.path for m in layer if m.kind != "5"}
    layer = [m for m in layer if not any(m.path[:n] in files for n in range(1, len(m.path)))]
    assume(marks(base, layer))
    return base, layer, draw(st.permutations(layer))


def marks(base: list[Member], layer: list[Member]) -> bool:
    """Say whether the markers of a layer have an effect on what is below it."""
    plain = [m for m in layer if not m.path[-1].startswith(b".wh.")]
    trees = [describe(merge(apply(base), apply(upper))) for upper in (layer, plain)]
    return bool(differences(*trees))


@pytest.mark.root
def test_the_order_of_markers_does_not_matter(tmp_path: Path, umask_0: None) -> None:
    with Root(tmp_path / "root") as root:
        stores = Stores(root, "default", AMD64)

        @settings(max_examples=30)
        @given(layers=marked_layers())
        def check(layers: tuple[list[Member], list[Member], list[Member]]) -> None:
            base, layer, shuffled = layers
            expected, other = expected_tree([base, layer]), expected_tree([base, shuffled])
            assert expected is not None
            assert other is not None
            assert not differences(describe(expected), describe(other))
            for name in BACKENDS:
                check_tree(stores, name, [base, shuffled], expected, tmp_path / "mnt")

        check()
        stores.close()


def check_tree(
    stores: Stores, name: str, stack: list[list[Member]], expected: Folder, target: Path
) -> None:
    """Hold a stack on one backend against the model, and leave nothing of it."""
    backend = stores.snapshotter(name)
    top = apply_stack(backend, [packed(layer) for layer in stack])
    assert not differences(tree_of(stores, name, top, target), describe(expected)), name
    while top:
        below = backend.stat(top).parent
        backend.remove(top)
        top = below
    assert backend.cleanup() == []
