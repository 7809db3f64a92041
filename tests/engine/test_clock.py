"""GC-17: what expires when the clock is set anew, within a boot and over one."""

import pytest

from engine.gc import clock as clocks
from engine.gc.collect import collect
from engine.gc.survey import Places
from engine.kv import keys
from engine.kv.schema import CLOCKS, Clock, Ingest, Lease
from engine.metadata import ledger
from engine.metadata.nodes import LEASE, Node
from engine.processes import Owner
from engine.snapshots import Commit
from engine.times import rfc3339
from tests.engine.image_files import records

S = 10**9
HOUR = 3600 * S
TEN_YEARS = 10 * 365 * 24 * HOUR
START = Clock(boot="a", boottime=50 * S, wall=1_800_000_000 * S)
PLACES = Places(namespace="default", backends=())


class Time:
    """The clocks of a machine that tests set."""

    def __init__(self, monkeypatch):
        self.now = START
        monkeypatch.setattr(clocks, "read", lambda: self.now)

    def passes(self, seconds: int, jump: int = 0) -> None:
        """Let time pass, and set the clock by `jump` nanoseconds."""
        ns = seconds * S
        wall, boottime = self.now.wall + ns + jump, self.now.boottime + ns
        self.now = Clock(boot=self.now.boot, boottime=boottime, wall=wall)

    def reboots(self, wall: int) -> None:
        self.now = Clock(boot=self.now.boot + "+", boottime=5 * S, wall=wall)


@pytest.fixture
def time(monkeypatch):
    return Time(monkeypatch)


def lease_until(stores, name, when):
    with stores.root.meta.write() as txn:
        lease = Lease(id=name, created=1, labels={"containerd.io/gc.expire": rfc3339(when)})
        ledger.put(txn, "default", lease)


def leases(stores):
    with stores.root.meta.read() as txn:
        return {record.id for record in ledger.table_of(LEASE).scan(txn, "default")}


def test_p11_what_expires_on_a_clock_that_runs(stores, time):
    lease_until(stores, "x", START.wall + HOUR)
    collected = collect(stores.root.meta, PLACES)
    assert (leases(stores), collected.expires) == ({"x"}, START.wall + HOUR)
    time.passes(3599)
    assert not collect(stores.root.meta, PLACES).leases
    time.passes(1)
    assert collect(stores.root.meta, PLACES).leases == ["x"]


@pytest.mark.parametrize("jump", [TEN_YEARS, HOUR, 61 * S])
def test_gc_17_a_jump_ahead_deletes_nothing_for_a_quarter_of_an_hour(stores, time, jump):
    lease_until(stores, "x", START.wall + 30 * S)
    collect(stores.root.meta, PLACES)
    time.passes(10, jump)
    collected = collect(stores.root.meta, PLACES)
    assert (leases(stores), collected.leases) == ({"x"}, [])
    assert collected.expires == time.now.wall + 900 * S
    assert "believed in 900 s" in collected.errors[0]
    time.passes(899)
    collect(stores.root.meta, PLACES)
    assert leases(stores) == {"x"}
    time.passes(1)
    assert collect(stores.root.meta, PLACES).leases == ["x"]


def test_a_jump_ahead_that_is_taken_back_has_harmed_nothing(stores, time):
    lease_until(stores, "x", START.wall + HOUR)
    collect(stores.root.meta, PLACES)
    time.passes(10, TEN_YEARS)
    collect(stores.root.meta, PLACES)
    time.passes(10, -TEN_YEARS)
    collect(stores.root.meta, PLACES)
    time.passes(901)
    collect(stores.root.meta, PLACES)
    assert leases(stores) == {"x"}
    time.passes(3600)
    assert collect(stores.root.meta, PLACES).leases == ["x"]


@pytest.mark.parametrize("jump", [-TEN_YEARS, -HOUR])
def test_p11_gc_17_a_jump_back_deletes_nothing_early(stores, time, jump):
    collect(stores.root.meta, PLACES)
    time.passes(10, jump)
    lease_until(stores, "new", time.now.wall + 1200 * S)  # by the clock that is right, or by neither
    lease_until(stores, "old", START.wall + 60 * S)
    for _ in range(4):
        collect(stores.root.meta, PLACES)
        assert leases(stores) == {"old", "new"}
        time.passes(299)
    time.passes(10)
    assert collect(stores.root.meta, PLACES).leases == ["new"]
    assert leases(stores) == {"old"}


def test_small_steps_of_a_time_service_are_none(stores, time):
    lease_until(stores, "x", START.wall + 100 * S)
    collect(stores.root.meta, PLACES)
    for jump in (-59 * S, 59 * S, S):
        time.passes(40, jump)
        collected = collect(stores.root.meta, PLACES)
        assert not collected.errors
    assert collected.leases == ["x"]


def test_over_a_boot_only_a_time_before_the_last_is_doubted(stores, time):
    lease_until(stores, "x", START.wall + HOUR)
    collect(stores.root.meta, PLACES)
    time.reboots(START.wall - 10 * HOUR)
    assert collect(stores.root.meta, PLACES).errors
    time.reboots(START.wall + 2 * HOUR)  # in the time of doubt: it begins anew
    assert collect(stores.root.meta, PLACES).errors
    assert leases(stores) == {"x"}
    time.passes(900)
    assert collect(stores.root.meta, PLACES).leases == ["x"]


def test_a_machine_may_have_been_off_for_ten_years(stores, time):
    lease_until(stores, "x", START.wall + HOUR)
    collect(stores.root.meta, PLACES)
    time.reboots(START.wall + TEN_YEARS)
    assert collect(stores.root.meta, PLACES).leases == ["x"]


def test_ingests_and_conditions_wait_too(stores, time):
    condition = {
        "containerd.io/gc.root": "yes",
        "containerd.io/gc.cond.snapshot.copy": "usedat<1h|layer",
    }
    with stores.content.ingest("holder", lease="") as writer:
        writer.write(b"holder")
        writer.commit(condition)
    backend = stores.snapshotter("copy")
    backend.prepare("key")
    backend.commit(Commit(name="layer", key="key"))
    backend.update("layer", {"containerd.io/gc.cond.value-usedat": rfc3339(START.wall)})
    with stores.root.meta.write() as txn:
        ingest = Ingest(
            ref="idle", number=9, total=None, expected=None, owner=Owner("dead"), lease="",
            started=1, expires=START.wall + HOUR,
        )  # fmt: skip
        ledger.put(txn, "default", ingest)
    places = Places(namespace="default", backends=["copy"])
    collect(stores.root.meta, places)
    time.passes(10, TEN_YEARS)
    collected = collect(stores.root.meta, places)
    assert (collected.ingests, collected.snapshots) == ([], [])
    time.passes(900)
    collected = collect(stores.root.meta, places)
    assert collected.ingests == ["idle"]
    assert collected.snapshots == [Node("snapshots", "copy", "layer")]


def test_a_note_that_cannot_be_read_is_a_reason_to_doubt(stores, time):
    lease_until(stores, "x", START.wall - HOUR)
    with stores.root.meta.write() as txn:
        txn.raw.put(keys.encode(["last"]), b"?", db=txn.databases["clocks"])
    assert collect(stores.root.meta, PLACES).errors
    assert leases(stores) == {"x"}
    time.passes(900)
    assert collect(stores.root.meta, PLACES).leases == ["x"]


def test_a_dry_run_notes_nothing(stores, time):
    collect(stores.root.meta, PLACES)
    before = records(stores)
    time.passes(10, TEN_YEARS)
    collect(stores.root.meta, PLACES, dry_run=True)
    assert records(stores) == before


def test_the_real_clocks(stores):
    first = clocks.read()
    second = clocks.told(first, clocks.read())
    assert second.boot == first.boot
    assert not second.is_doubted
    collect(stores.root.meta, PLACES)
    with stores.root.meta.read() as txn:
        noted = CLOCKS.get(txn, "last")
    assert noted is not None
    assert not noted.is_doubted
