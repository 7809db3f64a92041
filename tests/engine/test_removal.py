"""Removing what images made: nothing beyond a mount or a link goes, and it ends when it must."""

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from engine.fs import removal
from engine.fs.attributes import folder_descriptor
from engine.fs.removal import Unfinished, remove_entry, remove_tree
from engine.mount import Mount, activate, deactivate_below
from tests.filesystems import formatted


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a tree of a few folders, links out of it among them."""
    outside, made = tmp_path / "outside", tmp_path / "tree"
    (outside / "folder").mkdir(parents=True)
    for precious in (outside / "folder" / "precious", outside / "precious too"):
        precious.write_text("x")
    for depth in ("a", "a/b", "a/b/c", "d"):
        (made / depth).mkdir(parents=True, exist_ok=True)
        (made / depth / "file").touch()
        (made / depth / "link").symlink_to(outside / "folder")
        (made / depth / "nowhere").symlink_to("nowhere")
    return made


def remove(tree: Path) -> None:
    with folder_descriptor(tree.parent) as folder:
        remove_tree(folder, os.fsencode(tree.name))


def check_outside(tree: Path) -> None:
    for name in ("folder/precious", "precious too"):
        assert (tree.parent / "outside" / name).read_text() == "x"


def test_links_go_and_what_they_lead_to_stays(tree: Path) -> None:
    remove(tree)
    assert not tree.exists()
    check_outside(tree)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_deep_tree_on_another_file_system(tmp_path: Path, kind: str) -> None:
    # What is moved up while a folder is open is listed there at once by some file systems only.
    (tmp_path / "on").mkdir()
    with formatted(kind, tmp_path / "disk", tmp_path / "on") as disk:
        for number in range(3):
            (disk / "tree" / str(number) / "a/b/c/d").mkdir(parents=True)
            (disk / "tree" / str(number) / "a/b/file").touch()
        remove(disk / "tree")
        assert not (disk / "tree").exists()


def test_a_link_in_the_place_of_the_tree_is_not_entered(tree: Path) -> None:
    (tree.parent / "stands for it").symlink_to(tree.parent / "outside")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        remove(tree.parent / "stands for it")
    check_outside(tree)
    with folder_descriptor(tree.parent) as folder:
        assert not remove_entry(folder, b"stands for it")
        assert remove_entry(folder, b"tree")
    assert not tree.exists()
    check_outside(tree)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
@pytest.mark.parametrize("at", ["a", "a/b", "a/b/c", "."])
def test_e_05_what_is_mounted_is_not_emptied_and_the_rest_goes(tree: Path, at: str, kind: str) -> None:
    # A bind mount is of the same file system: only the kernel can tell.
    outside = tree.parent / "outside"
    options = ["rbind"] if kind == "bind" else []
    activate([Mount(type=kind, source=str(outside), options=options)], tree / at)
    try:
        if kind == "tmpfs":
            (tree / at / "folder").mkdir()
            for name in ("folder/precious", "precious too"):
                (tree / at / name).write_text("x")
        with (
            folder_descriptor(tree.parent) as folder,
            pytest.raises(OSError, match=r"cross-device|busy"),
        ):
            remove_entry(folder, b"tree")
        left = [path for path in tree.rglob("*") if path.is_symlink() or path.is_file()]
        if at == ".":
            left = [path for path in left if path.name.startswith("precious")]
        # Perhaps elsewhere: a folder above them may have been moved.
        assert sorted(path.name for path in left) == ["precious", "precious too"]
    finally:
        deactivate_below(tree.parent)
    remove(tree)
    assert not tree.exists()
    check_outside(tree)


def test_one_process_removes_what_another_is_removing(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each call finds that the other was first: everything it was about to remove is gone.
    def first(call: Callable[..., None]) -> Callable[..., None]:
        def called(name: bytes, **where: int) -> None:
            with suppress(FileNotFoundError):
                call(name, **where)
            raise FileNotFoundError

        return called

    monkeypatch.setattr(os, "unlink", first(os.unlink))
    monkeypatch.setattr(os, "rmdir", first(os.rmdir))
    remove(tree)
    assert not tree.exists()
    remove(tree)  # and nothing there is no error either
    check_outside(tree)


def test_names_that_a_removal_uses_itself(tmp_path: Path) -> None:
    # A folder two levels down is moved up under a name of ours: an image may have that name there.
    (tmp_path / "tree" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "e" / "f").mkdir(parents=True)
    thread = threading.get_native_id()
    for number in (1, 2):
        (tmp_path / "tree" / f".lamina-removing-{thread}-{number}" / "deep" / "down").mkdir(parents=True)
    (tmp_path / "tree" / f".lamina-removing-{thread}-3").symlink_to("nowhere")
    remove(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("resists", ["file", "a", "c", "deep file"])
def test_what_resists_does_not_keep_the_rest(
    tree: Path, resists: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_unlink, real_rmdir = os.unlink, os.rmdir
    inode = (
        {
            "file": tree / "d" / "file",
            "deep file": tree / "a" / "b" / "c" / "file",
            "a": tree / "a",
            "c": tree / "a" / "b" / "c",
        }[resists]
        .stat()
        .st_ino
    )

    def check(name: bytes, dir_fd: int) -> None:
        if os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_ino == inode:
            raise OSError(errno.EPERM, "immutable")

    def unlink(name: bytes, *, dir_fd: int) -> None:
        check(name, dir_fd)
        real_unlink(name, dir_fd=dir_fd)

    def rmdir(name: bytes, *, dir_fd: int) -> None:
        check(name, dir_fd)
        real_rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(PermissionError, match="immutable"):
        remove(tree)
    left = [path for path in tree.rglob("*") if not path.is_dir() or path.is_symlink()]
    assert [path.stat().st_ino for path in left] == ([inode] if "file" in resists else [])


def test_a_disk_that_fails_ends_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What fails is tried again for each level that there is, but not for ever.
    monkeypatch.setattr(removal, "_FAILURES", 20)
    (tmp_path / "tree" / "/".join("d" * 50)).mkdir(parents=True)
    for number in range(30):
        (tmp_path / "tree" / str(number)).touch()
    asked = []

    def fails(name: bytes, **_where: int) -> None:
        asked.append(name)
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(os, "unlink", fails)
    with pytest.raises(OSError, match="disk"):
        remove(tmp_path / "tree")
    assert len(asked) == 30


MANY = {"files": "{}", "folders": "{}/", "below": "d/{}/", "deep": "d/{}/e/"}


@pytest.mark.parametrize("kind", MANY)
def test_a_removal_stops_when_its_time_is_over_and_goes_on_later(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By a clock that goes on by one whenever it is looked at: which is for each name.
    tree = tmp_path / "tree"
    for number in range(50):
        name = MANY[kind].format(number)
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (tree / name).mkdir(parents=True)
        else:
            (tree / name).touch()
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with folder_descriptor(tmp_path) as folder:
        with pytest.raises(Unfinished):
            remove_tree(folder, b"tree", until=10)
        left = list((tree / "d" if kind in {"below", "deep"} else tree).iterdir())
        assert 35 <= len(left) < 50
        remove_tree(folder, b"tree")
        assert not tree.exists()
