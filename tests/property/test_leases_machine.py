"""Leases against dictionaries: who holds what, for how long, and what a collection leaves of it."""

import itertools
from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from engine.errors import AlreadyExists, FailedPrecondition, NotFound
from engine.kv.schema import Ingest, Lease
from engine.metadata import ledger
from engine.metadata.nodes import LEASE, Node
from engine.metadata.resources import Resource
from engine.processes import Owner
from engine.times import rfc3339
from tests.clocks import HOUR
from tests.property.records_machine import BLOBS, EXPIRE, FLAT, RecordsMachine, digest

IDS = st.sampled_from(["a", "ab", "b"])
REFS = st.sampled_from(["r", "s"])
LIVES = st.sampled_from([None, HOUR, 24 * HOUR])
_DEAD = Owner(id="dead", pid=1, namespace="1")


class LeaseMachine(RecordsMachine):
    """Leases of callers, of this process's work and of a dead one's; blobs and ingests in them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()

    @rule(name=IDS, life=LIVES, flat=st.booleans(), data=st.data())
    def create(self, name: str, life: int | None, flat: bool, data: Any) -> None:
        labels = {**self.labels(data), **({FLAT: ""} if flat else {})}
        labels = {key: value or "x" for key, value in labels.items()}
        try:
            lease = self.stores.leases.create(name, life=life, labels=labels)
        except AlreadyExists:
            assert name in self.model.leases
            return
        assert name not in self.model.leases
        expires = {} if life is None else {EXPIRE: rfc3339(self.model.at + life)}
        assert lease.labels == expires | labels
        self.model.leases[name] = (True, lease.labels)
        self.model.members[name] = set()
        assert self.stores.leases.is_live(lease) == self.model.is_live(name)

    @rule(name=IDS)
    def delete(self, name: str) -> None:
        try:
            self.stores.leases.delete(name)
        except NotFound:
            assert name not in self.model.leases
            return
        del self.model.leases[name], self.model.members[name]

    @precondition(lambda self: self.model.leases)
    @rule(blob=BLOBS, adds=st.booleans(), data=st.data())
    def hold(self, blob: str, adds: bool, data: Any) -> None:
        """GC-05: what is not there yet may be held, too."""
        name = data.draw(st.sampled_from([*sorted(self.model.leases) * 5, "a"]))
        change = self.stores.leases.add if adds else self.stores.leases.remove
        try:
            change(name, Resource("content", digest(blob)))
        except NotFound:
            assert name not in self.model.leases
            return
        held = ("content", "", digest(blob))
        self.model.members[name] = self.model.members[name] - {held} | ({held} if adds else set())

    # -- work -----------------------------------------------------------------------------

    @rule(dead=st.booleans())
    def begin(self, dead: bool) -> None:
        name = f"{'dead' if dead else 'work'}-{next(self.numbers)}"
        owner = _DEAD if dead else self.root.owners.me
        with self.root.meta.write() as txn:
            ledger.put(txn, "default", Lease(id=name, created=self.model.at, owner=owner))
        self.model.leases[name] = (not dead, {})
        self.model.members[name] = set()

    def works(self) -> list[str]:
        return sorted(name for name in self.model.leases if name.startswith(("work", "dead")))

    @precondition(works)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        """GC-14: only the owner ends the lease of work, or who finds it dead."""
        name = data.draw(st.sampled_from(self.works()))
        alive, _ = self.model.leases[name]
        if alive:
            with pytest.raises(FailedPrecondition, match="which is at work"):
                self.stores.leases.delete(name)
            with self.root.meta.write() as txn:
                ledger.drop(txn, "default", Node(LEASE, "", name))
        else:
            self.stores.leases.delete(name)
        del self.model.leases[name], self.model.members[name]

    @precondition(works)
    @rule(data=st.data(), heir=IDS)
    def take_over(self, data: Any, heir: str) -> None:
        work = data.draw(st.sampled_from(self.works()))
        held = self.stores.leases.members(work)
        assert set(held) == self.model.members[work]
        try:
            self.stores.leases.take_over(heir, held)
        except NotFound:
            assert heir not in self.model.leases
            return
        whole = {one for one in self.model.members[work] if one[2] in self.model.blobs}
        event(f"took over {'something' if whole else 'nothing'}")
        self.model.members[heir] |= whole

    @rule(ref=REFS, expected=st.none() | BLOBS, dead=st.booleans(), data=st.data())
    def ingest(self, ref: str, expected: str | None, dead: bool, data: Any) -> None:
        """GC-06: an ingest stays while its owner or its lease lives, and for a day."""
        lease = self.lease(data)
        ingest = Ingest(
            ref=ref,
            number=1,
            total=None,
            expected=digest(expected) if expected else None,
            owner=_DEAD if dead else self.root.owners.me,
            lease=lease,
            started=self.model.at,
            expires=self.model.at + 24 * HOUR,
        )
        with self.root.meta.write() as txn:
            ledger.put(txn, "default", ingest)
            ledger.pin(txn, "default", lease, Node("ingests", "", ref), made=True)
        self.model.ingests[ref] = (ingest.expires, not dead, ingest.expected or "")
        self.join(lease, ("ingests", "", ref))


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(
    settings.default, max_examples=2 * settings.default.max_examples, stateful_step_count=30
)
