"""Bundles: valid by the schema of the specification, and run by a real runtime, seen from within.

Rows of the catalogue that are proved here: E-02, P-18, P-19, P-31, M-15.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft4Validator  # type: ignore[import-untyped]
from referencing import Registry
from referencing.jsonschema import DRAFT4

from engine.errors import EngineError, InvalidArgument, NotFound, NotSupported, Refused
from engine.oci.execution import Execution
from engine.oci.platform import Platform
from engine.oci.runtime_spec import Spec
from engine.running.bundle import resource_limits, stop_signal, write_bundle
from engine.running.options import Bind, IDMap, Network, Resources, RunOptions
from tests.processes import until
from tests.running.bundles import ANY, HOST, Bench, shell

pytestmark = pytest.mark.root

SCHEMA = Path("/usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema")
MAPS = (IDMap(inside=0, outside=100_000, size=65_536),)


def image(**run: object) -> Execution:
    return msgspec.structs.replace(ANY, **run)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that others may come to, as whoever is mapped must."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "bundle"
    shutil.rmtree(folder)


# -- valid ----------------------------------------------------------------------------------------


@cache
def validator() -> Draft4Validator:
    if not SCHEMA.exists():
        if os.environ.get("CI"):
            pytest.fail("the schema of the runtime specification is missing, and CI must have it")
        pytest.skip("golang-github-opencontainers-specs-dev is not installed")
    parts = {
        file.name: DRAFT4.create_resource(json.loads(file.read_text())) for file in SCHEMA.glob("*.json")
    }
    return Draft4Validator(
        {"$ref": "config-schema.json"}, registry=Registry().with_resources(parts.items())
    )


def assert_valid(spec: Spec) -> None:
    wrong = [f"{list(error.path)}: {error.message}" for error in validator().iter_errors(written(spec))]
    assert not wrong


def written(spec: Spec) -> dict[str, object]:
    found: dict[str, object] = json.loads(msgspec.json.encode(spec))
    return found


OPTIONS = st.builds(
    RunOptions,
    args=st.just(["/bin/true"]),
    env=st.lists(st.sampled_from(["A=b", "B=", "PATH=/x"]), max_size=2),
    cwd=st.sampled_from(["", "/", "/new/folder"]),
    user=st.sampled_from(["", "www", "0:0", "7"]),
    hostname=st.sampled_from(["", "here"]),
    terminal=st.booleans(),
    readonly=st.booleans(),
    binds=st.sampled_from([(), (Bind(source="/usr", target="/usr"),)]),
    network=st.sampled_from(Network),
    resources=st.sampled_from([Resources(), Resources(memory=1 << 30, cpus=1.5, pids=9)]),
    id_maps=st.sampled_from([(), MAPS]),
)


@given(options=OPTIONS, volumes=st.sampled_from([(), ("/data", "/srv/more")]))
def test_specifications_are_valid_by_the_schema(options: RunOptions, volumes: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        assert_valid(bench.spec(options, image(volumes=volumes)))


def test_a_specification_without_root_is_valid(reachable: Path) -> None:
    assert_valid(Bench(reachable, 1000).spec(shell("true", rootless=True)))


def test_the_schema_finds_what_is_wrong() -> None:
    """What says nothing when something is wrong proves nothing."""
    assert list(validator().iter_errors({"ociVersion": "1.0.2", "process": {"args": [1], "cwd": "/"}}))


def test_a_bundle_is_written_for_its_owner_alone(bench: Bench, tmp_path: Path) -> None:
    spec = bench.spec(shell("true"))
    for _ in range(2):
        write_bundle(tmp_path, spec)
    file = tmp_path / "config.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_bytes()) == written(spec)


# -- what is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "asked", "args", "runs"),
    [
        (["e"], ["c"], None, [], ["e", "c"]),
        (["e"], ["c"], None, ["a"], ["e", "a"]),
        ([], ["c"], None, [], ["c"]),
        ([], ["c"], None, ["a", "b"], ["a", "b"]),
        (["e"], ["c"], ["x"], [], ["x"]),
        (["e"], ["c"], ["x"], ["a"], ["x", "a"]),
        (["e"], ["c"], [], ["a"], ["a"]),
    ],
)
def test_the_command_is_dockers(
    bench: Bench,
    entrypoint: list[str],
    cmd: list[str],
    asked: list[str] | None,
    args: list[str],
    runs: list[str],
) -> None:
    found = bench.spec(RunOptions(entrypoint=asked, args=args), image(entrypoint=entrypoint, cmd=cmd))
    assert list(found.process.args) == runs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (RunOptions(), "the image names no command to run; give one"),
        (RunOptions(entrypoint=[]), "the image names no command"),
        (RunOptions(args=[""]), "the name of the command is empty"),
        (RunOptions(args=["a\0"]), "has a NUL"),
        (RunOptions(args=["a", "b\udcff"]), "in a command is not UTF-8"),
        (shell("", env=["A=\udcff"]), "in the environment is not UTF-8"),
        (shell("", user="\udcff"), "is not a user"),
        (shell("", binds=[Bind(source="/\udcff", target="/x")]), "is not UTF-8"),
        (shell("", env=["A"]), "'A' is not KEY=VALUE"),
        (shell("", cwd="srv"), "'srv' is not an absolute path"),
        (shell("", hostname="-a"), "is not a host name"),
        (shell("", hostname="a" * 65), "is not a host name"),
        (shell("", user="-1"), "-1 is no user"),
        (shell("", id_maps=[IDMap(inside=1, outside=0, size=1)]), "leave out 0"),
        (shell("", id_maps=[IDMap(inside=0, outside=0, size=0)]), "no IDs are mapped by 0:0:0"),
        (shell("", id_maps=[IDMap(inside=0, outside=2**32 - 1, size=1)]), "no IDs are mapped"),
        (
            shell("", id_maps=[IDMap(inside=0, outside=5, size=1)], user="7"),
            "user 7 is not among the IDs",
        ),
        (shell("", resources=Resources(memory=1)), "are too few"),
        (shell("", resources=Resources(memory=-1)), "are too few"),
        (shell("", resources=Resources(cpus=0.001)), "are too few"),
        (shell("", resources=Resources(cpus=-1)), "are too few"),
        (shell("", resources=Resources(cpus=float("nan"))), "are too few"),
        (shell("", resources=Resources(pids=-1)), "is not a number of processes"),
        (shell("", binds=[Bind(source="usr", target="/usr")]), "'usr' is not an absolute path"),
        (shell("", binds=[Bind(source="/usr", target="usr")]), "not an absolute path below /"),
        (shell("", binds=[Bind(source="/usr", target="/x/..")]), "not an absolute path below /"),
        (shell("", binds=[Bind(source="/a\0", target="/x")]), "has a NUL"),
        (
            shell("", binds=[Bind(source="/usr", target="/x"), Bind(source="/etc", target="//x/")]),
            "two mounts",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_said_to_be(bench: Bench, options: RunOptions, says: str) -> None:
    error = bench.refused(options, image(entrypoint=[]))
    assert isinstance(error, InvalidArgument)
    assert says in str(error)


def test_an_image_for_another_machine_is_not_run(bench: Bench) -> None:
    other = "s390x" if HOST.architecture != "s390x" else "amd64"
    error = bench.refused(shell(""), image(platform=Platform(os="linux", architecture=other)))
    assert isinstance(error, NotSupported)
    assert f"the image is for linux/{other}, this machine is linux/{HOST.architecture}" in str(error)
    assert "for no platform" in str(bench.refused(shell(""), Execution()))


def test_the_signal_that_ends_it() -> None:
    assert stop_signal(ANY, RunOptions()) == 15
    assert stop_signal(image(stop_signal="SIGQUIT"), RunOptions()) == 3
    assert stop_signal(image(stop_signal="SIGQUIT"), RunOptions(stop_signal="INT")) == 2


def test_the_environment(bench: Bench) -> None:
    execution = image(env=["A=image", "B=image", "PATH=/bin:/image", "EMPTY="])
    found = bench.lines(shell("env", env=["B=asked", "C=a=b c"]), execution)
    assert {"A=image", "B=asked", "C=a=b c", "PATH=/bin:/image", "EMPTY=", "HOME=/root"} <= set(found)
    assert f"HOSTNAME={bench.unique[:12]}" in found
    assert not any(line.startswith("TERM=") for line in found)
    plain = bench.spec(shell("", terminal=True, env=["HOME=/x"]), image(env=["HOSTNAME=mine"]))
    assert set(plain.process.env) == {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME=mine",
        "TERM=xterm",
        "HOME=/x",
    }


@pytest.mark.parametrize(
    ("user", "asked", "found"),
    [
        ("", "", "uid=0(root) gid=0(root) groups=0(root),10(wheel) /root"),
        ("www", "", "uid=33(www) gid=34(www) groups=34(www),77(extra) /srv"),
        ("www", "0", "uid=0(root) gid=0(root) groups=0(root),10(wheel) /root"),
        ("", "33:extra", "uid=33(www) gid=77(extra) groups=77(extra) /srv"),
        ("", "2147483647:2147483647", "uid=2147483647 gid=2147483647 groups=2147483647 /"),
        ("1234", "", "uid=1234 gid=0(root) groups=0(root) /"),
    ],
)
def test_users(bench: Bench, user: str, asked: str, found: str) -> None:
    assert bench.lines(shell("echo $(id) $HOME", user=asked), image(user=user)) == [found]


def test_what_a_user_may_do(bench: Bench) -> None:
    """The capabilities are docker's 14; who is not root has them only by a program's."""
    docker = "00000000a80425fb"
    script = "grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status"
    about = dict(line.split(":\t") for line in bench.lines(shell(script)))
    assert [about[f"Cap{kind}"] for kind in ("Eff", "Prm", "Bnd")] == [docker] * 3
    assert [about[f"Cap{kind}"] for kind in ("Inh", "Amb")] == ["0" * 16] * 2
    assert (about["Seccomp"], about["NoNewPrivs"]) == ("2", "0")
    about = dict(line.split(":\t") for line in bench.lines(shell(script, user="www")))
    assert [about[f"Cap{kind}"] for kind in ("Eff", "Prm", "Bnd")] == ["0" * 16] * 2 + [docker]


def test_the_working_folder(bench: Bench) -> None:
    """It is made if it is not there, and belongs to root, as in docker."""
    (bench.rootfs / "link").symlink_to("/srv")
    script = "pwd; stat -c '%u %a' ."
    assert bench.lines(shell(script)) == ["/", f"0 {bench.rootfs.stat().st_mode & 0o777:o}"]
    assert bench.lines(shell(script), image(working_dir="/srv/new//x/.")) == ["/srv/new/x", "0 755"]
    assert bench.lines(shell(script, cwd="/link/y"), image(working_dir="/srv")) == ["/srv/y", "0 755"]
    assert bench.lines(shell(script, cwd="/dev/shm/z")) == ["/dev/shm/z", "0 755"]


# -- where it is run ------------------------------------------------------------------------------


def test_the_host_name(bench: Bench) -> None:
    assert bench.lines(shell("busybox hostname")) == [bench.unique[:12]]
    assert bench.lines(shell("busybox hostname; echo $HOSTNAME", hostname="a.b-c")) == ["a.b-c"] * 2
    on_host = shell("busybox hostname", network=Network.HOST)
    assert bench.lines(on_host) == [os.uname().nodename]


def namespaces(of: str) -> dict[str, str]:
    return {
        name: os.readlink(f"/proc/{of}/ns/{name}")
        for name in ("cgroup", "ipc", "mnt", "net", "pid", "uts")
    }


ALONE = "set -- /proc/[0-9]*; echo $$ $#"  # whose number it has, and how many processes there are
SHOWN = "for n in cgroup ipc mnt net pid uts; do busybox readlink /proc/self/ns/$n; done"


def test_what_is_its_own(bench: Bench) -> None:
    mine = namespaces("self").values()
    assert not set(bench.lines(shell(SHOWN))) & set(mine)
    shared = set(bench.lines(shell(SHOWN, network=Network.HOST))) & set(mine)
    assert shared == {namespaces("self")["net"]}


def test_without_a_network_there_is_a_loopback(bench: Bench) -> None:
    found = bench.run(shell("ifconfig -a; cat /proc/net/dev | wc -l"))
    assert "inet addr:127.0.0.1" in found
    assert "UP LOOPBACK RUNNING" in found
    assert found.splitlines()[-1] == "3"


@pytest.mark.parametrize("target", [None, "../run/resolve/stub.conf", "/etc/there"])
def test_p_31_on_the_hosts_network_its_names_are_there(bench: Bench, target: str | None) -> None:
    """Where the image has a link, the file is made and mounted where that leads within it."""
    if target:
        (bench.rootfs / "etc/resolv.conf").symlink_to(target)
        (bench.rootfs / "etc/there").write_text("of the image")
    script = "cat /etc/resolv.conf; cat /etc/hosts; ! touch /etc/resolv.conf /etc/hosts 2>/dev/null"
    names = [Path(f"/etc/{name}").read_text() for name in ("resolv.conf", "hosts")]
    assert bench.run(shell(script, network=Network.HOST)) == "".join(names)
    mine = Bind(source="/etc/hostname", target="/etc/hosts")
    found = bench.run(shell("cat /etc/hosts", network=Network.HOST, binds=[mine]))
    assert found == Path("/etc/hostname").read_text()


def test_files_and_folders_of_the_host(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "host/below").mkdir(parents=True)
    (tmp_path / "host/file").write_text("of the host\n")
    (tmp_path / "link").symlink_to("host")
    (bench.rootfs / "way").symlink_to("/srv/../opt")
    binds = [
        Bind(source=str(tmp_path / "host/file"), target="/data/sub/file"),  # below the next
        Bind(source=str(tmp_path / "link"), target="/data"),
        Bind(source=str(tmp_path / "host"), target="/way/ro", readonly=True),
        Bind(source=str(tmp_path / "host/file"), target="/new/file"),
    ]
    (tmp_path / "host/sub").mkdir()
    script = (
        "cat /data/file /data/sub/file /opt/ro/file /new/file; touch /data/made;"
        "touch /opt/ro/no 2>/dev/null || echo no; echo more >> /new/file"
    )
    found = bench.lines(shell(script, binds=binds))
    assert found == ["of the host"] * 4 + ["no"]
    assert sorted(os.listdir(tmp_path / "host")) == ["below", "file", "made", "sub"]
    assert (tmp_path / "host/file").read_text() == "of the host\nmore\n"
    assert (bench.rootfs / "new/file").read_text() == ""
    assert list((bench.rootfs / "data").iterdir()) == []


def test_what_is_mounted_below_is_read_only_too(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    outer = Bind(source="/dev", target="/host", readonly=True)
    script = "touch /host/shm/no 2>&1 || true"
    found = bench.run(shell(script, binds=[outer]))
    assert "Read-only file system" in found


@pytest.mark.parametrize(
    ("bind", "kind", "says"),
    [
        (Bind(source="/absent/x", target="/x"), NotFound, "/absent/x is not there; make it first"),
        (Bind(source="/etc", target="/bin/busybox"), Refused, "not a directory"),
        (Bind(source="/etc/hostname", target="/etc"), Refused, "is a folder in the image"),
        (Bind(source="/etc", target="/proc"), Refused, "at or below /proc"),
        (Bind(source="/etc", target="/proc/self/fd"), Refused, "at or below /proc"),
        (Bind(source="/etc", target="/sys/fs"), Refused, "at or below /sys"),
        (Bind(source="/etc", target="/dev"), Refused, "at or below /dev"),
        (Bind(source="/etc", target="/dev/fd/1"), Refused, "at or below /dev"),
        (Bind(source="/etc", target="/out/x"), Refused, "at or below /proc"),
        (Bind(source="/etc", target="/\udcff"), Refused, "is not UTF-8"),
        (Bind(source="/etc", target="/top"), Refused, "is the root folder in the image"),
    ],
    ids=lambda value: value.target if isinstance(value, Bind) else "",
)
def test_p_19_31_where_nothing_can_be_mounted(
    bench: Bench, bind: Bind, kind: type[EngineError], says: str
) -> None:
    (bench.rootfs / "out").symlink_to("/proc/self/cwd")
    (bench.rootfs / "top").symlink_to("/")
    error = bench.refused(shell("", binds=[bind]))
    assert isinstance(error, kind)
    assert says in str(error)


def test_what_may_be_mounted_over(bench: Bench, tmp_path: Path) -> None:
    """A container's own places may be someone else's: shared memory, the log's socket, cgroups."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/here").touch()
    binds = [
        Bind(source=str(tmp_path / "shared"), target="/dev/shm"),
        Bind(source=str(tmp_path / "shared/here"), target="/dev/log"),
        Bind(source=str(tmp_path / "shared"), target="/sys/fs/cgroup", readonly=True),
    ]
    script = (
        "ls /dev/shm /sys/fs/cgroup; test -f /dev/log;"
        "grep -c -E ' /(dev/shm|sys/fs/cgroup)' /proc/self/mounts"
    )
    found = bench.lines(shell(script, binds=binds))
    assert found == ["/dev/shm:", "here", "", "/sys/fs/cgroup:", "here", "2"]


def test_read_only_with_volumes(bench: Bench) -> None:
    """Volumes have what the image has there, and can be written; all else cannot."""
    (bench.rootfs / "data").mkdir()
    (bench.rootfs / "data/of-image").touch()
    execution = image(volumes=("/data/deep/er", "/data", "/new", "/dev/shm", "/sys/fs/cgroup"))
    script = (
        "for f in / /etc /data /data/deep/er /new /dev/shm; do touch $f/x 2>/dev/null && echo $f; done;"
        "ls /data"
    )
    writable = ["/data", "/data/deep/er", "/new", "/dev/shm"]
    found = bench.lines(shell(script, readonly=True), execution)
    assert found == [*writable, "deep", "of-image", "x"]
    assert (bench.rootfs / "data/x").exists()
    found = bench.lines(shell(script), execution)
    assert found[:3] == ["/", "/etc", "/data"]


def test_a_mount_takes_the_place_of_a_volume(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host/mine").touch()
    bind = Bind(source=str(tmp_path / "host"), target="/data")
    execution = image(volumes=("/data", "/data/below"))
    for readonly in (False, True):
        assert bench.lines(shell("ls /data", binds=[bind], readonly=readonly), execution) == ["mine"]
    assert list((bench.rootfs / "data").iterdir()) == []


def test_limits(bench: Bench) -> None:
    """As its cgroup has them, of either version."""
    script = (
        "cd /sys/fs/cgroup;"
        "cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us pids/pids.max 2>/dev/null ||"
        "cat memory.max cpu.max pids.max"
    )
    limits = Resources(memory=64 << 20, cpus=0.5, pids=30)
    assert bench.lines(shell(script, resources=limits)) in (
        [str(64 << 20), "50000", "30"],
        [str(64 << 20), "50000 100000", "30"],
    )
    assert msgspec.json.encode(resource_limits(Resources())) == b"{}"


def test_devices(bench: Bench) -> None:
    """Those that every program needs, and no other, though they can be made."""
    script = (
        "echo x > /dev/null; test -c /dev/zero -a -c /dev/tty -a -c /dev/urandom && echo there;"
        "busybox mknod /disk b 254 0 && echo made; busybox head -c1 /disk 2>&1;"
        "busybox mknod /kmsg c 1 11; busybox head -c1 /kmsg 2>&1 || true"
    )
    found = bench.lines(shell(script))
    assert found[:2] == ["there", "made"]
    assert [line.rpartition(": ")[2] for line in found[2:]] == ["Operation not permitted"] * 2


def test_what_the_kernel_shows(bench: Bench) -> None:
    script = (
        "wc -c < /proc/keys; wc -c < /proc/timer_list; ls /sys/firmware | wc -l; ls /proc/acpi | wc -l;"
        "touch /sys/x 2>/dev/null || (echo 1 >/proc/sys/kernel/panic) 2>/dev/null || echo no;"
        f"{ALONE}"
    )
    assert bench.lines(shell(script)) == ["0", "0", "0", "0", "no", "1 1"]


CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number, *rest in (
    ("keyctl", 250, 0, -3, 1), ("add_key", 248), ("request_key", 249), ("bpf", 321),
    ("perf_event_open", 298), ("userfaultfd", 323, 1), ("io_uring_setup", 425, 1, 0),
    ("kexec_load", 246), ("open_by_handle_at", 304), ("init_module", 175),
    ("getpid", 39), ("unshare", 272, 0x10000000),
):
    done = libc.syscall(number, *rest)
    print(name, "fine" if done >= 0 else errno.errorcode[ctypes.get_errno()])
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
def test_system_calls(bench: Bench) -> None:
    """Asked by the host's Python, which is mounted; arguments are not even looked at."""
    for name in ("lib", "lib64"):
        (bench.rootfs / name).symlink_to(f"usr/{name}")
    python = Path("/usr/bin/python3").resolve()
    usr = [Bind(source="/usr", target="/usr", readonly=True)]
    found = bench.lines(RunOptions(args=[str(python), "-I", "-S", "-c", CALLS], binds=usr))
    assert [line for line in found if not line.endswith("EPERM")] == ["getpid fine", "unshare fine"]
    assert len(found) == 12


# -- IDs ------------------------------------------------------------------------------------------


def test_id_maps(reachable: Path) -> None:
    """Root in it is somebody else outside; what is made for it belongs to its root."""
    bench = Bench(reachable)
    bench.give(100_000)
    script = (
        "cat /proc/self/uid_map /proc/self/gid_map; id -u; stat -c %u . /etc; touch /made; chown 7 /made"
    )
    found = bench.lines(shell(script, id_maps=MAPS, cwd="/new/folder", network=Network.NONE))
    assert [line.split() for line in found] == [["0", "100000", "65536"]] * 2 + [["0"]] * 3
    assert (bench.rootfs / "made").stat().st_uid == 100_007
    assert (bench.rootfs / "new/folder").stat().st_uid == 100_000
    assert bench.lines(shell("id -u; id -g", id_maps=MAPS, user="www")) == ["33", "34"]


@pytest.mark.parametrize("network", Network)
def test_without_root(reachable: Path, network: Network) -> None:
    """By someone without any right: he is root in it, alone."""
    bench = Bench(reachable, user=1000)
    script = (
        "id -u; id -g; cat /proc/self/uid_map; pwd; touch /made /srv/made;"
        "touch /sys/x /proc/sys/x 2>/dev/null || echo no; busybox hostname"
    )
    options = shell(script, rootless=True, cwd="/srv/new", hostname="mine", network=network)
    found = bench.lines(options, image(volumes=("/data",)))
    assert [" ".join(line.split()) for line in found] == ["0", "0", "0 1000 1", "/srv/new", "no", "mine"]
    assert {(bench.rootfs / name).stat().st_uid for name in ("made", "srv/new", "data")} == {1000}
    spec = bench.spec(options)
    assert (spec.linux.cgroups_path, spec.linux.resources) == ("", None)


def test_what_takes_root(reachable: Path) -> None:
    bench = Bench(reachable, user=1000)
    error = bench.refused(shell("", rootless=True, user="www"))
    assert isinstance(error, InvalidArgument)
    assert "user 33 is not among the IDs that the container has" in str(error)
    error = bench.refused(shell("", rootless=True, resources=Resources(pids=5)))
    assert isinstance(error, NotSupported)
    assert "need root" in str(error)


# -- nested ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", [(), MAPS])
def test_a_nested_container_shares_what_its_parent_has(reachable: Path, maps: tuple[IDMap, ...]) -> None:
    outer, inner = Bench(reachable / "outer"), Bench(reachable / "inner")
    if maps:
        outer.give(100_000)
        inner.give(100_000)
    running = outer.started(shell(f"{SHOWN}; sleep 60", id_maps=maps))
    try:
        pid = 0

        def is_up() -> bool:
            nonlocal pid
            asked = outer.command("state", outer.unique)
            state = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
            pid = json.loads(state)["pid"] if '"running"' in state else 0
            return pid > 0

        until(is_up)
        theirs = namespaces(str(pid))
        script = f"{SHOWN}; busybox hostname; {ALONE}"
        found = inner.lines(shell(script, id_maps=maps), parent=pid)
        mine = dict(zip(theirs, found, strict=False))
        assert {name for name in theirs if theirs[name] == mine[name]} == {"ipc", "net", "uts"}
        assert found[6:] == [outer.unique[:12], "1 1"]
        with pytest.raises(InvalidArgument, match="has the host name of the one that it is in"):
            inner.spec(shell("", hostname="x"), parent=pid)
    finally:
        killed = outer.command("kill", outer.unique, "KILL")
        subprocess.run(killed, check=True)
        running.communicate(timeout=30)


def test_names_of_classes_are_those_of_the_specification(bench: Bench) -> None:
    """No key is written that the specification does not have, as its schema takes any."""
    text = json.dumps(written(bench.spec(shell("", terminal=True, readonly=True, id_maps=MAPS))))
    keys = set(re.findall(r'"([A-Za-z]+)": ', text))
    known = set(re.findall(r'"([A-Za-z]+)": ', "".join(f.read_text() for f in SCHEMA.glob("*.json"))))
    assert keys <= known
