"""What goes wrong around lamina: others' mounts, inherited attributes, imports that meet, odd text."""

import os
import subprocess
from pathlib import Path

import pytest

from engine.testing.archives import archive, layout, member
from engine.testing.trees import read_tree
from tests.command import LAMINA, empty_store, environment, lamina, lamina_json

pytestmark = pytest.mark.root

LAYERS = [archive(member("a", data=b"a" * 200_000)), archive(member("b", data=b"b"))]


def test_umount_leaves_what_others_mounted_on_top(tmp_path: Path) -> None:
    root, target = tmp_path / "root", tmp_path / "mnt"
    target.mkdir()
    lamina(root, "import", layout(tmp_path / "image", LAYERS), "--name", "app:1")
    lamina(root, "mount", "app:1", target)
    subprocess.run(["mount", "-t", "tmpfs", "other", target], check=True)
    (target / "precious").touch()
    done = lamina(root, "umount", target, code=6)
    assert "not lamina's" in done.stderr
    assert (target / "precious").exists()
    subprocess.run(["umount", target], check=True)
    lamina(root, "umount", target)
    assert list(target.iterdir()) == []
    assert lamina_json(root, "snapshots", "ls")[0]["kind"] == "committed"


@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_a_tree_takes_nothing_from_the_folder_that_the_store_is_in(tmp_path: Path, backend: str) -> None:
    above = tmp_path / "above"
    above.mkdir()
    os.chown(above, 0, 50)
    above.chmod(0o2755)
    # A default ACL, user::rwx user:7:rwx group::--- mask::rwx other::---, as acl(5) lays it out.
    acl = bytes.fromhex("02000000 01000700ffffffff 0200070007000000 04000000ffffffff")
    acl += bytes.fromhex("10000700ffffffff 20000000ffffffff")
    os.setxattr(above, "system.posix_acl_default", acl)
    root, target = above / "root", tmp_path / "mnt"
    target.mkdir()
    words = ["--snapshotter", backend]
    lamina(root, "import", layout(tmp_path / "image", LAYERS), "--name", "app:1", *words)
    for more in ([], ["--rw"]):
        lamina(root, "mount", "app:1", target, *words, *more)
        info = target.stat()
        tree = read_tree(target)
        lamina(root, "umount", target)
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (0, 0, 0o755)
        assert {entry.mode & 0o7777 for entry in tree.values()} == {0o644}
        assert not any(entry.xattrs for entry in tree.values())


def test_two_imports_that_share_layers_both_succeed(tmp_path: Path) -> None:
    big = [archive(member("big", data=os.urandom(20_000_000))), *LAYERS]
    path = layout(tmp_path / "image", big, compression="none")
    command = [*LAMINA, "--root", str(tmp_path / "root"), "import", "--no-unpack", str(path), "--name"]
    running = [subprocess.Popen([*command, f"app:{n}"], env=environment()) for n in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(lamina_json(tmp_path / "root", "images")) == 3


def test_what_an_image_says_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\nx"
    path = layout(tmp_path / "image", LAYERS, config={"architecture": evil, "created": evil})
    lamina(tmp_path / "root", "import", path, "--name", "app:1", "--no-unpack")
    for words in (["images"], ["image", "inspect", "app:1"]):
        assert "\x1b" not in lamina(tmp_path / "root", *words).stdout
    done = lamina(tmp_path / "root", "import", "no\nsuch\x1b[31m", code=3)
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr


def test_a_fresh_file_system_can_be_a_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "lost+found").mkdir(parents=True)
    empty_store(tmp_path / "root")
    assert lamina_json(tmp_path / "root", "images") == []


def test_a_root_that_someone_else_filled_is_refused(tmp_path: Path) -> None:
    root = empty_store(tmp_path / "root")
    os.chown(root / "meta.lmdb", 65534, 65534)
    lamina(root, "images", code=6)


def test_the_store_cannot_be_mounted_over(tmp_path: Path) -> None:
    root = tmp_path / "root"
    lamina(root, "import", layout(tmp_path / "image", LAYERS), "--name", "app:1")
    for target in (root, root / "trash", tmp_path):
        lamina(root, "mount", "app:1", target, code=2)
