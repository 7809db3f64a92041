"""One LMDB file: opened once per process, with read and write transactions.

Sync; safe from any thread. A write transaction belongs to the thread that began it and is never open
across slow work. LMDB's defaults (sync, metasync, no writemap) stay: what a commit returned survives
power loss, and a full disk is an error, not a SIGBUS. A process that was forked from one with an open
environment must not touch it; lamina only starts helpers by exec.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lmdb

from engine.errors import FailedPrecondition, PermissionDenied, ResourceExhausted, os_errors
from engine.fs.kernel import release_mapped
from engine.kv import turn
from engine.kv.faults import OUTGROWN, is_of_the_disk, mapped
from engine.kv.freelist import pages_of_tree
from engine.kv.gate import Gate
from engine.kv.growth import ROOM, grow
from engine.kv.opening import HEADROOM, allocate_lock, is_unmade, make_file, open_file
from engine.kv.turn import Turn
from engine.kv.whole import check_length
from engine.processes import Owners

__all__ = ["Environment", "Transaction"]

_open: set[tuple[int, int]] = set()  # folders: LMDB must not open a file twice in a process
_open_lock = threading.Lock()


class Transaction:
    """A running transaction over the tables of one environment.

    `changes` are the records that it wrote and removed: each takes pages, which the commit writes.
    `noted` is what whoever listens is told once it is committed; None where nobody does.
    """

    __slots__ = ("changes", "databases", "noted", "raw")

    def __init__(self, raw: lmdb.Transaction, databases: dict[str, "lmdb._Database"]) -> None:
        self.changes = 0
        self.noted: list[Any] | None = None
        self.raw = raw
        self.databases = databases


class Environment:
    """An open LMDB file, a folder of its own at `path`."""

    def __init__(
        self,
        path: Path,
        *,
        map_bytes: int,
        tables: Sequence[str] = (),
        readonly: bool = False,
        owners: Owners | None = None,
        grows_ahead: bool = False,
    ) -> None:
        """Open `path` and its named tables, making what is missing unless `readonly`.

        `map_bytes` is address space, not disk: the file grows as it is written. Where so much cannot
        be had the map is smaller, and grows when it must. A file that `grows_ahead` is for many small
        transactions.
        """
        self.readonly = readonly
        self.owners = owners or Owners(path)
        self.path = path
        self._hearers: tuple[Callable[[list[Any]], None], ...] = ()
        self._map_bytes = map_bytes
        self._tables = tables
        self._gate = Gate()
        self._ahead = path / "data.mdb" if grows_ahead else None
        self._length = 0  # that the file of this name has at least
        with mapped(path), os_errors(f"store {path}"), ExitStack() as undo:
            self._register(undo)
            allocate_lock(path, readonly=readonly)
            if readonly:
                self._turn = None
                self._open()
                undo.callback(self._close_file)
            else:
                self._turn = Turn(path)
                undo.callback(self._turn.close)
                # Who makes nothing waits for nobody: a bulk write holds up no record.
                with self._turn.taken() if tables or is_unmade(path) else nullcontext():
                    make_file(path)
                    self._open()
                undo.callback(self._close_file)
                self.check_readers()
            self._close = undo.pop_all()

    def _register(self, undo: ExitStack) -> None:
        info = self.path.stat()
        identity = (info.st_dev, info.st_ino)
        with _open_lock:
            if identity in _open:
                raise FailedPrecondition(
                    f"store {self.path}: open in this process; share one engine instead"
                )
            _open.add(identity)
        undo.callback(_open.discard, identity)

    def _open(self) -> None:
        env = open_file(
            self.path, map_bytes=self._map_bytes, tables=len(self._tables), readonly=self.readonly
        )
        try:
            check_length(self.path / "data.mdb", page=env.stat()["psize"])
            self._databases = dict(self._open_tables(env))
        except BaseException:
            env.close()
            raise
        self._env = env
        self._is_doubtful = False
        self._mapped_bytes: int = env.info()["map_size"]
        self.page: int = env.stat()["psize"]

    def _open_tables(self, env: lmdb.Environment) -> Iterator[tuple[str, "lmdb._Database"]]:
        if not self.readonly:
            # In one write transaction: LMDB publishes handles only when such a one commits. It
            # writes nothing where all tables exist.
            with env.begin(write=bool(self._tables)) as txn:
                for name in self._tables:
                    yield name, env.open_db(name.encode(), txn=txn)
            return
        for name in self._tables:
            try:
                yield name, env.open_db(name.encode(), create=False)
            except lmdb.NotFoundError:
                continue  # of a later version: nothing was ever in it

    def close(self) -> None:
        """Close the file; transactions of it must have ended. May be called again."""
        self._close.close()

    def _close_file(self) -> None:
        self._env.close()  # the one that is open by then: see `_map_anew`

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """Give a consistent view. Values are memoryviews on the map, dead when the block ends."""
        with mapped(self.path), self._begun(write=False) as txn:
            yield txn

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Give the one writer's view; commit when the block ends, undo all of it on an error.

        Raises Unavailable when another writer does not come to an end.
        """
        if self._turn is None:
            raise PermissionDenied(f"store {self.path}: opened read-only")
        with mapped(self.path), self._turn.taken():
            is_tight = self._mapped_bytes < self._map_bytes and self._room() < HEADROOM
            if is_tight or self._is_doubtful:
                self._map_anew()
            if self._is_doubtful:  # someone here does not end his reading
                raise lmdb.PanicError("MDB_PANIC")
            if self._ahead is not None and (used := self._used() + ROOM) > self._length:
                self._length = grow(self._ahead, used)
            try:
                with self._begun(write=True) as txn:
                    txn.noted = [] if self._hearers else None
                    yield txn
                if noted := txn.noted:
                    for hear in self._hearers:
                        hear(noted)
            except lmdb.Error as error:
                # Nobody knows what a failed flush has left. Nothing is written on top of that before the
                # file is opened again, as after a crash.
                self._is_doubtful = is_of_the_disk(error)
                is_full = isinstance(error, lmdb.MapFullError)
                if is_full and self._mapped_bytes < self._map_bytes:  # memory ran out, not the store
                    raise ResourceExhausted(f"store {self.path}: {OUTGROWN}") from error
                raise

    @contextmanager
    def heard_by(self, hear: Callable[[list[Any]], None]) -> Iterator[None]:
        """Call `hear` with what each transaction of the block noted, once that is durable.

        In the order of commits, of this process alone. The next writer waits for it: it returns at once.
        """
        with _open_lock:
            self._hearers = (*self._hearers, hear)
        try:
            yield
        finally:
            with _open_lock:
                self._hearers = tuple(one for one in self._hearers if one != hear)

    def is_wanted(self) -> bool:
        """Say whether someone waits for us to end what we write."""
        return self._turn is not None and self._turn.is_wanted()

    @contextmanager
    def _begun(self, *, write: bool) -> Iterator[Transaction]:
        with self._gate.inside():
            if raw := self._begin(write=write):
                with raw:
                    yield Transaction(raw, self._databases)
                return
        self._map_anew()
        with self._gate.inside(), self._env.begin(write=write, buffers=True) as raw:
            yield Transaction(raw, self._databases)

    def _begin(self, *, write: bool) -> lmdb.Transaction | None:
        """Begin a transaction; None if the file has to be mapped anew before."""
        try:
            return self._env.begin(write=write, buffers=True)
        except lmdb.Error as error:
            is_larger = isinstance(error, lmdb.MapResizedError)  # another process made it so
            if self._mapped_bytes and not is_larger:
                raise
            return None

    def _room(self) -> int:
        return self._mapped_bytes - self._used()

    def _used(self) -> int:
        """Return how many bytes of the file LMDB has come to write."""
        with self._gate.inside():
            last: int = self._env.info()["last_pgno"] if self._mapped_bytes else -1
            return (last + 1) * self.page

    def _map_anew(self) -> None:
        """Map the file as large as it can be now, unless a transaction here does not end.

        By opening it again: LMDB's own way leaves nothing mapped where it fails. If this does, whoever
        comes next tries.
        """
        with self._gate.alone(turn.WAIT_S) as free, os_errors(f"store {self.path}"):
            if free:
                self._env.close()
                self._mapped_bytes = 0
                self._open()

    def check_readers(self) -> None:
        """Free the slots of readers that died: pages that they saw could never be used again."""
        with mapped(self.path), self._gate.inside():
            self._env.reader_check()

    def transactions(self) -> int:
        """Return how many transactions of all processes have changed something."""
        with mapped(self.path), self._gate.inside():
            last: int = self._env.info()["last_txnid"] if self._mapped_bytes else 0
            return last

    def readers(self) -> list[tuple[int, int]]:
        """Return the processes that read, and the transaction whose state each one sees."""
        with mapped(self.path), self._gate.inside():
            # Below a line of titles: pid, thread, transaction; `-` is none (mdb_reader_list).
            rows = [line.split() for line in str(self._env.readers()).splitlines()[1:]]
        return [(int(pid), int(state)) for pid, _, state in rows if state != "-"]

    def used_pages(self, txn: Transaction) -> int:
        """Return how many pages hold records in the state that `txn` sees."""
        names = txn.raw.stat()
        used: int = names["branch_pages"] + names["leaf_pages"] + names["overflow_pages"]
        if self._tables:  # those of another version too: what is under a name is its tree
            with txn.raw.cursor() as cursor:
                used += sum(pages_of_tree(bytes(tree)) for _, tree in cursor)
        return used

    def unused(self) -> int:
        """Return how many bytes that the file takes up on the disk hold nothing: deletions left them."""
        with self.read() as txn:
            last: int = self._env.info()["last_pgno"]
            used = self.used_pages(txn) * self.page
        # Others of the free pages are holes by now, and writing them takes space again.
        blocks = (self.path / "data.mdb").stat().st_blocks * 512
        return max(0, min((last + 1) * self.page, blocks) - used)

    def copy_to(self, sink: int) -> None:
        """Write the file to a descriptor without its free pages."""
        with mapped(self.path), self._gate.inside():
            self._env.copyfd(sink, compact=True)

    def release_pages(self) -> None:
        """Give back the memory of pages read so far; for readers of much."""
        release_mapped(self.path / "data.mdb")
