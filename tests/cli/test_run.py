"""`lamina run` and the commands on containers: what users of docker and podman expect of them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.oci.signals import parse_signal
from engine.stores import host_platform
from engine.testing.taking_registry import TakingRegistry
from tests.cli.container_places import Place
from tests.cli.failing import assert_one_line
from tests.processes import until

pytestmark = pytest.mark.root

_FOREVER = ("sh", "-c", "trap 'exit 7' TERM INT HUP; echo ready; while :; do sleep 0.05; done")
_STUBBORN = (
    *("sh", "-c"),
    "trap 'echo got' INT; trap '' TERM HUP; echo ready; while :; do sleep 0.05; done",
)


def _ready(process: subprocess.Popen[bytes]) -> None:
    """Wait until what runs says that it is."""
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"


def _ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# -- what comes out -----------------------------------------------------------------------------------


def test_output_exit_code_and_nothing_else(place: Place):
    done = place("run", "busybox", "sh", "-c", "echo out; echo err >&2; exit 3", code=3)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    (row,) = place.listed().values()
    assert (row["state"], row["exit_code"]) == ("stopped", 3)
    assert row["name"].startswith("c-")
    assert place("ps").stdout == ""
    assert "exited (3)" in place("ps", "-a").stdout


def test_the_command_is_the_images_if_none_is_given(place: Place):
    assert place("run", "--rm", "-i", "busybox", input="echo from sh\n").stdout == "from sh\n"
    assert place.listed() == {}


def test_options_behind_the_image_are_the_commands(place: Place):
    out = place("run", "--rm", "busybox", "echo", "--json", "-e", "--rm", "--", "-h").stdout
    assert out == "--json -e --rm -- -h\n"
    done = place("run", "--rm", "busybox", "sh", "-c", "exit 5", "--json", code=5)
    assert done.stdout == ""


def test_pipes_in_and_out(place: Place):
    assert place("run", "--rm", "-i", "busybox", "cat", input="hi\n").stdout == "hi\n"
    assert place("run", "--rm", "busybox", "cat", input="hi\n").stdout == ""


def test_much_output_comes_through_whole(place: Place, tmp_path: Path):
    """100 MB into a pipe, with a reader who hashes."""
    file = tmp_path / "data"
    block = os.urandom(1 << 20)
    with file.open("wb") as writing:
        for _ in range(100):
            writing.write(block)
    expected = hashlib.sha256(block * 100).hexdigest()
    process = place.start("run", "--rm", "-v", f"{file}:/data:ro", "busybox", "cat", "/data")
    assert process.stdout
    got = hashlib.sha256()
    while part := process.stdout.read(1 << 20):
        got.update(part)
    assert _ended(process)[0] == 0
    assert got.hexdigest() == expected


def test_much_input_comes_through_whole(place: Place):
    data = os.urandom(20 << 20)
    process = place.start("run", "--rm", "-i", "busybox", "cat")
    out, _ = process.communicate(data, timeout=60)
    assert out == data


def test_a_reader_who_stalls_holds_it_up_and_loses_nothing(place: Place):
    script = "dd if=/dev/zero bs=1024 count=8192 2>/dev/null; echo done >&2"
    process = place.start("run", "--name", "slow", "--rm", "busybox", "sh", "-c", script)
    place.until_state("slow", "running")
    assert process.poll() is None
    code, out, err = _ended(process)
    assert (code, len(out), err) == (0, 8 << 20, b"done\n")


def test_a_reader_who_leaves_ends_it(place: Place):
    command = f"{' '.join(map(str, _words(place, 'run', '--rm', '--name', 'y', 'busybox')))} sh -c "
    script = "'while :; do echo y; done' | head -n 2"
    done = subprocess.run(["sh", "-c", command + script], capture_output=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"y\ny\n", b"")
    place.until_gone("y")


def _words(place: Place, *words: object) -> list[object]:
    return [sys.executable, "-P", "-m", "engine", "--root", place.root, *words]


# -- how it ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("busybox", "nothing-there"), 127, "nothing-there"),
        (("busybox", "/etc/passwd"), 126, "passwd"),
        (("absent",), 3, "absent"),
        (("--name", "taken", "busybox"), 4, "taken"),
        (("-it", "busybox"), 2, "is no terminal"),
        (("--name", "a/b", "busybox"), 2, "a/b"),
        (("-v", "x:/y", "busybox"), 2, "there are no volumes with names"),
        (("--no-such", "busybox"), 2, "No such option"),
        (("-d", "--rm", "-w", "x", "busybox"), 2, "is no absolute path"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    place: Place, words: tuple[str, ...], code: int, says: str
):
    place("run", "-d", "--name", "taken", "busybox", "true")
    done = place("run", "--pull", "never", *words, code=code)
    assert_one_line(done.stderr, says)
    assert done.stdout == ""
    assert list(place.listed()) == ["taken"]


def test_a_command_that_a_signal_ends(place: Place):
    place("run", "--rm", "busybox", "sh", "-c", "sh -c 'kill -9 $$'; exit $?", code=137)


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_signals_are_passed_on(place: Place, name: str):
    process = place.start("run", "--rm", "busybox", *_FOREVER)
    _ready(process)
    process.send_signal(parse_signal(name))
    assert _ended(process) == (7, b"", b"")
    assert place.listed() == {}


def test_what_does_not_end_is_left_at_the_third_signal(place: Place):
    process = place.start("run", "--name", "stays", "busybox", *_STUBBORN)
    _ready(process)
    assert process.stdout
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"got\n"
    process.send_signal(signal.SIGTERM)
    code, _, err = _ended(process)
    assert code == 143
    assert_one_line(err.decode(), "stays goes on; `lamina kill stays` ends it")
    assert place.listed()["stays"]["state"] == "running"


def test_it_goes_on_when_lamina_is_killed(place: Place, tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    for name, options in (("kept", ()), ("gone", ("--rm",))):
        script = f"echo ready; while ! [ -e /shared/{name} ]; do sleep 0.05; done; echo more"
        process = place.start(
            "run", "--name", name, *options, "-v", f"{shared}:/shared", "busybox", "sh", "-c", script
        )
        _ready(process)
        process.kill()
        _ended(process)
        assert place.listed()[name]["state"] == "running"
        (shared / name).touch()
    place.until_state("kept", "stopped")
    assert place.listed()["kept"]["exit_code"] == 0
    assert place("logs", "kept").stdout == "ready\nmore\n"
    place.until_gone("gone")


def test_two_at_once(place: Place):
    both = [place.start("run", "--rm", "-i", "busybox", "cat") for _ in range(2)]
    for number, process in enumerate(both):
        out, _ = process.communicate(b"%d" % number, timeout=60)
        assert out == b"%d" % number
    assert place.listed() == {}


# -- what it is run with ------------------------------------------------------------------------------


def test_environment_folder_user_and_host_name(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FROM_HERE", "1")
    options = ("-e", "A=b c", "-e", "FROM_HERE", "-w", "/srv", "-u", "www", "--hostname", "web")
    script = "echo $A $FROM_HERE; pwd; id -u; id -g; cat /proc/sys/kernel/hostname"
    out = place("run", "--rm", *options, "busybox", "sh", "-c", script).stdout
    assert out.split("\n") == ["b c 1", "/srv", "33", "34", "web", ""]


def test_folders_of_the_hosts(place: Place, tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    place("run", "--rm", "-v", f"{shared}:/data", "busybox", "sh", "-c", "echo x > /data/file")
    assert (shared / "file").read_text(encoding="ascii") == "x\n"
    done = place("run", "--rm", "-v", f"{shared}:/data:ro", "busybox", "touch", "/data/y", code=1)
    assert "Read-only" in done.stderr


def test_a_read_only_root(place: Place):
    done = place("run", "--rm", "--read-only", "busybox", "touch", "/x", code=1)
    assert "Read-only" in done.stderr


def test_entrypoints(place: Place):
    assert place("run", "--rm", "--entrypoint", "echo", "busybox", "a").stdout == "a\n"


def test_networks(place: Place):
    none = place("run", "--rm", "busybox", "cat", "/proc/net/dev").stdout
    assert [line.split(":")[0].strip() for line in none.splitlines()[2:]] == ["lo"]
    host = place(
        "run", "--rm", "--network", "host", "busybox", "busybox", "readlink", "/proc/self/ns/net"
    )
    assert host.stdout.strip() == os.readlink("/proc/self/ns/net")


# -- what is not here yet -----------------------------------------------------------------------------


def test_what_is_missing_is_pulled_and_what_is_here_is_not_asked_for(place: Place, tmp_path: Path):
    with TakingRegistry().running() as registry:
        name = f"{registry.name}/team/busybox:1"
        place("push", "busybox", name)
        other = Place(tmp_path / "other")
        done = other("run", "--pull", "never", "--rm", name, code=3)
        assert_one_line(done.stderr, "no store at")
        words = ("run", "--rm", name, "echo", "pulled")
        assert other(*words).stdout == "pulled\n"
        before = len(registry.asked)
        assert other(*words).stdout == "pulled\n"
        assert len(registry.asked) == before
        assert other("run", "--pull", "always", *words[1:]).stdout == "pulled\n"
        assert len(registry.asked) > before
    other.clear()


_AS_NOBODY = """
import os
import engine.cli.launching
import engine.cli.program
from engine.cli.main import main
os.setuid(65534)
main()
"""


def test_without_root_there_are_no_containers(tmp_path: Path):
    words = [sys.executable, "-P", "-c", _AS_NOBODY, "--root", str(tmp_path / "root"), "run", "x"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, "only root can run containers")


# -- on containers that are there ---------------------------------------------------------------------


@pytest.fixture
def web(place: Place) -> str:
    """A container that runs until it is told to end."""
    assert place("run", "-d", "--name", "web", "-l", "a=b", "busybox", *_FOREVER).stdout == "web\n"
    until(lambda: place("logs", "web").stdout == "ready\n")
    return "web"


def test_ps_shows_what_runs(place: Place, web: str):
    assert place("ps", "-q").stdout == "web\n"
    row = place.listed()[web]
    assert (row["state"], row["labels"], row["command"]) == ("running", {"a": "b"}, list(_FOREVER))
    assert os.readlink(f"/proc/{row['pid']}/root")
    lines = place("ps").stdout.splitlines()
    assert "running" in lines[1]


def test_exec(place: Place, web: str):
    words = ("exec", "-e", "A=b", "-w", "/srv", "-u", "www", web, "sh", "-c")
    assert place(*words, "echo $A; pwd; id -u; exit 4", code=4).stdout == "b\n/srv\n33\n"
    assert place("exec", "-i", web, "cat", input="in\n").stdout == "in\n"
    (line,) = place("exec", web, "nothing-there", code=127).stderr.splitlines()
    assert "nothing-there" in line
    assert_one_line(place("exec", "absent", "true", code=3).stderr, "no container absent")


def test_stop(place: Place, web: str):
    (row,) = json.loads(place("stop", web, "--json").stdout)
    assert (row["state"], row["exit_code"]) == ("stopped", 7)
    place("stop", web)  # as docker has it: it is
    assert_one_line(place("kill", web, code=6).stderr, "web")
    assert_one_line(place("exec", web, "true", code=6).stderr, "web")


def test_stop_of_what_ignores_it(place: Place):
    place("run", "-d", "--name", "stays", "busybox", *_STUBBORN)
    until(lambda: place("logs", "stays").stdout == "ready\n")
    place("stop", "-t", "0.2", "stays")
    assert place.listed()["stays"]["exit_code"] == 137


def test_stop_and_kill_of_what_goes_when_it_has_ended(place: Place):
    for words in (("kill",), ("stop", "-t", "0")):
        process = place.start("run", "--rm", "--name", "brief", "busybox", *_FOREVER)
        _ready(process)
        place(*words, "brief")
        assert _ended(process)[0] in {7, 137}
    assert place.listed() == {}


def test_who_attaches_later_sees_to_no_removal(place: Place):
    """What ran it does, or else what its monitor leaves behind."""
    place("run", "-d", "--rm", "-i", "--name", "brief", "busybox", "sh", "-c", "read x; exit $x")
    place("attach", "brief", input="3\n", code=3)
    place.until_gone("brief")


def test_a_platform_that_is_asked_for(place: Place):
    host = host_platform()
    done = place(
        "run", "--rm", "--platform", f"{host.os}/{host.architecture}", "busybox", "echo", "here"
    )
    assert done.stdout == "here\n"


def test_who_looks_on_and_leaves_ends_nothing(place: Place):
    """A container is not killed because the reader of an `attach` has seen enough."""
    script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"
    place("run", "-d", "--name", "talks", "busybox", "sh", "-c", script)
    process = place.start("attach", "talks", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0
    assert place.listed()["talks"]["state"] == "running"


def test_kill(place: Place, web: str):
    place("kill", "-s", "SIGINT", web)
    place.until_state(web, "stopped")
    assert place.listed()[web]["exit_code"] == 7


def test_rm(place: Place, web: str):
    assert_one_line(place("rm", web, code=6).stderr, "-f")
    assert json.loads(place("rm", "-f", web, "--json").stdout) == {"removed": ["web"]}
    assert place.listed() == {}
    assert_one_line(place("rm", web, code=3).stderr, "no container web")


def test_a_container_is_named_by_the_first_digits_of_what_its_folder_is_called(place: Place, web: str):
    unique = place.listed()[web]["unique"]
    assert place("logs", unique[:6]).stdout == "ready\n"
    assert_one_line(place("logs", unique[:3], code=3).stderr, "no container")
    place("rm", "-f", unique)


def test_logs(place: Place):
    place("run", "--name", "a", "busybox", "sh", "-c", "for i in 1 2 3; do echo $i; done; echo e >&2")
    done = place("logs", "a")
    assert (done.stdout, done.stderr) == ("1\n2\n3\n", "e\n")
    assert place("logs", "--tail", "2", "a").stdout == "3\n"
    assert place("logs", "--since", "1h", "a").stdout == "1\n2\n3\n"
    assert place("logs", "--since", "2100-01-01T00:00:00Z", "a").stdout == ""
    for line in place("logs", "--timestamps", "a").stdout.splitlines():
        assert line[:4].isdigit()
    assert_one_line(place("logs", "absent", code=3).stderr, "no container absent")


def test_logs_that_are_followed(place: Place, web: str):
    following = place.start("logs", "-f", web)
    _ready(following)
    place("stop", web)
    assert _ended(following) == (0, b"", b"")


def test_image_prune(place: Place, web: str):
    assert_one_line(place("image", "prune", code=2).stderr, "--all, or --keep IMAGE")
    place("image", "prune", "--all")
    assert place("exec", web, "echo", "goes on").stdout == "goes on\n"
