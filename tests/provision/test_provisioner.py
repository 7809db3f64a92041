"""Root file systems of containers: made once, held, measured, and gone without a trace."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.app import Engine
from engine.errors import AlreadyExists, EngineError, FailedPrecondition, InvalidArgument, NotFound
from engine.explaining import explain_store
from engine.failpoints import armed
from engine.kv.schema import CONTAINERS
from engine.metadata.containers import ContainerState
from engine.mount import Mount, activate, deactivate
from engine.mounts.table import is_mounted
from engine.provision.provisioned import Recovered
from engine.provision.provisioner import Provisioner
from engine.stores import open_stores
from engine.testing.archives import archive, member
from engine.unpack.workshop import open_workshop
from tests.conftest import AMD64
from tests.provision.scene import (
    BASE,
    Bench,
    Host,
    assert_nothing_left,
    mounted_below,
    reboot,
)

pytestmark = pytest.mark.root


def test_bk_07_18_mc_15_a_container_has_a_root_that_is_its_own(bench: Bench) -> None:
    """BK-07, BK-18, BK-43 and MC-15: two layers, writable, and what is written changes no layer."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        assert (made.rootfs / "etc/name").read_text() == "base\n"
        (made.rootfs / "etc/name").write_text("changed\n")
        (made.rootfs / "new").write_bytes(b"x" * 100_000)
        assert json.loads(made.config)["author"] == "one"
        upper, work_folder = made.grows
        assert (upper / "new").stat().st_size == 100_000
        assert work_folder.name == "work"
        other = await host.provision("d")
        assert (other.rootfs / "etc/name").read_text() == "base\n"
        assert not (other.rootfs / "new").exists()
        usage = await host.provisioner.usage("c")
        assert usage["/"].size >= 100_000
        assert usage["/"].inodes >= 2
        record = await host.provisioner.status("c")
        assert record == made.container
        assert record.state == ContainerState.PROVISIONED
        assert record.since[ContainerState.PROVISIONING] <= record.since[ContainerState.PROVISIONED]
        assert [one.id for one in await host.provisioner.walk()] == ["c", "d"]
        assert await host.provisioner.destroy("c")
        assert not made.folder.exists()
        assert (other.rootfs / "own").read_text() == "one\n"
        assert await host.provisioner.destroy("d")
        assert not await host.provisioner.destroy("d")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_the_same_is_given_again_and_anything_else_refused(bench: Bench) -> None:
    async def work(host: Host) -> None:
        first = await host.provision("c", volumes={"/data": bench.name("two")})
        assert await host.provision("c", volumes={"/data": bench.name("two")}) == first
        others: list[dict[str, Any]] = [
            {"tag": "two"},
            {"volumes": {}},
            {"volumes": {"/other": bench.name("two")}},
            {"readonly": True},
            {"parent": "p"},
            {"snapshotter": "copy"},
        ]
        for other in others:
            with pytest.raises(AlreadyExists):
                await host.provision("c", **{"volumes": {"/data": bench.name("two")}, **other})
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("one", "two"))


def test_callers_at_once_get_one_root(bench: Bench) -> None:
    async def work(host: Host) -> None:
        found: list[Any] = []

        async def one() -> None:
            found.append(await host.provision("c", client=host.client))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert len({made.container.unique for made in found}) == 1
        assert len(mounted_below(bench.root)) == 1
        await host.provisioner.destroy("c")

    bench.run(work, pulled=())


def test_what_is_not_here_is_pulled_and_unpacked_if_there_is_a_client(bench: Bench) -> None:
    async def work(host: Host) -> None:
        with pytest.raises(NotFound):
            await host.provision("c")
        assert_nothing_left(host.stores)
        made = await host.provision("c", client=host.client)
        assert (made.rootfs / "own").read_text() == "one\n"
        await host.engine.pull(bench.name("two"), host.client)
        unpacked = await host.provision("d", "two")
        assert (unpacked.rootfs / "own").read_text() == "two\n"
        for name in "cd":
            await host.provisioner.destroy(name)
        assert_nothing_left(host.stores)

    bench.run(work, pulled=())


def test_bk_17_volumes_are_images_beside_the_root(bench: Bench) -> None:
    """Read-only, by the path in the container; all are provisioned or none is."""

    async def work(host: Host) -> None:
        made = await host.provision(
            "c", volumes={"/data": bench.name("two"), "/again": bench.name("one")}
        )
        assert (made.volumes["/data"] / "own").read_text() == "two\n"
        assert (made.volumes["/again"] / "own").read_text() == "one\n"
        with pytest.raises(OSError, match="Read-only"):
            (made.volumes["/data"] / "new").touch()
        assert set(await host.provisioner.usage("c")) == {"/", "/again", "/data"}
        await host.provisioner.destroy("c")
        with pytest.raises(NotFound) as error:
            await host.provision("c", volumes={"/a": bench.name("none"), "/b": bench.name("nil")})
        assert "a:none" in str(error.value)
        assert "a:nil" in str(error.value)
        for path in ("data", "/", "/a/../b", "/a/"):
            with pytest.raises(InvalidArgument):
                await host.provision("c", volumes={path: bench.name("two")})
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("one", "two"))


def test_a_read_only_root_takes_nothing(bench: Bench) -> None:
    async def work(host: Host) -> None:
        made = await host.provision("c", readonly=True)
        with pytest.raises(OSError, match="Read-only"):
            (made.rootfs / "new").touch()
        assert made.grows == ()
        deactivate(made.rootfs)
        await host.engine.collect()  # it has vanished, and is a container's all the same
        recovered = await host.provisioner.recover(["c"])
        assert recovered.kept == ["c"]
        assert (made.rootfs / "own").read_text() == "one\n"
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_mc_08_ms_35_a_container_is_what_its_image_was(bench: Bench) -> None:
    """No tag that moves or goes takes anything away, the config included."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        bench.serve("one", archive(member("other", data=b"other\n")))
        await host.pull("one")
        await host.engine.collect()
        assert await host.provision("c") == made
        await host.engine.remove_image(bench.name("one"), collect=True)
        assert (await host.provision("c")).config == made.config
        assert (made.rootfs / "own").read_text() == "one\n"
        holders = {str(one.holder.node.kind): one.holder for one in explain_store(host.stores).held}
        assert "containers" in holders
        await host.provisioner.destroy("c")
        await host.engine.collect()
        with host.stores.root.meta.read() as txn:
            assert not CONTAINERS.any(txn)
        assert [info for backend in host.stores.snapshotters() for info in backend.walk()] == []

    bench.run(work)


def test_an_empty_image_gives_an_empty_root(bench: Bench) -> None:
    bench.serve("empty")

    async def work(host: Host) -> None:
        made = await host.provision("c", "empty")
        assert os.listdir(made.rootfs) == []
        (made.rootfs / "new").touch()
        assert (made.grows[0] / "new").exists()
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("empty",))


def test_mc_06_07_bk_10_11_children_go_before_their_parent(bench: Bench) -> None:
    """What fails stays, is counted, and is tried again."""
    stuck = {"child"}
    ended: list[str] = []

    async def stop(container: Any) -> None:
        if container.id in stuck:
            raise EngineError(f"{container.id} does not end")
        ended.append(container.id)

    async def work(host: Host) -> None:
        await host.provision("parent")
        await host.provision("child", parent="parent")
        await host.provision("grandchild", parent="child")
        with pytest.raises(NotFound):
            await host.provision("orphan", parent="nobody")
        with pytest.raises(EngineError, match="child does not end"):
            await host.provisioner.destroy("parent")
        assert ended == ["grandchild"]
        for name in ("parent", "child"):
            record = await host.provisioner.status(name)
            assert (record.state, record.errors) == (ContainerState.DESTROYING, 1)
            assert record.error == "child does not end"
        assert is_mounted(host.stores.root.path / "containers" / record.unique / "rootfs")
        with pytest.raises(FailedPrecondition):
            await host.provision("late", parent="parent")
        with pytest.raises(FailedPrecondition):
            await host.provision("parent")
        stuck.clear()
        recovered = await host.provisioner.recover(["parent", "child"])
        assert sorted(recovered.destroyed) == ["child", "parent"]
        assert ended == ["grandchild", "child", "parent"]
        assert_nothing_left(host.stores)

    bench.run(work, stop=stop)


def test_mc_05_bk_10_who_destroys_at_once_gets_one_answer(bench: Bench) -> None:
    """Joined, and not cancelled with the one who asked first."""
    going, may_go = trio.Event(), trio.Event()
    calls: list[str] = []

    async def stop(container: Any) -> None:
        calls.append(container.id)
        going.set()
        await may_go.wait()
        if len(calls) == 1:
            raise EngineError("not yet")

    async def work(host: Host) -> None:
        await host.provision("c")
        answers: list[Any] = []

        async def destroy() -> None:
            try:
                answers.append(await host.provisioner.destroy("c"))
            except EngineError as error:
                answers.append(str(error))

        begun: list[str] = []
        removing = host.stores.provisions.removing

        def counted(name: str, **options: Any) -> Any:
            found = removing(name, **options)
            begun.append(name)
            return found

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(host.stores.provisions, "removing", counted)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(destroy)
                await going.wait()
                for _ in range(3):
                    nursery.start_soon(destroy)
                while len(begun) < 4:  # noqa: ASYNC110  threads count
                    await trio.sleep(0.001)
                may_go.set()
        assert answers == ["not yet"] * 4
        assert calls == ["c"]
        with trio.CancelScope() as scope:
            scope.cancel()
            await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work, stop=stop)


def test_mc_03_04_bk_08_destroying_cancels_what_is_being_made(bench: Bench) -> None:
    """The maker is told, and what he made goes once he is done."""
    begun, may_go = trio.Event(), trio.Event()

    async def work(host: Host) -> None:
        errors: list[BaseException] = []

        async def make() -> None:
            try:
                await host.provision("c", client=host.client, report=lambda *_: begun.set())
            except EngineError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            await begun.wait()
            assert await host.provisioner.destroy("c")
            may_go.set()
        (error,) = errors
        assert isinstance(error, FailedPrecondition)
        assert "removed while it was being made" in str(error)
        await host.engine.collect()
        assert_nothing_left(host.stores)

    bench.run(work, pulled=())


@pytest.mark.parametrize("where", ["recorded", "held", "prepared", "mounted"])
def test_bk_09_what_fails_leaves_nothing(bench: Bench, where: str) -> None:
    async def work(host: Host) -> None:
        with armed(f"provision.{where}", "enospc"), pytest.raises((OSError, EngineError)):
            await host.provision("c", volumes={"/data": bench.name("two")})
        await host.provisioner.recover()
        assert_nothing_left(host.stores)
        await host.provision("c")
        await host.provisioner.destroy("c")

    bench.run(work, pulled=("one", "two"))


@pytest.mark.parametrize("where", ["unmounted", "discarded", "emptied"])
def test_bk_11_what_could_not_be_removed_is_tried_again(bench: Bench, where: str) -> None:
    """Nothing is forgotten before it is gone."""

    async def work(host: Host) -> None:
        await host.provision("c", volumes={"/data": bench.name("two")})
        with armed(f"destroy.{where}", "error"), pytest.raises(EngineError, match="failpoint"):
            await host.provisioner.destroy("c")
        record = await host.provisioner.status("c")
        assert (record.state, record.errors, record.error) == (
            ContainerState.DESTROYING,
            1,
            f"failpoint destroy.{where}",
        )
        await host.engine.remove_image(bench.name("one"), collect=True)
        assert host.stores.references.walk()  # held to the last step
        assert await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("one", "two"))


def test_a_file_that_is_open_holds_up_nothing(bench: Bench) -> None:
    """BK-44 (MESOS-9196)."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        with (made.rootfs / "own").open() as opened, (made.rootfs / "new").open("w+") as written:
            written.write("still here")
            here = os.open(made.rootfs, os.O_RDONLY)
            assert await host.provisioner.destroy("c")
            assert opened.read() == "one\n"
            written.seek(0)
            assert written.read() == "still here"
            os.close(here)
        assert_nothing_left(host.stores)

    bench.run(work)


def test_what_is_mounted_within_goes_too(bench: Bench, tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        made = await host.provision("c")
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").touch()
        (made.rootfs / "mnt").mkdir()
        activate([Mount(type="bind", source=str(precious), options=["bind"])], made.rootfs / "mnt")
        assert await host.provisioner.destroy("c")
        assert (precious / "file").exists()
        assert_nothing_left(host.stores)

    bench.run(work)


def test_bk_12_a_backend_that_is_gone_is_no_reason_to_guess(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:

    async def work(host: Host) -> None:
        made = await host.provision("c")
        with monkeypatch.context() as patched:

            def gone(_name: str) -> Any:
                raise InvalidArgument("no snapshotter overlay")

            patched.setattr(host.stores, "snapshotter", gone)
            with pytest.raises(InvalidArgument, match="no snapshotter"):
                await host.provisioner.destroy("c")
            assert is_mounted(made.rootfs)
            assert (await host.provisioner.recover(())).failed == {"c": "no snapshotter overlay"}
        assert await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_mc_10_bk_15_after_a_reboot_the_known_are_mounted_again(bench: Bench) -> None:
    """With what they wrote; what ran does not any more."""

    async def work(host: Host) -> None:
        made = {name: await host.provision(name) for name in ("kept", "gone", "ran")}
        volume = await host.provision("volume", volumes={"/data": bench.name("two")}, readonly=True)
        (made["kept"].rootfs / "new").write_text("written\n")
        containers = host.stores.containers
        record = made["ran"].container
        for state in (ContainerState.PREPARING, ContainerState.STARTING, ContainerState.RUNNING):
            record = containers.move(record, state, pid=1)
        reboot(host.stores)
        assert mounted_below(bench.root) == []
        await host.engine.collect()
        recovered = await host.provisioner.recover(["kept", "ran", "volume"])
        assert sorted(recovered.kept) == ["kept", "ran", "volume"]
        assert recovered.destroyed == ["gone"]
        assert recovered.failed == {}
        assert (made["kept"].rootfs / "new").read_text() == "written\n"
        assert (volume.volumes["/data"] / "own").read_text() == "two\n"
        ran = await host.provisioner.status("ran")
        assert (ran.state, ran.pid, ran.exit_code) == (ContainerState.STOPPED, 0, None)
        again = await host.provisioner.recover(["kept", "ran", "volume"])
        assert (sorted(again.kept), again.destroyed) == (["kept", "ran", "volume"], [])
        assert len(mounted_below(bench.root)) == 4
        await host.provisioner.recover(())
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("one", "two"))


def test_bk_15_16_recovering_takes_children_before_parents(bench: Bench) -> None:
    """BK-15, BK-16 (ROOT_RecoverNestedOnReboot): whichever is met first; one has lost its parent."""

    async def work(host: Host) -> None:
        for container, parent in (("a", ""), ("b", "a"), ("c", "b"), ("z", ""), ("y", "z")):
            await host.provision(container, parent=parent)
        reboot(host.stores)
        with host.stores.root.meta.write() as txn:
            CONTAINERS.delete(txn, "default", "z")
        recovered = await host.provisioner.recover(["y"])
        assert (recovered.kept, sorted(recovered.destroyed)) == (["y"], ["a", "b", "c"])
        await host.provisioner.recover(())
        await host.provisioner.recover(())
        assert os.listdir(bench.root / "containers") == []

    bench.run(work)


def test_bk_11_15_what_nobody_knows_in_the_folder_of_containers(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders of containers that are gone go; anything else is told, and stays."""

    async def work(host: Host) -> None:
        await host.provision("c")
        folders = bench.root / "containers"
        (folders / "stray").touch()
        (folders / "0123456789abcdef" / "rootfs").mkdir(parents=True)
        recovered = await host.provisioner.recover(["c"])
        assert recovered.kept == ["c"]
        assert sorted(os.listdir(folders)) == sorted(
            [(await host.provisioner.status("c")).unique, "stray"]
        )
        assert "stray is nothing of lamina's" in caplog.text
        (folders / "stray").unlink()
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_mc_12_an_ephemeral_container_does_not_outlast_a_restart(bench: Bench) -> None:

    async def work(host: Host) -> None:
        await host.provision("c", labels={"lamina.container/ephemeral": "yes"})
        assert (await host.provisioner.recover()).kept == ["c"]
        assert (await host.provisioner.recover(["c"])).destroyed == ["c"]
        assert_nothing_left(host.stores)

    bench.run(work)


def test_ms_30_31_34_38_mc_09_pruning_takes_what_nobody_uses(bench: Bench) -> None:

    async def work(host: Host) -> None:
        await host.provision("c")
        for bad in ("not a name", "a:b:c"):
            with pytest.raises(InvalidArgument):
                await host.provisioner.prune([bench.name("two"), bad])
        assert len(host.stores.images.walk()) == 3
        with host.stores.root.meta.write() as txn:
            key = next(iter(txn.raw.cursor(db=txn.databases["containers"])))[0]
            raw = bytes(txn.raw.get(key, db=txn.databases["containers"]) or b"")
            txn.raw.put(bytes(key), b"\xc1", db=txn.databases["containers"])
        with pytest.raises(FailedPrecondition, match="nobody knows"):
            await host.provisioner.prune()
        assert list((await host.provisioner.recover(["c"])).failed) == ["c"]
        with host.stores.root.meta.write() as txn:
            txn.raw.put(bytes(key), raw, db=txn.databases["containers"])
        collected = await host.provisioner.prune([bench.name("two")])
        assert [image.name for image in host.stores.images.walk()] == [
            bench.name("one"),
            bench.name("two"),
        ]
        assert collected.blob_bytes > 0
        assert len(collected.blobs) == 3
        await host.provisioner.destroy("c")
        collected = await host.provisioner.prune()
        assert collected.snapshots
        assert host.stores.images.walk() == []

    bench.serve("three", archive(member("three", data=b"3" * 1000)))
    bench.run(work, pulled=("one", "two", "three"))


def test_what_may_be_changed_of_a_container(bench: Bench) -> None:
    async def work(host: Host) -> None:
        await host.provision("c", labels={"a": "1", "b": "2"})
        record = await host.provisioner.update("c", labels={"a": "", "c": "3"})
        assert record.labels == {"b": "2", "c": "3"}
        assert (await host.provision("c")).container == record
        await host.provisioner.destroy("c")
        with pytest.raises(NotFound):
            await host.provisioner.update("c", labels={"a": "1"})

    bench.run(work)


def test_no_other_command_takes_what_is_a_containers(bench: Bench) -> None:
    async def work(host: Host) -> None:
        made = await host.provision("c")
        key = f"container-{made.container.unique}"
        stores = host.stores
        (record,) = stores.mounting.walk()
        assert (record.key, record.container, record.state) == (key, "c", "mounted")
        for what in (
            lambda: stores.umount(made.rootfs),
            lambda: stores.release(key),
        ):
            with pytest.raises(FailedPrecondition, match=r"lamina rm c|mounted"):
                what()
        removal = stores.remove_snapshots([(stores.snapshotter("overlay"), key)])
        assert "lamina rm c" in str(removal.failed)
        with pytest.raises(FailedPrecondition, match="containers"):
            stores.namespaces.remove("default")
        with pytest.raises(InvalidArgument):
            stores.references.take("container/c", "sha256:0", "sha256:0")
        stores.references.retain([], delay_s=0)
        assert [held.owner for held in stores.references.walk()] == ["container/c"]
        reboot(stores)
        assert [record.state for record in stores.mounting.walk()] == ["kept"]
        removal = stores.remove_snapshots([(stores.snapshotter("overlay"), key)])
        assert "lamina rm c" in str(removal.failed)
        await host.provisioner.destroy("c")
        assert_nothing_left(stores)

    bench.run(work)


def test_limits_of_a_backend_are_told_before_anything_is_made(bench: Bench) -> None:
    layers = [archive(member(f"f{number}")) for number in range(3)]
    bench.serve("many", BASE, *layers)

    async def work(host: Host) -> None:
        backend = host.stores.snapshotter("overlay")
        few = type(backend.capabilities)(rebase=True, layers=3, name_bytes=255, whiteout_names=True)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(backend), "capabilities", few)
            with pytest.raises(FailedPrecondition, match="at most 3 layers"):
                await host.provision("c", "many")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("many",))


def test_bk_08_who_leaves_while_it_is_made_leaves_nothing(bench: Bench) -> None:
    """What was pulled stays for the next pull, as of any; of the container there is nothing."""

    async def work(host: Host) -> None:
        with trio.CancelScope() as scope:
            await host.provision("c", client=host.client, report=lambda *_: scope.cancel())
        assert scope.cancelled_caught
        assert await host.provisioner.walk() == []
        await host.engine.collect()
        assert_nothing_left(host.stores)

    bench.run(work, pulled=())


def test_ms_29_bk_13_pruning_goes_together_with_pulls_and_provisions(bench: Bench) -> None:
    """Whoever has begun has his image whole, whatever is pruned meanwhile."""

    async def work(host: Host) -> None:
        done = trio.Event()
        rounds = 0

        async def prune() -> None:
            nonlocal rounds
            while not done.is_set():
                await host.provisioner.prune()
                rounds += 1

        async def live(container: str, tag: str) -> None:
            for _ in range(3):
                made = await host.provision(container, tag, client=host.client)
                assert (made.rootfs / "own").read_text() == f"{tag}\n"
                await host.provisioner.destroy(container)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prune)
            async with trio.open_nursery() as living:
                for container, tag in (("a", "one"), ("b", "two"), ("c", "one")):
                    living.start_soon(live, container, tag)
            done.set()
        assert rounds
        await host.provisioner.prune()
        assert host.stores.images.walk() == []
        assert_nothing_left(host.stores)

    bench.run(work, pulled=())


def test_the_containers_of_another_namespace_are_not_known_here(bench: Bench) -> None:
    async def work(host: Host) -> None:
        made = await host.provision("c")
        with open_stores(bench.root, "other", AMD64) as stores:
            async with open_workshop(stores.root) as workshop:
                other = Provisioner(Engine(stores, workshop))
                assert await other.recover(()) == Recovered(kept=[], destroyed=[])
                assert not await other.destroy("c")
        assert (made.rootfs / "own").read_text() == "one\n"
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_what_another_writes_to_is_not_mounted_twice(bench: Bench, tmp_path: Path) -> None:
    """Of this boot, mounted where this process does not see it: two would ruin each other's files."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        (tmp_path / "elsewhere").mkdir()
        activate(made.mounts, tmp_path / "elsewhere")
        deactivate(made.rootfs)
        try:
            recovered = await host.provisioner.recover(["c"])
            assert "still mounted" in recovered.failed["c"]
            assert not is_mounted(made.rootfs)
        finally:
            deactivate(tmp_path / "elsewhere")
        assert (await host.provisioner.recover(["c"])).kept == ["c"]
        assert await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_what_may_run_is_not_removed_by_who_cannot_stop_it(bench: Bench) -> None:
    async def work(host: Host) -> None:
        record = (await host.provision("c")).container
        containers = host.stores.containers
        for state in (ContainerState.PREPARING, ContainerState.STARTING, ContainerState.RUNNING):
            record = containers.move(record, state)
        with pytest.raises(FailedPrecondition, match="may be running"):
            await host.provisioner.destroy("c")
        assert (await host.provisioner.status("c")).state == ContainerState.RUNNING
        with pytest.raises(FailedPrecondition, match="cannot become"):
            containers.move(record, ContainerState.PROVISIONED)
        containers.move(record, ContainerState.STOPPED)
        assert await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work)
