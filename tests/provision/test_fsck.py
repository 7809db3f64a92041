"""A check of the store knows containers: what they are made of, their children, their folders."""

from pathlib import Path

import pytest

from engine.fsck.findings import What
from engine.kv.schema import CONTAINERS, KIN, SNAPSHOTS
from engine.mount import deactivate_below
from engine.stores import open_stores
from tests.conftest import AMD64
from tests.provision.scene import Bench, Host

pytestmark = pytest.mark.root


def test_a_store_with_containers_is_in_order(bench: Bench) -> None:
    async def work(host: Host) -> None:
        await host.provision("parent", volumes={"/data": bench.name("two")})
        await host.provision("child", parent="parent", readonly=True)
        checked = await host.engine.check()
        assert checked.findings == []
        for name in ("parent", "child"):
            await host.provisioner.destroy("parent")
            assert not await host.provisioner.destroy(name)
        assert (await host.engine.check()).findings == []

    bench.run(work, pulled=("one", "two"))


def test_what_is_missing_is_told_and_mended_where_it_can_be(bench: Bench) -> None:
    async def work(host: Host) -> None:
        for name, parent in (("parent", ""), ("child", "parent"), ("orphan", "child")):
            await host.provision(name, parent=parent)
        broken = (await host.provision("broken")).container
        stray = bench.root / "containers" / "0123456789abcdef"
        (stray / "rootfs").mkdir(parents=True)
        (bench.root / "containers" / "stray").touch()
        deactivate_below(bench.root)
        with host.stores.root.meta.write() as txn:
            KIN.delete(txn, "default", "parent", "child")
            SNAPSHOTS.delete(txn, "overlay", "default", f"container-{broken.unique}")
            child = CONTAINERS.get(txn, "default", "child")
            CONTAINERS.delete(txn, "default", "child")
        found = [(one.what, one.name) for one in (await host.engine.check()).findings]
        assert (What.CONTAINER, "broken") in found
        assert (What.CONTAINER, "orphan") in found
        assert (What.FOLDER, "containers/0123456789abcdef") in found
        assert (What.FOLDER, "containers/stray") in found
        assert child is not None
        with host.stores.root.meta.write() as txn:
            CONTAINERS.put(txn, child, "default", "child")
        checked = await host.engine.check(repair=True)
        done = {(one.what, one.name): one.done for one in checked.findings if one.done}
        assert done[What.CONTAINER, "child"] == "noted"
        assert done[What.FOLDER, "containers/0123456789abcdef"] == "removed"
        assert not stray.exists()
        assert host.stores.containers.children("parent") == ["child"]
        for name in ("broken", "parent"):
            assert await host.provisioner.destroy(name)
        (bench.root / "containers" / "stray").unlink()

    bench.run(work)


def test_a_store_from_before_there_were_containers_can_be_read(tmp_path: Path) -> None:
    with open_stores(tmp_path / "root", "default", AMD64) as stores, stores.root.meta.write() as txn:
        for table in ("containers", "kin"):
            txn.raw.drop(txn.databases[table])
    with open_stores(tmp_path / "root", "default", AMD64, readonly=True) as stores:
        assert stores.containers.walk() == []
        assert stores.containers.damaged() == []
        assert stores.containers.find("c") is None
        assert stores.containers.children("c") == []
        assert stores.namespaces.walk() == []
        assert stores.mounting.walk() == []
