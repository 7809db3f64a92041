"""One layer at one place is made once, however many ask; the last one to cancel stops it, soon."""

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from engine import failpoints, limits
from engine.app import Engine, open_engine
from engine.errors import DigestMismatch, EngineError, FailedPrecondition, Refused
from engine.kv.schema import LEASES
from engine.oci.digest import digest_of
from engine.progress import Step
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from engine.unpack import making
from engine.unpack.unpacker import Unpacked
from engine.unpack.workshop import Workshop, open_workshop
from snapshotters.overlay import OverlaySnapshotter
from tests.command import LAMINA, environment, lamina, lamina_json
from tests.conftest import AMD64, children
from tests.processes import Victim, until

pytestmark = pytest.mark.root

BASE = [archive(*(member(f"base/{layer}-{n}") for n in range(20))) for layer in range(4)]


def run(tmp_path: Path, work: Callable[[Engine], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with open_engine(tmp_path / "root", platform=AMD64) as engine:
                await work(engine)

    trio.run(main)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each layer is begun, by chain ID."""
    begun: Counter[str] = Counter()
    prepare = OverlaySnapshotter.prepare

    def watched(self: OverlaySnapshotter, key: str, *rest: object, **more: object) -> object:
        begun[key.partition(" ")[2]] += 1
        return prepare(self, key, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(OverlaySnapshotter, "prepare", watched)
    return begun


async def two_images(engine: Engine, tmp_path: Path) -> list[str]:
    names = []
    for top in ("one", "two"):
        layers = [*BASE, archive(member(top))]
        (image,) = (await engine.import_image(layout(tmp_path / top, layers, tag=f"x/{top}:1"))).images
        names.append(image.name)
    return names


def test_up_20h_callers_and_images_share_layers(tmp_path: Path, prepared: Counter[str]) -> None:
    async def work(engine: Engine) -> None:
        names = await two_images(engine, tmp_path)
        async with trio.open_nursery() as nursery:
            for name in names * 3:
                nursery.start_soon(lambda n=name: engine.unpack(n, snapshotter="overlay"))
        chains = {c for n in names for c in chain_of(engine, n)}
        assert prepared == Counter(dict.fromkeys(chains, 1))
        assert {info.key for info in engine.stores.snapshotter("overlay").walk()} == chains

    run(tmp_path, work)


def chain_of(engine: Engine, name: str) -> list[str]:
    return list(engine.stores.resolve(engine.stores.images.get(name).target).chain)


def test_one_leaves_and_the_others_have_their_layers(tmp_path: Path, prepared: Counter[str]) -> None:
    async def work(engine: Engine) -> None:
        names = await two_images(engine, tmp_path)
        scope = trio.CancelScope()
        both: list[Step] = []  # what the other one was told: it shares the layers by then

        def cancel(step: Step, _item: str, _total: int, _done: int, /) -> None:
            if step is Step.UNPACK and both:
                scope.cancel()

        def stays(step: Step, _item: str, _total: int, done: int, /) -> None:
            if step is Step.SHARE and done == 2:
                both.append(step)

        async def leaves() -> None:
            with scope:
                await engine.unpack(names[0], snapshotter="overlay", report=cancel)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaves)
            nursery.start_soon(lambda: engine.unpack(names[1], snapshotter="overlay", report=stays))
        assert scope.cancelled_caught
        kept = {info.key for info in engine.stores.snapshotter("overlay").walk()}
        assert kept >= set(chain_of(engine, names[1]))
        assert all(prepared[name] == 1 for name in chain_of(engine, names[1]))
        # What one of two images had alone is gone with it, or was done before.
        assert not [key for key in kept if key.startswith("extract-")]

    run(tmp_path, work)


def test_who_began_a_layer_leaves_before_its_work_has_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease is what the layer is made under, for the other one, too."""
    turn = trio.Event()
    spawn = trio.lowlevel.spawn_system_task

    def late(work: Callable[..., Awaitable[None]], *arguments: object) -> object:
        async def wait() -> None:
            await turn.wait()
            await work(*arguments)

        return spawn(wait)

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", BASE))).images
        scope = trio.CancelScope()
        flights = engine._unpacker._shop.flights._flights

        async def leaves() -> None:
            with scope:
                await engine.unpack(image.name, snapshotter="overlay")

        def joined(callers: int) -> bool:
            return [len(flight._reports) for flight in flights.values()] == [callers] * len(BASE)

        with monkeypatch.context() as patch:
            patch.setattr(trio.lowlevel, "spawn_system_task", late)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leaves)
                try:
                    while not joined(1):
                        await trio.lowlevel.checkpoint()
                    (begun,) = leases_of(engine)
                    nursery.start_soon(lambda: engine.unpack(image.name, snapshotter="overlay"))
                    while not joined(2):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
                    while not scope.cancelled_caught:
                        await trio.lowlevel.checkpoint()
                    assert begun in leases_of(engine)
                finally:
                    turn.set()  # whoever leaves waits for the work to end
        assert not leases_of(engine)
        assert len(list(engine.stores.snapshotter("overlay").walk())) == len(BASE)

    run(tmp_path, work)


def leases_of(engine: Engine) -> list[str]:
    with engine.stores.root.meta.read() as txn:
        return [lease.id for lease in LEASES.scan(txn, "default")]


@pytest.mark.parametrize(
    "point", ["apply.entry", "apply.finish", "snapshot.commit.settled", "snapshot.commit.flushed"]
)
def test_a_cancel_ends_a_step_that_would_never_end(tmp_path: Path, point: str) -> None:
    # The worker is stopped at the point: without a kill, nothing of it ever comes again.
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", BASE))).images
        before = children()
        with failpoints.armed(point, "stop"), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: engine.unpack(image.name, snapshotter="overlay"))
                await trio.to_thread.run_sync(
                    until, lambda: any(is_stopped(pid) for pid in children() - before)
                )
                scope.cancel()
        assert scope.cancelled_caught
        assert not any(is_stopped(pid) for pid in children() - before)
        keys = {info.key for info in engine.stores.snapshotter("overlay").walk()}
        assert not [key for key in keys if key.startswith("extract-")]
        assert list(engine.stores.root.trash.iterdir()) == []
        assert (await engine.unpack(image.name, snapshotter="overlay")).layers == len(BASE)

    run(tmp_path, work)


def is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state == "T"


def test_layers_within_the_bounds_one_by_one_but_not_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "IMAGE_ENTRIES", 50)

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", BASE))).images
        with pytest.raises(Refused, match="image has over 50 entries"):
            await engine.unpack(image.name, snapshotter="overlay")
        # Before it is committed, and those that were there before count too.
        assert len(list(engine.stores.snapshotter("overlay").walk())) == 2
        with pytest.raises(Refused, match="image has over 50 entries"):
            await engine.unpack(image.name, snapshotter="overlay")
        assert len(list(engine.stores.snapshotter("overlay").walk())) == 2

    run(tmp_path, work)


def test_engines_of_one_root_share_workers_and_layers(tmp_path: Path, prepared: Counter[str]) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", BASE))).images
        async with (
            open_engine(tmp_path / "root", platform=AMD64) as second,
            trio.open_nursery() as nursery,
        ):
            for each in (engine, second) * 2:
                nursery.start_soon(lambda e=each: e.unpack(image.name, snapshotter="overlay"))
        assert set(prepared.values()) == {1}
        assert len(prepared) == len(BASE)
        # The pool is still there for the first one.
        assert (await engine.unpack(image.name, snapshotter="overlay")).applied == 0

    run(tmp_path, work)


def test_event_loops_share_no_workshop_and_backends_no_committer(stores: Stores) -> None:
    async def other() -> Workshop:
        async with open_workshop(stores.root) as theirs:
            return theirs

    async def main() -> None:
        async with open_workshop(stores.root) as ours, open_workshop(stores.root) as again:
            assert again is ours
            # Of two loops in two threads, neither may wake the other's tasks.
            assert await trio.to_thread.run_sync(trio.run, other) is not ours
            committers = [
                ours.committer(namespace, stores.snapshotter(backend))
                for _ in range(2)
                for namespace in ("default", "team")
                for backend in ("overlay", "copy")
            ]
            assert committers[:4] == committers[4:]
            assert len(set(committers)) == 4

    trio.run(main)


def test_a_report_that_fails_harms_nobody(tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", BASE))).images
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: engine.unpack(image.name, snapshotter="overlay", report=broken))
            nursery.start_soon(lambda: engine.unpack(image.name, snapshotter="overlay"))
        assert len(list(engine.stores.snapshotter("overlay").walk())) == len(BASE)

    run(tmp_path, work)


def test_a_failure_below_is_the_error_of_all(tmp_path: Path) -> None:
    bad = archive(member("h", "1", link="nowhere"))

    async def work(engine: Engine) -> None:
        names = []
        for top in ("one", "two"):
            layers = [BASE[0], bad, archive(member(top))]
            (image,) = (
                await engine.import_image(layout(tmp_path / top, layers, tag=f"x/{top}:1"))
            ).images
            names.append(image.name)
        errors: list[EngineError] = []

        async def one(name: str) -> None:
            try:
                await engine.unpack(name, snapshotter="overlay")
            except EngineError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for name in names * 2:
                nursery.start_soon(one, name)
        assert [type(error) for error in errors] == [Refused] * 4
        keys = {info.key for info in engine.stores.snapshotter("overlay").walk()}
        assert keys == {chain_of(engine, names[0])[0]}
        assert len(os.listdir(engine.stores.root.snapshots / "overlay")) == 1

    run(tmp_path, work)


def test_an_interrupted_command_ends_soon_and_leaves_nothing(tmp_path: Path) -> None:
    # Ctrl-C while the worker is at a step that never ends.
    root, image = tmp_path / "root", layout(tmp_path / "image", BASE)
    lamina(root, "import", "--no-unpack", "--name", "x:1", image)
    victim = Victim(root, ["unpack", "x:1"], "snapshot.commit.settled=stop")
    until(lambda: victim.process.poll() is not None or any(map(is_stopped, below(victim.process.pid))))
    victim.interrupt()
    assert victim.wait() == (130, "lamina: interrupted\n")
    kinds = {entry["kind"] for entry in lamina_json(root, "snapshots", "ls")}
    assert kinds <= {"committed"}
    assert list((root / "trash").iterdir()) == []


def below(pid: int) -> list[int]:
    """Return the children of a process: of each thread, as they are its own who started them."""
    found: list[int] = []
    for children_of in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it ended
            found += map(int, children_of.read_text(encoding="ascii").split())
    return found


def test_cleaning_up_is_bounded_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CLEANUP_S", 0.0)
    bad = archive(*(member(f"{n}") for n in range(50)), member("h", "1", link="nowhere"))

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", [bad]))).images
        with pytest.raises(Refused):
            await engine.unpack(image.name, snapshotter="overlay")
        (left,) = engine.stores.root.trash.iterdir()
        assert left.name == "overlay-1"
        assert list(engine.stores.snapshotter("overlay").walk()) == []
        await engine.collect()
        assert list(engine.stores.root.trash.iterdir()) == []

    run(tmp_path, work)


def test_a_chain_that_is_too_long_is_refused_before_any_work(tmp_path: Path, prepared: object) -> None:
    layers = [archive(member(str(number))) for number in range(127)]

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", layers))).images
        with pytest.raises(FailedPrecondition, match="at most 126 layers, this image has 127"):
            await engine.unpack(image.name, snapshotter="aufs")
        assert list((engine.stores.root.snapshots / "aufs").iterdir()) == []

    run(tmp_path, work)


def beside_another(tmp_path: Path) -> tuple[Path, Victim, Victim]:
    """Return a root, a command whose worker stands still within the lowest layer, and one that waits."""
    root, image = tmp_path / "root", layout(tmp_path / "image", BASE)
    lamina(root, "import", "--no-unpack", "--name", "x:1", image)
    first = Victim(root, ["unpack", "x:1"], "apply.entry=stop@5")
    until(lambda: any(map(is_stopped, below(first.process.pid))))
    second = Victim(root, ["unpack", "--json", "x:1"])
    assert second.process.stderr
    assert "waiting: layer sha256:" in second.process.stderr.readline()
    return root, first, second


def test_up_08_a_layer_that_another_process_makes_is_not_made_again(tmp_path: Path) -> None:
    root, first, second = beside_another(tmp_path)

    def goes_on() -> bool:  # at each layer anew
        for pid in filter(is_stopped, below(first.process.pid)):
            os.kill(pid, signal.SIGCONT)
        return first.process.poll() is not None

    until(goes_on)
    assert first.wait()[0] == 0
    out, _ = second.process.communicate(timeout=30)
    assert second.process.returncode == 0
    assert json.loads(out)["applied"] == 0
    assert [entry["kind"] for entry in lamina_json(root, "snapshots", "ls")] == ["committed"] * 4


def test_when_the_process_that_makes_a_layer_dies_another_does(tmp_path: Path) -> None:
    root, first, second = beside_another(tmp_path)
    workers = below(first.process.pid)
    first.kill()
    for pid in workers:  # stopped, it does not notice
        os.kill(pid, signal.SIGKILL)
    first.wait()
    out, _ = second.process.communicate(timeout=30)
    assert second.process.returncode == 0
    assert json.loads(out)["layers"] == len(BASE)
    lamina(root, "gc")
    assert [entry["kind"] for entry in lamina_json(root, "snapshots", "ls")] == ["committed"] * 4


def test_an_image_of_many_layers_takes_no_descriptor_for_each(tmp_path: Path) -> None:
    image = layout(tmp_path / "image", [archive(member(f"file-{n}")) for n in range(100)])
    limited = ["prlimit", "--nofile=48:48", *LAMINA, "--root", str(tmp_path / "root")]
    done = subprocess.run(
        [*limited, "import", str(image)], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr


def test_a_layer_on_two_bases_at_once_is_applied_once(tmp_path: Path) -> None:
    top = archive(*(member(f"top/{n}") for n in range(20)))

    async def work(engine: Engine) -> None:
        names = []
        for base in ("one", "two", "three"):
            layers = [archive(member(base)), top]
            (image,) = (
                await engine.import_image(layout(tmp_path / base, layers, tag=f"x/{base}:1"))
            ).images
            names.append(image.name)
        done: list[Unpacked] = []

        async def unpack(name: str) -> None:
            done.append(await engine.unpack(name, snapshotter="overlay"))

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(unpack, name)
        assert sorted(one.reused for one in done) == [0, 1, 1]
        assert len(os.listdir(engine.stores.root.snapshots / "overlay")) == 4
        assert engine._shop.twins._first == {}

    run(tmp_path, work)


def test_when_a_layer_fails_on_one_base_it_is_applied_on_the_other(tmp_path: Path) -> None:
    """One image lies about the layer below, so that what stands on that is never committed."""
    top = archive(*(member(f"top/{n}") for n in range(20)))
    bases = [archive(member("one")), archive(member("two"))]
    lie = [digest_of(b"another"), digest_of(top)]
    layout(tmp_path / "0", [bases[0], top], tag="x/0:1", diff_ids=lie)
    layout(tmp_path / "1", [bases[1], top], tag="x/1:1")

    async def work(engine: Engine) -> None:
        for number in range(2):
            await engine.import_image(tmp_path / str(number))
        results: dict[str, object] = {}

        async def unpack(name: str) -> None:
            try:
                results[name] = await engine.unpack(name, snapshotter="overlay")
            except EngineError as error:
                results[name] = error

        async with trio.open_nursery() as nursery:
            for name in ("x/0:1", "x/1:1"):
                nursery.start_soon(unpack, name)
        assert isinstance(results["x/0:1"], DigestMismatch)
        assert isinstance(results["x/1:1"], Unpacked)

    run(tmp_path, work)
