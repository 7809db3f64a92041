"""Who is alive: a lock that the kernel answers for, in this process, others, and other namespaces."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import processes
from engine.content.ingests import BeingWritten
from engine.kv.schema import EXTENT
from engine.processes import Owner, Owners
from tests.processes import kill

_HOLDER = """
import sys
from pathlib import Path
from engine.kv.schema import EXTENT
from engine.metadata.leases import leased
from engine.oci.platform import Platform
from engine.stores import open_stores
with open_stores(Path(sys.argv[1]), "default", Platform()) as stores:
    with leased(stores.root.meta, "default") as lease:
        writer = stores.content.ingest("x", lease=lease, total=2 * EXTENT)
        writer.write(bytes(EXTENT + 1))
        print("ready", flush=True)
        sys.stdin.readline()
"""
_ELSEWHERE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def holder(stores, *prefix: str) -> subprocess.Popen[str]:
    """Start a process that holds a lease and writes an ingest."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-P", "-c", _HOLDER, str(stores.root.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_an_owner_lives_until_it_closes(tmp_path):
    ours, others = Owners(tmp_path), Owners(tmp_path)
    me = ours.me
    assert ours.me is me
    assert others.me.id != me.id
    assert others.is_alive(me.id)
    others.sweep()
    ours.sweep()
    assert len(os.listdir(tmp_path)) == 2
    ours.close()
    assert not others.is_alive(me.id)
    assert os.listdir(tmp_path) == [others.me.id]
    others.close()
    others.close()


def test_a_look_at_a_dead_owner_does_not_make_it_live_for_others(tmp_path):
    """Two processes may look at once: else neither would go on with what the dead one began."""
    (tmp_path / "dead").touch()
    with (tmp_path / "dead").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not Owners(tmp_path).is_alive("dead")


def test_what_has_no_file_is_dead(tmp_path):
    owners = Owners(tmp_path)
    assert not owners.is_alive("")
    assert not owners.is_alive("0123456789abcdef")
    (tmp_path / "left").touch()
    assert not owners.is_alive("left")
    owners.sweep()
    assert os.listdir(tmp_path) == []


def test_a_sweep_that_comes_between_making_and_locking(tmp_path, monkeypatch):
    """The file is gone before it is locked: the owner takes another name."""
    owners, names = Owners(tmp_path), iter(["first", "second"])
    monkeypatch.setattr("engine.processes.secrets.token_hex", lambda _: next(names))
    real = os.open

    def swept(path, *arguments):
        made = real(path, *arguments)
        if str(path).endswith("first"):
            os.unlink(path)
        return made

    monkeypatch.setattr(os, "open", swept)
    assert owners.me.id == "second"
    owners.close()


def test_a_sweep_takes_no_file_that_is_locked_after_its_look(tmp_path, monkeypatch):
    """The owner has made its file before the look, and locks it between that and the removal."""
    ours, others = Owners(tmp_path), Owners(tmp_path)
    real_lock, real_unlink = processes.lock, Path.unlink
    sweeping = []

    def late(file, *, alone):
        if alone and not sweeping:
            sweeping.append(True)
            others.sweep()
        return real_lock(file, alone=alone)

    def unlink(path, missing_ok=False):
        if len(sweeping) == 1:
            sweeping.append(True)
            with path.open("rb") as file:
                assert not real_lock(file.fileno(), alone=True), "it could be locked, and lose its name"
        real_unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(processes, "lock", late)
    monkeypatch.setattr(Path, "unlink", unlink)
    me = ours.me
    assert len(sweeping) == 2
    assert others.is_alive(me.id)
    ours.close()


def test_one_process_claims_a_thing_once(tmp_path):
    owners = Owners(tmp_path)
    assert owners.claim("default", "x")
    assert not owners.claim("default", "x")
    assert owners.claim("other", "x")
    owners.release("default", "x")
    assert owners.claim("default", "x")


def test_an_owner_is_named_with_its_namespace():
    here = os.stat("/proc/self/ns/pid").st_ino
    assert str(Owner("x", 12, str(here))) == "process 12"
    assert str(Owner("x", 12, str(here + 1))) == "process 12 of another pid namespace"


@pytest.mark.root
@pytest.mark.parametrize("prefix", [(), _ELSEWHERE], ids=["here", "another pid namespace"])
def test_who_writes_elsewhere_is_alive_until_it_is_killed(stores, prefix):
    process = holder(stores, *prefix)
    try:
        says = "of another pid namespace" if prefix else f"process {process.pid}"
        with pytest.raises(BeingWritten, match=says):
            stores.content.ingest("x", lease="", total=2 * EXTENT)
        assert not any((stores.collect().ingests, stores.collect().leases))
    finally:
        kill(process)
    with stores.content.ingest("x", lease="", total=2 * EXTENT) as writer:
        assert writer.offset == EXTENT
    assert len(stores.collect().leases) == 1
    assert len(list((stores.root.path / "owners").iterdir())) == 1  # ours
