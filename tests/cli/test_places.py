"""A store in other places: read-only, nearly full, in other pid namespaces, beside stopped processes."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from engine.kv import keys
from engine.kv.schema import IMAGES, SMALL, Small
from engine.mount import Mount, activate, deactivate, mounted
from engine.root import Root
from engine.testing.archives import archive, layout, member
from tests.cli.failing import assert_one_line
from tests.command import LAMINA, commands, dump, empty_store, environment, lamina, lamina_json
from tests.processes import Victim, kill

pytestmark = pytest.mark.root

_ELSEWHERE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

_LISTINGS = (
    ("images",),
    ("image", "inspect", "app:1"),
    ("content", "ls"),
    ("content", "verify"),
    ("snapshots", "ls"),
    ("snapshots", "tree"),
    ("snapshots", "usage"),
    ("gc", "--dry-run"),
    ("du",),
    ("fsck",),
    ("backends",),
    ("mounts",),
    ("leases", "ls"),
    ("namespaces", "ls"),
    ("image", "label", "app:1"),
    ("ps", "--all"),
)


def _shown(root: Path) -> dict[tuple[str, ...], str]:
    """Return what listings show, but for how long ago something was made."""
    return {
        words: " ".join(re.sub(r"[0-9]+ (s|min) ago", "", lamina(root, *words).stdout).split())
        for words in _LISTINGS
        if words != ("backends",)
    }


@contextmanager
def _process(code: str, root: Path, *prefix: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that works on a store, from when it is ready until it is killed."""
    started = subprocess.Popen(
        [*prefix, sys.executable, "-P", "-c", code, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield started
    finally:
        kill(started)


# -- reading needs no writing -----------------------------------------------------------------


@pytest.mark.parametrize("words", [*_LISTINGS, ("content", "get", "sha256:" + "0" * 64)])
def test_a_mistyped_root_of_a_listing_is_an_error(tmp_path: Path, words: tuple[str, ...]):
    done = lamina(tmp_path / "typo", *words, code=3)
    assert_one_line(done.stderr, f"no store at {tmp_path}/typo; `lamina import` makes one")
    assert os.listdir(tmp_path) == []


def test_listings_of_a_read_only_bind_mount(stocked: Path):
    expected, before = _shown(stocked), dump(stocked)
    activate([Mount(type="bind", source=str(stocked), options=["bind", "ro"])], stocked)
    try:
        assert _shown(stocked) == expected
        layer = lamina_json(stocked, "image", "inspect", "app:1")["manifest"]["layers"][0]
        lamina(stocked, "content", "get", layer["digest"], encoding="latin-1")
        for row in lamina_json(stocked, "backends"):
            assert "read-only" in row["reason"]
    finally:
        deactivate(stocked)
    assert dump(stocked) == before


@pytest.mark.parametrize("lock", [True, False])
def test_listings_of_a_read_only_file_system(stocked: Path, tmp_path: Path, lock: bool):
    expected = _shown(stocked)
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted([Mount(type="tmpfs", source="tmpfs", options=["size=64m"])], disk):
        subprocess.run(["cp", "-a", stocked, disk / "root"], check=True)
        if not lock:  # LMDB's own, which a copy or an image of a store may lack
            for file in (disk / "root").glob("*/lock.mdb"):
                file.unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        shown = _shown(disk / "root")
        for usage in (shown, expected):  # with LMDB's own files or without
            assert "all" in usage.pop(("du",))
        assert shown == expected
        done = lamina(disk / "root", "gc", code=1)
        assert_one_line(done.stderr, "the file system is read-only; choose another --root")


_STOPPED = """
import os, signal, sys
from pathlib import Path
from engine.root import Root
with Root(Path(sys.argv[1])) as root, root.meta.write(), root.blobs.write():
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_listings_beside_a_stopped_writer(stocked: Path):
    expected = _shown(stocked)
    with _process(_STOPPED, stocked):
        assert _shown(stocked) == expected


_WORKING = (
    ("gc",),
    ("compact",),
    ("image", "rm", "app:1"),
    ("image", "tag", "app:1", "app:2"),
    ("content", "rm", "sha256:" + "0" * 64),
    ("snapshots", "rm", "key"),
    ("unpack", "app:1"),
    ("push", "app:1"),
    ("mount", "app:1", "/mnt"),
    ("umount", "/mnt"),
    ("image", "pin", "app:1"),
    ("image", "unpin", "app:1"),
    ("content", "label", "sha256:" + "0" * 64, "a=b"),
    ("snapshots", "label", "key", "a=b"),
    ("leases", "create"),
    ("leases", "inspect", "mine"),
    ("leases", "rm", "mine"),
    ("namespaces", "create", "other"),
    ("namespaces", "label", "other", "a=b"),
    ("namespaces", "rm", "other"),
    ("attach", "web"),
    ("exec", "web", "true"),
    ("logs", "web"),
    ("stop", "web"),
    ("kill", "web"),
    ("rm", "web"),
    ("image", "prune", "--all"),
)
_MAKING = (("import",), ("pull",), ("run",), ("copy",), ("demo",), ("completion",), ("image", "ls"))


@pytest.mark.parametrize("words", _WORKING)
def test_only_import_makes_a_store(tmp_path: Path, words: tuple[str, ...]):
    nothing = tmp_path / "nothing"
    nothing.mkdir(mode=0o755)
    for root in (tmp_path / "typo", nothing):
        done = lamina(root, *words, code=3)
        assert_one_line(done.stderr, f"no store at {root}; `lamina import` makes one")
    assert (os.listdir(tmp_path), os.listdir(nothing)) == (["nothing"], [])
    assert nothing.stat().st_mode & 0o777 == 0o755


def test_no_command_is_left_out():
    known = {
        words[:length]
        for words in (*_LISTINGS, *_WORKING, *_MAKING, ("content", "get"))
        for length in (1, 2)
    }
    assert {words for words, _ in commands()} <= known


# -- what is broken is a row ------------------------------------------------------------------


def test_a_damaged_image_is_a_row(stocked: Path, other_image: Path):
    lamina(stocked, "import", "--name", "other:1", other_image)
    with Root(stocked) as root, root.meta.write() as txn:
        key = keys.encode(["default", "docker.io/library/bad:1"])
        txn.raw.put(key, b"\xc1", db=txn.databases[IMAGES.name])
    manifest = lamina_json(stocked, "images")[0]["digest"]
    with Root(stocked) as root:
        number = next(b for b in _blobs(root) if b["digest"] == manifest)["number"]
        with root.meta.write() as txn:
            small = SMALL.get(txn, number)
            SMALL.put(txn, Small(data=b"{" * len(small.data)), number)
    app, other, bad = lamina_json(stocked, "images")
    assert (app["name"], "layers" in app) == ("docker.io/library/app:1", False)
    assert "is damaged" in app["error"]
    assert (other["layers"], "error" in other) == (1, False)
    assert bad["name"] == "docker.io/library/bad:1"
    assert "cannot be read" in bad["error"]
    lines = lamina(stocked, "images").stdout.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("app:1 ")
    assert "is damaged" in lines[2]
    done = lamina(stocked, "gc")
    assert "lamina: kept: image docker.io/library/bad:1: " in done.stderr
    lamina(stocked, "image", "rm", "bad:1")
    assert lamina_json(stocked, "gc")["errors"] == []
    assert len(lamina_json(stocked, "images")) == 2


def _blobs(root: Root) -> list[dict[str, object]]:
    with root.meta.read() as txn, txn.raw.cursor(db=txn.databases["blobs"]) as cursor:
        return [msgspec.msgpack.decode(bytes(value)) for _, value in cursor]


def test_a_backend_that_is_not_there_any_more_is_a_row(stocked: Path):
    (stocked / "snapshots" / "zfs").mkdir()
    rows = lamina_json(stocked, "snapshots", "ls")
    assert [row["snapshotter"] for row in rows] == ["overlay", "overlay", "zfs"]
    assert "no snapshotter 'zfs'" in rows[-1]["error"]
    done = lamina(stocked, "snapshots", "ls")
    assert len(done.stdout.splitlines()) == 3
    assert_one_line(done.stderr, "zfs: no snapshotter 'zfs'")
    assert "snapshots of zfs stay" in lamina(stocked, "gc").stderr
    assert lamina_json(stocked, "images")[0]["unpacked"].keys() == {"overlay"}
    for words in (["snapshots", "usage"], ["snapshots", "tree"]):
        assert_one_line(lamina(stocked, *words).stderr, "zfs: no snapshotter 'zfs'")
    lamina(stocked, "unpack", "app:1")


def test_a_damaged_record_is_a_row(stocked: Path):
    """Of a blob in `content ls`, of a snapshot in what lists snapshots; `images` says what it can."""
    digest = lamina_json(stocked, "content", "ls")[0]["digest"]
    with Root(stocked) as root, root.meta.write() as txn:
        txn.raw.put(keys.encode(["default", digest]), b"\xc1", db=txn.databases["blobs"])
        lost = keys.encode(["overlay", "default", "lost"])
        txn.raw.put(lost, b"\xc1", db=txn.databases["snapshots"])
    rows = lamina_json(stocked, "content", "ls")
    assert [row["digest"] for row in rows if "error" in row] == [digest]
    assert digest in lamina(stocked, "content", "ls").stdout
    (row,) = lamina_json(stocked, "snapshots", "ls")
    assert "a record of snapshots cannot be read" in row["error"]
    (image,) = lamina_json(stocked, "images")
    assert "cannot be read" in image["error"]
    errors = lamina_json(stocked, "gc")["errors"]
    assert [error.partition(":")[0] for error in errors] == ["blob sha256", "snapshot lost"]


# -- other pid namespaces ---------------------------------------------------------------------


def test_an_import_that_was_killed_in_another_pid_namespace_blocks_nobody(tmp_path: Path):
    root = tmp_path / "root"
    noise = random.Random(0).randbytes  # which no packing makes small
    layers = [archive(member("file", data=noise(30_000))) for _ in range(3)]
    words = ("import", "--no-unpack", str(layout(tmp_path / "large", layers)))
    killed = subprocess.run(
        # By way of a shell, as the first process of a namespace cannot kill itself.
        [*_ELSEWHERE, "sh", "-c", '"$@"; exit $?', "sh", *LAMINA, "--root", str(root), *words],
        env=environment("content.commit.before=kill@2"),
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert killed.returncode == 128 + signal.SIGKILL
    assert dump(root)["ingests"]
    assert "waiting" not in lamina(root, *words).stderr
    lamina(root, "gc")
    left = dump(root)
    assert (left["ingests"], left["leases"]) == ([], [])


_OPEN = """
import sys
from pathlib import Path
from engine.root import Root
with Root(Path(sys.argv[1])) as root:
    with root.meta.read(), root.blobs.read():
        print("ready", flush=True)
        sys.stdin.readline()
"""


def test_equal_pids_in_two_pid_namespaces(stocked: Path):
    """Each is the first process of its namespace: LMDB tells readers apart by pid alone."""
    words = [*_ELSEWHERE, *LAMINA, "--root", str(stocked)]
    with _process(_OPEN, stocked, *_ELSEWHERE):
        for command in (["images"], ["gc"], ["content", "verify"]):
            done = subprocess.run([*words, *command], capture_output=True, text=True, check=False)
            assert done.returncode == 7, done.stderr
            assert_one_line(done.stderr, "another pid namespace has the same pid (1)")
            assert "share one pid namespace" in done.stderr
        lamina(stocked, "gc")  # with a pid of its own
    done = subprocess.run([*words, "images"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- waiting ----------------------------------------------------------------------------------

_WRITING = """
import json, sys
from pathlib import Path
from engine.oci.platform import Platform
from engine.stores import open_stores
with open_stores(Path(sys.argv[1]), "default", Platform()) as stores:
    layout = Path(sys.argv[1]).parent / "image"
    name = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    manifest = json.loads((layout / "blobs/sha256" / name[7:]).read_text())["config"]
    stores.content.ingest("import-" + manifest["digest"], lease="", expected=manifest["digest"])
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("ending", ["interrupt", "owner dies"])
def test_waiting_for_another_import_is_shown_and_ends(tmp_path: Path, image: Path, ending: str):
    subprocess.run(["cp", "-a", image, tmp_path / "image"], check=True)
    root = empty_store(tmp_path / "root")
    with _process(_WRITING, root) as writer:
        victim = Victim(root, ["import", "--no-unpack", str(image)])
        assert victim.process.stderr is not None
        told = victim.process.stderr.readline()
        assert told.startswith(f"lamina: waiting: process {writer.pid} is writing sha256:")
        if ending == "interrupt":
            victim.interrupt()
            assert victim.wait() == (130, "lamina: interrupted\n")
            return
    code, messages = victim.wait()
    assert (code, messages.startswith("imported app:1")) == (0, True)


# -- nearly full disks ------------------------------------------------------------------------


def _fill(disk: Path, left: int) -> None:
    """Take all space but `left` bytes."""
    state = os.statvfs(disk)
    with (disk / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, state.f_bavail * state.f_frsize - left)


_LEFT = {
    "gc": (0, 4, 8, 32, 128),
    "import": (0, 4, 8, 16, 32, 64, 72, 96, 128, 136, 144, 148, 152, 156, 160, 192, 224, 256),
    "images": (0, 8, 64, 128),
}


@pytest.mark.parametrize(("command", "left"), [(c, left) for c in _LEFT for left in _LEFT[c]])
def test_a_store_on_a_nearly_full_disk(tmp_path: Path, image: Path, left: int, command: str):
    """Never a signal, always a typed exit, and all is well when there is room."""
    words = {"import": ["import", "--no-unpack", str(image)]}.get(command, [command])
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted([Mount(type="tmpfs", source="tmpfs", options=["size=1m"])], disk):
        root = disk / "root"
        if command != "import":
            empty_store(root)
        if command == "images":
            for file in root.glob("*/lock.mdb"):
                file.unlink()
        _fill(disk, left << 10)
        done = subprocess.run(
            [*LAMINA, "--root", str(root), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode in {0, 8}, done.stderr
        if done.returncode:
            assert_one_line(done.stderr, "no space left on the device")
        (disk / "ballast").unlink()
        lamina(root, *words)
        lamina(root, "gc")


# -- little address space ---------------------------------------------------------------------


def test_commands_in_little_address_space(tmp_path: Path, image: Path):
    root = tmp_path / "root"
    limited = ["prlimit", f"--as={2 << 30}", *LAMINA, "--root", str(root)]
    for words in (["import", str(image)], ["images"], ["gc"]):
        done = subprocess.run([*limited, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert lamina_json(root, "images")[0]["unpacked"]
