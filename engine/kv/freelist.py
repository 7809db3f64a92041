"""What LMDB says is free in a file: its list of free pages, read from the pages themselves.

Pure: bytes in, numbers out. The layout is that of LMDB 0.9 (data version 1) on a machine of 64 bits, as
mdb.c has it: MDB_page, MDB_meta, MDB_db, MDB_node, and MDB_IDL: numbers that descend, their count first.
py-lmdb shows none of it. Whatever does not look exactly as LMDB writes it is Odd.
"""

import operator
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

__all__ = ["Freed", "Meta", "Odd", "Run", "merged", "newest", "pages_of_tree", "records", "runs"]

Pages = Callable[[int, int], bytes]
"""Returns so many pages of a file, from a number on."""

_HEADER = struct.Struct("=QHHHH")  # MDB_page: number, pad, flags, lower, upper
_OVERFLOW = struct.Struct("=QHHI")  # of a run of pages: number, pad, flags, count
_META = struct.Struct("=II8xQ48s48sQQ")  # magic, version, address, map size, two trees, last page, txn
_TREE = struct.Struct("=IHHQQQQQ")  # MDB_db: pad, flags, depth, three counts of pages, entries, root
_NODE = struct.Struct("=HHHH")  # MDB_node: two halves, flags, length of the key
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOWS, _METAS = 0x01, 0x02, 0x04, 0x08
_BIG = 0x01  # a node's flag: the value is on pages of its own
_INTEGER_KEYS = 0x08
_NONE = (1 << 64) - 1  # the root of an empty tree
_DEEPEST = 32


class Odd(Exception):
    """The file is not as LMDB would have written it, or not of a kind that is known here."""


class Run(NamedTuple):
    """Pages in a row."""

    first: int
    length: int


class Meta(NamedTuple):
    """A state of the file: that of transaction `txnid`."""

    txnid: int
    page: int  # bytes of a page
    last: int  # number of the last page
    depth: int  # of the tree of free pages
    pages: int  # that this tree takes up itself
    entries: int
    root: int


class Freed(NamedTuple):
    """Pages that no state since `txnid` has: their numbers, which descend."""

    txnid: int
    pages: Sequence[int]


def newest(head: bytes, page: int) -> Meta:
    """Return the last committed state of a file that begins with `head`, its first two pages."""
    metas = [_meta(head[start : start + page], number) for number, start in enumerate((0, page))]
    found = max(metas, key=lambda meta: meta.txnid)
    _expect(found.page == page, f"pages of {found.page} bytes")
    return found


def _meta(data: bytes, number: int) -> Meta:
    _expect(len(data) > _HEADER.size + _META.size, "it is too short")
    at, _, flags, _, _ = _HEADER.unpack_from(data)
    _expect((at, flags) == (number, _METAS), f"page {number} is no meta page")
    magic, version, _, tree, _, last, txnid = _META.unpack_from(data, _HEADER.size)
    _expect((magic, version) == (_MAGIC, _VERSION), f"version {version} of LMDB's format")
    # The pad of this tree is where the size of a page is kept (mm_psize).
    page, tree_flags, depth, branches, leaves, overflows, entries, root = _TREE.unpack(tree)
    # Its flags are where those of the environment are kept: MDB_NOSUBDIR of a file made as such.
    _expect(tree_flags & ~0xC000 == _INTEGER_KEYS, "the tree of free pages has other keys")
    _expect(depth <= _DEEPEST and (root == _NONE) == (depth == 0), "a tree without a root")
    return Meta(txnid, page, last, depth, branches + leaves + overflows, entries, root)


def pages_of_tree(tree: bytes) -> int:
    """Return how many pages a table takes up, by what stands under its name."""
    _, _, _, branches, leaves, overflows, _, _ = _TREE.unpack(tree)
    return int(branches + leaves + overflows)


def records(read: Pages, meta: Meta, since: int = 0) -> Iterator[Freed]:
    """Yield what the transactions from `since` on freed, in their order. Raises Odd."""
    before = 0
    if not meta.depth:
        return
    for txnid, pages in _walk(read, meta, meta.root, meta.depth, since):
        _expect(before < txnid <= meta.txnid, f"transaction {txnid} does not follow {before}")
        before = txnid
        yield Freed(txnid, pages)


def _walk(
    read: Pages, meta: Meta, number: int, depth: int, since: int
) -> Iterator[tuple[int, Sequence[int]]]:
    _expect(2 <= number <= meta.last, f"page {number} is not in the file")
    data = read(number, 1)
    _expect(len(data) == meta.page, f"page {number} is cut short")
    at, _, flags, lower, upper = _HEADER.unpack_from(data)
    _expect((at, flags) == (number, _LEAF if depth == 1 else _BRANCH), f"page {number} is of no tree")
    count = (lower - _HEADER.size) // 2
    _expect(_HEADER.size < lower <= upper <= meta.page and count > 0, f"page {number} has no nodes")
    places = struct.unpack_from(f"={count}H", data, _HEADER.size)
    nodes = [_node(data, place, upper, number) for place in places]
    if depth == 1:
        for flags, key, low, start in nodes:
            if key >= since:
                yield key, _numbers(read, meta, data, flags, low, start)
        return
    # A branch's first key is not set; a child has the keys from its own up to the next one's.
    ends = [key for _, key, _, _ in nodes[1:]]
    for (flags, _, low, _), end in zip(nodes, [*ends, None], strict=True):
        if end is None or end > since:
            yield from _walk(read, meta, flags << 32 | low, depth - 1, since)


def _node(data: bytes, place: int, upper: int, number: int) -> tuple[int, int, int, int]:
    """Return a node's flags, key, the number in its halves, and where its value begins."""
    _expect(upper <= place <= len(data) - _NODE.size, f"a node of page {number} is outside of it")
    low, high, flags, length = _NODE.unpack_from(data, place)
    start = place + _NODE.size + length
    _expect(length in {0, 8} and start <= len(data), f"a key of page {number} is no transaction")
    key = int.from_bytes(data[place + _NODE.size : start], "little" if _IS_LITTLE else "big")
    return flags, key, low | high << 16, start


def _numbers(read: Pages, meta: Meta, data: bytes, flags: int, size: int, start: int) -> Sequence[int]:
    if flags == _BIG:
        _expect(start + 8 <= len(data), "a value is outside of its page")
        (first,) = struct.unpack_from("=Q", data, start)
        count = (_HEADER.size - 1 + size) // meta.page + 1
        _expect(2 <= first <= meta.last - count + 1, f"pages from {first} on are not in the file")
        data, start = read(first, count), _HEADER.size
        _expect(len(data) == count * meta.page, f"page {first} is cut short")
        at, _, kind, pages = _OVERFLOW.unpack_from(data)
        _expect((at, kind, pages) == (first, _OVERFLOWS, count), f"page {first} holds no value")
    else:
        _expect(flags == 0, f"a value of kind {flags}")
    _expect(size >= 8 and not size % 8 and start + size <= len(data), f"a value of {size} bytes")
    values = memoryview(data[start : start + size]).cast("Q")
    _expect(values[0] < len(values), "a list longer than what holds it")
    return values[1 : values[0] + 1]


def runs(pages: Sequence[int], meta: Meta) -> Iterator[Run]:
    """Yield the runs in numbers that descend. Raises Odd if they don't, or are not in the file."""
    if not pages:
        return
    _expect(all(map(operator.gt, pages, islice(pages, 1, None))), "free pages out of order")
    _expect(pages[-1] >= 2 and pages[0] <= meta.last, "a free page is not in the file")
    start, end = 0, len(pages)
    while start < end:
        # They descend, so those in between are in a row if the two ends are. Most runs are long.
        step, last = 1, start
        while last + step < end and pages[start] - pages[last + step] == last + step - start:
            last += step
            step *= 2
        while step:
            if last + step < end and pages[start] - pages[last + step] == last + step - start:
                last += step
            step //= 2
        yield Run(pages[last], last + 1 - start)
        start = last + 1


def merged(found: Iterable[Run]) -> list[Run]:
    """Return runs in order, those that touch made one. Raises Odd where they overlap."""
    together: list[Run] = []
    for run in sorted(found):
        end = together[-1].first + together[-1].length if together else 0
        _expect(run.first >= end, f"page {run.first} is free twice")
        if together and run.first == end:
            together[-1] = Run(together[-1].first, together[-1].length + run.length)
        else:
            together.append(run)
    return together


_IS_LITTLE = struct.pack("=H", 1)[0] == 1


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Odd(otherwise)
