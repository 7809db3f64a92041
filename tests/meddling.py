"""Lets something happen between any two transactions of an operation: every race, made certain.

Sync. What one transaction sees another may have changed before the next begins; nothing else of a
store changes under an operation. So an operation is safe from collections and removals if it is with
one before each of its transactions.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from engine.kv.environment import Environment, Transaction

__all__ = ["meddled"]


@contextmanager
def meddled(
    monkeypatch: pytest.MonkeyPatch, meta: Environment, meddle: Callable[[int], None]
) -> Iterator[list[int]]:
    """Call `meddle` with 0, 1, 2… before each transaction of `meta` in the block, of any thread.

    Gives a list that grows with the transactions. What `meddle` does itself is not meddled with.
    """
    read, write = Environment.read, Environment.write
    mine, lock = threading.local(), threading.RLock()
    passed: list[int] = []

    @contextmanager
    def begun(
        real: Callable[[Environment], AbstractContextManager[Transaction]], self: Environment
    ) -> Iterator[Transaction]:
        if self is meta and not getattr(mine, "inside", False):
            mine.inside = True
            try:
                with lock:
                    passed.append(len(passed))
                    meddle(passed[-1])
            finally:
                mine.inside = False
        was, mine.inside = getattr(mine, "inside", False), True
        try:
            with real(self) as txn:
                yield txn
        finally:
            mine.inside = was

    with monkeypatch.context() as patch:
        patch.setattr(Environment, "read", lambda self: begun(read, self))
        patch.setattr(Environment, "write", lambda self: begun(write, self))
        yield passed
