"""Marks what is reachable over any kind of node. Pure."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

__all__ = ["reachable"]

N = TypeVar("N", bound=Hashable)


def reachable(roots: Iterable[N], references: Callable[[N], Iterable[N]]) -> set[N]:
    """Return `roots` and all that they lead to; cycles and edges to nothing are fine."""
    marked: set[N] = set()
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node not in marked:
            marked.add(node)
            pending.extend(references(node))
    return marked
