"""What the C allocator does with memory given back: keep it for the next use. Sync."""

from functools import cache

__all__ = ["keep_memory"]

_KEPT = 16 << 20  # what a transaction of blobs takes; the pieces of a layer in flight are less


@cache
def keep_memory() -> None:
    """Let the allocator keep pieces of some MiB that were given back, for the next.

    glibc learns it from what is freed (mallopt(3), M_MMAP_THRESHOLD). Else each page of each piece is
    a page fault, which takes longer than to copy it.
    """
    bytearray(_KEPT)
