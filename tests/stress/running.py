"""Runs actors at once on one store, kills some of them, and holds what is left against their notes.

Sync.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.images.states import parts_of
from engine.kv.environment import Transaction
from engine.kv.schema import HOLDINGS, LAYERS, LEASES, MARKS, MENTIONS, SMALL, TOUCHED
from engine.metadata import ledger
from engine.oci.digest import digest_of
from engine.root import Root
from engine.snapshots import Kind
from engine.stores import Stores, open_stores
from engine.testing.archives import archive, layout, member
from tests.command import dump
from tests.conftest import AMD64
from tests.processes import until
from tests.property.naive_closure import parents_missing, world_of
from tests.stress.actor import BACKENDS, Note
from tests.support import tree_of

__all__ = ["Outcome", "stress"]

_STUCK_S = 90.0  # no operation takes so long, not even one that waits for all others
_LIFE_S = (1.0, 4.0)  # of one that is killed


@dataclass
class Outcome:
    """What was done, by operation, and how many processes were killed at it."""

    done: Counter[str] = field(default_factory=Counter)
    killed: int = 0


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    log: Path
    until: float


def images(folder: Path) -> Path:
    """Write small images that share layers, and a broken one beside them."""
    source = random.Random("images")
    shared = [
        archive(
            *(member(f"base/{n}", data=source.randbytes(source.randrange(20_000))) for n in range(30))
        ),
        archive(member("base/.wh.1"), member("middle/file", data=source.randbytes(1 << 20))),
    ]
    for number in range(16):
        own = archive(member(f"own/{number}", data=source.randbytes(50_000)), member("base/2", "5"))
        layout(folder / "whole" / f"image{number:02}", [*shared[: number % 3], own])
    layout(folder / "broken", [*shared, archive(member("x"))], diff_ids=[digest_of(b"")] * 3)
    return folder / "whole"


def stress(folder: Path, *, seconds: float, processes: int, seed: str = "stress") -> Outcome:
    """Let processes work for so long, of which every other one is killed again and again; check."""
    root, sources = folder / "root", images(folder)
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    outcome = Outcome()
    number = 0
    logs: list[Path] = []

    def start(slot: int) -> _Running:
        nonlocal number
        number += 1
        log = folder / f"log{number}"
        logs.append(log)
        left = max(end - time.monotonic(), 0.1)
        dies = time.monotonic() + chance.uniform(*_LIFE_S) if slot % 2 else end + _STUCK_S
        words = [str(root), str(sources), str(log), f"{seed}{number}", str(left)]
        return _Running(
            subprocess.Popen(
                [sys.executable, "-m", "tests.stress.actor", *words],
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd=Path(__file__).parents[2],
            ),
            log,
            dies,
        )

    running = [start(slot) for slot in range(processes)]
    try:
        while time.monotonic() < end:
            for slot, one in enumerate(running):
                _check_moving(one)
                if time.monotonic() > one.until:
                    one.process.kill()
                    one.process.communicate()
                    outcome.killed += 1
                    running[slot] = start(slot)
            time.sleep(0.01)
        for one in running:
            _, errors = one.process.communicate(timeout=_STUCK_S)
            assert one.process.returncode == 0, errors.decode()
    finally:
        for one in running:
            if one.process.returncode is None:
                one.process.kill()
                one.process.communicate()
    until(lambda: not _left(root))
    notes = [list(_notes(log)) for log in logs]
    outcome.done.update(note.operation for log in notes for note in log if note.is_done)
    check(folder, root, notes)
    return outcome


def _check_moving(one: _Running) -> None:
    """Fail where a process has ended before its time, or its last operation takes too long."""
    code = one.process.poll()
    if code not in {None, 0}:
        _, errors = one.process.communicate()
        raise AssertionError(f"a process ended with {code}: {errors.decode()}")
    if code is None and one.log.exists() and time.time() - one.log.stat().st_mtime > _STUCK_S:
        raise AssertionError(f"stuck in {list(_notes(one.log))[-1:]}")


def _left(root: Path) -> list[str]:
    """Return the processes that have a file of a store open: workers of those that were killed."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if int(link.parts[2]) != os.getpid() and os.readlink(link).startswith(f"{root}/"):
                found.append(link.parts[2])
        except OSError:
            continue
    return found


def _notes(log: Path) -> Iterator[Note]:
    decoder = msgspec.json.Decoder(Note)
    for line in log.read_bytes().splitlines() if log.exists() else []:
        yield decoder.decode(line)


# -- the check ----------------------------------------------------------------------------------


@dataclass
class _Expected:
    """What one process was told that there is, and has not taken back since."""

    named: dict[str, str] = field(default_factory=dict)
    unpacked: set[tuple[str, str]] = field(default_factory=set)
    prepared: dict[str, str] = field(default_factory=dict)
    leased: dict[str, str] = field(default_factory=dict)
    labelled: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    """Names, keys and leases that were taken back."""

    def take(self, note: Note) -> None:
        places = {"name": self.named, "prepare": self.prepared, "lease": self.leased}
        ending = {"unname": self.named, "release": self.prepared, "end": self.leased}
        if note.operation in places and note.is_done:
            places[note.operation][note.key] = note.value
        elif note.operation in ending:  # if it was killed at it, nobody knows
            ending[note.operation].pop(note.key, None)
            if note.is_done:
                self.gone.add(note.key)
        elif note.operation == "unpack" and note.is_done:
            self.unpacked.add((note.key, note.value))
        elif note.operation == "label" and note.is_done:
            self.labelled[note.key] = note.value


def check(folder: Path, root: Path, notes: list[list[Note]]) -> None:
    """Check that what was acknowledged is there, and that a store is whole and can be emptied."""
    with open_stores(root, "default", AMD64) as stores:
        collected = stores.collect()
        assert not collected.errors, collected.errors
        assert not collected.left, collected.left
        for log in notes:
            expected = _Expected()
            for note in log:
                expected.take(note)
            _check_acknowledged(stores, expected)
        _check_trees(stores, folder)
        _check_records(stores)
        checked = stores.check()
        assert not checked.left, checked.left
    _check_files(root)
    with open_stores(root, "default", AMD64) as stores:
        for backend in stores.snapshotters():
            for info in list(backend.walk()):
                if info.kind is not Kind.COMMITTED:
                    stores.release(info.key, backend.name)
        for lease in stores.leases.walk():
            stores.leases.delete(lease.id)
        for image in stores.images.walk():
            stores.images.remove(image.name)
        stores.collect()
    left = {table: records for table, records in dump(root).items() if records}
    assert left == {}


def _check_acknowledged(stores: Stores, expected: _Expected) -> None:
    for name in expected.named:
        image = stores.resolve(stores.images.get(name).target)
        for part in (*image.path, image.manifest.config, *image.manifest.layers):
            stores.content.verify(part.key)
    for name, backend in expected.unpacked:
        if name in expected.named:
            image = stores.resolve(stores.images.get(name).target)
            assert backend in parts_of(stores, image).unpacked, f"{name} is not unpacked for {backend}"
    for key, value in expected.prepared.items():
        backend = value.partition(" ")[0]
        assert stores.snapshotter(backend).stat(key).kind is Kind.ACTIVE
    for lease, digest in expected.leased.items():
        assert [one.id for one in stores.leases.resources(lease)] == [digest]
        stores.content.verify(stores.content.find(digest))
    for label, name in expected.labelled.items():
        if name in expected.named:
            blob = stores.content.info(stores.images.get(name).target.key)
            assert blob.labels[label] == name
    there = {image.name for image in stores.images.walk()}
    there |= {lease.id for lease in stores.leases.walk()}
    there |= {info.key for backend in stores.snapshotters() for info in backend.walk()}
    assert not there & expected.gone


def _check_trees(stores: Stores, folder: Path) -> None:
    """Check that the backends agree on every tree."""
    seen: dict[str, object] = {}
    for image in stores.images.walk():
        resolved = stores.resolve(image.target)
        for backend, top in parts_of(stores, resolved).unpacked.items():
            tree = tree_of(stores, backend, top, folder / "mnt")
            assert seen.setdefault(top, tree) == tree, f"{backend} has another tree of {top}"


def _check_records(stores: Stores) -> None:
    meta = stores.root.meta
    with meta.read() as txn:
        world = world_of(txn, stores.namespace, BACKENDS, meta.owners.me.id, time.time_ns())
        assert not parents_missing(world)
        assert not MARKS.scan(txn)
        assert not TOUCHED.scan(txn)
        assert all(lease.owner is None for lease in LEASES.scan(txn)), "a lease of the dead"
    with meta.write() as txn:
        edges = _edges(txn)
        ledger.rebuild(txn)
        assert _edges(txn) == edges


def _edges(txn: Transaction) -> list[list[tuple[bytes, bytes]]]:
    found = []
    for table in (MENTIONS, HOLDINGS, LAYERS):
        with txn.raw.cursor(db=txn.databases[table.name]) as cursor:
            found.append([(bytes(key), bytes(value)) for key, value in cursor])
    return found


def _check_files(root: Path) -> None:
    """Check that there are no bytes, folders or owners that no record needs."""
    left = dump(root)
    assert left["ingests"] == left["trash"] == left["marks"] == left["touched"] == []
    extents = {int.from_bytes(key[:8], "big") for key, _ in left["extents"]}
    with Root(root) as opened, opened.meta.read() as txn:
        small = set(SMALL.numbers(txn))
    assert extents | small == {blob["number"] for blob in left["blobs"]}
    assert not extents & small
    folders = {snapshot["id"] for snapshot in left["snapshots"]}  # which those of one layer share
    assert len(left["folders"]) == len(folders), left["folders"]
    with Root(root) as opened:
        assert list((opened.path / "owners").iterdir()) == []
