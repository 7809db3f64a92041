"""The contract of snapshotters: what every backend promises, and the values that cross it.

Sync: values and a protocol, no I/O of its own. A snapshot is active (writable), a view (read-only) or
committed (immutable, may be a parent). Keys of actives and views and names of committed snapshots share
one space. The vocabulary and the error table are containerd's; `engine.testing.snapshotter_suite` checks
a backend against them.

    prepare, view   parent unknown: NotFound; not committed: InvalidArgument; key taken: AlreadyExists
    mounts          unknown: NotFound; committed: FailedPrecondition; the list is stable
    commit          key unknown: NotFound; name taken: AlreadyExists; not active: FailedPrecondition;
                    another parent than at prepare, or one where the backend cannot rebase:
                    InvalidArgument; parent unknown: NotFound, not committed: FailedPrecondition
    remove          unknown: NotFound; has children, or mounted: FailedPrecondition
    stat, update, usage   unknown: NotFound; in doubt since the machine went down: DataLoss

A snapshot made under a lease is work in progress: only the lease keeps it, until it is committed.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import msgspec

from engine.errors import FailedPrecondition
from engine.kv.environment import Environment
from engine.labels import Labels
from engine.mount import Mount
from engine.mounts.table import MountTable

__all__ = [
    "Capabilities",
    "Commit",
    "Durability",
    "Info",
    "Kind",
    "Leftover",
    "Plugin",
    "Probe",
    "Sealing",
    "Snapshotter",
    "Target",
    "Usage",
]


class Kind(StrEnum):
    """The states of a snapshot."""

    ACTIVE = "active"
    VIEW = "view"
    COMMITTED = "committed"


class Durability(StrEnum):
    """When the files of what is committed are made durable."""

    FULL = "full"
    """Before it is committed: what a call has returned survives power loss."""
    LAZY = "lazy"
    """When the kernel likes: the next to open the store after a power loss checks them first."""


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as others see it; times are nanoseconds since the epoch."""

    key: str
    kind: Kind
    parent: str
    created: int
    updated: int
    labels: dict[str, str]


class Usage(msgspec.Struct, frozen=True):
    """What a snapshot itself takes up, parents left out: bytes on disk, and inodes."""

    size: int
    inodes: int


class Leftover(msgspec.Struct, frozen=True):
    """Files of a removed snapshot that could not be deleted yet, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do beyond the contract, and its limits; the core never tests a name."""

    rebase: bool
    """A layer may be applied without its parent, which is then given at commit. Without it, layers are
    prepared on their committed parents one after the other."""
    layers: int
    """How many snapshots may be stacked."""
    name_bytes: int
    """The longest file name."""
    whiteout_names: bool
    """Whether a folder may have a name that begins with `.wh.`."""
    shares: bool = False
    """Whether the data of a layer that was applied before can be that of a snapshot on another base."""

    def check_layers(self, name: str, layers: int) -> None:
        """Raise FailedPrecondition if the backend `name` cannot stack so many."""
        if layers > self.layers:
            raise FailedPrecondition(
                f"{name} stacks at most {self.layers} layers, this image has {layers}; "
                "use another snapshotter for it"
            )


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how a layer is applied directly, with nothing mounted: a value for a worker.

    `sink` names what opens a sink (`engine.diff.layer.Sink`) for `place`, "module:attribute": called
    with `place`, it returns a context manager. What a place is, a folder or one file, is the backend's.
    """

    sink: str
    place: str
    name_bytes: int
    whiteout_names: bool


class Sealing(msgspec.Struct, frozen=True, kw_only=True):
    """The slow half of a commit, a value for a worker.

    `run` names what makes a function, "module:attribute"; a worker makes it once and keeps it. Called
    with `argument` it returns how many of the steps are done and durable, and the error that stopped
    it or None.
    """

    run: str
    argument: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One step of a commit: active `key` becomes `name`, pinned by `lease`.

    `parent` rebases a snapshot that was prepared without one; None keeps what prepare was given.
    `diff_id` says that the caller has verified what layer it is: only that makes its data be reused.
    `blob` is the digest of what was unpacked to verify it, which is labelled in the same transaction.
    """

    name: str
    key: str
    parent: str | None = None
    lease: str = ""
    diff_id: str = ""
    blob: str = ""
    labels: Labels = field(default_factory=dict)


class Snapshotter(Protocol):
    """A backend. Sync; safe from any thread, and from several processes on one root."""

    @property
    def name(self) -> str:
        """The name under which the backend is registered."""

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do."""

    def prepare(
        self, key: str, parent: str = "", *, labels: Labels | None = None, lease: str = ""
    ) -> list[Mount]:
        """Make a writable snapshot and return its mounts."""

    def view(
        self, key: str, parent: str = "", *, labels: Labels | None = None, lease: str = ""
    ) -> list[Mount]:
        """Make a read-only snapshot and return its mounts."""

    def reusable(self, diff_id: str) -> Usage | None:
        """Return what a layer takes up that is here to be reused, None if it is not."""

    def reuse(
        self, key: str, diff_id: str, *, labels: Labels | None = None, lease: str = ""
    ) -> Usage | None:
        """Make an active snapshot that is to have the data of a layer that is here, on any base.

        In place of `prepare` and applying the layer; what it is on its base is worked out by `sealing`.
        Return what it takes up, None if the layer is not here: then nothing was made.
        """

    def sink(self, key: str) -> Target:
        """Return where a layer's entries go, for an active snapshot."""

    def comparing(self, key: str) -> Target:
        """Return where a layer's entries are held against a committed snapshot, with nothing written.

        What its `sink` opens is an `engine.diff.compare.Comparison`.
        """

    def sealing(self, *steps: Commit, flush: bool = True) -> list[Sealing]:
        """Return what may be done elsewhere before `commit` is asked for the same steps.

        Without `flush` their data is left to the kernel, and `commit` notes that (`flush`).
        Nothing for steps that are sealed already, nor from the first on that `commit` will refuse.
        """

    def flushing(self) -> Sealing:
        """Return what may be done elsewhere, again and again, while snapshots are written.

        It makes durable what was written so far, so that a seal finds less to do.
        """

    def flush(self) -> None:
        """Make durable what was committed without that; nothing to do is one look."""

    def commit(self, *steps: Commit) -> None:
        """Commit actives, bottom first, each durable before it is visible; seal what is not sealed.

        Each step stands by itself: when one fails, those before it are committed.
        """

    def replace(self, step: Commit) -> list[Leftover]:
        """Put an active snapshot, with the same layer applied anew, in the place of a committed one.

        Sealed on what that stands on first; whatever stands on it then stands on the new one. Labels
        stay. Return what is left of the old one's files: they wait while they are mounted.
        """

    def measure(self, key: str) -> Usage:
        """Return what is on disk of a snapshot now, whatever its record says. DataLoss without files."""

    def mounts(self, key: str) -> list[Mount]:
        """Return the mounts of an active snapshot or a view."""

    def stat(self, key: str, *, lease: str = "") -> Info:
        """Return what is known of a snapshot; with a lease, pin it in the same step."""

    def update(self, key: str, labels: Labels, paths: Sequence[str] | None = None) -> Info:
        """Set labels, deleting those whose new value is empty.

        With `paths` those become what `labels` has of them: `labels` all, `labels.KEY` one; none, all.
        """

    def usage(self, key: str) -> Usage:
        """Return what a snapshot takes up: measured now for an active one, else as at commit."""

    def walk(self) -> Iterator[Info]:
        """Yield all snapshots; others may write meanwhile."""

    def remove(self, key: str, *, table: MountTable | None = None) -> int:
        """Make a snapshot unreachable; `cleanup` deletes its files, known by the number returned.

        The table of mounts says whether it is in use; read it once for many.
        """

    def cleanup(
        self,
        *,
        only: Collection[int] | None = None,
        table: MountTable | None = None,
        seconds: float = math.inf,
    ) -> list[Leftover]:
        """Delete the files of all removed snapshots, or of some; return what is left for next time.

        That is what resists, and what `seconds` do not suffice for.
        """

    def close(self) -> None:
        """Let go of what the backend holds; may be called again."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a backend works on a root: to unpack, and to mount what was unpacked."""

    unpacks: bool
    mounts: bool
    reason: str = ""
    """Why not, where it does not."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """What the entry point of a backend names."""

    name: str
    create: Callable[[Path, Environment, str], Snapshotter]
    """Called with the backend's own folder, `meta.lmdb` and the namespace."""
    probe: Callable[[Path], Probe]
    """Called with the backend's own folder."""
    rank: int = 100
    """The lowest that mounts here is used where no backend is named."""
