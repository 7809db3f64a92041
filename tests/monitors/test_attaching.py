"""What containers write to clients, and these to them: pipes, terminals, those that stall or leave."""

import os
import signal
import socket

import pytest
import trio

from engine.errors import FailedPrecondition
from engine.limits import CLIENT_BEHIND, CLIENTS, STDIN_AHEAD
from engine.running import runc
from engine.running.attaching import Channel, attach, ended
from engine.running.frames import ATTACH, STDIN, frame
from engine.running.monitors import open_monitors
from engine.running.outcome import outcome
from tests.monitors.monitored import output, read_until, run, shell
from tests.processes import until

pytestmark = pytest.mark.root


def started(one, work):
    """Start a container, do `work` on its attachment, and wait for its end."""

    async def main():
        async with open_monitors() as monitors:
            begun = await monitors.start(one.launch)
            try:
                given = await work(begun.attachment)
            finally:
                if begun.attachment:
                    await begun.attachment.aclose()
            return given, await ended(one.folder)

    given, found = trio.run(main)
    one.delete()
    return given, found


def connected(one):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(one.folder / "attach"))
    return connection


async def kill(one):
    await trio.to_thread.run_sync(runc.kill, one.runtime, one.states, one.id, signal.SIGKILL)


def test_input_goes_through_whole(bundle):
    """More than any buffer on the way holds, both ways at once."""
    sent = b"".join(b"%07d\n" % n for n in range(200_000))

    async def work(attachment):
        async def write():
            await attachment.send(sent)
            await attachment.close_stdin()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            return [piece async for piece in attachment]

    told, found = started(bundle("/bin/cat", stdin=True, attached=True), work)
    assert output(told) == sent
    assert found.code == 0


def test_without_input_it_is_empty(bundle):
    async def work(attachment):
        await attachment.send(b"nobody reads this")
        return [piece async for piece in attachment]

    told, found = started(bundle(*shell("cat; echo done"), attached=True), work)
    assert (output(told), found.code) == (b"done\n", 0)


def test_input_that_nobody_reads_holds_its_writer_only(bundle):
    one = bundle(*shell("read x; exec 0<&-; echo $x; sleep 1000"), stdin=True, attached=True)

    async def work(attachment):
        await attachment.send(b"first\n")
        assert await read_until(attachment, b"first\n")
        other = bundle("/bin/sleep", "1000", stdin=True)
        async with open_monitors() as monitors:
            await monitors.start(other.launch)
            async with attach(other.folder) as writer:
                with trio.move_on_after(0.3) as scope:
                    await writer.send(bytes(10 * STDIN_AHEAD))
                assert scope.cancelled_caught
            async with attach(other.folder):  # others are heard
                await kill(other)
                assert (await ended(other.folder)).code == 137
        other.delete()
        await attachment.send(bytes(10 * STDIN_AHEAD))  # it has closed its input: that goes nowhere
        await kill(one)
        return [piece async for piece in attachment]

    _, found = started(one, work)
    assert found.code == 137


def test_a_client_that_comes_later(bundle):
    one = bundle(*shell("echo before; read x; echo got $x; read x; exit 7"), stdin=True)

    async def work(nothing):
        assert nothing is None
        await trio.to_thread.run_sync(until, lambda: b"before" in one.log)
        async with attach(one.folder) as attachment:
            await attachment.send(b"this\n")
            assert await read_until(attachment, b"got this\n") == b"got this\n"
        async with attach(one.folder) as attachment:  # who left changed nothing
            await attachment.send(b"end\n")
            assert [piece async for piece in attachment] == []
            return attachment.outcome

    seen, found = started(one, work)
    assert seen == found
    assert found.code == 7


def test_attaching_where_nothing_runs(bundle):
    one = bundle("/bin/true")

    async def main():
        with pytest.raises(FailedPrecondition):
            async with attach(one.folder):
                pass

    trio.run(main)
    run(one)
    trio.run(main)
    one.delete()


def test_several_clients_have_the_same(bundle):
    one = bundle(*shell("read x; seq 1000; seq 1000 >&2"), stdin=True)
    found = []

    async def work(_):
        async def watch(attachment):
            found.append([piece async for piece in attachment])

        async with (
            attach(one.folder) as first,
            attach(one.folder) as second,
            attach(one.folder) as third,
            trio.open_nursery() as nursery,
        ):
            for attachment in (first, second, third):
                nursery.start_soon(watch, attachment)
            await trio.to_thread.run_sync(until, lambda: one.attached() == 3)
            await first.send(b"go\n")

    started(one, work)
    expected = b"".join(b"%d\n" % n for n in range(1, 1001))
    assert [output(told) for told in found] == [expected] * 3
    assert [output(told, Channel.STDERR) for told in found] == [expected] * 3


def test_a_client_that_stalls_slows_the_container_and_nothing_else(bundle):
    one = bundle(*shell("while :; do echo line; done"), log_limit=1 << 16)

    async def work(_):
        stalled = connected(one)
        with stalled:
            stalled.sendall(frame(ATTACH))
            await trio.to_thread.run_sync(until, one.is_still)
            async with attach(one.folder) as other:  # is taken
                with trio.move_on_after(0.2):
                    async for _piece in other:
                        pass
            watched = trio.Event()

            async def watch():
                await ended(one.folder)
                watched.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await kill(one)
                with trio.fail_after(30):  # the end is noticed, told and written
                    await watched.wait()
            assert outcome(one.folder).code == 137

    started(one, work)
    assert CLIENT_BEHIND < 1 << 20


def test_a_stalled_client_that_leaves_lets_the_container_go_on(bundle):
    one = bundle(*shell("seq 100000; read x </etc/text; exit 5"))

    async def work(_):
        with connected(one) as stalled:
            stalled.sendall(frame(ATTACH))
            await trio.to_thread.run_sync(
                until, lambda: one.is_still() or (one.folder / "exit").exists()
            )

    _, found = started(one, work)
    assert found.code == 5


def test_too_many_clients_are_let_go(bundle):
    one = bundle("/bin/cat", stdin=True)

    async def work(_):
        taken = [connected(one) for _ in range(CLIENTS + 1)]
        for connection in taken:
            connection.sendall(frame(ATTACH))
        await trio.to_thread.run_sync(until, lambda: one.attached() == CLIENTS)
        for connection in taken:
            connection.settimeout(0.01)
        refused = [connection for connection in taken if _is_closed(connection)]
        assert len(refused) == 1
        for connection in taken:
            connection.close()
        await trio.to_thread.run_sync(until, lambda: one.attached() == 0)
        async with attach(one.folder) as attachment:
            await attachment.send(b"heard\n")
            assert await read_until(attachment, b"heard\n")
            await attachment.close_stdin()

    _, found = started(one, work)
    assert found.code == 0


def _is_closed(connection):
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def test_a_terminal(bundle):
    """Its size from the beginning, echo, Ctrl-D, both channels as one, and a new size by SIGWINCH."""
    script = "tty; stty size; echo err >&2; read x; trap 'stty size' WINCH; echo set"
    script += "; while read y; do :; done"
    one = bundle(*shell(script), terminal=True, attached=True, size=(33, 77))

    async def work(attachment):
        told = await read_until(attachment, b"err\r\n")
        assert b"/dev/" in told
        assert b"33 77\r\n" in told
        await attachment.send(b"typed\n")
        assert b"typed\r\n" in await read_until(attachment, b"set\r\n")
        await attachment.resize(20, 50)
        await attachment.send(b"\n")
        assert await read_until(attachment, b"20 50\r\n")
        await attachment.close_stdin()
        return [piece async for piece in attachment]

    _, found = started(one, work)
    assert found.code == 0


def test_ctrl_c_at_a_terminal(bundle):
    script = "trap 'echo caught; exit 9' INT; echo set; while :; do sleep 0.01; done"
    one = bundle(*shell(script), terminal=True, attached=True)

    async def work(attachment):
        await read_until(attachment, b"set")
        await attachment.send(b"\x03")
        return [piece async for piece in attachment]

    told, found = started(one, work)
    assert b"caught" in output(told)
    assert found.code == 9


def test_a_terminal_may_be_closed_and_opened_again(bundle):
    """While nobody has it open, nothing is in a hurry; what is written afterwards is there."""
    script = "exec 0<&- 1>&- 2>&-; sleep 0.3; exec 0</dev/tty 1>/dev/tty 2>&1; echo again"
    one = bundle(*shell(f"echo on; {script}"), terminal=True, attached=True)

    async def work(attachment):
        await read_until(attachment, b"on\r\n")
        told = [piece async for piece in attachment]
        return told

    told, _ = started(one, work)
    assert output(told).endswith(b"again\r\n")


def test_what_is_written_last_is_there(bundle):
    for terminal in (False, True):
        one = bundle(*shell("seq 9000; printf end"), terminal=terminal, attached=True)
        told, _ = run(one)
        assert output(told).replace(b"\r", b"").split() == [*(b"%d" % n for n in range(1, 9001)), b"end"]
        one.delete()


def test_a_background_process_goes_with_the_first(bundle):
    """What it leaves in the background, in a session of its own, is gone with its pid namespace."""
    one = bundle(*shell("setsid sleep 1000 & setsid sh -c 'sleep 1000' & echo begun"), attached=True)
    told, found = run(one)
    assert (output(told), found.code) == (b"begun\n", 0)
    until(lambda: not one.running())
    one.delete()


def test_somebody_outside_who_holds_the_output_open(bundle):
    """The end waits for him a bounded time, and is told."""
    one = bundle(*shell("echo begun; read x; exit 4"), stdin=True, attached=True)

    async def work(attachment):
        await read_until(attachment, b"begun\n")
        held = os.open(f"/proc/{(one.folder / 'pid').read_text()}/fd/1", os.O_WRONLY)
        await attachment.send(b"\n")
        with trio.fail_after(30):
            told = [piece async for piece in attachment]
        os.close(held)
        return told

    _, found = started(one, work)
    assert found.code == 4


def test_a_frame_may_come_in_pieces(bundle):
    one = bundle("/bin/cat", stdin=True)

    async def work(_):
        with connected(one) as connection:
            for byte in frame(ATTACH) + frame(STDIN, b"pieces\n") + frame(STDIN):
                connection.send(bytes([byte]))
            got = b""
            while piece := connection.recv(1000):
                got += piece
        return got

    got, found = started(one, work)
    assert b"pieces\n" in got
    assert found.code == 0
