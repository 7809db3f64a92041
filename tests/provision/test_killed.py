"""Who is killed while it makes, mends or removes a container leaves what the next to come puts in order.

And several processes that work on one container at once.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.errors import EngineError, FailedPrecondition
from engine.mount import deactivate
from tests.provision.scene import Bench, Host, assert_nothing_left, mounted_below, reboot, several_looks

pytestmark = [pytest.mark.root, pytest.mark.crash]

_CHILD = """
import sys
import trio
from engine import failpoints
from engine.app import open_engine
from engine.provision.provisioner import Provisioner
from engine.registry.client import Access, open_client
from tests.conftest import AMD64
from tests.registry.asking import QUICK

async def main(root, one, two, what, terms):
    access = Access(patience=QUICK)
    async with open_engine(root, platform=AMD64) as engine, open_client(access) as client:
        provisioner = Provisioner(engine)

        async def provision():
            volumes = {"/data": two}
            await provisioner.provision("c", one, volumes=volumes, snapshotter="overlay", client=client)

        if what != "restore":
            if "destroy" not in terms:
                failpoints.arm(terms)
            await provision()
        if what == "stay":
            print("ready", flush=True)
            await trio.sleep_forever()
        failpoints.arm(terms)
        if what == "restore":
            await provisioner.recover(["c"])
        else:
            await provisioner.destroy("c")

trio.run(main, *sys.argv[1:])
"""

_MAKING = [
    "provision.recorded",
    "provision.brought",
    "provision.held",
    "provision.prepared",
    "provision.mounted",
    "provision.settled",
]
_REMOVING = ["destroy.recorded", "destroy.unmounted", "destroy.discarded", "destroy.emptied"]


def _killed(bench: Bench, what: str, terms: str) -> None:
    words = [str(bench.root), bench.name("one"), bench.name("two"), what, terms]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def _started(words: Sequence[object]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _CHILD, *map(str, words)]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def _is_stopped(child: subprocess.Popen[str]) -> bool:
    assert child.poll() is None
    # proc(5): after the name comes the state, T for one that a signal stopped.
    stat = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8", errors="replace")
    return stat.rpartition(") ")[2].startswith("T")


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("where", [*_MAKING, *_REMOVING, "provision.prepared@2", "provision.mounted@2"])
def test_bk_14_whoever_is_killed_leaves_what_can_be_put_in_order(
    bench: Bench, where: str, is_known: bool
) -> None:
    """A container is there whole and mounted, or it is gone with all that there was of it."""
    name, _, nth = where.partition("@")
    is_pulled = where != "provision.brought"

    async def before(host: Host) -> None:
        pass

    async def after(host: Host) -> None:
        await host.engine.collect()  # of whoever comes first; it takes nothing of a container
        recovered = await host.provisioner.recover(["c"] if is_known else ())
        assert recovered.failed == {}
        if is_known and where == "provision.settled":
            made = await host.provision("c", volumes={"/data": bench.name("two")})
            assert (made.rootfs / "own").read_text() == "one\n"
            assert (made.volumes["/data"] / "own").read_text() == "two\n"
            assert await host.provisioner.destroy("c")
        await host.engine.collect()
        assert_nothing_left(host.stores)
        again = await host.provision("c", client=host.client)
        assert (again.rootfs / "own").read_text() == "one\n"
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(before, pulled=("one", "two") if is_pulled else ())
    _killed(bench, "destroy", f"{name}=kill@{nth or 1}")
    bench.run(after, pulled=())


@pytest.mark.parametrize("where", ["restore.held", "restore.mounted"])
@pytest.mark.parametrize("boots", [True, False])
def test_mounting_again_is_begun_again(bench: Bench, where: str, boots: bool) -> None:
    async def before(host: Host) -> None:
        made = await host.provision("c", volumes={"/data": bench.name("two")})
        (made.rootfs / "new").write_text("written\n")
        if boots:
            reboot(host.stores)
        else:
            deactivate(made.rootfs)
            deactivate(made.volumes["/data"])

    async def after(host: Host) -> None:
        recovered = await host.provisioner.recover(["c"])
        assert (recovered.kept, recovered.failed) == (["c"], {})
        made = await host.provision("c", volumes={"/data": bench.name("two")})
        assert (made.rootfs / "new").read_text() == "written\n"
        assert len(mounted_below(bench.root)) == 2
        await host.provisioner.recover(())
        await host.engine.collect()
        assert_nothing_left(host.stores)

    bench.run(before, pulled=("one", "two"))
    _killed(bench, "restore", f"{where}=kill")
    bench.run(after, pulled=())


def test_two_processes_make_one_container(bench: Bench) -> None:
    """The second waits for the first; when that is killed, it makes it itself."""

    async def before(host: Host) -> None:
        pass

    async def both(host: Host) -> None:
        words = [bench.root, bench.name("one"), bench.name("two"), "stay", "provision.mounted=stop"]
        child = _started(words)
        try:
            while not _is_stopped(child):  # noqa: ASYNC110  another process gets there
                await trio.sleep(0.001)
            assert len(mounted_below(bench.root)) == 1
            async with trio.open_nursery() as nursery:
                made: list[Any] = []

                async def provision() -> None:
                    volumes = {"/data": bench.name("two")}
                    made.append(await host.provision("c", volumes=volumes))

                nursery.start_soon(provision)
                await several_looks(host.stores)
                assert not made
                child.kill()
                child.wait()
            assert (made[0].rootfs / "own").read_text() == "one\n"
        finally:
            child.kill()
            child.communicate()
        await host.provisioner.destroy("c")
        await host.engine.collect()  # what the other held for single steps
        assert_nothing_left(host.stores)

    bench.run(before, pulled=("one", "two"))
    bench.run(both, pulled=())


def test_another_process_is_given_what_is_there(bench: Bench) -> None:
    async def before(host: Host) -> None:
        pass

    async def both(host: Host) -> None:
        words = [bench.root, bench.name("one"), bench.name("two"), "stay", ""]
        child = _started(words)
        try:
            assert child.stdout is not None
            assert await trio.to_thread.run_sync(child.stdout.readline) == "ready\n"
            made = await host.provision("c", volumes={"/data": bench.name("two")})
            assert (made.rootfs / "own").read_text() == "one\n"
            assert (await host.provisioner.recover(["c"])).kept == ["c"]
            assert await host.provisioner.destroy("c")
            assert_nothing_left(host.stores)
        finally:
            child.kill()
            child.communicate()

    bench.run(before, pulled=("one", "two"))
    bench.run(both, pulled=())


def test_mc_03_bk_08_destroying_ends_what_another_process_makes(bench: Bench) -> None:
    """It finds its record moved, and removes what it made, before the answer is given."""

    async def before(host: Host) -> None:
        pass

    async def both(host: Host) -> None:
        words = [bench.root, bench.name("one"), bench.name("two"), "stay", "provision.mounted=stop"]
        child = _started(words)
        try:
            while not _is_stopped(child):  # noqa: ASYNC110  another process gets there
                await trio.sleep(0.001)
            assert len(mounted_below(bench.root)) == 1
            async with trio.open_nursery() as nursery:
                gone: list[bool] = []

                async def destroy() -> None:
                    gone.append(await host.provisioner.destroy("c"))

                nursery.start_soon(destroy)
                await several_looks(host.stores)
                assert not gone, "removed while it is being made"
                assert len(mounted_below(bench.root)) == 1
                with pytest.raises((FailedPrecondition, EngineError)):
                    await host.provision("c", volumes={"/data": bench.name("two")})
                child.send_signal(signal.SIGCONT)
            assert gone == [True]
            _, messages = await trio.to_thread.run_sync(child.communicate)
            assert "was removed while it was being made" in messages
        finally:
            child.kill()
            child.communicate()
        assert_nothing_left(host.stores)

    bench.run(before, pulled=("one", "two"))
    bench.run(both, pulled=())
