"""Opening a store after a crash puts it in order, also when that is what dies, again and again."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine import failpoints, plugins, recovery
from engine.kv.schema import TRASH
from engine.processes import boot_id
from engine.root import Root
from engine.stores import host_platform, open_stores
from engine.testing.archives import archive, layout, member
from tests.command import dump, lamina
from tests.processes import Victim

pytestmark = [pytest.mark.crash, pytest.mark.root]

LAYER = archive(member("etc/passwd", data=b"root\n"), *(member(f"x/{n}") for n in range(20)))
POINTS = ("recover.begun", "recover.emptied", "recover.checked", "recover.swept")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layout(tmp_path_factory.mktemp("image"), [LAYER])


@pytest.fixture(scope="module")
def died(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which a collection died, after it dropped a snapshot and blobs."""
    root = tmp_path_factory.mktemp("died") / "root"
    lamina(root, "import", "--snapshotter", "overlay", "--name", "a:1", image)
    lamina(root, "image", "rm", "a:1")
    code, messages = Victim(root, ["gc"], "trash.moved=kill").wait()
    assert code == -signal.SIGKILL, messages
    return root


def copied(template: Path, root: Path) -> Path:
    subprocess.run(["cp", "-a", template, root], check=True)
    return root


def is_in_order(path: Path) -> bool:
    with Root(path) as root:
        return recovery.is_in_order(root)


@pytest.mark.parametrize("points", [POINTS[:3], POINTS[1:], POINTS[::-1][:3], ("recover.swept",) * 3])
def test_a_recovery_may_die_three_times(died: Path, tmp_path: Path, points: Sequence[str]) -> None:
    root = copied(died, tmp_path / "root")
    for point in points:
        assert not is_in_order(root)
        code, messages = Victim(root, ["gc"], f"{point}=kill").wait()
        assert code == -signal.SIGKILL, messages or "the point was not reached"
    with open_stores(root, "default", host_platform()) as stores:
        assert list(stores.root.trash.iterdir()) == []
        with stores.root.meta.read() as txn:
            assert TRASH.scan(txn) == []
    assert is_in_order(root)
    lamina(root, "fsck")
    lamina(root, "gc")
    assert not any(dump(root).values())


def test_every_point_of_a_recovery_is_met() -> None:
    assert {name for name in failpoints.NAMES if name.startswith("recover.")} == set(POINTS)


def test_a_store_that_was_closed_is_in_order(tmp_path: Path, image: Path) -> None:
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", image)
    assert is_in_order(root)
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(recovery, "_recover", lambda _root: pytest.fail("nothing is to be done"))
        lamina(root, "gc")


def test_who_opens_it_meanwhile_does_not_wait(died: Path, tmp_path: Path) -> None:
    root = copied(died, tmp_path / "root")
    lock = os.open(root / "recovery", os.O_RDONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open_stores(root, "default", host_platform()) as stores:
            assert list(stores.root.trash.iterdir()), "whoever is at it does it"
    finally:
        os.close(lock)
    assert not is_in_order(root)


def test_a_reader_changes_nothing(died: Path, tmp_path: Path) -> None:
    root = copied(died, tmp_path / "root")
    before = sorted(map(str, root.rglob("*")))
    lamina(root, "images")
    assert sorted(map(str, root.rglob("*"))) == before


def test_time_for_it_is_bounded(died: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copied(died, tmp_path / "root")
    monkeypatch.setattr("engine.limits.RECOVERY_S", -1.0)
    with open_stores(root, "default", host_platform()):
        pass
    assert is_in_order(root)
    assert dump(root)["trash"], "a collection takes what is left"
    lamina(root, "gc")
    assert not any(dump(root).values())


def test_after_another_boot_what_was_committed_last_is_looked_at(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    lamina(root, "import", "--snapshotter", "overlay", "--name", "a:1", image)
    assert (root / "boot").read_text().strip() == boot_id()
    (root / "boot").write_text("another\n")
    lamina(root, "gc")
    assert "is damaged" not in caplog.text
    (file,) = root.glob("snapshots/overlay/*/fs/etc/passwd")
    file.unlink()
    (root / "boot").write_text("another\n")
    lamina(root, "gc")
    assert "it has 22 files, not 23; run `lamina fsck --repair`" in caplog.text
    lamina(root, "fsck", "--repair")


def test_a_note_that_a_power_cut_emptied_is_another_boots(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    lamina(root, "import", "--snapshotter", "overlay", image)
    (file,) = root.glob("snapshots/overlay/*/fs/etc/passwd")
    file.unlink()
    (root / "boot").write_text("")
    lamina(root, "gc")
    assert "it has 22 files, not 23" in caplog.text


def test_the_note_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(
        recovery, "flush", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    with Root(tmp_path / "root") as root:
        recovery.recover(root)
    assert flushed == [f"{tmp_path}/root/boot.new"]


def test_a_recovery_without_time_lets_go_of_tries(tmp_path: Path) -> None:
    """A collection takes them."""
    with Root(tmp_path / "root") as root:
        left = root.trash / ".probe-dead-x"
        left.mkdir()
        plugins.sweep(root, time.monotonic() - 1)
        assert left.exists()
        plugins.sweep(root)
        assert not left.exists()


def test_what_cannot_be_done_keeps_nobody_out(
    died: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = copied(died, tmp_path / "root")
    began = time.monotonic()
    with failpoints.armed("recover.emptied", "enospc"):
        lamina(root, "images")  # a reader does not try
        lamina(root, "content", "rm", "sha256:" + "0" * 64, code=3)
    assert "not in order yet" in caplog.text
    assert not is_in_order(root)
    assert time.monotonic() - began < 20
    lamina(root, "gc")
    assert is_in_order(root)


def test_without_proc_a_store_opens(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(recovery, "boot_id", missing)
    lamina(tmp_path / "root", "import", "--no-unpack", image)
    assert is_in_order(tmp_path / "root")
    assert caplog.text == ""
