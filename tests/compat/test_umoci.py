"""Real images unpack to the same trees as with umoci: every entry, byte and attribute.

The image of 1.5 GB takes minutes and 10 GB of disk for each compression: only with `pytest -m large`.
"""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.corpus import COMPRESSIONS, build
from engine.testing.archives import SPARSE_FORMS, archive, layout, member, sparse_member
from engine.testing.trees import differences
from tests.command import lamina, lamina_json
from tests.compat.images import Tree, assert_same, our_tree, removed, umoci_tree
from tests.conftest import peer
from tests.support import BACKENDS

pytestmark = [pytest.mark.compat, pytest.mark.root]


@dataclass(frozen=True)
class Imported:
    """An image in a store of its own, not yet unpacked."""

    compression: str
    root: Path
    layout: Path
    name: str = "image:latest"


def _imported(folder: Path, image_set: str, compression: str) -> Imported:
    for tool in ("debootstrap", "pigz", "zstd"):
        peer(tool)
    archive = build(folder / "image", image_set, compression)
    lamina(folder / "root", "import", "--no-unpack", archive)
    return Imported(compression, folder / "root", folder / "image")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """The small image as umoci unpacks it; umoci does not know zstd, and needs not."""
    for program in ("debootstrap", "pigz", "umoci"):
        peer(program)
    with removed(tmp_path_factory.mktemp("umoci")) as folder:
        build(folder / "image", "small", "gzip")
        yield umoci_tree(folder / "image", folder / "tree")


@pytest.fixture(scope="module", params=COMPRESSIONS)
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Imported]:
    with removed(tmp_path_factory.mktemp("small")) as folder:
        yield _imported(folder, "small", request.param)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_small_image_is_as_umoci_unpacks_it(
    small: Imported, expected: Tree, backend: str, tmp_path: Path
):
    done = lamina_json(small.root, "unpack", "--snapshotter", backend, small.name)
    assert done["applied"] == done["layers"] == 3
    assert_same(our_tree(small.root, small.name, backend, tmp_path / "mnt"), expected, "umoci")


def test_holes_and_acls_are_as_umoci_unpacks_them(tmp_path: Path):
    acl = struct.pack("<I", 2)
    for tag, permissions, number in ((1, 7, -1), (2, 7, 5), (4, 5, -1), (16, 5, -1), (32, 0, -1)):
        acl += struct.pack("<HHi", tag, permissions, number)
    about = {f"SCHILY.xattr.system.posix_acl_{key}".encode(): acl for key in ("access", "default")}
    holes = [(5000, b"begin"), *((n * 8192, b"%d" % n) for n in range(1, 60)), (900_000, b"")]
    forms = SPARSE_FORMS[1:]  # umoci reads type S and then does not know what to make of it
    layers = [
        archive(
            member("d/", "5", mode=0o750, pax=about),
            *(sparse_member(form, b"d/" + form.encode(), 900_000, holes) for form in forms),
            member("acl", mode=0o750, pax={next(iter(about)): acl}),
            sparse_member("1.0", b"hole", 1 << 20, []),
        ),
        archive(member("e/", "5"), member("e/f", data=b"f")),
    ]
    image = layout(tmp_path / "image", layers)
    theirs = umoci_tree(image, tmp_path / "theirs")
    assert theirs[b"d"].xattrs == tuple(sorted((key[13:].decode(), acl) for key in about))
    assert theirs[b"acl"].xattrs
    assert len({theirs[b"d/" + form.encode()].detail for form in forms}) == 1
    lamina(tmp_path / "root", "import", "--snapshotter", "overlay", image, "--name", "odd:1")
    assert_same(our_tree(tmp_path / "root", "odd:1", "overlay", tmp_path / "mnt"), theirs, "umoci")


def test_the_expected_tree_shows_what_the_layers_do(expected: Tree):
    # Were the layers of the corpus to lose their special entries, equal trees would prove less.
    assert b"etc/issue" not in expected
    assert b"var/lib/dpkg" not in expected
    assert stat.S_ISREG(expected[b"srv"].mode)
    documents = {name for name in expected if name.startswith(b"usr/share/doc/")}
    assert documents == {b"usr/share/doc/README"}
    assert expected[b"data/one"].links == (b"data/two",)
    assert expected[b"data/one"].xattrs == (("user.note", b"kept"),)
    assert stat.S_IMODE(expected[b"data/suid"].mode) == 0o6755
    assert expected[b"data/suid"].owner == (1000, 1000)
    assert stat.S_ISFIFO(expected[b"data/pipe"].mode)
    assert expected[b"data"].mtime == 1_234_567_890_123_456_789


def test_a_changed_entry_shows_as_a_difference(expected: Tree):
    # The comparison itself must see one entry among thousands.
    without = {name: entry for name, entry in expected.items() if name != b"data/link"}
    assert len(differences(without, expected)) == 1
    with pytest.raises(AssertionError, match="data/link"):
        assert_same(without, expected, "umoci")


@pytest.mark.large
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_large_image_is_as_umoci_unpacks_it(compression: str, tmp_path: Path):
    with removed(tmp_path / "large") as folder:
        large = _imported(folder, "large", compression)
        plain = large.layout
        if compression == "zstd":
            plain = folder / "plain"
            build(plain, "large", "none")
        theirs = umoci_tree(plain, folder / "umoci")
        for backend in BACKENDS:
            lamina(large.root, "unpack", "--snapshotter", backend, large.name)
            ours = our_tree(large.root, large.name, backend, folder / "mnt")
            assert_same(ours, theirs, "umoci")
