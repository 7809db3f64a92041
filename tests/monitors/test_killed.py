"""Who is killed: monitors, reapers, those who start containers. Containers go on, and are told of."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from engine.errors import Unavailable
from engine.running import runc
from engine.running.attaching import attach, ended
from engine.running.jobs import encoded
from engine.running.monitors import open_monitors
from engine.running.outcome import Outcome, outcome
from tests.conftest import children
from tests.monitors.monitored import read_until, shell
from tests.processes import ready, until

pytestmark = [pytest.mark.root, pytest.mark.crash]

START = """
import sys, trio
from engine.running.jobs import decoded
from engine.running.monitors import open_monitors

async def main():
    async with open_monitors() as monitors:
        begun = await monitors.start(decoded(sys.argv[1].encode()))
        print("ready", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def reapers():
    """Return the reapers that this process has started."""
    found = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children()}
    return {pid for pid, line in found.items() if b"engine.running.reaper" in line}


def test_a_monitor_is_killed(bundle):
    """The container goes on; nobody will know its exit code; it can be killed and deleted."""
    one = bundle(*shell("while :; do sleep 0.01; done"))

    async def main():
        async with open_monitors() as monitors:
            begun = await monitors.start(one.launch)
            async with attach(one.folder) as attachment:
                waited = []

                async def wait():
                    waited.append(await ended(one.folder))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    os.kill(one.monitor, signal.SIGKILL)
                with pytest.raises(Unavailable):
                    await anext(attachment)
            assert waited == [Outcome(ended=False, monitored=False)]
            assert waited == [outcome(one.folder)]
            told = runc.state(one.runtime, one.states, one.id)
            assert told == runc.RuntimeState("running", begun.pid)
            assert runc.kill(one.runtime, one.states, one.id, signal.SIGKILL)
        until(lambda: runc.state(one.runtime, one.states, one.id).status == "stopped")

    trio.run(main)
    one.delete()
    assert runc.state(one.runtime, one.states, one.id) is None
    assert not outcome(one.folder).ended


def test_a_reaper_is_killed(bundle):
    """The monitors go on; the next container is started by another reaper."""
    one = bundle(*shell("read x; exit 3"), stdin=True)
    two = bundle(*shell("exit 4"), attached=True)

    async def main():
        async with open_monitors() as monitors:
            await monitors.start(one.launch)
            (reaper,) = reapers()
            os.kill(reaper, signal.SIGKILL)
            begun = await monitors.start(two.launch)
            assert [piece async for piece in begun.attachment] == []
            await begun.attachment.aclose()
            assert reaper not in reapers()
            async with attach(one.folder) as attachment:
                await attachment.send(b"\n")
            assert (await ended(one.folder)).code == 3
            assert (await ended(two.folder)).code == 4

    trio.run(main)
    one.delete()
    two.delete()


def test_a_reaper_hangs_and_is_killed_while_a_job_waits(bundle):
    """A job that it never took up is given to another."""
    one = bundle(*shell("exit 4"))

    async def main():
        async with open_monitors() as monitors:
            monitors.prepare()
            until(reapers)
            (reaper,) = reapers()
            os.kill(reaper, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(monitors.start, one.launch)
                await trio.testing.wait_all_tasks_blocked(0.05)
                os.kill(reaper, signal.SIGKILL)
            assert (await ended(one.folder)).code == 4

    trio.run(main)
    one.delete()


def test_who_started_it_is_killed(bundle):
    """The container goes on, its exit code is kept, and others attach."""
    one = bundle(*shell("echo begun; read x; echo $x; exit 6"), stdin=True)
    starter = ready(START, encoded(one.launch).decode())
    before = one.monitor
    starter.kill()
    starter.communicate()

    async def main():
        assert outcome(one.folder) == Outcome(ended=False, monitored=True)
        async with attach(one.folder) as attachment:
            await attachment.send(b"more\n")
            assert await read_until(attachment, b"more\n")
        return await ended(one.folder)

    assert trio.run(main).code == 6
    assert one.monitor == before
    assert one.log.endswith(b"stdout F more\n")
    one.delete()


def test_a_first_client_is_killed(bundle):
    """What it has not read is in the log, and the container is not held up."""
    one = bundle(*shell("seq 100000; exit 6"), attached=True)
    starter = ready(START, encoded(one.launch).decode())
    starter.kill()
    starter.communicate()
    assert trio.run(ended, one.folder).code == 6
    assert one.log.endswith(b"stdout F 100000\n")
    one.delete()


def test_who_starts_it_is_killed_at_any_moment(bundle):
    """What was begun is killed, or runs and is found."""
    code = START.replace("begun =", 'print("ready", flush=True); begun =')
    for moment in range(12):
        one = bundle("/bin/sleep", "1000")
        starter = ready(code, encoded(one.launch).decode())
        time.sleep(moment * 0.006)  # any will do
        starter.kill()
        starter.communicate()
        until(lambda one=one: not one.running() or outcome(one.folder).monitored)
        found = trio.run(partial(_ended_or_killed, one))
        assert not found.ended or found.code == 137
        one.delete()
        until(lambda one=one: not one.running())


async def _ended_or_killed(one):
    with trio.move_on_after(0.2):
        return await ended(one.folder)
    runc.kill(one.runtime, one.states, one.id, signal.SIGKILL)
    return await ended(one.folder)
