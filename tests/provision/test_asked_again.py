"""A container that is asked for again while somebody mends it, removes it, or has left it half made."""

import threading
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from engine.kv.schema import CONTAINERS
from engine.metadata.containers import ContainerState
from engine.mount import deactivate
from engine.mounts.table import is_mounted
from engine.provision import provisioner, rootfs
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
