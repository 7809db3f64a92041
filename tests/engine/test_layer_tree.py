"""The layer's tree: what it tells a sink, what it counts, and that its cost follows what it holds."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import limits
from engine.diff import outline
from engine.diff.apply import apply_layer
from engine.diff.budget import Budget
from engine.diff.layer import Attributes, Folder, LayerTree, Leaf, folders, path_of
from engine.diff.outline import Outline
from engine.diff.rules import Rules
from engine.diff.tar import TarReader
from engine.errors import DataLoss, NotSupported, Refused
from engine.oci.digest import digest_of
from engine.snapshots import Target
from engine.testing.archives import archive, member


class Recorder:
    """A sink that only writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def _note(self, what: str, parent: Folder, name: bytes, *more: object) -> None:
        assert not parent.is_gone
        self.calls.append((what, path_of(parent), name, *more))

    def make_folder(self, parent: Folder, name: bytes) -> None:
        self._note("folder", parent, name)

    def make_file(self, parent: Folder, name: bytes, _entry: object, payload: object) -> None:
        self._note("file", parent, name, b"".join(map(bytes, payload())))  # type: ignore[operator]

    def make_symlink(self, parent: Folder, name: bytes, entry: object) -> None:
        self._note("symlink", parent, name)

    def make_node(self, parent: Folder, name: bytes, entry: object) -> None:
        self._note("node", parent, name)

    def make_link(self, parent: Folder, name: bytes, target: tuple[Folder, bytes], old: object) -> None:
        self._note("link", parent, name, path_of(target[0]), target[1], type(old).__name__)

    def remove(self, parent: Folder, name: bytes, node: Folder | Leaf) -> None:
        self._note("remove", parent, name)

    def finish(self, root: Folder, size: int, inodes: int) -> int:
        self.calls.append(("finish", size, inodes))
        return 0


def built(*members: bytes) -> tuple[LayerTree, Recorder]:
    sink, budget = Recorder(), Budget()
    rules = Rules(budget, name_bytes=255, whiteout_names=True)
    tree = LayerTree(sink, rules, budget)
    reader = TarReader([archive(*members)])
    for operation in rules.operations(reader):
        tree.apply(operation, reader.payload)
    tree.finish()
    return tree, sink


def test_places_are_resolved_before_a_sink_sees_them() -> None:
    _, sink = built(
        member("real/", "5"),
        member("way", "2", link="../../real/./sub/.."),
        member("way/in/file", data=b"x"),
        member("hard", "1", link="way/in/file"),
    )
    assert sink.calls == [
        ("folder", b"", b"real"),
        ("symlink", b"", b"way"),
        ("folder", b"real", b"sub"),
        ("folder", b"real", b"in"),
        ("file", b"real/in", b"file", b"x"),
        ("link", b"", b"hard", b"real/in", b"file", "NoneType"),
        ("finish", 4096 * 4, 5),
    ]


def test_what_is_replaced_is_removed_once_and_no_longer_counted() -> None:
    _, sink = built(
        member("a/b/c", data=b"x" * 5000),
        member("keep", "1", link="a/b/c"),
        member("a", data=b"file"),
        member("a", "2", link="nowhere"),
    )
    assert [call[0] for call in sink.calls if call[0] in {"remove", "finish"}] == [
        "remove",
        "remove",
        "finish",
    ]
    assert sink.calls[-1] == ("finish", 8192, 2)  # the linked file and the link


def test_a_link_over_the_folder_that_holds_its_target() -> None:
    _, sink = built(member("d/f", data=b"x"), member("d", "1", link="d/f"))
    assert sink.calls[-2:] == [("link", b"", b"d", b"d", b"f", "Folder"), ("finish", 4096, 1)]


def test_hidden_names_are_told_apart_when_the_layer_ends() -> None:
    tree, _ = built(
        member(".wh.file"),
        member(".wh.folder"),
        member(".wh.gone"),
        member("file"),
        member("folder/x"),
    )
    folder = tree.root.names[b"folder"]
    assert isinstance(folder, Folder)
    assert tree.root.hidden == {b"gone"}
    assert folder.is_opaque


def test_links_are_bounded_over_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LAYER_LINK_STEPS", 1000)
    links = [member("d/", "5"), member("l", "2", link="d/" + "../d/" * 20)]
    built(*links, *(member(f"l/{n}") for n in range(20)))
    far = [entry for n in range(60) for entry in (member(f"{n}/"), member(f"l/{n}"))]
    with pytest.raises(Refused, match="over 1000 steps"):
        built(*links, *far)


def test_only_what_is_kept_counts_as_names(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2,000 long paths of one folder keep its name once; xattrs of files go straight to the disk.
    monkeypatch.setattr(limits, "LAYER_NAMES", 20_000)
    long = "/".join(["n" * 200] * 5)
    many = [member(f"{long}/{n}", pax={b"SCHILY.xattr.user.x": b"v" * 500}) for n in range(2000)]
    built(*many)


NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff"])


@st.composite
def trees(draw: st.DrawFn) -> Folder:
    root = Folder(None, b"")
    made = [root]
    for _ in range(draw(st.integers(0, 12))):
        parent, name = draw(st.sampled_from(made)), draw(NAMES)
        if name in parent.names:
            continue
        if draw(st.booleans()):
            folder = parent.names[name] = Folder(parent, name)
            folder.is_opaque = draw(st.booleans())
            folder.hidden = draw(st.sets(NAMES, max_size=2))
            if draw(st.booleans()):
                folder.attributes = Attributes(0o700, 1, 2, 3, ((b"user.x", b"\0"),))
            made.append(folder)
        else:
            parent.names[name] = Leaf(0)
    return root


def facts(root: Folder) -> dict[bytes, object]:
    return {
        path_of(folder): (
            folder.attributes,
            folder.is_opaque,
            folder.hidden,
            {name: type(node).__name__ for name, node in folder.names.items()},
        )
        for folder in folders(root)
    }


def encoded(tree: Folder) -> bytes:
    return b"".join(outline.encode(Outline(tree, 5, 6)))


@given(tree=trees())
def test_an_outline_is_the_tree_again(tree: Folder) -> None:
    found = outline.decode(encoded(tree))
    assert facts(found.root) == facts(tree)
    assert (found.size, found.inodes) == (5, 6)


@given(tree=trees(), at=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_damaged_outline_is_an_error_or_another_outline(tree: Folder, at: int, bit: int) -> None:
    data = bytearray(encoded(tree))
    data[at % len(data)] ^= 1 << bit
    for damaged in (bytes(data), bytes(data[: at % len(data)]), b""):
        with suppress(DataLoss):
            outline.decode(damaged)


def test_an_outline_that_ends_between_two_pieces_is_damaged() -> None:
    """As a crash may leave its file: each piece is whole, what the others hide would show again."""
    root = Folder(None, b"")
    for number in range(outline._AT_ONCE):
        root.names[b"%d" % number] = Folder(root, b"%d" % number)
    pieces = list(outline.encode(Outline(root, 5, 6)))
    assert len(pieces) > 3  # a head, then lengths and pieces
    for end in range(1, len(pieces)):
        with pytest.raises(DataLoss, match="unpack again"):
            outline.decode(b"".join(pieces[:end]))


def test_an_outline_is_linear_in_a_deep_tree() -> None:
    # As paths, 500 folders of 500 levels would be 125,000 components.
    root = folder = Folder(None, b"")
    for _ in range(500):
        folder.names[b"d"] = below = Folder(folder, b"d")
        folder = below
    assert len(encoded(root)) < 500 * 20


@contextmanager
def open_one_file(place: str) -> Iterator["OneFile"]:
    """Open a sink that is no folder: names one after the other, in a file."""
    with Path(place).open("wb") as file:
        yield OneFile(file)


class OneFile(Recorder):
    def __init__(self, file: object) -> None:
        super().__init__()
        self._file = file

    def finish(self, root: Folder, size: int, inodes: int) -> int:
        super().finish(root, size, inodes)
        for call in self.calls:
            self._file.write(repr(call).encode() + b"\n")  # type: ignore[attr-defined]
        return 0


def target(sink: str, place: Path) -> Target:
    return Target(sink=sink, place=str(place), name_bytes=255, whiteout_names=True)


def test_a_backend_names_its_sink_which_need_not_be_a_folder(tmp_path: Path) -> None:
    layer = archive(member("a/b", data=b"x"))
    place = tmp_path / "image"
    apply_layer(
        [layer],
        target(f"{__name__}:open_one_file", place),
        diff_id=digest_of(layer),
    )
    assert place.read_bytes().splitlines()[1] == b"('file', b'a', b'b', b'x')"


def test_a_sink_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="no_such_module"):
        apply_layer(
            [archive()],
            target("no_such_module:sink", tmp_path),
            diff_id=digest_of(b""),
        )
