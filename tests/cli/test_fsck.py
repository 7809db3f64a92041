"""The command `fsck`: what it says, its codes, and what it leaves alone."""

import json
import os
import signal
from pathlib import Path

import pytest

from engine.testing.archives import archive, layout, member
from tests.command import dump, lamina, lamina_json
from tests.processes import Victim, until

pytestmark = pytest.mark.root


def first_tree(root: Path) -> Path:
    return min(root.glob("snapshots/overlay/*/fs"))


def test_a_good_store(stocked: Path) -> None:
    done = lamina(stocked, "fsck")
    assert done.stdout == ""
    assert done.stderr.startswith("looked at ")
    assert lamina(stocked, "fsck", "-q").stderr == ""
    assert lamina_json(stocked, "fsck")["findings"] == []
    before = dump(stocked)
    assert lamina(stocked, "fsck", "--repair").stdout == ""
    assert dump(stocked) == before


def test_damage_is_a_line_and_a_code(stocked: Path) -> None:
    (first_tree(stocked) / "added").touch()
    done = lamina(stocked, "fsck", code=5)
    (line,) = done.stdout.splitlines()
    assert line.startswith("damaged  snapshot overlay sha256:")
    assert "/added added" in line
    assert done.stderr.splitlines()[-1] == (
        "lamina: 1 thing damaged; `lamina fsck --repair` mends what can be"
    )
    assert lamina(stocked, "fsck", "-q", code=5).stdout == done.stdout
    found = json.loads(lamina(stocked, "fsck", "--json", code=5).stdout)
    assert (found["left"], found["error"]["exit_code"]) == (1, 5)
    assert {"path": "added", "how": "added", "detail": "", "by_below": False} in (
        found["findings"][0]["differences"]
    )
    mended = lamina(stocked, "fsck", "--repair").stdout
    assert mended.startswith("repaired  snapshot overlay")
    assert mended.endswith("applied again from its layer\n")
    assert lamina(stocked, "fsck").stdout == ""


def test_a_line_names_a_namespace_that_is_not_the_one_in_use(stocked: Path) -> None:
    (first_tree(stocked) / "added").touch()
    here = lamina(stocked, "fsck", code=5).stdout
    there = lamina(stocked, "--namespace", "other", "fsck", code=5).stdout
    assert "in namespace" not in here
    assert " in namespace default: " in there


def test_only_some_images(stocked: Path) -> None:
    (first_tree(stocked) / "added").touch()
    lamina(stocked, "fsck", "app:1", code=5)
    lamina(stocked, "fsck", "no-such", code=3)
    lamina(stocked, "fsck", "--repair", "app:1")
    lamina(stocked, "fsck", "app:1")


def test_a_mount_in_use_is_no_damage(stocked: Path, tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    lamina(stocked, "mount", "app:1", target, "--rw", "--name", "web")
    try:
        (target / "written").write_text("by a container")
        for path in target.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.read_bytes()
        assert lamina(stocked, "fsck").stdout == ""
        assert lamina(stocked, "fsck", "--repair").stdout == ""
        (first_tree(stocked) / "added").touch()
        done = lamina(stocked, "fsck", "--repair", code=5)
        assert (
            "waits: it is mounted, or something that stands on it is; unmount that first" in done.stdout
        )
    finally:
        lamina(stocked, "umount", target)
    lamina(stocked, "fsck", "--repair")
    lamina(stocked, "mount", "web", target)
    try:
        assert (target / "written").read_text() == "by a container"
        assert not (target / "added").exists()
    finally:
        lamina(stocked, "umount", target)
    assert lamina(stocked, "fsck").stdout == ""


def test_every_namespace_is_looked_at(stocked: Path, image: Path) -> None:
    lamina(stocked, "--namespace", "other", "import", "--snapshotter", "copy", image)
    (min(stocked.glob("snapshots/copy/*/fs")) / "added").touch()
    found = json.loads(lamina(stocked, "fsck", "--json", code=5).stdout)["findings"]
    assert {finding["namespace"] for finding in found} == {"other"}


def test_ctrl_c_ends_a_repair_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    layer = archive(member("big", data=os.urandom(8 << 20)))
    lamina(root, "import", "--name", "a:1", layout(tmp_path / "image", [layer]))
    (first_tree(root) / "big").unlink()
    before = dump(root)
    victim = Victim(root, ["fsck", "--repair"], "fsck.snapshot.prepared=stop")
    stat = Path(f"/proc/{victim.process.pid}/stat")
    until(lambda: stat.read_text(encoding="ascii").rpartition(") ")[2].startswith("T"))
    victim.interrupt()
    os.kill(victim.process.pid, signal.SIGCONT)
    code, messages = victim.wait()
    assert code == 130, messages
    after = dump(root)
    assert (after["snapshots"], after["folders"]) == (before["snapshots"], before["folders"])
    assert after["leases"] == after["trash"] == []
    lamina(root, "fsck", "--repair")
