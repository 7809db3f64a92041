"""Images held for owners: counted as sets, gone after a delay, through every race and restart."""

import logging
from functools import partial
from typing import Any

import pytest
import trio

from engine import errors, labels
from engine.errors import (
    EngineError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Refused,
    Unavailable,
    is_recoverable,
)
from engine.explaining import explain_store
from engine.failpoints import armed
from engine.gc.policy import Policy
from engine.images.admitting import Admission
from engine.images.coordinating import Coordinator
from engine.registry.client import Access, open_client
from engine.registry.credentials import Credential
from engine.testing.fake_registry import reset, respond, response, stall
from tests.holding.scene import DELAY_S, Desk, Scene, assert_complete, assert_empty
from tests.meddling import meddled
from tests.registry.asking import QUICK

pytestmark = pytest.mark.root


def test_nd_01_those_who_ask_at_once_share_one_pull(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        found: list[Any] = []

        async def one(owner: str) -> None:
            found.append(await desk.acquire("one", owner))

        async with trio.open_nursery() as nursery:
            for owner in "abcde":
                nursery.start_soon(one, owner)
        assert {held.image for held in found} == {scene.ids["one"]}
        assert {held.owner for held in await desk.coordinator.held()} == set("abcde")

    scene.run(work, at_once=1)
    paths = [(asked.method, asked.path) for asked in scene.registry.asked]
    assert len(set(paths)) == len(paths)


def test_nd_02_no_result_is_remembered(scene: Scene) -> None:
    """What was removed behind our back is pulled again."""

    async def work(desk: Desk) -> None:
        await desk.acquire("one", "a")
        desk.stores.leases.delete(*(lease.id for lease in desk.stores.leases.walk()))
        await desk.later()
        assert_empty(desk.stores)
        await desk.acquire("one", "a")
        assert_complete(desk.stores, scene.ids["one"])

    scene.run(work)


def test_nd_03_the_same_owner_counts_once(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        first = await desk.acquire("one", "a")
        assert await desk.acquire("one", "a") == first
        assert len(await desk.coordinator.held()) == 1
        assert await desk.coordinator.release(first.image, "a")
        await desk.later()
        assert_empty(desk.stores)

    scene.run(work)


def test_nd_04_without_cleanup_nothing_is_counted_or_removed(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        held = await desk.acquire("one", "a")
        assert held.image == scene.ids["one"]
        assert (await desk.coordinator.hold(held.image, "b")).image == held.image
        assert not await desk.coordinator.held()
        assert not await desk.coordinator.release(held.image, "a")
        assert not await desk.coordinator.retain([])
        await desk.later()
        assert_complete(desk.stores, held.image)
        assert desk.stores.images.named(scene.name("one"))

    scene.run(work, cleanup=False)


def test_nd_05_the_last_to_leave_is_the_one_who_counts(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        image = (await desk.acquire("one", "a")).image
        await desk.acquire("one", "b")
        await desk.coordinator.release(image, "a")
        await desk.later()
        assert_complete(desk.stores, image)
        await desk.coordinator.release(scene.name("one"), "b")
        (held,) = await desk.coordinator.held()
        assert held.until == scene.clock.at + DELAY_S * 10**9
        # A background collector knows when.
        seen = desk.stores.glance(0, await _look(desk), None)
        assert seen.expires == held.until
        await desk.later(DELAY_S - 1)
        assert_complete(desk.stores, image)
        await desk.later(1)
        assert_empty(desk.stores)

    scene.run(work)


async def _look(desk: Desk) -> Any:
    return await trio.to_thread.run_sync(desk.stores.glance, 0, None, None)


def test_nd_05_without_a_delay_the_next_collection_takes_it(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        held = await desk.acquire("one", "a")
        await desk.coordinator.release(held.image, "a")
        scene.clock.at -= 10**15  # whatever the clock shows
        await desk.engine.collect()
        assert_empty(desk.stores)

    scene.run(work, delay_s=0)


@pytest.mark.parametrize("owner", ["a", "b"])
def test_nd_06_who_comes_within_the_delay_has_it_still(scene: Scene, owner: str) -> None:
    async def work(desk: Desk) -> None:
        image = (await desk.acquire("one", "a")).image
        await desk.coordinator.release(image, "a")
        before = scene.registry.count("blobs")
        if owner == "a":
            await desk.acquire("one", owner)
        else:
            await desk.coordinator.hold(image[:20], owner)
        assert scene.registry.count("blobs") == before
        await desk.later(2 * DELAY_S)
        assert_complete(desk.stores, image)
        (held,) = await desk.coordinator.held()
        assert (held.owner, held.until) == (owner, None)

    scene.run(work)


def test_nd_06_an_acquisition_under_way_cancels_the_removal(scene: Scene) -> None:
    """Though its reference comes last: what its name means it holds from the start."""

    async def work(desk: Desk) -> None:
        image = (await desk.acquire("one", "a")).image
        await desk.coordinator.release(image, "a")
        scene.registry.plan("/manifests/", stall())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(desk.acquire, "one", "b"))
            await scene.asked("manifests/one", 2)
            await desk.later(2 * DELAY_S)
            assert_complete(desk.stores, image)
            nursery.cancel_scope.cancel()
        await desk.later()
        assert_empty(desk.stores)

    scene.run(work)


def test_nd_07_13c_a_reference_at_any_moment_of_a_collection(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the image whole, or is told that it went."""

    async def work(desk: Desk) -> None:
        stores, outcomes = desk.stores, set()
        for moment in range(1000):
            held = await desk.acquire("one", "a")
            await desk.coordinator.release(held.image, "a")
            scene.clock.at += int(DELAY_S * 10**9)
            came: list[bool] = []

            def meddle(at: int, moment: int = moment, held: Any = held, came: Any = came) -> None:
                if at != moment:
                    return
                try:
                    stores.references.take("b", held.image, held.target, held.name)
                    came.append(True)
                except NotFound:
                    came.append(False)

            with meddled(monkeypatch, stores.root.meta, meddle) as passed:
                await trio.to_thread.run_sync(stores.collect)
            if came == [True]:
                assert_complete(stores, held.image)
                stores.references.release("b", {held.image}, delay_s=0)
                await desk.later()
            assert_empty(stores)
            outcomes.update(came)
            if moment >= len(passed):
                break
        assert outcomes == {True, False}

    scene.run(work)


def test_nd_08_13e_a_removal_that_fails_is_not_forgotten(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        held = await desk.acquire("one", "a")
        await desk.coordinator.release(held.image, "a")
        for _ in range(4):
            with armed("gc.marked", "error"), pytest.raises(EngineError):
                await desk.later()
            assert [one.owner for one in await desk.coordinator.held()] == ["a"]
        await desk.engine.collect()
        assert_empty(desk.stores)

    scene.run(work)


def test_nd_09_who_releases_what_he_does_not_hold_is_warned(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(desk: Desk) -> None:
        held = await desk.acquire("one", "a")
        for image, owner in ((held.image, "b"), ("sha256:" + "0" * 64, "a"), ("busybox", "a")):
            with caplog.at_level(logging.WARNING):
                assert not await desk.coordinator.release(image, owner)
            assert f"{owner} holds no image {image}" in caplog.messages.pop()
        await desk.later(100 * DELAY_S)
        assert_complete(desk.stores, held.image)

    scene.run(work)


def test_nd_10_errors_say_whether_to_try_again() -> None:
    kinds = {
        "Unavailable": True,
        "ResourceExhausted": True,
        "NotFound": False,
        "PermissionDenied": False,
        "Refused": False,
        "DataLoss": False,
        "InvalidArgument": False,
        "AlreadyExists": False,
        "FailedPrecondition": False,
        "NotSupported": False,
    }
    assert kinds.keys() <= set(errors.__all__)
    for kind, recoverable in kinds.items():
        assert is_recoverable(getattr(errors, kind)("x")) == recoverable, kind
    assert not is_recoverable(errors.DigestMismatch("a", "b", "c"))


@pytest.mark.parametrize(
    ("fault", "kind", "recoverable"),
    [
        (respond(response(404)), NotFound, False),
        (respond(response(403)), PermissionDenied, False),
        (respond(response(503)), Unavailable, True),
        (reset(), Unavailable, True),
        (respond(response(200, b"no manifest")), Refused, False),
    ],
)
def test_nd_10_what_a_registry_does(
    scene: Scene, fault: Any, kind: type[EngineError], recoverable: bool
) -> None:
    async def work(desk: Desk) -> None:
        scene.registry.plan("/manifests/", fault, times=100)
        with pytest.raises(kind) as caught:
            await desk.acquire("one", "a")
        assert is_recoverable(caught.value) == recoverable
        assert not await desk.coordinator.held()
        await desk.later(48 * 3600)
        assert_empty(desk.stores)

    scene.run(work)


def test_nd_11_a_name_without_a_tag_means_latest(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        name = scene.name("latest").removesuffix(":latest")
        held = await desk.coordinator.acquire(name, "a", desk.client, snapshotter="overlay")
        assert (held.image, held.name) == (scene.ids["latest"], f"{name}:latest")
        assert await desk.coordinator.release(name, "a")

    scene.serve("latest")
    scene.run(work)


def test_nd_12_each_coordinator_has_its_own_settings(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        hasty = Coordinator(desk.engine, delay_s=1)
        for tag, coordinator in (("one", hasty), ("two", desk.coordinator)):
            held = await desk.acquire(tag, "a")
            await coordinator.release(held.image, "a")
        await desk.later(1)
        assert [held.image for held in await desk.coordinator.held()] == [scene.ids["two"]]
        for wrong in ({"delay_s": -1}, {"at_once": 0}, {"stall_s": 0}):
            with pytest.raises(InvalidArgument):
                Coordinator(desk.engine, **wrong)  # type: ignore[arg-type]

    scene.run(work)


def test_nd_13a_those_who_leave_a_pull_that_failed_disturb_no_later_one(scene: Scene) -> None:
    """Each comes again at once, while others still leave the first attempt."""

    async def work(desk: Desk) -> None:
        scene.registry.plan(scene.ids["one"], respond(response(403)), times=2)
        failed: list[str] = []

        async def one(owner: str) -> None:
            while True:
                try:
                    await desk.acquire("one", owner)
                except PermissionDenied:
                    failed.append(owner)
                else:
                    break

        async with trio.open_nursery() as nursery:
            for owner in "abcde":
                nursery.start_soon(one, owner)
        assert failed
        assert {held.owner for held in await desk.coordinator.held()} == set("abcde")
        assert_complete(desk.stores, scene.ids["one"])

    scene.run(work)


def test_nd_13b_nothing_takes_an_image_between_its_pull_and_its_reference(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MS-09: before each transaction another releases it, its delay passes, and a collection comes."""

    async def work(desk: Desk) -> None:
        stores, image = desk.stores, scene.ids["one"]
        for there in (False, True):
            if there:
                stores.references.take("other", image, scene.targets["one"], scene.name("one"))

            def meddle(_at: int) -> None:
                stores.references.release("other", {image}, delay_s=1)
                scene.clock.at += int(2 * DELAY_S * 10**9)
                stores.collect()

            with meddled(monkeypatch, stores.root.meta, meddle) as passed:
                held = await desk.acquire("one", "a")
            await desk.later()  # it is held when that returns
            assert len(passed) > 10
            assert held.image == image
            assert_complete(stores, image)
            assert stores.images.named(scene.name("one"))

    scene.run(work)


def test_nd_13d_what_is_gone_leaves_no_trace(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        held = await desk.acquire("one", "a")
        desk.stores.images.remove(scene.name("one"))
        await desk.later()
        assert_complete(desk.stores, held.image)  # it lost its name, not its owner
        await desk.coordinator.release(held.image, "a")
        await desk.later()
        assert_empty(desk.stores)
        assert not await desk.coordinator.release(held.image, "a")

    scene.run(work)


def test_nd_13f_an_earlier_removal_does_not_end_a_later_one(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        image = (await desk.acquire("one", "a")).image
        await desk.coordinator.release(image, "a")
        await desk.later(DELAY_S - 1)
        await desk.acquire("one", "a")
        await desk.coordinator.release(image, "a")
        await desk.later(DELAY_S - 1)
        assert_complete(desk.stores, image)
        await desk.coordinator.release(image, "a")  # again: it ends no later
        await desk.later(1)
        assert_empty(desk.stores)

    scene.run(work)


def test_nd_13g_what_was_under_way_ends_with_the_engine(scene: Scene) -> None:
    async def closing(desk: Desk) -> None:
        scene.registry.plan(scene.ids["one"], stall())
        await desk.acquire("two", "a")
        await desk.coordinator.release(scene.ids["two"], "a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.acquire, "one", "a")
            await scene.asked(scene.ids["one"])
            nursery.cancel_scope.cancel()

    async def after(desk: Desk) -> None:
        assert [held.image for held in await desk.coordinator.held()] == [scene.ids["two"]]
        await desk.later(48 * 3600)
        assert_empty(desk.stores)

    scene.run(closing)
    scene.run(after)


def test_nd_13h_each_can_be_cancelled_and_the_last_ends_the_pull(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        scene.registry.plan(scene.ids["one"], stall(), times=2)
        scopes = [trio.CancelScope() for _ in range(3)]
        found: list[Any] = []

        async def one(tag: str, scope: trio.CancelScope) -> None:
            with scope:
                found.append(await desk.acquire(tag, "a"))

        async with trio.open_nursery() as nursery:
            for tag, scope in zip(("one", "one", "two"), scopes, strict=True):
                nursery.start_soon(one, tag, scope)
                await scene.asked(scene.ids["one"])
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not scene.registry.count("manifests/two")  # one at once
            scopes[0].cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not scene.registry.count("manifests/two")
            scopes[1].cancel()
        (held,) = found
        assert held.image == scene.ids["two"]
        await desk.coordinator.release("sha256:" + held.image[7:], "a")
        await desk.later(48 * 3600)
        assert_empty(desk.stores)

    scene.run(work, at_once=1)


def test_nd_13h_a_pull_that_does_not_get_on_ends(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        scene.registry.plan(scene.ids["one"], stall(), times=1)
        hasty = Coordinator(desk.engine, stall_s=0.1)
        with pytest.raises(Unavailable, match=r"nothing of image .* came for 0\.1 s"):
            await hasty.acquire(scene.name("one"), "a", desk.client)
        assert not await desk.coordinator.held()
        await desk.acquire("one", "a")

    scene.run(work)


def test_nd_13h_so_many_different_things_at_once() -> None:
    """In the order in which they came; those who come for the same go together."""

    async def run() -> None:
        admission, log, scopes = Admission(2), [], {}
        gates: dict[str, trio.Event] = {}

        async def one(name: str) -> None:
            gates[name] = trio.Event()
            with trio.CancelScope() as scopes[name]:
                async with admission.admitted(name[0]):
                    log.append(name)
                    await gates[name].wait()

        async with trio.open_nursery() as nursery:
            for name in ("a1", "b1", "c1", "d1", "a2", "c2", "e1"):
                nursery.start_soon(one, name)
                await trio.testing.wait_all_tasks_blocked()
            assert log == ["a1", "b1", "a2"]
            scopes["d1"].cancel()
            gates["a1"].set()
            await trio.testing.wait_all_tasks_blocked()
            assert log == ["a1", "b1", "a2"]
            gates["a2"].set()
            scopes["c1"].cancel()  # who is let in and leaves at the same moment holds nobody up
            await trio.testing.wait_all_tasks_blocked()
            assert log[3:] == ["c2"]
            scopes["c2"].cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert log[4:] == ["e1"]
            nursery.cancel_scope.cancel()
        assert not admission._inside
        assert not admission._waiting

    trio.run(run)


def test_nd_13i_each_asks_with_his_own_credentials(scene: Scene) -> None:
    """C2-17: what is here is not given to who may not have it."""
    scene.registry.realm, scene.registry.user, scene.registry.password = "basic", "u", "s3cr3t"

    async def work(desk: Desk) -> None:
        good = Access(patience=QUICK, credentials=lambda _host: Credential(user="u", secret="s3cr3t"))
        bad = Access(patience=QUICK, credentials=lambda _host: Credential(user="u", secret="wrong"))
        results: dict[str, Any] = {}

        async def one(owner: str, access: Access) -> None:
            async with open_client(access) as client:
                try:
                    results[owner] = await desk.coordinator.acquire(scene.name("one"), owner, client)
                except EngineError as error:
                    results[owner] = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "a", good)
            nursery.start_soon(one, "b", bad)
        await one("c", bad)
        assert results["a"].image == scene.ids["one"]
        assert isinstance(results["b"], PermissionDenied)
        assert isinstance(results["c"], PermissionDenied)
        assert [held.owner for held in await desk.coordinator.held()] == ["a"]

    scene.run(work)


def test_nd_13j_a_restart_forgets_nobody(scene: Scene) -> None:
    async def before(desk: Desk) -> None:
        for owner, tag in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "two")):
            await desk.acquire(tag, owner)
        await desk.coordinator.release(scene.ids["two"], "c")

    async def after(desk: Desk) -> None:
        assert {held.owner for held in await desk.coordinator.held()} == set("abcd")
        # The client knows of `b` alone: the others were gone when it came back.
        left = await desk.coordinator.retain({"b", "new"})
        assert {held.owner for held in left} == set("acd")
        await desk.later()
        assert [held.owner for held in await desk.coordinator.held()] == ["b"]
        assert_complete(desk.stores, scene.ids["one"])
        assert [image.name for image in desk.stores.images.walk()] == [scene.name("one")]
        assert await desk.coordinator.release(scene.ids["one"], "b")

    async def due(desk: Desk) -> None:
        await desk.later()
        assert_empty(desk.stores)

    scene.run(before)
    scene.run(after)
    scene.run(due)


# -- names, and whose they are -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pulled before", "pulled again", "tagged", "tagged anew", "pinned"])
def test_a_name_that_a_user_wants_stays(scene: Scene, how: str) -> None:
    async def work(desk: Desk) -> None:
        images, name = desk.stores.images, scene.name("one")
        if how == "pulled before":
            await desk.engine.pull(name, desk.client, snapshotter="overlay")
        held = await desk.acquire("one", "a")
        target = images.get(name).target
        if how == "pulled again":
            await desk.engine.pull(name, desk.client)
        elif how == "tagged":
            images.put_all({"mine": target})
        elif how == "tagged anew":
            images.put_all({name: target})
        elif how == "pinned":
            images.label({labels.PINNED: labels.PINNED_VALUE}, name)
        await desk.coordinator.release(held.image, "a")
        await desk.later()
        assert_complete(desk.stores, held.image)
        assert {image.name for image in images.walk()} >= {
            "docker.io/library/mine:latest" if how == "tagged" else name
        }
        for image in images.walk():
            images.remove(image.name)
        await desk.later()
        assert_empty(desk.stores)

    scene.run(work)


def test_ms_35_a_tag_that_moves_leaves_each_owner_what_he_has(scene: Scene) -> None:
    """Who runs the image of a tag that moved on keeps that image, config and all."""

    async def work(desk: Desk) -> None:
        old = (await desk.acquire("one", "a")).image
        new = scene.serve("one", "another")
        assert (await desk.acquire("one", "b")).image == new
        await desk.later()
        assert_complete(desk.stores, old)
        assert_complete(desk.stores, new)
        assert await desk.coordinator.release(new, "b")
        await desk.later()
        assert_complete(desk.stores, old)
        assert not desk.stores.images.walk()  # its name went with what it meant
        assert await desk.coordinator.release(scene.name("one"), "a")
        await desk.later()
        assert_empty(desk.stores)

    scene.run(work)


def test_whoever_asks_is_told_for_whom(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        await desk.acquire("one", "task-7")
        explained = explain_store(desk.stores)
        assert [held.holder.why for held in explained.held] == ["for task-7"]

    scene.run(work)


def test_a_policy_leaves_what_is_held(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        held = await desk.acquire("one", "a")
        await desk.engine.pull(scene.name("two"), desk.client)
        scene.clock.at += 10**15
        policy = Policy(high=0, low=0, min_age=0, max_age=1)
        enforced = await trio.to_thread.run_sync(desk.stores.enforce, policy)
        assert [one.names for one in enforced.chosen] == [[scene.name("two")]]
        assert_complete(desk.stores, held.image)
        assert desk.stores.images.named(held.name)
        assert not (await desk.engine.check()).findings

    scene.run(work)


def test_what_is_not_here_is_not_held(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        with pytest.raises(NotFound, match="acquire it"):
            await desk.coordinator.hold(scene.name("one"), "a")
        await desk.engine.pull(scene.name("one"), desk.client)  # not unpacked
        with pytest.raises(NotFound, match="not unpacked"):
            await desk.coordinator.hold(scene.name("one"), "a")
        scene.registry.asked.clear()
        for owner in ("", "a\nb", "é" * 3000):
            with pytest.raises(InvalidArgument, match=r"no owner|over 4096 bytes"):
                await desk.acquire("one", owner)
        assert not scene.registry.asked
        with pytest.raises(InvalidArgument, match="a list of owners"):
            await desk.coordinator.retain("one")
        with pytest.raises(InvalidArgument, match="'A B' is not an image reference"):
            await desk.coordinator.acquire("A B", "a", desk.client)

    scene.run(work)


def test_owners_and_names_may_be_of_any_length(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        owner = "ö" * 1000
        held = await desk.acquire("one", owner)
        (found,) = await desk.coordinator.held()
        assert found == held
        assert await desk.coordinator.release(held.name, owner)

    scene.run(work)
