"""What LMDB's errors mean to who reads them."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import lmdb
import pytest

from engine.errors import EngineError, ResourceExhausted, Unavailable
from engine.kv import turn
from engine.kv.environment import Environment
from engine.kv.faults import mapped
from tests.conftest import peer


@pytest.mark.parametrize(("free", "kind"), [(1 << 20, ResourceExhausted), (1 << 40, Unavailable)])
def test_writing_after_a_meta_page_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: type[EngineError]
) -> None:
    disk = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _path: disk)
    with pytest.raises(kind), mapped(tmp_path):
        raise lmdb.PanicError("mdb_txn_begin")


_WRITING = """
import sys
from pathlib import Path
from engine.errors import EngineError
from engine.kv.environment import Environment
file = Environment(Path(sys.argv[1]), map_bytes=1 << 30, tables=("t",))
for number in range(8):
    before = file._env
    try:
        with file.write() as txn:
            for part in range(30):
                txn.raw.put(b"%d %d" % (number, part), bytes([number]) * 3000, db=txn.databases["t"])
            is_new = file._env is not before
        print(number, "opened again" if is_new else "done")
    except EngineError as error:
        print(number, error)
file.close()
"""


@pytest.mark.parametrize("call", ["fdatasync", "pwrite64", "writev"])
@pytest.mark.parametrize("nth", [1, 2, 3, 6])
def test_after_a_failed_write_the_file_is_opened_again(tmp_path: Path, call: str, nth: int) -> None:
    """It is an error of its own write alone; what was done before and after is there."""
    Environment(tmp_path, map_bytes=1 << 30, tables=("t",)).close()
    trace = [peer("strace"), "-f", "-qq", "-o", os.devnull, f"-P{tmp_path / 'data.mdb'}"]
    inject = [f"-etrace={call}", f"-einject={call}:error=EIO:when={nth}"]
    child = [sys.executable, "-P", "-c", _WRITING, str(tmp_path)]
    done = subprocess.run([*trace, *inject, *child], check=True, capture_output=True, text=True)
    says = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    ((failed, message),) = [row for row in says.items() if row[1] not in {"done", "opened again"}]
    assert message == f"store {tmp_path}: {os.strerror(errno.EIO)}"
    assert [number for number, said in says.items() if said == "opened again"] == [f"{int(failed) + 1}"]
    file = Environment(tmp_path, map_bytes=1 << 30, tables=("t",))
    with file.read() as txn, txn.raw.cursor(db=txn.databases["t"]) as cursor:
        found = [bytes(key).split() for key, _ in cursor]
        assert all(bytes(value) == bytes([int(key[0:1])]) * 3000 for key, value in cursor)
    file.close()
    assert {number.decode() for number, _ in found} == says.keys() - {failed}
    assert len(found) == 7 * 30, "a write is there by half"


def test_a_file_in_doubt_is_not_written_while_someone_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "WAIT_S", 0.05)
    file = Environment(tmp_path, map_bytes=1 << 30)
    with pytest.raises(EngineError), file.write():
        raise lmdb.DiskError(os.strerror(errno.EIO))
    begun, end = threading.Event(), threading.Event()

    def read() -> None:
        with file.read():
            begun.set()
            end.wait()

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    with pytest.raises(Unavailable, match="an earlier write failed"), file.write():
        pass
    end.set()
    thread.join()
    with file.write() as txn:
        txn.raw.put(b"a", b"b")
    file.close()
