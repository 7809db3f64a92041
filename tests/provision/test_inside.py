"""Looking into hostile root file systems: E-02, P-18, P-19, P-31. What is outside is never touched."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import FailedPrecondition, NotFound, Refused
from engine.fs.kernel import IN_ROOT, NO_SYMLINKS, open_beneath
from engine.mount import Mount, mounted
from engine.provision.inside import (
    check_folders,
    check_no_links,
    make_file,
    make_folder,
    open_rootfs,
    read_file,
    resolve,
)
from tests.provision.hostile import CANARY, KINDS, Host, fill

HARMLESS = {"a link to nothing", "a folder"}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def root(host: Host) -> Iterator[int]:
    with open_rootfs(host.rootfs) as opened, host.unharmed():
        yield opened


# -- the folders that a runtime mounts on ---------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("name", ["dev", "proc", "sys", "etc", "tmp", "run"])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"a folder"}))
def test_e_02_a_folder_that_is_none_is_refused(host: Host, root: int, name: str, kind: str) -> None:
    fill(host, name, kind)
    with pytest.raises(Refused, match=f"/{name} of the image is not a folder"):
        check_folders(root)


def test_e_02_folders_may_be_there_or_not(host: Host, root: int) -> None:
    check_folders(root)
    for name in ("dev", "proc", "sys", "etc", "tmp", "run"):
        (host.rootfs / name).mkdir()
        check_folders(root)


def test_e_02_a_root_file_system_is_no_link(host: Host, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(host.victim)
    for path, says in ((tmp_path / "link", "not a directory"), (tmp_path / "absent", "no such file")):
        with pytest.raises((FailedPrecondition, NotFound), match=says), open_rootfs(path):
            pass


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("path", ["etc/passwd", "etc"])
def test_p_18_a_file_is_read_only_if_it_is_one(host: Host, root: int, kind: str, path: str) -> None:
    """Refused, or as if it were not there; never the host's, and nothing waits."""
    fill(host, path, kind)
    try:
        found = read_file(root, "/etc/passwd", 10 << 20)
    except Refused as error:
        assert "/etc/passwd of the image" in str(error)  # noqa: PT017
    else:
        assert found == b""


def test_p_18_a_file_is_read_through_links_of_the_image(host: Host, root: int) -> None:
    """As a process of the container reads it."""
    (host.rootfs / "etc").mkdir()
    (host.rootfs / "usr/lib").mkdir(parents=True)
    (host.rootfs / "usr/lib/passwd").write_bytes(b"mine")
    (host.rootfs / "etc/passwd").symlink_to("/usr/lib/passwd")
    assert read_file(root, "/etc/passwd", 4) == b"mine"
    with pytest.raises(Refused, match="is over 3 bytes"):
        read_file(root, "/etc/passwd", 3)
    (host.rootfs / "etc/group").symlink_to("../../../../../usr/lib/passwd")
    assert read_file(root, "/etc/group", 4) == b"mine"


@pytest.mark.root
def test_no_file_of_another_file_system_is_read(host: Host, root: int) -> None:
    (host.rootfs / "etc").mkdir()
    with mounted([bind(host.victim)], host.rootfs / "etc"):
        with pytest.raises(Refused, match="cross-device"):
            read_file(root, "/etc/passwd", 10 << 20)
        with pytest.raises(Refused, match="cross-device"):
            make_folder(root, "/etc/more", "the folder")
    assert (host.victim / "passwd").read_text() == CANARY


# -- paths ----------------------------------------------------------------------------------------


def bind(source: Path, *options: str) -> Mount:
    return Mount(type="bind", source=str(source), options=["rbind", *options])


def at(root: int, path: str, *covered: str) -> str:
    return resolve(root, path, "the path", covered).path


def test_p_19_links_are_those_of_the_container(host: Host, root: int) -> None:
    (host.rootfs / "a/b").mkdir(parents=True)
    (host.rootfs / "abs").symlink_to("/a/b")
    (host.rootfs / "a/up").symlink_to("../../../abs/new")
    (host.rootfs / "vol").symlink_to("/etc")
    (host.rootfs / "out").symlink_to("../victim/passwd")
    assert at(root, "/") == "/"
    assert at(root, "//a//./b/") == "/a/b"
    assert at(root, "/abs/c/d") == "/a/b/c/d"
    assert at(root, "/a/up") == "/a/b/new"
    assert at(root, "/a/../../../../etc") == "/etc"
    assert at(root, "/vol") == "/etc"
    assert at(root, "/out") == "/victim/passwd"  # in the image, were it there


@pytest.mark.parametrize(
    ("target", "path", "says"),
    [
        ("/proc/self/fd/7", "/link", "at or below /proc"),
        ("/proc", "/link/self/fd/7", "at or below /proc"),
        ("dev/fd/7", "/link", "at or below /dev"),
        ("sys", "/link", "at or below /sys"),
        ("x", "/proc/self/fd/7", "at or below /proc"),
        ("x", "/proc", "at or below /proc"),
        ("x", "/a/../proc/1/root", "at or below /proc"),
        ("x", "/dev/../dev/fd", "at or below /dev"),
        ("link", "/link", "too many links"),
        ("link/link", "/link/a", "too many links"),
        ("file", "/link/a", "not a directory"),
        ("x", "/file/a", "not a directory"),
        ("x", "/" + "a" * 256, "file name too long"),
        ("x", "/" + "a/" * 2001, "is not a path"),
        ("x", "/a\0b", "is not a path"),
        (b"\xff", "/link", "not UTF-8"),
        ("n" * 250 + ("/" + "n" * 250) * 14, "/link" + ("/" + "n" * 250) * 10, "too long a path"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_p_19_paths_that_lead_nowhere_good_are_refused(
    host: Host, root: int, target: str | bytes, path: str, says: str
) -> None:
    """P-19, with CVE-2024-21626: `/proc/self/fd/N` was a way out."""
    os.symlink(os.fsencode(target), os.fsencode(host.rootfs / "link"))
    (host.rootfs / "file").touch()
    with pytest.raises(Refused, match=says) as error:
        resolve(root, path, "the working folder")
    assert str(error.value).startswith("the working folder")
    assert len(str(error.value)) < 500


def test_p_19_what_is_mounted_hides_what_the_image_has_there(host: Host, root: int) -> None:
    """Links below a mount are not the image's."""
    (host.rootfs / "data").mkdir()
    (host.rootfs / "data/x").symlink_to("/proc/self/fd/7")
    (host.rootfs / "dev").mkdir()
    (host.rootfs / "dev/shm").symlink_to(host.victim)
    (host.rootfs / "shared").symlink_to("/dev/shm")
    (host.rootfs / "odd").symlink_to("/data/../etc")
    assert resolve(root, "/data/x/./y", "it", {"/data"}) == ("/data/x/y", "/data")
    assert resolve(root, "/data", "it", {"/data"}) == ("/data", "/data")
    assert resolve(root, "/shared/z", "it", {"/dev/shm"}) == ("/dev/shm/z", "/dev/shm")
    assert resolve(root, "/database", "it", {"/data"}) == ("/database", "")
    with pytest.raises(Refused, match="goes by a link through what is mounted on '/data'"):
        resolve(root, "/odd", "it", {"/data"})


def test_p_19_a_long_way_is_bounded(host: Host, root: int) -> None:
    """Each link doubles the way."""
    (host.rootfs / "0").mkdir()
    for number in range(1, 200):
        (host.rootfs / str(number)).symlink_to(f"{number - 1}/../{number - 1}")
    assert at(root, "/6") == "/0"
    with pytest.raises(Refused, match="too many links"):
        at(root, "/199")


# -- making ---------------------------------------------------------------------------------------


def test_p_31_what_is_missing_is_made(host: Host, root: int) -> None:
    """With its own mode, whatever the umask."""
    os.umask(0o077)
    (host.rootfs / "a").mkdir()
    make_folder(root, "/a/b/c", "the volume")
    make_folder(root, "/a/b/c", "the volume")
    make_folder(root, "/", "the volume")
    make_file(root, "/etc/hosts", "the file")
    (host.rootfs / "etc/hosts").write_text("kept")
    make_file(root, "/etc/hosts", "the file")
    modes = {path: stat.S_IMODE((host.rootfs / path).stat().st_mode) for path in ("a/b", "a/b/c", "etc")}
    assert set(modes.values()) == {0o755}
    assert stat.S_IMODE((host.rootfs / "etc/hosts").stat().st_mode) == 0o644
    assert (host.rootfs / "etc/hosts").read_text() == "kept"


@pytest.mark.root
def test_what_is_made_belongs_to_the_container(host: Host, root: int) -> None:
    (host.rootfs / "old").mkdir()
    make_folder(root, "/old/new/newer", "it", (1000, 2000))
    make_file(root, "/old/file", "it", (1000, 2000))
    owners = {
        path: (host.rootfs / path).stat().st_uid
        for path in ("old", "old/new", "old/new/newer", "old/file")
    }
    assert owners == {"old": 0, "old/new": 1000, "old/new/newer": 1000, "old/file": 1000}
    assert (host.rootfs / "old/file").stat().st_gid == 2000


@pytest.mark.root
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - HARMLESS))
@pytest.mark.parametrize("make", [make_folder, make_file])
def test_p_31_nothing_is_made_through_what_is_in_the_way(
    host: Host, root: int, kind: str, make: object
) -> None:
    """`S etc -> /T/victim`, put there after all was looked at."""
    fill(host, "etc", kind)
    assert callable(make)
    with pytest.raises(Refused):
        make(root, "/etc/resolv.conf", "it")
    if make is make_folder:
        with pytest.raises(Refused):
            make(root, "/etc", "it")


@pytest.mark.root
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_p_31_a_file_that_is_there_is_left_as_it_is(host: Host, root: int, kind: str) -> None:
    """It is only mounted on; a link is refused by whoever mounts, or was resolved before."""
    fill(host, "etc/resolv.conf", kind)
    before = (host.rootfs / "etc/resolv.conf").lstat()
    if kind == "a folder":
        with pytest.raises(Refused, match="is a folder in the image"):
            make_file(root, "/etc/resolv.conf", "it")
    else:
        make_file(root, "/etc/resolv.conf", "it")
    assert (host.rootfs / "etc/resolv.conf").lstat() == before


@pytest.mark.root
def test_nothing_is_made_where_nothing_can_be_written(host: Host) -> None:
    (host.rootfs / "there").mkdir()
    with mounted([bind(host.rootfs, "ro")], host.victim), open_rootfs(host.victim) as root:
        make_folder(root, "/there", "the volume")
        for make in (make_folder, make_file):
            with pytest.raises(
                FailedPrecondition, match="'/not' is not in the image, and its root file"
            ):
                make(root, "/not", "the volume")


def test_p_19_below_a_folder_of_the_host_no_link_is_followed(host: Host, tmp_path: Path) -> None:
    """What is mounted from the host may be another container's to write."""
    (tmp_path / "data/real").mkdir(parents=True)
    (tmp_path / "data/x").symlink_to("/proc/self/fd/7")
    (tmp_path / "data/real/y").symlink_to("real")
    (tmp_path / "data/file").touch()
    for rest in (".", "real", "real/new/newer", "new"):
        check_no_links(str(tmp_path / "data"), rest, "the working folder")
    for rest in ("x", "x/y", "real/y", "file/z", "../victim"):
        with pytest.raises(Refused, match="the working folder"):
            check_no_links(str(tmp_path / "data"), rest, "the working folder")


# -- the law --------------------------------------------------------------------------------------

NAMES = st.sampled_from("abc")
STEPS = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=4)
TARGETS = st.builds(lambda up, steps: up + "/".join(steps), st.sampled_from(["", "/"]), STEPS)
TREES = st.recursive(
    st.one_of(st.none(), TARGETS),
    lambda below: st.dictionaries(NAMES, below, max_size=3),
    max_leaves=8,
)


def build(folder: Path, tree: object) -> None:
    assert isinstance(tree, dict)
    for name, below in tree.items():
        if isinstance(below, dict):
            (folder / name).mkdir()
            build(folder / name, below)
        elif below is None:
            (folder / name).touch()
        else:
            (folder / name).symlink_to(below)


def identity(opened: int) -> tuple[int, int]:
    try:
        about = os.fstat(opened)
        return about.st_dev, about.st_ino
    finally:
        os.close(opened)


@given(tree=st.dictionaries(NAMES, TREES, max_size=3), path=st.lists(NAMES, min_size=1, max_size=4))
def test_p_19_31_paths_are_resolved_as_the_kernel_does(tree: dict[str, object], path: list[str]) -> None:
    """What a process whose root this is would open by the path, and nothing else.

    What is not there is made where that process would then find it.
    """
    with TemporaryDirectory() as folder:
        build(Path(folder), tree)
        with open_rootfs(Path(folder)) as root:
            wanted = "/".join(path).encode()
            try:
                found = resolve(root, f"/{wanted.decode()}", "it")
            except Refused:
                with pytest.raises(OSError, match=r"links|irectory"):
                    os.close(open_beneath(root, wanted, os.O_PATH, IN_ROOT))
                return
            inside = found.path.strip("/").encode()
            try:
                there = identity(open_beneath(root, wanted, os.O_PATH, IN_ROOT))
            except (FileNotFoundError, NotADirectoryError):
                pass
            else:
                assert identity(open_beneath(root, inside, os.O_PATH, NO_SYMLINKS)) == there
                return
            try:
                make_folder(root, found.path, "it")
            except Refused:  # a file is there, but the path says that it is a folder: `link -> file/.`
                assert "." in str(tree)
                return
            made = identity(open_beneath(root, inside, os.O_PATH, NO_SYMLINKS))
            try:
                assert identity(open_beneath(root, wanted, os.O_PATH, IN_ROOT)) == made
            except (FileNotFoundError, NotADirectoryError):
                assert ".." in str(tree)  # `link -> absent/..`, in which the kernel finds nothing
