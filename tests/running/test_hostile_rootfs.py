"""Hostile images, up to the end: refused with one line that says why, or run and harmless.

E-01, E-02, P-18, P-19, P-31: whatever an image has in its root file system and says in its config,
nothing of the host's is read, made or changed. A real runtime runs what is not refused.
"""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import NotFound, Refused
from engine.oci.execution import Execution
from engine.running.options import Bind, Network, RunOptions
from tests.provision.hostile import KINDS, Host, fill
from tests.running.bundles import ANY, Bench, shell

pytestmark = pytest.mark.root

SEEN = "cat /etc/passwd /etc/group /etc/resolv.conf /etc/hosts 2>/dev/null; env; id; pwd"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def bench(host: Host) -> Bench:
    return Bench(host.rootfs.parent)


def tried(host: Host, bench: Bench, options: RunOptions, execution: Execution = ANY) -> str:
    """Run it, if it is not refused; return what is seen in it, or why it is refused."""
    with host.unharmed():
        try:
            bench.spec(options, execution)
        except (Refused, NotFound) as error:
            return str(error)
        seen = bench.run(options, execution)
    assert "4242" not in seen
    assert "canary" not in seen
    return seen


def image(**run: Any) -> Execution:
    return msgspec.structs.replace(ANY, **run)


def clear(bench: Bench, path: str) -> None:
    at = bench.rootfs / path
    if at.is_dir() and not at.is_symlink():
        for name in os.listdir(at):
            clear(bench, f"{path}/{name}")
        at.rmdir()
    else:
        at.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("path", ["dev", "proc", "sys", "etc", "tmp", "run"])
def test_e_02_folders_that_the_runtime_mounts_on(host: Host, bench: Bench, path: str, kind: str) -> None:
    """Links, files, devices in their place."""
    clear(bench, path)
    fill(host, path, kind)
    found = tried(host, bench, shell("true", network=Network.HOST))
    assert found == (
        ""
        if kind == "a folder"
        else f"/{path} of the image is not a folder; nothing can be run in it safely"
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("path", ["etc/passwd", "etc/group"])
@pytest.mark.parametrize("user", ["", "root", "7:root"])
def test_p_18_lists_of_accounts(host: Host, bench: Bench, path: str, kind: str, user: str) -> None:
    clear(bench, path)
    fill(host, path, kind)
    tried(host, bench, shell("env; id -u", user=user))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("path", ["etc/resolv.conf", "etc/hosts"])
def test_p_31_files_that_are_mounted_on(host: Host, bench: Bench, path: str, kind: str) -> None:
    """What the host's file is mounted on is in the root file system, whatever is there."""
    fill(host, path, kind)
    found = tried(host, bench, shell(f"cat /{path}", network=Network.HOST))
    if kind in {"a FIFO", "a socket", "a device", "a giant", "a link to nothing"}:
        assert found == Path(f"/{path}").read_text()


@pytest.mark.parametrize(
    ("links", "folder", "says"),
    [
        ({}, "/proc/self/fd/7", "at or below /proc"),
        ({}, "/proc/self/cwd/../..", ""),  # `/proc`, by its words
        ({}, "/sys/fs/cgroup", "at or below /sys"),
        ({}, "/dev/fd/7", "at or below /dev"),
        ({"w": "/proc/self/fd/7"}, "/w", "at or below /proc"),
        ({"w": "/proc/self/fd/7"}, "/w/../../../..", "/\n"),
        ({"w": "/proc", "v": "w/self/root"}, "/v", "at or below /proc"),
        ({"w": "{victim}"}, "/w/new", "/new"),
        ({"w": "../../../victim"}, "/w/new", "/victim/new\n"),
        ({"w": "/dev/shm/x"}, "/w", "/dev/shm/x\n"),
        ({"w": "w"}, "/w/new", "too many links"),
        ({"w": "/bin/busybox"}, "/w/new", "not a directory"),
        ({}, "/bin/busybox", "not a directory"),
    ],
)
def test_p_19_working_folders(
    host: Host, bench: Bench, links: dict[str, str], folder: str, says: str
) -> None:
    """P-19, with CVE-2024-21626 and CVE-2026-55686."""
    for name, target in links.items():
        (bench.rootfs / name).symlink_to(target.format(victim=host.victim))
    assert says in tried(host, bench, shell("pwd"), image(working_dir=folder))


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    ("links", "volume", "says"),
    [
        ({}, "/a/../../../../etc", "runs"),
        ({"vol": "/etc"}, "/vol", "runs"),
        ({"vol": "{victim}"}, "/vol", "runs"),
        ({"vol": "../../victim"}, "/vol/sub", "runs"),
        ({"vol": "/proc/self/root"}, "/vol", "at or below /proc"),
        ({"vol": "/proc/1/fd/7"}, "/vol", "at or below /proc"),
        ({}, "/proc/self/fd", "at or below /proc"),
        ({}, "/sys", "at or below /sys"),
        ({}, "/dev/pts", "at or below /dev"),
        ({}, "/", "is the root folder"),
        ({"vol": "."}, "/vol", "is the root folder"),
        ({}, "/a/../..", "is the root folder"),
        ({}, "/bin/busybox", "not a directory"),
        ({}, "/bin/busybox/x", "not a directory"),
    ],
)
def test_p_19_volumes(
    host: Host, bench: Bench, links: dict[str, str], volume: str, says: str, readonly: bool
) -> None:
    """P-19, with CVE-2022-23648."""
    for name, target in links.items():
        (bench.rootfs / name).symlink_to(target.format(victim=host.victim))
    script = f"touch {volume}/of-the-container 2>/dev/null; echo runs"
    found = tried(host, bench, shell(script, readonly=readonly), image(volumes=(volume,)))
    assert says in found
    assert not list(host.victim.glob("of-*"))


def test_p_19_a_working_folder_within_what_the_host_lends(
    host: Host, bench: Bench, tmp_path: Path
) -> None:
    """Another container may write there, and put a link in the way."""
    lent = bench.rootfs.parent / "runc" / "lent"  # beside the victim, where he is not looked for
    lent.mkdir(parents=True)
    (lent / "good").mkdir()
    (lent / "bad").symlink_to("/proc/self/fd/7")
    (lent / "out").symlink_to(host.victim)
    binds = [Bind(source=str(lent), target="/lent")]
    for folder, says in (
        ("/lent/good", "/lent/good"),
        ("/lent/bad", "too many levels of symbolic links"),
        ("/lent/bad/x", "too many levels of symbolic links"),
        ("/lent/out/x", "too many levels of symbolic links"),
    ):
        assert says in tried(host, bench, shell("pwd", binds=binds), image(working_dir=folder))
    inner = Bind(source="/usr", target="/lent/out/x")
    assert "too many levels" in tried(host, bench, shell("pwd", binds=[*binds, inner]))


def test_e_02_files_of_the_host_are_not_kept_open(bench: Bench) -> None:
    """E-02, with CVE-2024-21626: a process of the container has its three files, and no other."""
    assert bench.lines(shell("ls -l /proc/self/fd | wc -l")) == [
        "5"
    ]  # `total`, ours and ls's own folder


def test_e_01_p_18_31_all_at_once(host: Host, bench: Bench) -> None:
    """An image full of traps, of which none is stepped into."""
    victim = str(host.victim)
    (bench.rootfs / "etc/mtab").symlink_to("/proc/self/mounts")
    (bench.rootfs / "etc/hostname").symlink_to(f"{victim}/hostname")
    (bench.rootfs / "etc/ld.so.preload").write_text("/lib/evil.so\n")
    (bench.rootfs / "etc/nsswitch.conf").write_text("passwd: evil\n")
    for name in ("lib", "lib64", "usr", "var", "root", "home"):
        (bench.rootfs / name).symlink_to(victim)
    found = tried(host, bench, shell(SEEN, user="www"), image(volumes=("/srv/data",), env=("A=b",)))
    assert "uid=33(www) gid=34(www)" in found
