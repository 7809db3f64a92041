"""However a command ends, it says so in one line and by its exit code: never with a traceback."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from engine import errors
from engine.cli import signals
from engine.cli.ending import Incomplete, end, exit_code
from engine.cli.signals import Stopped
from engine.content.ingests import BeingWritten
from engine.errors import DigestMismatch, EngineError, NotFound, Refused, Unavailable
from engine.stores import host_platform, open_stores
from engine.testing.archives import archive, layout, member
from tests.cli.failing import assert_fails, assert_one_line
from tests.cli.test_commands import CHAIN
from tests.command import LAMINA, dump, environment, lamina, lamina_json
from tests.processes import Victim, until

pytestmark = pytest.mark.root


def _shell(root: Path, words: str, redirection: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does, with its streams as the shell was told."""
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
    command = [*shell, *LAMINA, "--root", str(root), *words.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


# -- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["images", "images --json", "--help"])
def test_a_closed_stdout(stocked: Path, words: str):
    done = _shell(stocked, words, ">&-")
    assert done.returncode == 1
    assert_one_line(done.stderr, "standard output: Bad file descriptor")


@pytest.mark.parametrize(
    "words", ["images", "images --json", "content get {digest}", "image rm x --json"]
)
def test_a_full_stdout(stocked: Path, words: str):
    digest = lamina_json(stocked, "content", "ls")[0]["digest"]
    done = _shell(stocked, words.format(digest=digest), ">/dev/full")
    assert done.returncode == (3 if "rm" in words else 8)
    assert_one_line(done.stderr, "no image" if "rm" in words else "standard output: no space left")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_takes_nothing(stocked: Path, redirection: str):
    done = _shell(stocked, "image inspect absent --json", redirection)
    assert (done.returncode, done.stderr) == (3, "")
    assert json.loads(done.stdout)["error"]["kind"] == "NotFound"


def test_no_stream_at_all(stocked: Path, image: Path):
    """What a command opens then must not get the number of a stream that something is written to."""
    done = _shell(stocked, f"import --name again:1 {image}", "<&- >&- 2>&-")
    assert done.returncode == 0
    assert lamina_json(stocked, "content", "verify")["damaged"] == []
    assert len(lamina_json(stocked, "images")) == 2


@pytest.mark.parametrize("redirection", ["2>&-", "<&- 2>&-"])
def test_no_stream_for_the_workers(stocked: Path, redirection: str):
    assert _shell(stocked, "unpack app:1 --snapshotter copy", redirection).returncode == 0
    assert lamina_json(stocked, "fsck")["findings"] == []


def test_a_terminal_that_does_not_know_all_characters(stocked: Path):
    lamina(stocked, "image", "tag", "app:1", "other:1")
    command = [*LAMINA, "--root", str(stocked), "snapshots", "tree"]
    variables = environment() | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    assert CHAIN[0] in done.stdout


# -- signals ----------------------------------------------------------------------------------

# A signal that comes while the module of that name is looked for.
_WHILE_LOADING = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
from engine.cli.main import main
main()
"""


@pytest.mark.parametrize("name", ["engine.cli.program", "click", "lmdb", "engine.app"])
def test_a_signal_while_a_command_is_loaded(name: str):
    number = signal.SIGINT if name != "lmdb" else signal.SIGTERM
    program = _WHILE_LOADING.format(name=name, number=int(number))
    command = [sys.executable, "-P", "-c", program, "--root", "/nowhere", "unpack", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    says = "interrupted" if number == signal.SIGINT else "terminated"
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"lamina: {says}\n")


_WHILE_ENDING = """
import os, signal
from engine.cli import ending
say = ending.say
ending.say = lambda message: (os.kill(os.getpid(), signal.SIGINT), say(message))
from engine.cli.main import main
main()
"""


def test_a_signal_while_a_command_ends():
    command = [sys.executable, "-P", "-c", _WHILE_ENDING, "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stderr) == (130, "lamina: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_cleans_up_as_ctrl_c_does(tmp_path: Path, number: signal.Signals):
    big = archive(member("big", data=bytes(60 << 20)))
    image = layout(tmp_path / "image", [big], compression="none")
    root = tmp_path / "root"
    victim = Victim(root, ["import", str(image)], "content.ingest.written=stop")
    pid = victim.process.pid
    state = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state is not None
    assert state.si_code == os.CLD_STOPPED  # halfway through the layer
    victim.process.send_signal(number)
    victim.process.send_signal(signal.SIGCONT)
    says = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}[number]
    assert victim.wait() == (128 + number, f"lamina: {says}\n")
    assert {name: records for name, records in dump(root).items() if records} == {}


# In a process of its own: a KeyboardInterrupt may leave the store open in this one.
_LONG_WORK = """
import os, signal, sys, trio
from pathlib import Path
from engine.cli.context import Context
from engine.cli.running import run
number, name = int(sys.argv[1]), sys.argv[3]
signal.signal(signal.SIGINT, signal.default_int_handler)
async def too_late(engine):
    await trio.to_thread.run_sync(os.kill, os.getpid(), number)
    return "made"
async def twice(engine):
    try:
        os.kill(os.getpid(), number)
        await trio.sleep_forever()
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleaned")
try:
    print(run(Context(Path(sys.argv[2]), "default"), globals()[name]))
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)  # what comes after the loop is clean-up too
    print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("too_late", "made\n", id="what was made stays, so it is told"),
        pytest.param("twice", "cleaned\ninterrupted\n", id="a second one breaks off no clean-up"),
    ],
)
def test_a_signal_in_long_work(stocked: Path, number: signal.Signals, name: str, says: str):
    command = [sys.executable, "-P", "-c", _LONG_WORK, str(int(number)), str(stocked), name]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, says, "")


def test_the_demo_leaves_nothing_when_it_is_terminated(tmp_path: Path):
    """Also where Ctrl-C is ignored, as by what a script starts in the background."""
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *LAMINA, "demo", "--json"]
    variables = environment() | {"TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(
        command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(lambda: any(tmp_path.glob("lamina-demo-*/root/snapshots/*/*/fs/*")))
    demo.send_signal(signal.SIGINT)
    demo.send_signal(signal.SIGTERM)
    out, messages = demo.communicate(timeout=30)
    assert (demo.returncode, messages) == (143, "lamina: terminated\n")
    assert json.loads(out)["error"] == {"kind": "Stopped", "message": "terminated", "exit_code": 143}
    assert list(tmp_path.iterdir()) == []


# -- where it runs ----------------------------------------------------------------------------


_ANYWHERE = ("images", "unpack app:1")


@pytest.mark.parametrize("words", [*_ANYWHERE, "umount web", "mount app:1 mnt", "import app"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_working_folder_that_is_gone(
    stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, relative: bool
):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    works = words in _ANYWHERE and not relative
    done = lamina(Path("root") if relative else stocked, *words.split(), code=0 if works else 3)
    if not works:
        assert_one_line(done.stderr, "no such file or directory")


def test_the_working_folder_may_go_where_it_is_not_needed(stocked: Path, tmp_path: Path):
    gone = tmp_path / "gone"
    shell = ["sh", "-c", f'mkdir "{gone}" && cd "{gone}" && rmdir "{gone}" && exec "$@"', "sh"]
    words = ["unpack", "app:1", "--snapshotter", "copy"]
    done = subprocess.run(
        [*shell, *LAMINA, "--root", stocked, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{CHAIN[-1]}\n"), done.stderr


_ODD = os.fsdecode(b"\xff\xfe")
_ODD_WORDS = (
    ["images", _ODD],
    ["image", "rm", _ODD],
    ["image", "tag", "app:1", _ODD],
    ["image", "inspect", _ODD],
    ["unpack", "app:1", "--snapshotter", _ODD],
    ["unpack", "app:1", "--platform", _ODD],
    ["mount", _ODD, "."],
    ["mount", "app:1", "{tmp}/" + _ODD],
    ["mount", "app:1", "{tmp}", "--name", _ODD],
    ["mount", "app:1", "{tmp}", "-o", _ODD],
    ["umount", _ODD],
    ["content", "get", _ODD],
    ["content", "rm", _ODD],
    ["snapshots", "rm", _ODD],
    ["snapshots", "usage", _ODD],
    ["import", _ODD],
    ["import", "--name", _ODD, "{image}"],
    ["completion", _ODD],
    [_ODD],
    ["--namespace", _ODD, "images"],
)


@pytest.mark.parametrize("words", _ODD_WORDS, ids=lambda words: " ".join(map(ascii, words)))
def test_names_that_are_not_utf_8(stocked: Path, image: Path, tmp_path: Path, words: list[str]):
    (tmp_path / _ODD).mkdir()
    words = [word.replace("{tmp}", str(tmp_path)).replace("{image}", str(image)) for word in words]
    code = 3 if words[0] in {"umount", "import"} and "--name" not in words else 2
    done = lamina(stocked, *words, "--json", code=code)
    assert_one_line(done.stderr, "")
    assert json.loads(done.stdout)["error"]["exit_code"] == code


def test_a_root_whose_name_is_not_utf_8(tmp_path: Path, image: Path):
    root = tmp_path / _ODD
    for words in (["import", image], ["images"]):
        assert_one_line(lamina(root, *words, code=2).stderr, "the path must be UTF-8")
    assert not root.exists()
    source = tmp_path / os.fsdecode(b"image\xff")
    source.symlink_to(image)
    lamina(tmp_path / "root", "import", source, "--name", "app:1")


def test_a_kernel_without_pid_namespaces(stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stat = os.stat

    def without(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and os.fspath(path) == "/proc/self/ns/pid":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", without)
    target = tmp_path / "mnt"
    target.mkdir()
    lamina(stocked, "mount", "app:1", target)
    (row,) = lamina_json(stocked, "mounts")
    assert row["state"] == "mounted"
    lamina(stocked, "gc")
    lamina(stocked, "umount", target)
    assert lamina_json(stocked, "mounts") == []


# -- as JSON ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        ("images --no-such-option --json", "InvalidArgument", 2),
        ("no-such-command --json", "InvalidArgument", 2),
        ("content get --json 1234", "InvalidArgument", 2),
        ("image inspect --json absent", "NotFound", 3),
        ("image rm absent --json", "NotFound", 3),
        ("unpack --json absent", "NotFound", 3),
        ("umount --json /nowhere", "NotFound", 3),
        (f"snapshots rm --json {CHAIN[0]}", "FailedPrecondition", 6),
        ("--namespace .. images --json", "InvalidArgument", 2),
    ],
)
def test_an_error_is_one_document(stocked: Path, words: str, kind: str, code: int):
    done = lamina(stocked, *words.split(), code=code)
    error = json.loads(done.stdout)["error"]
    assert done.stderr == f"lamina: {error.pop('message')}\n"
    assert error == {"kind": kind, "exit_code": code}


def test_what_was_done_before_an_error_is_in_its_document(stocked: Path):
    with (
        open_stores(stocked, "default", host_platform()) as stores,
        stores.content.ingest("loose", lease="") as writer,
    ):
        writer.write(b"nobody's")
        loose = writer.commit().digest
    (held,) = {row["digest"] for row in lamina_json(stocked, "images")}
    done = lamina(stocked, "content", "rm", loose, held, "--json", code=6)
    shown = json.loads(done.stdout)
    assert shown["removed"] == [loose]
    assert held in shown["error"]["message"]


def test_image_names_go_together(stocked: Path):
    """All or none; and digits tell by what there was before the first went."""
    digits = lamina_json(stocked, "images")[0]["digest"][7:19]
    lamina(stocked, "image", "tag", "app:1", "app:2")
    assert_fails(stocked, "image", "rm", "app:2", "absent", "app:1", code=3, says="no image absent")
    assert_fails(stocked, "image", "rm", "app:2", digits, code=6, says="has 2 names")
    removed = lamina_json(stocked, "image", "rm", "app:2", "app:1")["removed"]
    assert removed == ["docker.io/library/app:2", "docker.io/library/app:1"]


def test_snapshots_that_went_before_an_error_are_in_its_document(stocked: Path):
    with open_stores(stocked, "default", host_platform()) as stores:
        stores.snapshotter("overlay").prepare("own", CHAIN[-1])
    done = lamina(stocked, "snapshots", "rm", "own", CHAIN[0], CHAIN[-1], "--json", code=6)
    shown = json.loads(done.stdout)
    assert shown["removed"] == [{"snapshotter": "overlay", "key": "own"}]
    assert shown["left"] == []
    assert "has children" in shown["error"]["message"]
    assert {row["key"] for row in lamina_json(stocked, "snapshots", "ls")} == set(CHAIN)


def test_blobs_that_were_removed_before_an_error_are_in_its_document(stocked: Path):
    lamina(stocked, "image", "rm", "app:1")
    digest = lamina_json(stocked, "content", "ls")[0]["digest"]
    shown = json.loads(lamina(stocked, "content", "rm", digest, digest, "--json", code=3).stdout)
    assert shown["removed"] == [digest]
    assert shown["error"]["message"].startswith(f"no blob {digest}")


# -- errors of several tasks, and of others ---------------------------------------------------


def _group(*errors: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("tasks", errors)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (_group(Unavailable("try again")), 7, "try again"),
        (_group(Unavailable("first"), NotFound("second")), 7, "first"),
        (_group(_group(NotFound("first"), Refused("x")), Unavailable("second")), 3, "first"),
        (_group(NotFound("first"), KeyboardInterrupt()), 130, "interrupted"),
        (_group(NotFound("first"), _group(Refused("x"), KeyboardInterrupt())), 130, "interrupted"),
        (_group(NotFound("first"), Stopped(signal.SIGTERM)), 143, "terminated"),
        (_group(EngineError("odd")), 1, "odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (Stopped(signal.SIGHUP), 129, "hung up"),
        (MemoryError(), 8, "out of memory"),
        (PermissionError(errno.EACCES, "no", "/file"), 1, "/file: permission denied"),
        (OSError(errno.ENOSPC, "no"), 8, "standard output: no space left"),
        (FileNotFoundError(errno.ENOENT, "no"), 3, "the working folder: no such file"),
        (UnicodeEncodeError("utf-8", _ODD, 0, 1, "no"), 2, "not UTF-8"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_every_error_has_a_code_and_a_line(
    error: BaseException, code: int, says: str, as_json: bool, capfd: pytest.CaptureFixture[str]
):
    assert end(error, as_json=as_json) == code
    out, messages = capfd.readouterr()
    assert_one_line(messages, says)
    if as_json:
        assert json.loads(out)["error"]["exit_code"] == code
    else:
        assert out == ""


def test_an_incomplete_result_is_shown_with_its_error(capfd: pytest.CaptureFixture[str]):
    error = Incomplete(Unavailable("later"), {"removed": ["a"]})
    assert end(error, as_json=True) == exit_code(error.error) == 7
    assert json.loads(capfd.readouterr().out) == {
        "removed": ["a"],
        "error": {"kind": "Unavailable", "message": "later", "exit_code": 7},
    }


@pytest.mark.parametrize("error", [BeingWritten("x"), DigestMismatch("x", "a", "b"), Unavailable("x")])
def test_kinds_are_those_of_the_vocabulary(error: EngineError, capfd: pytest.CaptureFixture[str]):
    end(error, as_json=True)
    assert json.loads(capfd.readouterr().out)["error"]["kind"] in errors.__all__


def test_a_bug_is_not_an_error_of_the_user():
    with pytest.raises(ZeroDivisionError):
        end(ZeroDivisionError(), as_json=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(number: signal.Signals):
    """As `nohup lamina import` has it: the end of the session does not end the import."""
    every = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    others = every.keys() - {number}
    try:
        signal.signal(number, signal.SIG_IGN)
        for change in (signals.leave_at_once, signals.raising, signals.restore):
            before = {each: signal.getsignal(each) for each in others}
            change()
            assert signal.getsignal(number) is signal.SIG_IGN
            assert all(signal.getsignal(each) != before[each] for each in others)
        with signals.handled(lambda _number: None):
            assert signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        for each, handler in every.items():
            signal.signal(each, handler)
