"""Marks what is reachable, and orders what is not: holders before what they hold. Pure."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

__all__ = ["by_level", "children_first", "holders_first", "reachable"]

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


def holders_first(nodes: Sequence[N], references: Callable[[N], Iterable[N]]) -> list[N]:
    """Return `nodes` so that each comes after all of them that refer to it, but where those go round.

    Whoever drops a part of them then never leaves one whose references are gone. Those that nothing
    refers to stay in their order.
    """
    return _depth_first(nodes[::-1], references)[::-1]


def by_level(
    order: Sequence[N], references: Callable[[N], Iterable[N]], key: Callable[[N], str]
) -> list[N]:
    """Return what `holders_first` did by how many holders are above each, those of a level by `key`.

    What lies together is then dropped together: a page is written once for all in it.
    """
    level = dict.fromkeys(order, 0)
    done: set[N] = set()
    for node in order:
        done.add(node)
        for one in references(node):
            if one in level and one not in done:
                level[one] = max(level[one], level[node] + 1)
    return sorted(order, key=lambda node: (level[node], key(node)))


def children_first(nodes: Sequence[N], children: Callable[[N], Iterable[N]]) -> list[N]:
    """Return `nodes` in their order, but each after its children."""
    return _depth_first(nodes, children)


def _depth_first(nodes: Iterable[N], following: Callable[[N], Iterable[N]]) -> list[N]:
    """Return `nodes` so that each comes after those that follow from it, but where those go round."""
    left = dict.fromkeys(nodes)
    done: list[N] = []
    for start in list(left):
        pending = [(start, False)]
        while pending:
            node, is_met = pending.pop()
            if is_met:
                done.append(node)
            elif node in left:
                del left[node]
                pending.append((node, True))
                pending += [(one, False) for one in following(node) if one in left]
    return done
