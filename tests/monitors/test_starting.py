"""Containers are started, and end: exit codes, signals, errors, cancellation, many at once."""

import os
import resource
import signal
import socket
from functools import partial

import pytest
import trio
import trio.testing

from engine.errors import CommandFailed, EngineError, NotFound, Unavailable
from engine.running import runc
from engine.running.attaching import Channel, attach, ended
from engine.running.frames import frame
from engine.running.jobs import encoded
from engine.running.monitors import open_monitors
from engine.running.outcome import Outcome, outcome
from tests.monitors.monitored import output, run, shell
from tests.processes import until

pytestmark = pytest.mark.root


def test_a_container_runs_to_its_end(bundle):
    one = bundle(*shell("echo out; echo err >&2; exit 3"), attached=True)
    told, found = run(one)
    assert (output(told), output(told, Channel.STDERR)) == (b"out\n", b"err\n")
    assert (found.ended, found.code, found.oom) == (True, 3, False)
    assert outcome(one.folder) == found
    assert sorted(path.name for path in one.folder.iterdir()) == [
        "config.json",
        "exit",
        "log",
        "monitor",
        "pid",
    ]
    assert [line.split(b" ", 1)[1] for line in sorted(one.log.splitlines(), key=lambda x: x[-3:])] == [
        b"stderr F err",
        b"stdout F out",
    ]
    one.delete()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_it(bundle, number):
    one = bundle("/bin/sleep", "1000")
    if number != signal.SIGKILL:  # the first process of a pid namespace ignores what it does not handle
        one = bundle(
            *shell(f"trap 'exit {128 + number}' {int(number)}; echo; while :; do sleep 0.01; done")
        )

    async def main():
        async with open_monitors() as monitors:
            await monitors.start(one.launch)
        await trio.to_thread.run_sync(until, lambda: number == signal.SIGKILL or one.log)
        assert await trio.to_thread.run_sync(runc.kill, one.runtime, one.states, one.id, number)
        found = await ended(one.folder)
        assert found.code == 128 + number
        return await trio.to_thread.run_sync(runc.kill, one.runtime, one.states, one.id, number)

    assert trio.run(main) is False
    one.delete()


def test_it_runs_on_without_its_engine(bundle):
    one = bundle(*shell("echo begun; read x </etc/text; sleep 0.2; echo done"))

    async def main():
        async with open_monitors() as monitors:
            begun = await monitors.start(one.launch)
            assert begun.attachment is None
        assert outcome(one.folder) == Outcome(ended=False, monitored=True)
        return begun.pid, await ended(one.folder)

    pid, found = trio.run(main)
    assert found.code == 0
    assert int((one.folder / "pid").read_text()) == pid
    assert one.log.count(b" stdout F ") == 2
    one.delete()


def test_mc_10_it_runs_on_without_whoever_starts_it(bundle, tmp_path):
    """An engine that is killed as the runtime ends: others saw the pid, and take it to run."""
    one = bundle(*shell("sleep 0.3; exit 7"))
    slow = tmp_path / "slow"
    slow.write_text(
        f'#!/bin/sh\n{one.launch.argv[0]} "$@"\nuntil test -e {tmp_path}/go; do sleep 0.01; done\n'
    )
    slow.chmod(0o700)
    launch = one.launch._replace(argv=(str(slow), *one.launch.argv[1:]))

    async def main():
        async with open_monitors() as monitors:
            reaper = monitors._ready()
            ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                await reaper.give(encoded(launch), theirs)
            await trio.to_thread.run_sync(until, (one.folder / "pid").exists)
            ours.close()
            (tmp_path / "go").touch()
        return await ended(one.folder)

    assert trio.run(main).code == 7
    one.delete()


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["/bin/nope"], 127),
        (["nope"], 127),
        (["/etc/text"], 126),
        (["/bin"], 126),
        (["/etc/text/x"], 126),
    ],
)
def test_a_command_that_cannot_be_run(bundle, args, code):
    one = bundle(*args)
    with pytest.raises(CommandFailed) as failed:
        run(one)
    assert failed.value.code == code
    assert args[0] in str(failed.value)
    assert "\n" not in str(failed.value)
    assert not (one.folder / "exit").exists()
    one.delete()


def test_a_specification_that_is_none(bundle):
    one = bundle("/bin/true")
    (one.folder / "config.json").write_text("{")
    with pytest.raises(EngineError, match="could not start the container"):
        run(one)


def test_a_runtime_that_is_not_there(bundle):
    one = bundle("/bin/true")
    with pytest.raises(NotFound, match="starting a container"):
        run(one, argv=("/usr/sbin/no-runtime", *one.launch.argv[1:]))


def test_a_folder_that_is_not_there(bundle):
    one = bundle("/bin/true")
    with pytest.raises((NotFound, Unavailable)):
        run(one, folder=f"{one.folder}-not")


def test_a_folder_has_one_monitor(bundle):
    one = bundle("/bin/sleep", "1000")

    async def main():
        async with open_monitors() as monitors:
            await monitors.start(one.launch)
            with pytest.raises(EngineError):
                await monitors.start(one.launch)
            assert outcome(one.folder).monitored
            runc.kill(one.runtime, one.states, one.id, 9)
            assert (await ended(one.folder)).code == 137

    trio.run(main)
    one.delete()


def test_the_path_of_a_folder_may_be_long(bundle, tmp_path):
    one = bundle(*shell("tty; echo hallo"), terminal=True, attached=True, below="x" * 200)
    told, _ = run(one)
    assert b"hallo" in output(told)

    other = bundle("/bin/cat", stdin=True, below="x" * 200)
    told, found = run(other, then=partial(_attached_cat, other))
    assert found.code == 0
    one.delete()
    other.delete()


async def _attached_cat(one, _begun):

    async with attach(one.folder) as attachment:
        await attachment.send(b"hallo")
        await attachment.close_stdin()
        return [piece async for piece in attachment], attachment.outcome


def test_20_at_once(bundle):
    many = [bundle(*shell(f"echo {n}; exit {n}"), attached=True) for n in range(20)]
    found = {}

    async def main():
        async def one(monitors, n):
            begun = await monitors.start(many[n].launch)
            pieces = [data async for _, data in begun.attachment]
            found[n] = (b"".join(pieces), begun.attachment.outcome.code)
            await begun.attachment.aclose()

        async with open_monitors() as monitors, trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(one, monitors, n)

    trio.run(main)
    assert found == {n: (b"%d\n" % n, n) for n in range(20)}
    for one in many:
        one.delete()


def test_mc_03_a_cancelled_start_leaves_no_process(bundle):
    """At whatever moment."""
    moments = [0, 0.001, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05]

    async def main():
        async with open_monitors() as monitors:
            monitors.prepare()
            for moment in moments:
                one = bundle("/bin/sleep", "1000", attached=moment == 0.01)
                begun = None
                with trio.move_on_after(moment) as scope:
                    begun = await monitors.start(one.launch)
                if scope.cancelled_caught:
                    await trio.to_thread.run_sync(until, lambda one=one: not one.running())
                else:
                    assert begun is not None
                    if begun.attachment:
                        await begun.attachment.aclose()
                one.delete()

    trio.run(main)


def test_a_start_that_hangs_is_killed_when_cancelled(bundle, tmp_path):
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nsleep 1000 & \nwait\n")
    hanging.chmod(0o700)
    one = bundle("/bin/true")

    async def main():
        async with open_monitors() as monitors:
            with trio.move_on_after(0.2) as scope:
                await monitors.start(one.launch._replace(argv=(str(hanging),)))
            assert scope.cancelled_caught

    trio.run(main)


def test_e_02_the_runtime_has_nothing_of_the_engine(bundle, tmp_path, monkeypatch):
    """No descriptor, no environment, no ignored signal, no terminal."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/secret")
    spy = tmp_path / "spy"
    told = tmp_path / "told"
    spy.write_text(
        f"#!/bin/sh\nexec >{told}\nls -l /proc/$$/fd\necho\nenv\necho\n"
        "grep -E 'SigIgn|SigBlk' /proc/self/status\necho\nps -o tty= -p $$\nexit 1\n"
    )
    spy.chmod(0o700)
    inherited = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    one = bundle("/bin/true", stdin=True)
    with pytest.raises(EngineError):
        run(one, argv=(str(spy),))
    os.close(inherited)
    files, environment, signals, terminal = told.read_text().split("\n\n")
    numbers = sorted(line.split()[8] for line in files.splitlines() if "->" in line)
    assert set(numbers) <= {"0", "1", "2", "10"}  # a shell keeps its script open
    assert "NOTIFY_SOCKET" not in environment
    within_glibc = 0b11 << 31  # 32 and 33, which its posix_spawn leaves ignored
    assert [int(line.split()[1], 16) & ~within_glibc for line in signals.splitlines()] == [0, 0]
    assert terminal.strip() == "?"


def test_an_exit_command_runs_where_nobody_saw_the_end(bundle, tmp_path):
    told = tmp_path / "told"
    command = ("/bin/sh", "-c", f"cat {{}}/exit >{told}")
    one = bundle("/bin/true")
    argv = (*command[:2], command[2].format(one.folder))
    run(one, exit_argv=argv)
    until(lambda: told.exists() and b"code" in told.read_bytes())
    told.unlink()
    other = bundle("/bin/true", attached=True)
    argv = (*command[:2], command[2].format(other.folder))
    run(other, exit_argv=argv)
    until(lambda: not other.running())
    assert not told.exists()
    one.delete()
    other.delete()


def test_running_out_of_memory_is_told(bundle):
    one = bundle(*shell("x=x; while :; do x=$x$x; done"), memory=16 << 20)
    _, found = run(one)
    assert found.oom
    assert found.code == 137
    one.delete()


def test_who_is_no_client_of_ours_is_let_go(bundle):
    one = bundle("/bin/cat", stdin=True)

    async def main():
        async with open_monitors() as monitors:
            await monitors.start(one.launch)
        for said in (b"x" * 5, b"a\xff\xff\xff\xff", frame(b"i", b"x"), frame(b"r", b"1234")):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(30)
                connection.connect(str(one.folder / "attach"))
                connection.sendall(said)
                assert connection.recv(1) == b""
        runc.kill(one.runtime, one.states, one.id, 9)
        assert (await ended(one.folder)).code == 137

    trio.run(main)
    one.delete()


def test_many_who_wait_for_the_end(bundle):
    """More than a monitor has descriptors for: they are told, too."""
    one = bundle("/bin/cat", stdin=True)
    found = []

    async def main():
        async def wait():
            found.append(await ended(one.folder))

        async with open_monitors() as monitors:
            await monitors.start(one.launch)
            resource.prlimit(one.monitor, resource.RLIMIT_NOFILE, (40, 40))
            async with trio.open_nursery() as nursery:
                for _ in range(60):
                    nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked(0.05)
                runc.kill(one.runtime, one.states, one.id, 9)

    trio.run(main)
    assert len(found) == 60
    assert len(set(found)) == 1
    one.delete()
