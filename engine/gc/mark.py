"""Marks what is reachable, and orders what is not: holders before what they hold. Pure."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import TypeVar

__all__ = ["holders_first", "reachable"]

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


def holders_first(nodes: Collection[N], references: Callable[[N], Iterable[N]]) -> Iterator[N]:
    """Yield `nodes` so that each comes after all of them that refer to it, but where those go round.

    Whoever drops a part of them then never leaves one whose references are gone.
    """
    left = dict.fromkeys(nodes)
    holders = Counter(
        target for node in left for target in set(references(node)) if target in left and target != node
    )
    free = deque(node for node in left if not holders[node])
    while left:
        if not free:
            free.append(next(iter(left)))  # a circle: it begins anywhere
        node = free.popleft()
        if node not in left:
            continue
        del left[node]
        yield node
        for target in set(references(node)):
            if target in left and target != node:
                holders[target] -= 1
                if not holders[target]:
                    free.append(target)
