"""A container that somebody else makes, mends, removes or has left half made while one asks for it."""

import threading
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from engine.kv.schema import CONTAINERS
from engine.metadata.containers import ContainerState, ContainerStore
from engine.mount import deactivate
from engine.mounts.table import is_mounted
from engine.provision import provisioner, rootfs
from engine.provision.destroying import Destroyer
from tests.provision.scene import Bench, Host

pytestmark = pytest.mark.root

_PATIENCE_S = 20


def test_mc_08_who_asks_while_another_mounts_it_again_gets_it_mounted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is given again, whole, whoever mends it."""
    held, may_go_on = threading.Event(), threading.Event()
    rest = provisioner.rest

    def hit(name: str) -> None:
        if name == "restore.held":
            held.set()
            assert may_go_on.wait(_PATIENCE_S)

    async def rested(pause: float) -> float:
        may_go_on.set()
        return await rest(pause)

    async def work(host: Host) -> None:
        made = await host.provision("c")
        deactivate(made.rootfs)
        monkeypatch.setattr(rootfs, "hit", hit)
        monkeypatch.setattr(provisioner, "rest", rested)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(host.provision, "c")
                assert await trio.to_thread.run_sync(held.wait, _PATIENCE_S)
                assert is_mounted((await host.provision("c")).rootfs)
                may_go_on.set()
        finally:
            may_go_on.set()
        await host.provisioner.destroy("c")

    bench.run(work)


def test_one_that_goes_just_then_is_made_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(host: Host) -> None:
        made = await host.provision("c")
        mend = host.provisioner._mender.mend

        def meddled(containers: Any) -> Any:
            monkeypatch.undo()
            trio.from_thread.run(host.provisioner.destroy, "c")
            return mend(containers)

        monkeypatch.setattr(host.provisioner._mender, "mend", meddled)
        again = await host.provision("c")
        assert again.container.unique != made.container.unique
        assert is_mounted(again.rootfs)
        await host.provisioner.destroy("c")

    bench.run(work)


def test_mc_12_what_was_left_half_made_is_in_nobodys_way(bench: Bench) -> None:
    """Whoever was making it is dead, so it need not be what is asked for."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        with host.stores.root.meta.write() as txn:
            state = str(ContainerState.PROVISIONING)
            half = replace(made.container, state=state, lease="of someone dead")
            CONTAINERS.put(txn, half, "default", "c")
        other = await host.provision("c", "two")
        assert (other.rootfs / "own").read_text() == "two\n"
        await host.provisioner.destroy("c")

    bench.run(work, pulled=("one", "two"))


def test_recovering_leaves_what_was_finished_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MC-12: seen half made, and made by the time that it is looked who makes it."""
    made, seen = threading.Event(), threading.Event()
    walk = ContainerStore.walk

    def hit(name: str) -> None:
        if name == "provision.mounted":
            made.set()
            assert seen.wait(_PATIENCE_S)

    async def work(host: Host) -> None:
        is_done = trio.Event()

        async def provision() -> None:
            await host.provision("c")
            is_done.set()

        def walked(self: ContainerStore) -> Any:
            found = walk(self)
            monkeypatch.setattr(ContainerStore, "walk", walk)
            seen.set()
            trio.from_thread.run(is_done.wait)
            return found

        monkeypatch.setattr(rootfs, "hit", hit)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provision)
            assert await trio.to_thread.run_sync(made.wait, _PATIENCE_S)
            monkeypatch.setattr(ContainerStore, "walk", walked)
            recovered = await host.provisioner.recover()
        assert (recovered.kept, recovered.destroyed, recovered.failed) == (["c"], [], {})
        assert (await host.provisioner.status("c")).state == ContainerState.PROVISIONED
        await host.provisioner.destroy("c")

    bench.run(work)


def test_two_who_find_the_same_half_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """MC-12: the later does not remove what the first has made instead."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        with host.stores.root.meta.write() as txn:
            state = str(ContainerState.PROVISIONING)
            half = replace(made.container, state=state, lease="of someone dead")
            CONTAINERS.put(txn, half, "default", "c")
        destroy = Destroyer.destroy
        firsts: list[str] = []

        async def later(*arguments: Any, **options: Any) -> bool:
            monkeypatch.setattr(Destroyer, "destroy", destroy)
            firsts.append((await host.provision("c")).container.unique)
            return await destroy(*arguments, **options)

        monkeypatch.setattr(Destroyer, "destroy", later)
        assert [(await host.provision("c")).container.unique] == firsts
        await host.provisioner.destroy("c")

    bench.run(work)
