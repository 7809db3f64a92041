"""Further commands in a container that runs: `exec`."""

import fcntl
import os
import pty
import signal
import struct
import sys
import termios

import pytest
import trio

from engine.errors import CommandFailed, FailedPrecondition
from engine.running import runc
from engine.running.attaching import ended
from engine.running.executing import execute
from engine.running.monitors import open_monitors
from engine.running.options import ExecOptions
from tests.processes import until

pytestmark = pytest.mark.root


def within(one, work):
    """Do `work` while a container runs; nothing of it stays in its folder."""

    async def main():
        async with open_monitors() as monitors:
            await monitors.start(one.launch)
            before = sorted(os.listdir(one.folder))
            try:
                return await work()
            finally:
                assert sorted(os.listdir(one.folder)) == before
                runc.kill(one.runtime, one.states, one.id, signal.SIGKILL)
                await ended(one.folder)

    given = trio.run(main)
    one.delete()
    return given


async def executed(one, *args, given=b"", **more):
    """Run a command with pipes, which hold all of it; return its exit code and its two outputs."""
    command = ExecOptions(args=args, **more)
    (stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr) = (os.pipe() for _ in range(3))
    try:
        os.write(to_stdin, given)
        os.close(to_stdin)
        code = await execute(
            one.runtime, one.states, one.folder, command, stdin=stdin, stdout=stdout, stderr=stderr
        )
        os.close(stdout)
        os.close(stderr)
        stdout = stderr = -1
        return code, os.read(from_stdout, 1 << 16), os.read(from_stderr, 1 << 16)
    finally:
        for file in {stdin, from_stdout, from_stderr, stdout, stderr} - {-1}:
            os.close(file)


def test_outputs_and_exit_code(bundle):
    one = bundle("/bin/sleep", "1000")

    async def work():
        found = await executed(one, "/bin/sh", "-c", "cat; echo err >&2; exit 42", given=b"in")
        assert found == (42, b"in", b"err\n")
        assert await execute(one.runtime, one.states, one.folder, ExecOptions(args=["/bin/true"])) == 0
        assert (await executed(one, "/bin/sh", "-c", "kill -9 $$"))[0] == 137

    within(one, work)


def test_who_where_and_with_what(bundle):
    one = bundle("/bin/sleep", "1000")

    async def work():
        script = "id -u; id -g; id -G; pwd; echo $HERE $MORE $HOME"
        _, told, _ = await executed(
            one, "/bin/sh", "-c", script, user="five", cwd="/tmp", env=["MORE=so=1"]
        )
        assert told == b"5\n6\n6 7 8\n/tmp\nyes so=1 /home\n"

    within(one, work)


def test_commands_that_cannot_be_run(bundle):
    one = bundle("/bin/sleep", "1000")

    async def work():
        for name, code in (("nope", 127), ("/bin/nope", 127), ("/etc/text", 126)):
            with pytest.raises(CommandFailed) as failed:
                await executed(one, name)
            assert failed.value.code == code

    within(one, work)


def test_where_nothing_runs(bundle):
    one = bundle("/bin/true")
    with pytest.raises(FailedPrecondition, match="does not run"):
        trio.run(executed, one, "/bin/true")


def test_a_cancelled_command_is_killed(bundle):
    one = bundle("/bin/sleep", "1000")

    async def work():
        with trio.move_on_after(0.3) as scope:
            await execute(one.runtime, one.states, one.folder, ExecOptions(args=["/bin/sleep", "2000"]))
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(until, lambda: len(one.running()) == 2)  # it and its monitor

    within(one, work)


def test_cancelled_at_any_moment(bundle):
    one = bundle("/bin/sleep", "1000")

    async def work():
        for moment in range(10):
            with trio.move_on_after(0.004 * moment):
                await execute(
                    one.runtime, one.states, one.folder, ExecOptions(args=["/bin/sleep", "2000"])
                )
            await trio.to_thread.run_sync(until, lambda: len(one.running()) == 2)

    within(one, work)


TERMINAL = r"""
import sys, trio
from pathlib import Path
from engine.running.executing import execute
from engine.running.options import ExecOptions
from engine.running.runc import find_runtime
# The runtime sets the size once the command has begun.
script = "while [ \"$(stty size)\" != '21 63' ]; do :; done; stty size; read x; echo got $x; exit 5"
command = ExecOptions(args=["/bin/sh", "-c", script], terminal=True)
async def main():
    return await execute(
        find_runtime(), Path(sys.argv[1]), Path(sys.argv[2]), command, stdin=0, stdout=1, stderr=2
    )
sys.exit(trio.run(main))
"""


def test_a_terminal(bundle):
    """The caller's own: its size, what is typed, the exit code."""
    one = bundle("/bin/sleep", "1000")

    async def work():
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 21, 63, 0, 0))
        argv = [sys.executable, "-c", TERMINAL, str(one.states), str(one.folder)]
        process = await trio.lowlevel.open_process(
            argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        told = b""
        for wanted in (b"21 63", b"got this"):
            with trio.fail_after(30):
                while wanted not in told:
                    await trio.lowlevel.wait_readable(ours)
                    told += os.read(ours, 1000)
            os.write(ours, b"this\n")
        assert await process.wait() == 5
        os.close(ours)

    within(one, work)
