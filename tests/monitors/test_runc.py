"""The runtime: which one is taken, what its commands do, what its errors mean; cgroups beside it."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import trio

from engine.errors import CommandFailed, EngineError, FailedPrecondition, NotSupported, PermissionDenied
from engine.running import cgroups, runc
from engine.running.attaching import ended
from engine.running.cgroups import Layout
from engine.running.monitors import open_monitors
from engine.running.runc import Runtime, RuntimeState, exec_failure, failure, find_runtime
from tests.conftest import peer
from tests.monitors.monitored import shell
from tests.processes import until


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A search path with what a test puts there."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setattr(runc, "PATH", str(folder))
    find_runtime.cache_clear()

    def add(name, says, status=0):
        (folder / name).write_text(f"#!/bin/sh\nprintf '{says}'\nexit {status}\n")
        (folder / name).chmod(0o755)
        return str(folder / name)

    yield add
    find_runtime.cache_clear()


@pytest.fixture
def unified(monkeypatch):
    monkeypatch.setattr(runc, "layout", lambda: Layout.UNIFIED)


@pytest.mark.usefixtures("unified")
def test_the_first_that_works_is_taken(programs):
    with pytest.raises(NotSupported, match="crun is not installed; runc is not installed; install"):
        find_runtime()
    path = programs("runc", "runc version 1.3.3\\nspec: 1.2.0\\n")
    assert find_runtime() == Runtime("runc", path, "1.3.3")
    find_runtime.cache_clear()
    crun = programs("crun", "crun version 1.21\\ncommit: x\\n")
    assert find_runtime() == Runtime("crun", crun, "1.21")
    assert find_runtime(path) == find_runtime("runc") == Runtime("runc", path, "1.3.3")


def test_crun_is_not_taken_where_it_refuses(programs, monkeypatch):
    crun = programs("crun", "crun version 1.21\\n")
    runc_path = programs("runc", "runc version 1.3.3\\n")
    monkeypatch.setattr(runc, "layout", lambda: Layout.HYBRID)
    assert find_runtime().path == runc_path
    with pytest.raises(NotSupported, match=r"crun refuses hosts with cgroup v1 and v2 \(hybrid\)"):
        find_runtime(crun)


@pytest.mark.parametrize(
    ("says", "status", "why"),
    [
        ("podman version 1.2.3", 0, "neither"),
        ("runc version 1.3.3", 127, "does not run"),
        ("", 0, "neither"),
    ],
)
@pytest.mark.usefixtures("unified")
def test_what_does_not_work_is_passed_over(programs, says, status, why):
    programs("crun", says, status)
    path = programs("runc", "runc version 1.3.3\\n")
    assert find_runtime().path == path
    with pytest.raises(NotSupported, match=why) as error:
        find_runtime("crun")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "warns"),
    [
        ("1.1.5+ds1", True),
        ("1.2.7", True),
        ("1.2.8", False),
        ("1.3.2", True),
        ("1.3.3", False),
        ("1.4", False),
    ],
)
@pytest.mark.usefixtures("unified")
def test_a_runc_with_known_holes_is_warned_of(programs, caplog, version, warns):
    """E-02; once in a process."""
    programs("runc", f"runc version {version}\\n")
    find_runtime()
    find_runtime()
    assert len(caplog.records) == warns


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ('runc run failed: exec: "x": executable file not found in $PATH: unknown', 127),
        ('unable to start container process: exec: "/x": stat /x: no such file or directory', 127),
        ("executable file `x` not found in $PATH: No such file or directory", 127),
        ('exec: "/etc": permission denied', 126),
        ("exec /x: exec format error", 126),
        ('exec: "/": is a directory', 126),
        ("open executable: Permission denied", 126),
    ],
)
def test_what_runtimes_say_of_commands(said, code):
    for error in (failure(said), exec_failure(said)):
        assert isinstance(error, CommandFailed)
        assert error.code == code


def test_what_runtimes_say_otherwise():
    assert type(failure("mount: no such file or directory")) is EngineError
    assert type(failure("mount: operation not permitted")) is PermissionDenied
    assert "\x1b" not in str(failure("\x1b[31m" * 10_000))
    assert len(str(failure("x" * 10_000))) < 500
    assert type(exec_failure("cannot exec in a stopped container")) is FailedPrecondition
    assert type(exec_failure("container does not exist")) is FailedPrecondition


@pytest.mark.root
def test_the_real_crun_is_judged_as_it_judges(bundle):
    """It says itself whether it runs here."""
    path = peer("crun")
    one = bundle("/bin/true")
    argv = [path, "--root", str(one.states), "run", one.id]
    runs = subprocess.run(argv, cwd=one.folder, capture_output=True, check=False).returncode == 0
    try:
        assert find_runtime("crun").path == path
    except NotSupported:
        assert not runs
    else:
        assert runs


async def _running(one, work):
    async with open_monitors() as monitors:
        await monitors.start(one.launch)
        await trio.to_thread.run_sync(work)
        runc.kill(one.runtime, one.states, one.id, signal.SIGKILL)
        return await ended(one.folder)


@pytest.mark.root
def test_states(bundle):
    one = bundle("/bin/sleep", "1000")
    asked = (one.runtime, one.states, one.id)
    assert runc.state(*asked) is None
    assert runc.kill(*asked, 0) is False

    def work():
        assert runc.state(*asked) == RuntimeState("running", int((one.folder / "pid").read_text()))

    assert trio.run(_running, one, work).code == 137
    assert runc.state(*asked).status == "stopped"
    assert runc.kill(*asked, 9) is False
    one.delete()
    one.delete()
    assert runc.state(*asked) is None


@pytest.mark.root
def test_a_container_that_runs_is_deleted(bundle):
    one = bundle(*shell("setsid sleep 1000 & exec sleep 1000"))

    async def main():
        async with open_monitors() as monitors:
            await monitors.start(one.launch)
        await trio.to_thread.run_sync(one.delete)
        return await ended(one.folder)

    assert trio.run(main).code == 137
    assert cgroups.consumption(one.id) is None
    assert not (one.states / one.id).exists()


@pytest.mark.root
def test_resources_are_changed(bundle):
    one = bundle("/bin/sleep", "1000", memory=64 << 20)

    def work():
        assert cgroups.consumption(one.id).memory_limit == 64 << 20
        wanted = json.dumps({"memory": {"limit": 32 << 20}}).encode()
        runc.update(one.runtime, one.states, one.id, wanted)
        assert cgroups.consumption(one.id).memory_limit == 32 << 20
        with pytest.raises(EngineError):
            runc.update(one.runtime, one.states, one.id, b'{"memory": {"limit": 1}}')
        with pytest.raises(EngineError):
            runc.update(one.runtime, one.states, one.id, b"[")

    trio.run(_running, one, work)
    one.delete()


@pytest.mark.root
def test_consumption(bundle):
    one = bundle(*shell("while :; do :; done"))

    def work():
        until(lambda: (cgroups.consumption(one.id).cpu_ns or 0) > 100_000_000)
        found = cgroups.consumption(one.id)
        assert found.pids == 1
        assert 10_000 < found.memory <= found.memory_peak
        assert found.memory_limit is None

    trio.run(_running, one, work)
    one.delete()
    assert cgroups.consumption(one.id) is None


@pytest.mark.root
def test_all_in_a_cgroup_are_killed_and_it_is_removed(bundle):
    """Whatever the runtime left: processes in it and in cgroups below it."""
    one = bundle("/bin/true")
    if cgroups.layout() is Layout.UNIFIED:
        roots = [Path("/sys/fs/cgroup")]
    else:
        roots = [Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup/memory")]
    sleeping = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    for root in roots:
        folder = root / cgroups.name_of(one.id).lstrip("/")
        for below, process in zip((folder, folder / "a", folder / "a" / "b"), sleeping, strict=True):
            below.mkdir()
            (below / "cgroup.procs").write_text(str(process.pid))
    reaped = [process.pid for process in sleeping]
    signal.signal(signal.SIGCHLD, lambda *_: [process.poll() for process in sleeping])
    try:
        cgroups.remove(one.id)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    assert [process.wait() for process in sleeping] == [-9] * len(reaped)
    assert cgroups.consumption(one.id) is None
    cgroups.remove(one.id)


UNIFIED_FILES = {
    "memory.current": "4096\n",
    "memory.peak": "8192\n",
    "memory.max": "max\n",
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\n",
    "pids.current": "2\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1\n8:16 rbytes=5 wbytes=6\n",
    "memory.events": "low 0\noom 1\noom_kill 1\n",
}


def test_consumption_of_version_2(tmp_path, monkeypatch):
    """What the kernel's documentation says (cgroup-v2.rst): this may be a host with version 1."""
    monkeypatch.setattr(cgroups, "_ROOT", str(tmp_path))
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    folder = tmp_path / "lamina-x"
    assert cgroups.consumption("x") is None
    folder.mkdir()
    assert cgroups.consumption("x") == cgroups.Consumption()
    for name, text in UNIFIED_FILES.items():
        (folder / name).write_text(text)
    assert cgroups.consumption("x") == cgroups.Consumption(4096, 8192, None, 1_500_000, 2, 15, 26)
    assert cgroups.was_oom_killed("x")
    (folder / "memory.max").write_text("1000\n")
    assert cgroups.consumption("x").memory_limit == 1000
    (folder / "memory.current").write_bytes(b"\xff" * (1 << 20))
    assert cgroups.consumption("x").memory is None
