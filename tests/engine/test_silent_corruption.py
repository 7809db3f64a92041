"""Bytes are whole or there is an error: short writes, resumes, work cut off halfway, races lost."""

import errno
import gzip
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from msgspec.structs import replace as replace_record

from engine.diff.apply import apply_layer
from engine.errors import AlreadyExists, EngineError, FailedPrecondition, Unavailable
from engine.failpoints import armed
from engine.fs.room import Room
from engine.kv.schema import EXTENT, INGESTS, LEASE_ITEMS
from engine.metadata.leases import leased
from engine.observing.tally import Tally
from engine.oci.digest import digest_of
from engine.processes import Owner
from engine.progress import Amount
from engine.root import Root
from engine.snapshots import Commit, Snapshotter
from engine.stores import Stores
from engine.testing.archives import archive, layout, member, tar_layout
from engine.testing.trees import TreeEntry, differences
from engine.unpack import committer as committing
from engine.unpack import worker
from engine.unpack.jobs import Failed, frame
from engine.unpack.workshop import open_workshop
from snapshotters import filling, markers, sealing, union
from tests.conftest import AMD64 as HOST
from tests.engine.image_files import (
    HELLO,
    config_of,
    docker_files,
    import_image,
    tar_of,
)
from tests.engine.image_files import extents as stored_extents
from tests.filesystems import in_memory
from tests.support import BACKENDS, applied, apply_stack, tree_of


def unheard(_layers: int, _done: int) -> None:
    """Take note of nothing."""


pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    """Stores in memory: these tests commit often."""
    with in_memory(tmp_path / "memory") as memory, Root(memory / "root") as root:
        assert root.owners.me.id
        yield Stores(root, "default", HOST)


def noise(size: int, seed: object = 0) -> bytes:
    """Return bytes that do not pack, and of which no two pieces are alike."""
    return random.Random(f"{seed}").randbytes(size)


# -- short writes and reads --------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Make the kernel do a third of what is asked for, as it may; count how often each call did."""
    calls: dict[str, int] = {}

    def shorten(name: str, at: int) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def call(*words: Any, **options: Any) -> Any:
            asked = words[at]
            size = asked if isinstance(asked, int) else len(asked)
            few = max(1, min(size, 16), size // 3)
            if few < size:
                calls[name] = calls.get(name, 0) + 1
            given = few if isinstance(asked, int) else memoryview(asked)[:few]
            return real(*words[:at], given, *words[at + 1 :], **options)

        monkeypatch.setattr(os, name, call)

    for name, at in (("write", 1), ("pwrite", 1), ("read", 1), ("pread", 1), ("copy_file_range", 2)):
        shorten(name, at)
    monkeypatch.setattr(filling, "ioctl_ficlone", no_reflinks)
    return calls


def no_reflinks(*_: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "no reflinks here")


SIZES = (0, 1, 15, 17, 512, 4095, 4097, 100_000)
FILES = archive(*(member(f"d/{size}", data=noise(size)) for size in SIZES), member("d/gone"))
ABOVE = archive(member("d/.wh.gone"), member("d/new", data=noise(5000, "new")))


def tree_of_files() -> dict[bytes, int]:
    return {b"d": 0, b"d/new": 5000, **{f"d/{size}".encode(): size for size in SIZES}}


@pytest.mark.parametrize("name", BACKENDS)
def test_short_writes_go_on(stores: Stores, short: dict[str, int], name: str) -> None:
    top = apply_stack(stores.snapshotter(name), [FILES, ABOVE])
    tree = tree_of(stores, name, top, stores.root.path.parent / "mnt")
    assert {path: entry.size for path, entry in tree.items()} == tree_of_files()
    for size in SIZES:
        assert tree[b"d/%d" % size].detail == digest_of(noise(size))[7:]
    assert short["write"] > 10
    assert name != "copy" or short["copy_file_range"] > 10


def sparse(path: Path, *data: tuple[int, bytes], size: int) -> None:
    with path.open("wb") as file:
        for at, piece in data:
            file.seek(at)
            file.write(piece)
        file.truncate(size)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ([], 1 << 20),
        ([(0, b"x")], 1 << 20),
        ([((1 << 20) - 1, b"x")], 1 << 20),
        ([(0, noise(5000)), (1 << 19, noise(70_000))], 1 << 20),
        ([(4096, noise(4096)), (12288, noise(1)), (20480, noise(4096))], 24576),
        ([(0, noise(300_000))], 300_000),
    ],
)
@pytest.mark.parametrize("is_short", [True, False])
def test_a_copy_of_a_sparse_file(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    data: list[tuple[int, bytes]],
    size: int,
    is_short: bool,
) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    sparse(tmp_path / "from" / "file", *data, size=size)
    if is_short:
        request.getfixturevalue("short")
    monkeypatch.setattr(filling, "ioctl_ficlone", no_reflinks)
    with open_folder(tmp_path / "from") as source, open_folder(tmp_path / "to") as target:
        filling.fill(source, target, None, Room(tmp_path))
    old, new = tmp_path / "from" / "file", tmp_path / "to" / "file"
    assert new.read_bytes() == old.read_bytes()
    assert new.stat().st_blocks <= old.stat().st_blocks


class open_folder:  # noqa: N801  used as the function that it is
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def test_a_copy_that_ends_early_is_an_error(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stores.snapshotter("copy")
    base = apply_stack(backend, [FILES])
    real = os.copy_file_range

    def ends(old: int, new: int, count: int) -> int:
        return 0 if os.lseek(new, 0, os.SEEK_CUR) else real(old, new, count // 2)

    monkeypatch.setattr(os, "copy_file_range", ends)
    monkeypatch.setattr(filling, "ioctl_ficlone", no_reflinks)
    with pytest.raises(EngineError, match="ended before its size"):
        backend.prepare("key", base)
    assert {info.key for info in backend.walk()} == {base}


def folder_form(tmp_path: Path, layers: list[bytes]) -> Path:
    return layout(tmp_path / "image", layers, compression="none")


def tar_form(tmp_path: Path, layers: list[bytes]) -> Path:
    return tar_layout(folder_form(tmp_path, layers), tmp_path / "image.tar")


def gzip_form(tmp_path: Path, layers: list[bytes]) -> Path:
    packed = tmp_path / "image.tar.gz"
    packed.write_bytes(gzip.compress(tar_form(tmp_path, layers).read_bytes(), 1))
    return packed


def docker_form(tmp_path: Path, layers: list[bytes]) -> Path:
    return tar_of(tmp_path / "image.tar", docker_files(layers))


FORMS = (folder_form, tar_form, gzip_form, docker_form)


def stored_layers(stores: Stores) -> list[bytes]:
    """Return the layers of the only image, verified."""
    (image,) = stores.images.walk()
    return [
        b"".join(stores.content.read_verified(layer.descriptor.key))
        for layer in stores.resolve(image.target).layers
    ]


@pytest.mark.parametrize("form", FORMS)
def test_short_reads_go_on(
    stores: Stores, tmp_path: Path, request: pytest.FixtureRequest, form: Callable[..., Path]
) -> None:
    layers = [HELLO, archive(member("big", data=noise(EXTENT + 5)))]
    source = form(tmp_path, layers)
    short: dict[str, int] = request.getfixturevalue("short")
    import_image(stores, source)
    assert stored_layers(stores) == layers
    assert short["read" if form is folder_form else "pread"] > 1


def test_frames_of_workers_are_written_and_read_whole(short: dict[str, int]) -> None:
    reply = frame(Failed("Refused", "x" * 3000))
    ours, theirs = os.pipe()
    with open(ours, "rb", buffering=0) as reader:
        with open(theirs, "wb", buffering=0) as writer:
            worker._send(writer.fileno(), Failed("Refused", "x" * 3000))
            writer.write(reply)
        assert worker._read_exactly(reader.fileno(), len(reply)) == reply
        assert reader.read() == reply
    assert short["write"] > 1
    assert short["read"] > 1


# -- ingests -----------------------------------------------------------------------------------


BOUNDARIES = [n * EXTENT + off for n in (0, 1, 2, 8, 9) for off in (-1, 0, 1) if n * EXTENT + off >= 0]


@pytest.mark.parametrize("stopped", BOUNDARIES)
def test_a_resume_at_every_boundary(stores: Stores, stopped: int) -> None:
    data = noise(10 * EXTENT + 3)
    expected = digest_of(data)
    with stores.content.ingest("x", lease="", expected=expected, total=len(data)) as writer:
        writer.write(data[:stopped])
    with stores.content.ingest("x", lease="", expected=expected, total=len(data)) as writer:
        assert writer.offset == stopped
        assert writer.digest == digest_of(data[: writer.offset])
        writer.write(data[writer.offset :])
        assert writer.commit().size == len(data)
    assert stores.content.verify(expected) == len(data)
    assert len(stored_extents(stores)) == 11


@pytest.fixture(params=[1 << 30, 300_007])
def at_most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read so many bytes at once: all, or so few that a resume passes over several pieces."""
    for name in ("read", "pread"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda file, size, *at, r=real: r(file, min(size, request.param), *at)
        )


@pytest.mark.usefixtures("at_most")
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("size", [EXTENT - 1, EXTENT, EXTENT + 1, 2 * EXTENT, 9 * EXTENT + 1])
def test_an_import_goes_on_where_one_stopped(
    stores: Stores, tmp_path: Path, form: Callable[..., Path], size: int
) -> None:
    # A layer of exactly so many bytes: what a tar archive is padded with is part of it.
    layer = (HELLO + bytes(size))[:size]
    source = form(tmp_path, [layer])
    with leased(stores.root.meta, "default") as lease:  # as after a crash: nothing is given up
        digest = digest_of(layer)
        with stores.content.ingest(
            f"import-{digest}", lease=lease, expected=digest, total=size
        ) as writer:
            writer.write(layer[: EXTENT + 7])
        tally = Tally()
        import_image(stores, source, report=tally)
    assert stored_layers(stores) == [layer]
    # It did not begin anew.
    (part,) = tally.headway().parts
    assert part.fetch == Amount(size, size, found=min(size, EXTENT + 7), rate=part.fetch.rate)


def test_a_resumed_ingest_is_its_new_writers(stores: Stores) -> None:
    data = noise(2 * EXTENT)
    with (
        leased(stores.root.meta, "default") as first,
        stores.content.ingest("x", lease=first, total=len(data)) as writer,
    ):
        writer.write(data[:EXTENT])
    with stores.root.meta.write() as txn:
        (record,) = INGESTS.scan(txn, "default")
        dead = replace_record(record, owner=Owner(id="dead"))
        INGESTS.put(txn, dead, "default", "x")
    with leased(stores.root.meta, "default") as second:
        with stores.content.ingest("x", lease=second, total=len(data)) as writer:
            assert writer.offset == EXTENT
            with stores.root.meta.read() as txn:
                (record,) = INGESTS.scan(txn, "default")
            assert (record.lease, record.owner) == (second, stores.root.owners.me)
            stores.collect()  # of the first lease nothing is left
            writer.write(data[EXTENT:])
            blob = writer.commit()
        with stores.root.meta.read() as txn:
            assert [item.key for item in LEASE_ITEMS.scan(txn, "default", second)] == [blob.digest]
        stores.collect()
        assert stores.content.verify(digest_of(data)) == len(data)


def test_an_ingest_of_other_bytes_is_not_gone_on_with(stores: Stores) -> None:
    """Announced are as many bytes, but another digest."""
    one, other = noise(2 * EXTENT, "one"), noise(2 * EXTENT, "other")
    for data, size in ((one, EXTENT), (other, 2 * EXTENT)):
        expected, total = digest_of(data), len(data)
        with stores.content.ingest("x", lease="", expected=expected, total=total) as writer:
            assert writer.offset == 0
            writer.write(data[:size])
            if size == total:
                writer.commit()
    assert stores.content.verify(digest_of(other)) == len(other)


def packed_alike(layer: bytes) -> list[bytes]:
    """Return a layer packed twice: as many bytes, but others."""
    one, other = gzip.compress(layer, 1, mtime=1), gzip.compress(layer, 1, mtime=2)
    assert len(one) == len(other)
    return [one, other]


def test_layers_packed_by_two_tools_are_not_mixed(stores: Stores, tmp_path: Path) -> None:
    """Only their diff ID is known before they are read, and it is the same."""
    layer = archive(member("big", data=noise(2 * EXTENT)))
    files = [
        tar_of(tmp_path / f"{number}.tar", docker_files([packed], config=config_of([layer])))
        for number, packed in enumerate(packed_alike(layer))
    ]
    with armed("content.ingest.written", "error"), pytest.raises(EngineError, match="failpoint"):
        import_image(stores, files[0], name="one:1")
    import_image(stores, files[1], name="two:1")
    assert stored_layers(stores) == packed_alike(layer)[1:]


def test_the_rest_of_a_packed_layer_is_not_another_imports(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same after a crash, when nothing was given up."""
    monkeypatch.setattr(Stores, "give_up", lambda *_args, **_more: None)
    test_layers_packed_by_two_tools_are_not_mixed(stores, tmp_path)


def test_two_packed_layers_of_one_archive(stores: Stores, tmp_path: Path) -> None:
    layers = [archive(member(name, data=noise(EXTENT, name))) for name in ("one", "two")]
    packed = [gzip.compress(layer, 1, mtime=1) for layer in layers]
    longest = max(map(len, packed))
    packed = [piece + bytes(longest - len(piece)) for piece in packed]  # padding is allowed
    refs: set[str] = set()

    def look(*_: object) -> None:
        refs.update(status.ref for status in stores.content.statuses())

    source = tar_of(tmp_path / "a", docker_files(packed, config=config_of(layers)))
    import_image(stores, source, report=look)
    assert stored_layers(stores) == packed
    assert len(refs) == 2, "each layer is an ingest of its own"


# -- a layer that was settled in part ----------------------------------------------------------


BELOW = archive(
    member("a/", "5", mode=0o750, uid=7),
    *(member(f"a/{n}", data=noise(n * 100)) for n in range(4)),
    member("b/", "5", mode=0o700, mtime=99),
    member("b/x"),
    member("c/y"),
)
TOP = archive(
    member("a/.wh.1"), member("a/.wh.2"), member("b/.wh..wh..opq"), member("b/new"), member("c")
)
IMPLIED = archive(member("a/3/", "5"), member("b/z"), member(".wh.c"))

SEAMS = (
    (union, "give_attributes"),
    (markers.OverlayMarkers, "make_whiteout"),
    (markers.OverlayMarkers, "make_opaque"),
    (markers.AufsMarkers, "make_whiteout"),
    (markers.AufsMarkers, "make_opaque"),
    (filling, "give_attributes"),
    (filling.Copying, "_copy_file"),
    (filling._Filling, "fill"),
    (sealing, "_mark"),
)


class Cut(BaseException):
    """A process that is killed; nothing catches it."""


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let a number of steps of settling be done, and no more."""
    left = [after]

    def wrap(place: Any, name: str) -> None:
        real = getattr(place, name)

        def step(*words: Any, **options: Any) -> Any:
            if not left[0]:
                raise Cut
            left[0] -= 1
            return real(*words, **options)

        monkeypatch.setattr(place, name, step)

    for place, name in SEAMS:
        wrap(place, name)


def shown(stores: Stores, name: str, top: str) -> dict[bytes, TreeEntry]:
    return tree_of(stores, name, top, stores.root.path.parent / "mnt")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_half_settled_layer_is_not_settled_again(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Cut off at every step: committed again it is refused, or right; removed and redone it is right."""
    backend = stores.snapshotter(name)
    base = apply_stack(backend, [BELOW])
    backend.commit(*applied(backend, [TOP, IMPLIED], base, base))
    top = f"done {base}key 1"
    expected = shown(stores, name, top)
    refused = 0
    for after in range(100):
        for info in (top, f"done {base}key 0"):
            backend.remove(info)
        backend.cleanup()
        steps = applied(backend, [TOP, IMPLIED], base, base)
        with monkeypatch.context() as patch:
            cut_off(patch, after)
            try:
                backend.commit(*steps)
            except Cut:
                pass
            else:
                break
        try:
            backend.commit(*steps)
        except FailedPrecondition:
            refused += 1
            done = {info.key for info in backend.walk()}
            assert top not in done
            left = [step for step in steps if step.name not in done]
            for step in left:
                backend.remove(step.key)
            for step, layer in zip(steps, [TOP, IMPLIED], strict=True):
                if step in left:
                    backend.prepare(step.key)
                    target = backend.sink(step.key)
                    apply_layer([layer], target, diff_id=digest_of(layer))
            backend.commit(*left)
        assert not differences(shown(stores, name, top), expected), after
    assert refused >= 3
    assert after >= 5


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_settled_is_not_settled_on_something_else(stores: Stores, name: str) -> None:
    """A crash came between the seal and the record; then it is to stand on another parent."""
    backend = stores.snapshotter(name)
    base = apply_stack(backend, [BELOW])
    other = apply_stack(backend, [IMPLIED])
    (step,) = applied(backend, [TOP], base, base)
    for sealed in backend.sealing(step):
        assert sealing.Sealer()(sealed.argument) == (1, None)
    for parent in (other, None):
        with pytest.raises(FailedPrecondition, match="settled on another parent"):
            backend.commit(replace(step, parent=parent))
    backend.commit(step)
    assert b"b/x" not in shown(stores, name, step.name)


# -- "exists already" --------------------------------------------------------------------------


class Pool:
    """Seals nothing: `commit` does it then."""

    failures = 0

    async def seal(self, _job: object) -> tuple[int, None]:
        return 0, None


def commit_all(backend: Snapshotter, steps: list[Commit]) -> list[bool | EngineError | None]:
    """Commit steps as several layers under way do, in one batch; return what each was told."""
    told: list[bool | EngineError | None] = [None] * len(steps)

    async def one(committer: committing.Committer, number: int) -> None:
        try:
            told[number] = await committer.commit(steps[number], unheard, 0)
        except EngineError as error:
            told[number] = error

    async def main() -> None:
        committer = committing.Committer(backend, Pool())  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            for number in range(len(steps)):
                nursery.start_soon(one, committer, number)
                await trio.testing.wait_all_tasks_blocked()

    trio.run(main)
    return told


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_layers_that_another_process_made_are_not_all(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """It was first with some of a chain, after they were found missing: the others are still made."""
    backend = stores.snapshotter("overlay")
    steps = applied(backend, [BELOW, TOP, IMPLIED])
    real = backend.commit

    def beaten(*asked: Commit) -> None:
        for number in range(first):
            if steps[number].name not in {info.key for info in backend.walk()}:
                key, layer = f"theirs {number}", [BELOW, TOP, IMPLIED][number]
                backend.prepare(key)
                apply_layer([layer], backend.sink(key), diff_id=digest_of(layer))
                real(replace(steps[number], key=key))
        real(*asked)

    monkeypatch.setattr(backend, "commit", beaten)
    with leased(stores.root.meta, "default") as lease:
        held = [replace(step, lease=lease) for step in steps]
        assert commit_all(backend, held) == [number >= first for number in range(3)]
        with stores.root.meta.read() as txn:
            pins = {item.key for item in LEASE_ITEMS.scan(txn, "default", lease)}
        assert {step.name for step in steps} <= pins, "found or made, it is pinned"
    assert {step.name for step in steps} <= {info.key for info in backend.walk()}
    assert b"b/new" in shown(stores, "overlay", steps[1].name)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_commit_stops_at_what_exists(stores: Stores, taken: int) -> None:
    """What was before it counts, what comes after it is not there, and all can be tried again."""
    backend = stores.snapshotter("overlay")
    steps = applied(backend, [BELOW, TOP, IMPLIED])
    backend.prepare("theirs")
    backend.commit(Commit(name=steps[taken].name, key="theirs"))
    with pytest.raises(AlreadyExists, match=steps[taken].name):
        backend.commit(*steps)
    done = {info.key for info in backend.walk()}
    assert [step.name in done for step in steps] == [number <= taken for number in range(3)]
    backend.commit(*steps[taken + 1 :])
    assert {step.name for step in steps} <= {info.key for info in backend.walk()}


@pytest.mark.parametrize("first", [0, 1])
def test_a_commit_that_fails_is_the_error_of_all_that_are_not_there(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    backend = stores.snapshotter("overlay")
    steps = applied(backend, [BELOW, TOP])
    real, error = backend.commit, Unavailable("the disk went away")

    def fails(*_asked: Commit) -> None:
        if first and not any(info.key == steps[0].name for info in backend.walk()):
            backend.prepare("theirs")
            apply_layer([BELOW], backend.sink("theirs"), diff_id=digest_of(BELOW))
            real(replace(steps[0], key="theirs"))
        raise error

    monkeypatch.setattr(backend, "commit", fails)
    assert commit_all(backend, steps) == [False] * first + [error] * (2 - first)


def test_what_is_sealed_before_one_that_cannot_be_counts(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stores.snapshotter("overlay")
    steps = [Commit(name=name, key=name) for name in "abcd"]
    error = Unavailable("the disk went away")
    replies = iter([(2, None), (1, error)])

    async def some(_pool: Pool, _job: object) -> object:
        return next(replies)

    monkeypatch.setattr(backend, "sealing", lambda *_steps, flush=True: [None, None])
    monkeypatch.setattr(Pool, "seal", some)
    committer = committing.Committer(backend, Pool())  # type: ignore[arg-type]

    async def sealed() -> tuple[int, EngineError | None]:
        return await committer._seal(steps, flush=True)

    assert trio.run(sealed) == (3, error)


class SlowPool:
    """Seals once a test lets it: an event for each batch."""

    failures = 0

    def __init__(self) -> None:
        self.batches: list[trio.Event] = []

    async def seal(self, _job: object) -> tuple[int, None]:
        self.batches.append(trio.Event())
        await self.batches[-1].wait()
        return 0, None


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_layer_that_is_given_up_while_it_waits_is_not_committed_and_the_others_are(
    stores: Stores, is_waiting: bool
) -> None:
    """Nor does one that is given up in a batch with another one stop that: both are committed."""
    backend = stores.snapshotter("overlay")
    steps = applied(backend, [BELOW, TOP, IMPLIED])
    told: dict[int, bool] = {}

    async def main() -> None:
        pool, scope = SlowPool(), trio.CancelScope()
        committer = committing.Committer(backend, pool)  # type: ignore[arg-type]

        async def one(number: int) -> None:
            with scope if number == 2 else trio.CancelScope():
                told[number] = await committer.commit(steps[number], unheard, 0)

        async def until(batches: int) -> None:
            while len(pool.batches) < batches:
                await trio.lowlevel.checkpoint()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, 0)
                await until(1)
                for number in (1, 2):  # they wait for the first
                    nursery.start_soon(one, number)
                    await trio.testing.wait_all_tasks_blocked()
                if not is_waiting:
                    pool.batches[0].set()
                    await until(2)
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                pool.batches[0].set()
                await until(2)
                pool.batches[1].set()
        await committer.idle()

    trio.run(main)
    assert told == {0: True, 1: True}
    done = {info.key for info in backend.walk()}
    assert {steps[0].name, steps[1].name} <= done
    assert (steps[2].name in done) is not is_waiting


def test_a_store_is_not_closed_while_a_commit_is_under_way(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it any more, but its thread is in the middle of a transaction."""
    backend = stores.snapshotter("overlay")
    begun, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(*_steps: Commit) -> None:
        begun.set()
        assert may_end.wait(30)
        order.append("committed")

    monkeypatch.setattr(backend, "sealing", lambda *_steps, flush=True: [])
    monkeypatch.setattr(backend, "commit", slow)

    async def let_end() -> None:
        await trio.testing.wait_all_tasks_blocked()
        may_end.set()

    async def main() -> None:
        async with trio.open_nursery() as outside:
            async with open_workshop(stores.root) as workshop, trio.open_nursery() as inside:
                committer = workshop.committer("default", backend)
                inside.start_soon(committer.commit, Commit(name="b", key="a"), unheard, 0)
                await trio.to_thread.run_sync(begun.wait)
                inside.cancel_scope.cancel()
                outside.start_soon(let_end)
            order.append("closed")

    trio.run(main)
    assert order == ["committed", "closed"]
