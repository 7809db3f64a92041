"""Who is at work on a store: each process that has it open and works on it holds a lock on a file.

Sync; safe from any thread. The kernel lets go of a lock with its process, however that ends, and
answers for processes of other pid namespaces too, where a pid says nothing.
"""

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from engine.errors import os_errors
from engine.fs.locks import lock

__all__ = ["Owner", "Owners", "boot_id", "pid_namespace"]


class Owner(msgspec.Struct, frozen=True):
    """Who made a record. The ID tells whether it is alive, the rest is for messages."""

    id: str = ""
    pid: int = 0
    namespace: str = ""

    def __str__(self) -> str:
        here = self.namespace == str(pid_namespace())
        return f"process {self.pid}" + ("" if here else " of another pid namespace")


def pid_namespace() -> int:
    """Return the inode that names this process's pid namespace, 0 where /proc does not tell."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def boot_id() -> str:
    """Return what names this boot of the machine: neither processes nor mounts outlive it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class Owners:
    """The owners of one store: a folder with a locked file for each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Condition()
        self._me: Owner | None = None
        self._held = -1
        self._claims: set[tuple[str, ...]] = set()

    @property
    def me(self) -> Owner:
        """Return this process as an owner, from now on until `close`."""
        with self._lock, os_errors(f"a file in {self._folder}"):
            if self._me is None:
                name, self._held = self._begin()
                self._me = Owner(name, os.getpid(), str(pid_namespace()))
            return self._me

    @contextmanager
    def at_work(self) -> Iterator[Owner]:
        """Give an owner, beside `me`, that lives for the length of a block."""
        me = self.me
        with os_errors(f"a file in {self._folder}"):
            name, held = self._begin()
        try:
            yield Owner(name, me.pid, me.namespace)
        finally:
            self._end(name, held)

    def _begin(self) -> tuple[str, int]:
        """Make and lock the file of an owner; return its ID and the file."""
        while True:
            name = secrets.token_hex(8)
            held = self._locked(name)
            if held is not None:
                return name, held

    def _locked(self, name: str) -> int | None:
        """Make and lock a file; None if a sweep came between the two."""
        flags = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        held = os.open(self._folder / name, flags, 0o600)
        try:
            if lock(held, alone=True) and os.fstat(held).st_nlink:
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)
        return None

    def is_alive(self, name: str) -> bool:
        """Say whether the owner with the ID `name` still runs."""
        with self._looked_at(name) as is_alive:
            return is_alive

    @contextmanager
    def _looked_at(self, name: str) -> Iterator[bool]:
        """Say whether an owner runs; who does not cannot begin to for the length of the block."""
        with os_errors(f"owner {name}"), ExitStack() as inside:
            if not name:
                yield False
                return
            try:
                file = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                yield False
                return
            inside.callback(os.close, file)
            # Not alone: another who looks at the same time would take it for alive.
            yield not lock(file, alone=False)

    def beat(self, owner: Owner) -> None:
        """Have others see that an owner of this process gets on."""
        with suppress(OSError):  # then they wait less long
            os.utime(self._folder / owner.id)

    def beaten(self, owner: Owner) -> int:
        """Return when an owner last got on, 0 where there is none."""
        with suppress(OSError):
            return os.stat(self._folder / owner.id).st_mtime_ns
        return 0

    def any_dead(self) -> bool:
        """Say whether someone died at work: who ends in order takes his file along."""
        with os_errors(str(self._folder)):
            return any(not self.is_alive(name) for name in os.listdir(self._folder))

    def sweep(self) -> None:
        """Remove the files of owners that are dead."""
        with os_errors(str(self._folder)):
            for name in os.listdir(self._folder):
                with self._looked_at(name) as is_alive:
                    if not is_alive:
                        (self._folder / name).unlink(missing_ok=True)

    def claim(self, *what: str) -> bool:
        """Say whether `what` is free in this process, and take it; others see the record's owner."""
        with self._lock:
            if what in self._claims:
                return False
            self._claims.add(what)
            return True

    def release(self, *what: str) -> None:
        """Give back what was claimed."""
        with self._lock:
            self._claims.discard(what)
            self._lock.notify_all()

    def wait_released(self, *what: str, seconds: float) -> bool:
        """Wait so long at most for a claim of this process to be given back; False if there is none."""
        with self._lock:
            return what in self._claims and self._lock.wait_for(
                lambda: what not in self._claims, seconds
            )

    def close(self) -> None:
        """End this process as an owner; may be called again."""
        with self._lock:
            if self._me is not None:
                self._end(self._me.id, self._held)
                self._me = None

    def _end(self, name: str, held: int) -> None:
        with suppress(OSError):  # an unlocked file says the same, and is swept later
            (self._folder / name).unlink()
        os.close(held)
