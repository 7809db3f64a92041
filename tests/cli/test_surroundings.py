"""What surrounds a command may fail it, never harm the store: rights, disks, processes, signals."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.mount import Mount, activate, deactivate, mounted
from engine.testing.archives import archive, layout, member
from tests.cli.failing import assert_fails, assert_one_line
from tests.cli.test_commands import CHAIN
from tests.command import dump, empty_store, environment, lamina, lamina_json
from tests.processes import Victim, until

pytestmark = pytest.mark.root

_NOBODY = 65534
_MIB = 1 << 20

# The command runs with all rights first, on a new root and again, so that its modules are loaded
# when the rights go: an interpreter in somebody's home is for its owner only.
_AS_NOBODY = f"""
import contextlib, io, os, sys, tempfile
from pathlib import Path
from engine.cli.main import main
from engine.root import Root
os._exit = sys.exit  # which the end of a command is not to be here
root = sys.argv[2]
with tempfile.TemporaryDirectory() as folder:
    sys.argv[2] = os.path.join(folder, "root")
    Root(Path(sys.argv[2])).close()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        words = sys.argv[3:]
        for sys.argv[3:] in (["gc"], words, words):
            with contextlib.suppress(SystemExit):
                main()
sys.argv[2] = root
os.setgroups([]); os.setgid({_NOBODY}); os.setuid({_NOBODY})
main()
"""


def _as_nobody(root: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", _AS_NOBODY, "--root", str(root), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )


@contextmanager
def _tmpfs(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a small file system of its own."""
    folder.mkdir()
    small = Mount(type="tmpfs", source="tmpfs", options=[f"size={mebibytes}m"])
    with mounted([small], folder):
        yield folder


# -- rights -----------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="lamina-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_another_user_may_not_open_a_root(stocked: Path, open_folder: Path):
    shutil.move(stocked, open_folder / "root")
    before = dump(open_folder / "root")
    for words in (["images"], ["gc"], ["image", "rm", "app:1"], ["unpack", "app:1"]):
        done = _as_nobody(open_folder / "root", *words)
        assert done.returncode == 1
        assert_one_line(done.stderr, "belongs to user 0, not to you")
    assert dump(open_folder / "root") == before


def test_a_root_in_a_folder_of_another_user(tmp_path: Path):
    done = _as_nobody(tmp_path / "root", "images")
    assert done.returncode == 1
    assert_one_line(done.stderr, "permission denied; run as root or choose another --root")


def test_without_root_an_image_is_stored_but_not_unpacked(image: Path, open_folder: Path):
    source = open_folder / "app"
    shutil.copytree(image, source)
    home = open_folder / "home"
    home.mkdir()
    os.chown(home, _NOBODY, _NOBODY)
    done = _as_nobody(home / "root", "import", source)
    assert done.returncode == 1
    assert_one_line(done.stderr, "needs root")
    assert "add --no-unpack to only store the image" in done.stderr
    done = _as_nobody(home / "root", "images", "--json")
    assert (done.stdout, done.stderr) == ("[]\n", "")
    done = _as_nobody(home / "root", "import", "--no-unpack", source)
    assert done.returncode == 0, done.stderr
    assert "app:1" in _as_nobody(home / "root", "images").stdout


def test_an_unreadable_image(stocked: Path, image: Path, open_folder: Path):
    home = open_folder / "home"
    home.mkdir()
    os.chown(home, _NOBODY, _NOBODY)
    done = _as_nobody(home / "root", "import", "--no-unpack", image)
    assert done.returncode == 1
    assert_one_line(done.stderr, "permission denied")


# -- disks ------------------------------------------------------------------------------------


def test_a_read_only_root(stocked: Path):
    before = dump(stocked)
    activate([Mount(type="bind", source=str(stocked), options=["bind", "ro"])], stocked)
    try:
        for words in (["gc"], ["image", "rm", "app:1"]):
            done = lamina(stocked, *words, code=1)
            assert_one_line(done.stderr, "the file system is read-only; choose another --root")
    finally:
        deactivate(stocked)
    assert dump(stocked) == before


def test_a_disk_that_blobs_do_not_fit_on(tmp_path: Path):
    content = os.urandom(12 * _MIB)
    image = layout(tmp_path / "image", [archive(member("big", data=content))], compression="none")
    with _tmpfs(tmp_path / "small", 8) as folder:
        root = empty_store(folder / "root")
        assert_fails(root, "import", image, code=8, says="no space left on the device")
        assert lamina_json(root, "images") == []
        fitting = layout(tmp_path / "fitting", [archive(member("small", data=content[:_MIB]))])
        # The file of blobs keeps the space that it took: there is none for a tree beside it.
        lamina(root, "import", "--no-unpack", fitting)


def test_a_disk_that_files_do_not_fit_on(tmp_path: Path, image: Path):
    # Zeros pack well: the blob fits, what is in it does not.
    content = [member(f"{number}", data=bytes(4 * _MIB)) for number in range(8)]
    large = layout(tmp_path / "large", [archive(*content)])
    with _tmpfs(tmp_path / "small", 16) as folder:
        root = folder / "root"
        lamina(root, "import", image)
        for backend in ("overlay", "copy"):
            words = ("import", "--snapshotter", backend, large)
            assert_fails(root, *words, code=8, says="no space left on the device")
        lamina(root, "import", "--no-unpack", large)
        assert_fails(root, "unpack", "large", code=8, says="no space left on the device")
        assert lamina_json(root, "unpack", "app:1", "--snapshotter", "copy")["applied"] == 2


# -- other processes --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_two_processes_unpack_one_image(tmp_path: Path, backend: str):
    layers = [
        archive(*(member(f"{layer}/{number}", data=b"%d" % number) for number in range(400)))
        for layer in range(3)
    ]
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", layout(tmp_path / "image", layers))
    words = ["unpack", "image:latest", "--snapshotter", backend]
    both = [Victim(root, words) for _ in range(2)]
    for process in both:
        code, messages = process.wait()
        assert code == 0, messages
    assert lamina_json(root, "unpack", "image:latest", "--snapshotter", backend)["applied"] == 0
    lamina(root, "gc")  # who lost a race deletes for half a second only
    left = dump(root)
    assert len(left["snapshots"]) == len(left["folders"]) == 3
    for table in ("leases", "lease_items", "ingests", "trash"):
        assert left[table] == []


def test_two_processes_import_different_images(tmp_path: Path, image: Path):
    root = tmp_path / "root"
    more = layout(tmp_path / "more", [archive(member("file", data=b"of another"))], tag="1")
    both = [Victim(root, ["import", str(source)]) for source in (image, more)]
    for process in both:
        code, messages = process.wait()
        assert code == 0, messages
    assert {row["name"].rpartition("/")[2] for row in lamina_json(root, "images")} == {"app:1", "more:1"}


# -- signals ----------------------------------------------------------------------------------


def _interrupted(root: Path, words: list[str], begun: Callable[[], object]) -> None:
    """Interrupt a command once `begun` says that work is under way."""
    victim = Victim(root, words)
    until(begun)
    victim.interrupt()
    code, messages = victim.wait()
    assert (code, messages) == (130, "lamina: interrupted\n")


def _many_files() -> bytes:
    return archive(*(member(f"{number:05}", data=b"%d" % number) for number in range(30_000)))


def test_ctrl_c_while_storing_leaves_nothing(tmp_path: Path):
    big = archive(member("big", data=bytes(200 * _MIB)))
    image = layout(tmp_path / "image", [big], compression="none")
    root = tmp_path / "root"
    file = root / "blobs.lmdb" / "data.mdb"
    _interrupted(root, ["import", str(image)], lambda: file.exists() and file.stat().st_size > 8 * _MIB)
    assert {name: records for name, records in dump(root).items() if records} == {}


def test_ctrl_c_while_unpacking_leaves_nothing(tmp_path: Path):
    image = layout(tmp_path / "image", [_many_files()])
    root = tmp_path / "root"
    begun = lambda: any((root / "snapshots").glob("overlay/*/fs/*"))  # noqa: E731
    _interrupted(root, ["import", str(image)], begun)
    assert {name: records for name, records in dump(root).items() if records} == {}


def test_ctrl_c_while_unpacking_keeps_what_was_there(stocked: Path, tmp_path: Path):
    image = layout(tmp_path / "image", [_many_files()])
    lamina(stocked, "import", "--no-unpack", image)
    before = dump(stocked)
    seen = {path.name for path in (stocked / "snapshots/overlay").iterdir()}
    _interrupted(
        stocked,
        ["unpack", "image:latest"],
        lambda: any(p.parts[-3] not in seen for p in (stocked / "snapshots").glob("overlay/*/fs/*")),
    )
    assert dump(stocked) == before
    assert lamina_json(stocked, "image", "inspect", "app:1")["chain_ids"] == list(CHAIN)


def test_running_again_in_one_process_adds_nothing_to_its_logging(tmp_path: Path):
    lamina(tmp_path, "--help")
    before = list(logging.getLogger().handlers)
    lamina(tmp_path, "--help")
    assert logging.getLogger().handlers == before
