"""Settling costs what layers hold: nothing is looked up twice, nothing held open, nothing recurses."""

import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.diff.apply import apply_layer
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.oci.digest import digest_of
from engine.root import Root
from engine.snapshots import Commit, Snapshotter
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.testing.trees import differences
from snapshotters import combined, filling
from snapshotters.markers import AufsMarkers, Listing, OverlayMarkers
from snapshotters.sealing import Sealer
from tests.conftest import AMD64
from tests.property.layer_model import Member, describe
from tests.property.test_layer_stacks import OWNERS, ROUNDS, expected_tree, packed, possible
from tests.support import BACKENDS, apply_stack, branches, commit_chain, tree_of
from tests.union_reader import OPAQUE

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

UNIONS = ("overlay", "aufs")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """Count how often each folder on disk is listed, by device and inode."""
    seen: Counter[tuple[int, int]] = Counter()
    for markers in (AufsMarkers, OverlayMarkers):
        read = markers.read

        def watched(self: object, folder: int, read: object = read) -> Listing:
            info = os.fstat(folder)
            seen[info.st_dev, info.st_ino] += 1
            return read(self, folder)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(markers, "read", watched)
    return seen


def deep(depth: int, *names: str) -> bytes:
    return archive(*(member("d/" * depth + name) for name in names))


@pytest.mark.parametrize("name", UNIONS)
def test_layers_of_one_commit_are_never_listed(
    name: str, stores: Stores, listed: Counter[tuple[int, int]]
) -> None:
    layers = [deep(30, f"f{n}", f".wh.f{n - 1}", ".wh..wh..opq") for n in range(10)]
    top = commit_chain(stores.snapshotter(name), layers)
    assert not listed
    if name == "aufs":
        assert set(tree_of(stores, name, top, stores.root.path)) == {
            *(b"/".join([b"d"] * n) for n in range(1, 31)),
            b"/".join([b"d"] * 30) + b"/f9",
        }


@pytest.mark.parametrize("name", UNIONS)
def test_what_is_below_is_listed_once(
    name: str, stores: Stores, listed: Counter[tuple[int, int]]
) -> None:
    backend = stores.snapshotter(name)
    base = commit_chain(backend, [deep(30, f"f{n}") for n in range(5)])
    commit_chain(backend, [deep(30, f".wh.f{n}", f"g{n}") for n in range(5)], "on top ", base)
    assert set(listed.values()) == {1}
    assert len(listed) == 5 * 31


@pytest.mark.parametrize("name", UNIONS)
def test_a_deep_folder_is_not_walked_to_again(
    name: str, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stores.snapshotter(name)
    base = commit_chain(backend, [deep(200, str(n)) for n in range(5)])
    steps = Counter[str]()
    real = combined._step

    def watched(opened: int, part: bytes) -> int:
        steps["all"] += 1
        return real(opened, part)

    monkeypatch.setattr(combined, "_step", watched)
    commit_chain(backend, [deep(200, "top")], "on top ", base)
    assert steps["all"] == 5 * 200


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.usefixtures("few_descriptors")
def test_many_deep_layers_need_few_descriptors(name: str, stores: Stores) -> None:
    # 60 layers of 500 folders, in two commits: the second stands on what is on disk.
    backend = stores.snapshotter(name)
    base = commit_chain(backend, [deep(500, f"f{n}") for n in range(30)])
    top = commit_chain(backend, [deep(500, f"g{n}", f".wh.f{n}") for n in range(30)], "more ", base)
    assert len(list(backend.walk())) == 60
    assert (top, backend.stat(top).parent) == ("done more key 29", "done more key 28")


def test_a_replaced_link_closes_no_folders(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each turn replaces a link and writes through it; only what is needed is opened.
    opened = Counter[str]()
    real = os.open

    def watched(path: object, flags: int, *rest: object, **more: object) -> int:
        opened["folder" if flags & os.O_DIRECTORY else "file"] += 1
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    folders = [member(f"open/{number}/f") for number in range(100)]
    turns = [
        entry
        for number in range(500)
        for entry in (member("l", "2", link=f"open/{number % 100}"), member("l/x"))
    ]
    monkeypatch.setattr(os, "open", watched)
    apply_stack(stores.snapshotter("overlay"), [archive(*folders, *turns)])
    assert opened["file"] < 610
    assert opened["folder"] < 150


def test_a_copy_walks_its_parent_once(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = Counter[str]()
    real = filling._Filling.fill

    def watched(self: object, place: object) -> object:
        filled["folders"] += 1
        return real(self, place)  # type: ignore[arg-type]

    monkeypatch.setattr(filling._Filling, "fill", watched)
    commit_chain(stores.snapshotter("copy"), [deep(40, f"f{n}", f".wh.f{n - 1}") for n in range(4)])
    assert filled["folders"] == 41 * 3


def seal(backend: Snapshotter, sealer: Sealer, *steps: Commit) -> object:
    """Seal as a worker does, which keeps what it sealed with."""
    (sealing,) = backend.sealing(*steps)
    return sealer(sealing.argument)


def applied(backend: Snapshotter, key: str, *members: bytes) -> Commit:
    layer = archive(*members)
    backend.prepare(key)
    apply_layer([layer], backend.sink(key), diff_id=digest_of(layer))
    return Commit(name=f"done {key}", key=key)


@pytest.mark.parametrize("name", UNIONS)
def test_a_failed_settle_leaves_nothing_to_the_next(name: str, stores: Stores) -> None:
    backend, sealer = stores.snapshotter(name), Sealer()
    one = applied(backend, "one", member("etc/", "5", mode=0o777, uid=1234))
    two = replace(applied(backend, "two", member("x")), parent=one.name)
    (stores.root.snapshots / name / "2" / "settling").touch()
    count, failed = seal(backend, sealer, one, two)  # type: ignore[misc]
    assert (count, type(failed)) == (1, FailedPrecondition)
    other = applied(backend, "other", member("etc/implied"))
    assert seal(backend, sealer, other) == (1, None)
    backend.commit(other)
    found = (stores.root.snapshots / name / "3" / "fs" / "etc").stat()
    assert (found.st_mode & 0o7777, found.st_uid) == (0o755, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_devices_of_a_layer_on_disk_are_no_whiteouts(name: str, stores: Stores) -> None:
    # Only 0:0 is one, and only a character device: these are hidden, and stay, as other files.
    devices = [
        member("dev/null", "3", device=(1, 3)),
        member("dev/mem", "3", device=(1, 0)),
        member("dev/odd", "3", device=(0, 7)),
        member("dev/block", "4", device=(0, 0)),
    ]
    hidden = [member(f"dev/.wh.{gone}") for gone in ("null", "odd", "block")]
    top = apply_stack(stores.snapshotter(name), [archive(*devices), archive(*hidden)])
    tree = tree_of(stores, name, top, stores.root.path.parent / "mnt")
    assert set(tree) == {b"dev", b"dev/mem"}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_was_hidden_stays_hidden(name: str, at_once: bool, stores: Stores) -> None:
    # On disk below: a/ with x. Then a is a file, then a folder again, then only implied.
    backend = stores.snapshotter(name)
    base = apply_stack(backend, [archive(member("a/", "5", mode=0o700, uid=77), member("a/x"))])
    layers = [
        archive(member("a")),
        archive(member("a/", "5", mode=0o755, uid=5)),
        archive(member("a/z"), member("a/.wh.x")),
    ]
    if at_once:
        top = commit_chain(backend, layers, "upper ", base)
    else:
        top = base
        for number, layer in enumerate(layers):
            top = commit_chain(backend, [layer], f"{number} ", top)
    tree = tree_of(stores, name, top, stores.root.path.parent / "mnt")
    assert {path: (entry.mode & 0o7777, entry.owner) for path, entry in tree.items()} == {
        b"a": (0o755, (5, 0)),
        b"a/z": (0o644, (0, 0)),
    }


@pytest.mark.parametrize("name", BACKENDS)
def test_a_layer_that_is_given_up_takes_only_those_above(name: str, stores: Stores) -> None:
    # Another caller's layers are sealed in the same job: two below are there, one is gone.
    backend = stores.snapshotter(name)
    steps = [applied(backend, key, member(key)) for key in ("a", "b", "c")]
    steps = [
        replace(step, parent=below)
        for step, below in zip(steps, (None, "done a", "done b"), strict=True)
    ]
    (sealing,) = backend.sealing(*steps)
    backend.cleanup(only={backend.remove("c")})
    count, failed = Sealer()(sealing.argument)
    assert (count, type(failed)) == (2, NotFound)
    backend.commit(*steps[:2])
    assert {info.key for info in backend.walk()} == {"done a", "done b"}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_commit_that_was_refused_measures_again(name: str, stores: Stores) -> None:
    # What is written through a mount after a refusal counts, and is flushed, like all the rest.
    backend = stores.snapshotter(name)
    (mount,) = backend.prepare("key")
    with pytest.raises(InvalidArgument):
        backend.commit(Commit(name="done", key="key", labels={"l": "x" * 5000}))
    with pytest.raises(FailedPrecondition):
        backend.commit(Commit(name="done", key="key", lease="no such lease"))
    (Path(mount.source) / "file").write_bytes(b"x" * 100_000)
    backend.commit(Commit(name="done", key="key"))
    assert backend.usage("done").size >= 100_000
    assert backend.usage("done").inodes == 1


# -- aufs, as a real kernel has it ------------------------------------------------------------


def opaque_marks(stores: Stores, top: str) -> list[str]:
    return sorted(
        str(mark.relative_to(branch))
        for branch in branches(stores, top)
        for mark in branch.rglob(OPAQUE.decode())
    )


def test_what_an_upper_opaque_mark_hides_stays_hidden_over_a_lower_one(stores: Stores) -> None:
    # A real kernel keeps the lowest of two marks at one path, and shows what the upper one hid.
    layers = [
        archive(member("a/base"), member("a/sub/deep")),
        archive(member(".wh.a"), member("a/x"), member("a/sub/y")),
        archive(member("a/", "5"), member("a/sub/", "5"), member("a/.wh..wh..opq")),
    ]
    backend = stores.snapshotter("aufs")
    top = apply_stack(backend, layers)
    assert set(tree_of(stores, "aufs", top, stores.root.path)) == {b"a", b"a/sub"}
    assert opaque_marks(stores, top) == ["a/.wh..wh..opq", "a/sub/.wh..wh..opq"]


def test_a_folder_over_a_file_over_a_folder(stores: Stores) -> None:
    layers = [archive(member("a/x")), archive(member("a")), archive(member("a/", "5"))]
    backend = stores.snapshotter("aufs")
    top = apply_stack(backend, layers)
    assert set(tree_of(stores, "aufs", top, stores.root.path)) == {b"a"}
    assert len(opaque_marks(stores, top)) == 1


def test_names_are_hidden_once_however_often_a_folder_is_replaced(stores: Stores) -> None:
    # A whiteout by name hides for all layers above: else each of them would make them all again.
    layers = [archive(*(member(f"d/{n}") for n in range(100)))]
    layers += [archive(member("d/.wh..wh..opq"), member(f"d/x{n}")) for n in range(20)]
    top = commit_chain(stores.snapshotter("aufs"), layers)
    assert set(tree_of(stores, "aufs", top, stores.root.path)) == {b"d", b"d/x19"}
    markers = [mark for branch in branches(stores, top) for mark in branch.rglob(".wh.*")]
    assert len(markers) < 100 + 2 * 20


FEW = st.sampled_from([b"a", b"b"])
PATHS = st.lists(FEW, min_size=1, max_size=3).map(tuple)
ENTRIES = st.one_of(
    st.builds(Member, PATHS, st.just("5"), st.sampled_from([0o755, 0o700]), OWNERS, st.just(7)),
    st.builds(Member, PATHS, st.just("0")),
    PATHS.map(lambda path: Member((*path, b".wh..wh..opq"), "0")),
    PATHS.map(lambda path: Member((*path[:-1], b".wh." + path[-1]), "0")),
)


@given(stack=st.lists(st.lists(ENTRIES, max_size=5).map(possible), min_size=3, max_size=6))
def test_layers_that_replace_each_other_again_and_again(
    stack: list[list[Member]], tmp_path: Path
) -> None:
    # Few names and many opaque folders: marks meet at one path, in one commit and across several.
    expected = expected_tree(stack)
    assert expected is not None
    here = tmp_path / str(next(ROUNDS))
    with Root(here) as root:
        opened = Stores(root, "default", AMD64)
        for name in ("aufs", "overlay"):
            backend = opened.snapshotter(name)
            layers = [packed(layer) for layer in stack]
            split = len(layers) // 2
            base = commit_chain(backend, layers[:split])
            top = commit_chain(backend, layers[split:], "upper ", base)
            tree = tree_of(opened, name, top, tmp_path / "mnt")
            assert not differences(tree, describe(expected)), name
            if name == "aufs":
                marks = opaque_marks(opened, top)
                assert len(marks) == len(set(marks)), "two opaque marks at one path of a chain"
        opened.close()
    shutil.rmtree(here)
