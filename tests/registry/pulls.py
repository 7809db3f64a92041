"""What the tests of pulls share: layers, a store with workers in this process, requests that wait."""

import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import trio

from engine.app import Engine, open_engine
from engine.errors import NotFound
from engine.kv.schema import EXTENT
from engine.oci.digest import Digest
from engine.oci.platform import Platform
from engine.registry.client import Access
from engine.testing.archives import archive, member
from engine.testing.fake_registry import Asked, Fault
from tests.command import dump
from tests.engine.image_files import AMD64
from tests.inline import workers_inline
from tests.registry.asking import QUICK

ON_AMD64 = Platform(**AMD64)
HELLO = archive(member("hello", data=b"hello\n"))
BIG = archive(member("big", data=random.Random("big").randbytes(2 * EXTENT + 5000)))
NOTHING = {"ingests": [], "leases": [], "lease_items": [], "trash": []}


@asynccontextmanager
async def engine_at(root: Path) -> AsyncIterator[Engine]:
    async with open_engine(root, platform=ON_AMD64) as engine:
        with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
            yield engine


def access(**options: Any) -> Access:
    return Access(patience=QUICK, **options)


class Held:
    """Requests that are answered when the test says so; `came` is set by the first."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.go_on = threading.Event()

    def fault(self) -> Fault:
        def fault(connection: socket, _asked: Asked, good: bytes) -> bool:
            self.came.set()
            self.go_on.wait(30)
            connection.sendall(good)
            return True

        return fault


def left(root: Path) -> dict[str, Any]:
    """Return what a store has of work that is over."""
    found = dump(root)
    return {table: found[table] for table in NOTHING}


async def here(engine: Engine, digest: Digest) -> None:
    """Wait until a blob is in the store."""
    with trio.fail_after(30):
        while True:
            with suppress(NotFound):
                await trio.to_thread.run_sync(engine.stores.content.info, digest)
                return
