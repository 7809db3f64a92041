"""What LMDB's errors mean to who reads them."""

import os
from pathlib import Path
from types import SimpleNamespace

import lmdb
import pytest

from engine.errors import EngineError, ResourceExhausted, Unavailable
from engine.kv.faults import mapped


@pytest.mark.parametrize(("free", "kind"), [(1 << 20, ResourceExhausted), (1 << 40, Unavailable)])
def test_writing_after_a_meta_page_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: type[EngineError]
) -> None:
    disk = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _path: disk)
    with pytest.raises(kind), mapped(tmp_path):
        raise lmdb.PanicError("mdb_txn_begin")
