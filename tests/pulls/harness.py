"""Kills a pull at a moment, and checks what it leaves and what the next pull fetches.

Sync. A moment is so many requests or bytes that the registry has seen, or so many calls of a kind that
the command has made; never a time. The registry counts: what was durable is not fetched again.
"""

import random
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection, socket

from engine import labels
from engine.errors import NotFound
from engine.images.states import parts_of
from engine.kv.schema import EXTENT
from engine.labels import Labels
from engine.stores import Stores, host_platform, open_stores
from engine.testing.archives import archive, member
from engine.testing.fake_registry import Asked, FakeRegistry
from tests.command import LAMINA, dump, environment, lamina, lamina_json
from tests.conftest import peer
from tests.processes import Victim, until
from tests.registry.asking import Served

__all__ = ["CALLS", "Moment", "Pullable", "assert_gone_on_with", "killed", "moments", "pullable"]

CALLS = ("pwrite64", "fdatasync", "fsync", "rename", "mkdir", "openat", "recvfrom", "utimensat")
_BYTES = 17 << 20  # of the image
_MOST = {
    "bytes": _BYTES,
    "requests": 7,
    "pwrite64": 60,
    "fdatasync": 20,
    "fsync": 8,
    "rename": 2,
    "mkdir": 12,
}
_TIMEOUT_S = 120
_PIECE = 64 << 10
_FOREVER = 1 << 60
_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")
_WORKER_DIED = 7


@dataclass(frozen=True)
class Moment:
    """When a pull dies: at the `count`-th of `what`, which is requests, bytes or a system call."""

    what: str
    count: int
    collects: bool
    """Whether the store is collected before the next pull."""

    def __str__(self) -> str:
        return f"{self.what}-{self.count}{'-gc' if self.collects else ''}"


@dataclass(frozen=True)
class Pullable:
    """An image in a registry that counts, and what a store has after an undisturbed pull."""

    served: Served
    clean: Mapping[str, object]

    @property
    def registry(self) -> FakeRegistry:
        return self.served.registry

    @property
    def name(self) -> str:
        return str(self.served.reference)

    @property
    def words(self) -> tuple[str, ...]:
        return ("pull", "--platform", "linux/amd64", "--snapshotter", "overlay", self.name)


@contextmanager
def pullable(folder: Path) -> Iterator[Pullable]:
    """Serve an image of layers of some extents and of less than one; `folder` is for a store."""
    source = random.Random("pulls")
    sizes = (13 * EXTENT + 77, 3 * EXTENT, 100, EXTENT // 2)
    layers = tuple(
        archive(*(member(f"{n}-{m}", data=source.randbytes(size // 4)) for m in range(4)))
        for n, size in enumerate(sizes)
    )
    with FakeRegistry().running() as registry:
        served = Served(registry, layers)
        made = Pullable(served, {})
        lamina(folder / "clean", *made.words)
        yield Pullable(served, _content(folder / "clean"))


def moments(seed: str, count: int) -> list[Moment]:
    """Return so many moments of all kinds."""
    source = random.Random(seed)
    found = []
    for number in range(count):
        what = ("bytes", "requests", "bytes", source.choice(CALLS))[number % 4]
        most = _MOST.get(what, 200)
        found.append(Moment(what, source.randint(1, most), source.random() < 0.5))
    return found


# -- to be killed -----------------------------------------------------------------------------------


class _Watch:
    """Sends what is right in pieces, and kills a victim when enough was asked or sent."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._lock = threading.Lock()
        self._seen = 0
        self._has_victim = threading.Event()
        self._victim: Victim | None = None

    def point_at(self, victim: Victim) -> None:
        self._victim = victim
        self._has_victim.set()

    def _is_enough(self, what: str, count: int) -> bool:
        with self._lock:
            self._seen += count if what == self._moment.what else 0
            enough = self._seen >= self._moment.count
        if enough:
            self._has_victim.wait()
            assert self._victim
            with suppress(ProcessLookupError):
                self._victim.process.kill()
        return enough

    def __call__(self, connection: socket, _asked: Asked, good: bytes) -> bool:
        """Answer as a fault does; say whether the connection stays."""
        if self._is_enough("requests", 1):
            return False
        head, gap, body = good.partition(b"\r\n\r\n")
        connection.sendall(head + gap)
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            connection.sendall(piece)
            if self._is_enough("bytes", len(piece)):
                return False
        return True


@contextmanager
def _answering(registry: FakeRegistry, watch: _Watch) -> Iterator[None]:
    registry.plan("", watch, times=_FOREVER)
    try:
        yield
    finally:
        registry._planned.clear()


def killed(image: Pullable, root: Path, moment: Moment) -> bool:
    """Pull into a new store until that moment; say whether it came before the end."""
    if moment.what in {"bytes", "requests"}:
        watch = _Watch(moment)
        with _answering(image.registry, watch):
            victim = Victim(root, image.words)
            watch.point_at(victim)
            code, messages = victim.wait()
    else:
        code, messages = _traced(image, root, moment)
    assert code in {0, -signal.SIGKILL, _WORKER_DIED}, messages
    _settle(image.registry)
    return code != 0


def _settle(registry: FakeRegistry) -> None:
    """Wait until the registry has read all that the dead one had sent, also by its last connection."""
    with create_connection(("127.0.0.1", registry.port)) as probe:
        probe.sendall(b"GET /v2/ HTTP/1.1\r\n\r\n")
        assert probe.recv(1)  # those who came before were let in before
    until(lambda: not registry._open)


def _traced(image: Pullable, root: Path, moment: Moment) -> tuple[int, str]:
    inject = f"inject={moment.what}:signal=KILL:when={moment.count}"
    trace = ["-f", "-qq", "-o", root.with_name("trace"), "-e", f"trace={moment.what}", "-e", inject]
    done = subprocess.run(
        [peer("strace"), *trace, *LAMINA, "--root", root, *image.words],
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
        env=environment(),
    )
    return done.returncode, done.stderr


# -- and after it -----------------------------------------------------------------------------------


def assert_gone_on_with(image: Pullable, root: Path, moment: Moment) -> None:
    """Check what is left of a pull that was killed, pull again, and check that too."""
    had: dict[str, int] = {}
    with suppress(NotFound):  # it died before there was a store
        had = _left(root, collects=moment.collects)
    image.registry.asked.clear()
    lamina(root, *image.words)
    for digest, fetched in _fetched(image).items():
        size = len(image.registry.content[f"/a/blobs/{digest}"][1])
        assert fetched <= size - had.get(digest, 0), f"{digest}: {fetched} of {size}, had {had}"
    lamina(root, "fsck")
    assert lamina_json(root, "gc")["blobs"] == []
    assert _content(root) == image.clean
    left = dump(root)
    for table in ("ingests", "leases", "lease_items", "trash"):
        assert left[table] == [], table
    assert len(left["folders"]) == len(left["snapshots"]), left["folders"]


def _left(root: Path, *, collects: bool) -> dict[str, int]:
    """Check that nothing is half done; return how much of each blob there is for certain."""
    had = _durable(root)
    if collects:
        lamina(root, "gc")
        assert _durable(root) == had, "a collection took what the next pull goes on with"
    with _opened(root) as stores:
        for named in stores.images.walk():
            resolved = stores.resolve(named.target)
            for part in (*resolved.path, resolved.manifest.config, *resolved.manifest.layers):
                stores.content.verify(part.key)
            assert "overlay" in parts_of(stores, resolved).unpacked, "named before it was unpacked"
    return had


def _durable(root: Path) -> dict[str, int]:
    with _opened(root) as stores:
        found = {str(one.expected): one.offset for one in stores.content.statuses() if one.offset}
        return found | {blob.digest: blob.size for blob in stores.content.walk()}


def _opened(root: Path) -> AbstractContextManager[Stores]:
    return open_stores(root, "default", host_platform(), create=False)


def _fetched(image: Pullable) -> Counter[str]:
    """Return how many bytes of each blob were asked for."""
    found: Counter[str] = Counter()
    for asked in image.registry.asked:
        kind, _, digest = asked.path.rpartition("/")
        if asked.method == "GET" and kind.endswith("/blobs"):
            size = len(image.registry.content[f"/a/blobs/{digest}"][1])
            part = _RANGE.match(asked.headers.get("range", "bytes=0-"))
            assert part, asked
            found[digest] += (int(part[2]) + 1 if part[2] else size) - int(part[1])
    return found


def _content(root: Path) -> Mapping[str, object]:
    """Return what a store holds, by names alone."""
    with _opened(root) as stores:
        return {
            "images": {image.name: image.target for image in stores.images.walk()},
            "blobs": {blob.digest: _timeless(blob.labels) for blob in stores.content.walk()},
            "snapshots": sorted(info.key for info in stores.snapshotter("overlay").walk()),
        }


def _timeless(found: Labels) -> dict[str, str]:
    """Return labels, of which those that tell times have none."""
    return {key: "" if key.startswith(labels.PULLED_WITH) else value for key, value in found.items()}
