"""Stacks in which what is hidden could show again, by name: each backend against the plain model."""

import os
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest

from engine.diff.apply import apply_layer
from engine.errors import FailedPrecondition
from engine.oci.digest import digest_of
from engine.snapshots import Commit, Snapshotter
from engine.stores import Stores
from engine.testing.trees import differences
from snapshotters.sealing import Sealer
from tests.property.layer_model import Member, describe
from tests.property.test_layer_stacks import expected_tree, packed
from tests.snapshotters.test_settling import seal
from tests.support import BACKENDS, apply_stack, commit_chain, tree_of

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]


def path(name: str) -> tuple[bytes, ...]:
    return tuple(part.encode() for part in name.split("/"))


def D(name: str, mode: int = 0o755, uid: int = 0, note: bytes = b"") -> Member:  # noqa: N802
    return Member(path(name), "5", mode, (uid, uid), 7, note=note)


def F(name: str, data: str = "") -> Member:  # noqa: N802
    return Member(path(name), "0", data=data.encode())


def S(name: str, target: str, uid: int = 0) -> Member:  # noqa: N802
    return Member(path(name), "2", owner=(uid, uid), mtime=5, link=target.encode())


def H(name: str, target: str) -> Member:  # noqa: N802
    return Member(path(name), "1", link=target.encode())


def W(name: str) -> Member:  # noqa: N802
    *above, last = path(name)
    return Member((*above, b".wh." + last), "0")


def O(name: str = "") -> Member:  # noqa: N802, E743
    return Member((*(path(name) if name else ()), b".wh..wh..opq"), "0")


CLOSED = [D("a", 0o700, 7, b"a note"), F("a/x", "lower"), D("a/b", 0o711, 8), F("a/b/y", "lower")]
DEEP = [*CLOSED, D("a/b/c", 0o710, 4), F("a/b/c/q"), D("a/b/c/d", 0o701, 5)]

STACKS = {
    # what is implied, and what was there before
    "implied": [CLOSED, [F("a/b/new")]],
    "implied twice": [CLOSED, [F("a/b/new")], [F("a/b/newer")]],
    "implied, then said": [CLOSED, [F("a/b/new")], [D("a", 0o750, 9)], [F("a/b/newer")]],
    "implied over a mark": [CLOSED, [D("a", 0o750, 9), O("a"), F("a/mid")], [F("a/new")]],
    "implied over two marks": [
        CLOSED,
        [O("a"), D("a/b", 0o700, 3)],
        [O("a"), F("a/b/z")],
        [F("a/b/new")],
    ],
    "implied below a mark": [CLOSED, [O("a"), F("a/b/new")]],
    "implied after a mark": [CLOSED, [O("a")], [F("a/b/new")]],
    "implied two below a mark": [DEEP, [O("a"), F("a/b/z")], [F("a/b/c/new")], [F("a/b/c/d/new")]],
    "implied three below a mark": [DEEP, [O("a"), F("a/b/c/z")], [F("a/b/c/d/new")]],
    "implied two below a whiteout": [DEEP, [W("a/b"), F("a/b/c/z")], [F("a/b/c/d/new")]],
    "implied two below a file": [DEEP, [F("a/b")], [F("a/b/z")], [F("a/b/c/d/new")]],
    "implied over a whiteout": [CLOSED, [W("a")], [F("a/b/new")]],
    "implied with its whiteout": [CLOSED, [W("a"), F("a/b/new")]],
    "implied with a whiteout below it": [CLOSED, [W("a/b"), F("a/b/new")]],
    "implied over a file": [CLOSED, [F("a")], [F("a/b/new")]],
    "implied over a link": [CLOSED, [S("a", "nowhere", 4)], [F("a/b/new")]],
    "implied over an opaque root": [CLOSED, [O(), F("c")], [F("a/b/new")]],
    "implied with an opaque root": [CLOSED, [O(), F("a/b/new")]],
    "a file where a folder was, below": [CLOSED, [F("a/b")], [F("a/b/new")]],
    "implied on nothing": [[F("a/b/new")], [F("a/b/c/new")]],
    # folder, file, folder
    "folder, file, folder": [CLOSED, [F("a", "file")], [D("a", 0o751, 3)]],
    "folder, file, folder, implied": [CLOSED, [F("a")], [D("a", 0o751, 3)], [F("a/b/new")]],
    "folder, link, folder": [CLOSED, [S("a", "b")], [D("a"), D("a/b"), F("a/b/z")]],
    "folder, file, folder below": [CLOSED, [F("a/b")], [D("a/b", 0o751, 3), F("a/b/z")]],
    "folder, whiteout, folder": [CLOSED, [W("a")], [D("a", 0o751, 3), F("a/b/z")]],
    "folder, file, folder, file, folder": [CLOSED, [F("a")], [F("a/x")], [F("a")], [F("a/b/z")]],
    "folder, file, opaque folder": [CLOSED, [F("a")], [D("a"), O("a"), F("a/z")], [F("a/b/new")]],
    "opaque, file, opaque": [CLOSED, [O("a"), F("a/z")], [F("a")], [O("a"), F("a/new")]],
    # marks over marks
    "three marks": [CLOSED, [O("a"), F("a/1")], [O("a"), F("a/2")], [O("a"), F("a/3")]],
    "a mark above and one below": [CLOSED, [O("a/b"), F("a/b/1")], [O("a"), F("a/b/2")]],
    "a mark below and one above": [
        CLOSED,
        [O("a"), F("a/b/1")],
        [O("a/b"), F("a/b/2")],
        [O(), F("a/b/3")],
    ],
    "a whiteout below a mark": [CLOSED, [W("a/x"), O("a/b")], [F("a/x"), F("a/b/y")]],
    "hidden and back": [CLOSED, [W("a/x"), W("a/b")], [F("a/x", "upper"), D("a/b")], [O("a"), D("a/b")]],
    "a root marked twice": [CLOSED, [O(), F("c/1")], [O(), F("c/2"), F("a")]],
    # names of one file
    "a name replaced above": [[F("x", "1"), H("y", "x"), H("z", "x")], [F("x", "2")]],
    "a name hidden above": [[F("x", "1"), H("y", "x"), H("z", "x")], [W("x")]],
    "a name replaced in its layer": [[F("x", "1"), H("y", "x"), F("x", "2"), H("z", "x")], [F("w")]],
    "a name put in its own place": [[F("x", "1"), H("x", "x"), H("y", "x")], [F("w")]],
    "a link to the first of two": [[F("x", "1"), H("y", "x"), F("x", "2"), H("z", "y")], [F("w")]],
    "its folder replaced": [[F("d/x", "1"), H("y", "d/x"), F("d"), H("z", "y")], [F("w")]],
    "a folder replaced by a name in it": [[F("d/x", "1"), H("d", "d/x")], [F("w")]],
    "names in two folders": [
        [F("d/x", "1"), H("e/y", "d/x")],
        [W("d"), F("e/z")],
        [F("e/z"), H("e/q", "e/z")],
    ],
    "names of a link": [[S("l", "nowhere", 5), H("m", "l")], [W("l")], [S("l", "m", 6), H("n", "l")]],
}


def seal_in_turn(sealer: Sealer, backend: Snapshotter, layers: list[bytes]) -> str:
    """Seal layers one by one, and those of all stacks by one sealer, as a worker does."""
    below = ""
    for number, layer in enumerate(layers):
        backend.prepare("key")
        apply_layer([layer], backend.sink("key"), diff_id=digest_of(layer))
        step = Commit(name=str(number), key="key", parent=below or None)
        assert seal(backend, sealer, step) == (1, None)
        backend.commit(step)
        below = step.name
    return below


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("overlay", "one by one"),
        ("overlay", "at once"),
        ("overlay", "by one sealer"),
        ("aufs", "one by one"),
        ("aufs", "by one sealer"),
        ("copy", "one by one"),
    ],
)
def test_stacks(name: str, how: str, stores: Stores) -> None:
    make: Callable[[Snapshotter, list[bytes]], str] = {
        "one by one": apply_stack,
        "at once": commit_chain,
        "by one sealer": partial(seal_in_turn, Sealer()),
    }[how]
    backend = stores.snapshotter(name)
    wrong = {}
    for about, stack in STACKS.items():
        expected = expected_tree(stack)
        assert expected is not None, about
        layers = [packed(layer) for layer in stack]
        top = make(backend, layers)
        found = tree_of(stores, name, top, stores.root.path.parent / "mnt")
        if lines := differences(found, describe(expected)):
            wrong[about] = lines
        while top:
            below = backend.stat(top).parent
            backend.remove(top)
            top = below
        backend.cleanup()
    assert not wrong


@pytest.mark.parametrize("name", ["overlay", "aufs"])
def test_what_is_hidden_further_up_is_not_marked_again(name: str, stores: Stores) -> None:
    stack = [CLOSED, [O("a"), O("a/b"), W("a/b/y"), F("a/b/z"), D("new"), O("new"), W("new/x")]]
    commit_chain(stores.snapshotter(name), [packed(layer) for layer in stack])
    upper = stores.root.snapshots / name / "2" / "fs"
    assert sorted(os.listdir(upper / "a" / "b")) == ["z"]
    assert os.listdir(upper / "new") == []
    if name == "overlay":
        assert "trusted.overlay.opaque" in os.listxattr(upper / "a")
        for unmarked in ("a/b", "new"):  # and what hides nothing is not marked at all
            assert "trusted.overlay.opaque" not in os.listxattr(upper / unmarked)
    else:
        assert sorted(os.listdir(upper / "a")) == [".wh..wh..opq", "b"]


@pytest.mark.parametrize("name", BACKENDS)
def test_what_was_written_by_hand_is_put_on_a_parent_as_it_is(name: str, stores: Stores) -> None:
    backend = stores.snapshotter(name)
    base = apply_stack(backend, [packed(CLOSED)])
    backend.prepare("by hand")  # on nothing, so that it can be put on anything
    tree = Path(backend.sink("by hand").place) / "fs"
    (tree / "a").mkdir(mode=0o750)
    os.chown(tree / "a", 3, 4)
    os.utime(tree / "a", (9, 9))
    (tree / "a" / "mine").touch()
    backend.commit(Commit(name="done", key="by hand", parent=base))
    found = tree_of(stores, name, "done", stores.root.path.parent / "mnt")
    assert set(found) == {b"a", b"a/x", b"a/b", b"a/b/y", b"a/mine"}
    own = found[b"a"]
    assert (own.mode & 0o7777, own.owner, own.xattrs) == (0o750, (3, 4), ())
    assert backend.usage("done").inodes >= 2


@pytest.mark.parametrize("marks", [[W("a")], [O("a")], [W("a/b"), O("a/b")], [O()]])
def test_markers_count_wherever_they_stand(marks: list[Member], stores: Stores) -> None:
    layer = [*marks, D("a", 0o750), F("a/b/new"), D("a/b", 0o751)]
    expected = expected_tree([CLOSED, layer])
    assert expected is not None
    backend = stores.snapshotter("overlay")
    base = apply_stack(backend, [packed(CLOSED)])
    for number, order in enumerate(permutations(layer)):
        top = commit_chain(backend, [packed(list(order))], f"{number} ", base)
        found = tree_of(stores, "overlay", top, stores.root.path.parent / "mnt")
        assert not differences(found, describe(expected)), order


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_settled_on_one_parent_is_not_put_on_another(name: str, stores: Stores) -> None:
    backend = stores.snapshotter(name)
    for base in ("one", "two"):
        backend.prepare(f"{base} key")
        backend.commit(Commit(name=base, key=f"{base} key"))
    backend.prepare("key")
    layer = packed([W("a"), F("b")])
    apply_layer([layer], backend.sink("key"), diff_id=digest_of(layer))
    assert seal(backend, Sealer(), Commit(name="top", key="key", parent="one")) == (1, None)
    with pytest.raises(FailedPrecondition, match="settled on another parent"):
        backend.commit(Commit(name="top", key="key", parent="two"))
    backend.commit(Commit(name="top", key="key", parent="one"))
    assert backend.stat("top").parent == "one"
